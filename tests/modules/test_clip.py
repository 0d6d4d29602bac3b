"""The packed CLIP tower agrees with transformers' own, in float64 and by the accuracy rule; it refuses other towers."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from mg_fast import MiniGeminiForConditionalGeneration
from mg_fast.modules.clip import PackedClip
from mg_fast.testing.tolerances import assert_accurate
from tests.models.mini_gemini.test_original import NAMES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make(
    dtype=torch.float32, *, seed=0, width=48, heads=3, layers=4, hidden=80, image=42, patch=14, activation="quick_gelu"
):
    """A small tower whose biases and gains are not trivial."""
    torch.manual_seed(seed)
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            image_size=image,
            patch_size=patch,
            hidden_act=activation,
        )
    )
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.1))
    return tower.eval().to(dtype)


def plain(tower, views, select_layer=-2):
    with torch.no_grad():
        return tower(views.to(tower.dtype), output_hidden_states=True).hidden_states[select_layer][:, 1:]


def check(tower, views, select_layer=-2):
    ours = PackedClip.from_tower(tower, select_layer)(views)
    if not len(views):
        # transformers' attention does not take an empty batch.
        assert ours.shape == (0, tower.embeddings.num_patches, tower.config.hidden_size)
        return
    oracle = plain(copy.deepcopy(tower).double(), views.to(tower.dtype), select_layer)
    assert ours.dtype == tower.dtype
    assert_accurate(ours, plain(tower, views, select_layer), oracle)


@dtypes
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_against_transformers(dtype, batch):
    check(make(dtype), torch.randn(batch, 3, 42, 42))


@pytest.mark.parametrize("select_layer", [-5, -4, -2, -1, 0, 1, 4])
def test_every_hidden_state(select_layer):
    check(make(), torch.randn(2, 3, 42, 42), select_layer)


@pytest.mark.slow
@dtypes
def test_wide_enough_for_the_cpus_convolutions(dtype):
    """With 512 rows and 2**18 weights the float32 products take another path."""
    check(make(dtype, width=512, heads=8, hidden=2048, layers=3, image=70, patch=14), torch.randn(20, 3, 70, 70))


@dtypes
def test_views_of_any_layout(dtype):
    tower, views = make(dtype), torch.randn(2, 42, 42, 6)[..., 1:4].permute(0, 3, 1, 2)
    packed = PackedClip.from_tower(tower)
    assert torch.equal(packed(views), packed(views.contiguous()))
    before = views.clone()
    packed(views.to(dtype))
    assert torch.equal(views, before)


def test_large_offsets():
    """The tower stays accurate where values of the residual stream are large compared with their differences."""
    tower = make()
    with torch.no_grad():
        tower.embeddings.position_embedding.weight.add_(1000)
        tower.pre_layrnorm.bias.add_(100)
    check(tower, torch.randn(2, 3, 42, 42))


def test_float16_near_its_largest_value():
    """Pre-activations of 30000 are accurate: 1.702 times that still fits in float16."""
    tower = make(torch.float16, layers=2)
    with torch.no_grad():
        tower.encoder.layers[0].mlp.fc1.bias[:2] = torch.tensor([30000.0, -30000.0])
        tower.encoder.layers[0].mlp.fc2.weight[:, :2] = 2.0**-14
    assert PackedClip.from_tower(tower)(torch.randn(2, 3, 42, 42)).isfinite().all()
    check(tower, torch.randn(2, 3, 42, 42))


@dtypes
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible_and_alone(dtype, bad):
    packed, views = PackedClip.from_tower(make(dtype)), torch.randn(3, 3, 42, 42)
    clean = packed(views)
    views[1, 0, 5, 5] = bad
    out = packed(views)
    assert out[1].isnan().all() and out[0].isfinite().all() and out[2].isfinite().all()
    assert_accurate(out[::2], clean[::2], clean[::2].double())


@pytest.mark.parametrize("name", NAMES)
def test_the_originals_checkpoints(golden, name):
    tower = MiniGeminiForConditionalGeneration.from_pretrained(golden / name).model.vision_tower
    size = tower.config.image_size
    check(tower, torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0)))


def test_one_graph():
    packed, views = PackedClip.from_tower(make()), torch.randn(2, 3, 42, 42)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(views), packed(views), rtol=1e-5, atol=1e-5)


def test_only_queries_keys_and_values_are_copied():
    tower = make(layers=4, width=48)
    packed = PackedClip.from_tower(tower)
    theirs = {p.data_ptr() for p in tower.parameters()}
    own = sum(b.nbytes for b in packed.buffers() if b.data_ptr() not in theirs)
    # The query, key and value projections of three of the four layers are copies, and the first bias of their MLPs.
    assert own == 3 * (3 * 48 * 48 + 3 * 48 + 80) * 4
    assert not list(packed.parameters()) and not packed.state_dict()


@pytest.mark.parametrize(
    "name", ["self_attn.q_proj.weight", "self_attn.v_proj.bias", "mlp.fc1.bias", "mlp.fc2.weight", "layer_norm1.weight"]
)
def test_changed_weights_are_noticed(name):
    tower = make()
    packed, views = PackedClip.from_tower(tower), torch.randn(1, 3, 42, 42)
    expected = packed(views).clone()
    kept = copy.deepcopy(packed)
    # The last layer is not run, so its weights do not matter.
    with torch.no_grad():
        tower.encoder.layers[3].get_parameter(name).add_(1)
    assert torch.equal(packed(views), expected)
    with torch.no_grad():
        tower.encoder.layers[2].get_parameter(name).add_(1)
    with pytest.raises(RuntimeError, match="weights were changed since it was packed: pack it again"):
        packed(views)
    # A copy has memory of its own, so it still works.
    assert torch.equal(kept(views), expected)
    check(tower, views)


def test_outlives_the_tower():
    tower = make()
    packed, views = PackedClip.from_tower(tower), torch.randn(1, 3, 42, 42)
    expected = packed(views)
    tower.to(torch.float64)
    assert torch.equal(packed(views), expected)
    del tower
    assert torch.equal(packed(views), expected)
    assert torch.equal(pickle.loads(pickle.dumps(packed))(views), expected)


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        tower = make()
        views = torch.randn(1, 3, 42, 42)
        check(tower, views)


def test_frozen():
    packed = PackedClip.from_tower(make())
    with pytest.raises(RuntimeError, match="PackedClip is frozen: train the tower"):
        packed.train()
    assert packed.eval() is packed and not packed.training
    with pytest.raises(RuntimeError, match="gives no gradient to its views"):
        packed(torch.randn(1, 3, 42, 42, requires_grad=True))
    assert not packed(torch.randn(1, 3, 42, 42)).requires_grad


@pytest.mark.parametrize(
    "views, message",
    [
        (torch.zeros(3, 42, 42), r"expected floating-point views \['B', 3, 42, 42\], got \[3, 42, 42\]"),
        (torch.zeros(1, 3, 42, 41), r"got \[1, 3, 42, 41\]"),
        (torch.zeros(1, 3, 42, 42, dtype=torch.uint8), "torch.uint8"),
        (torch.zeros(1, 3, 42, 42, device="meta"), "the views are on meta, the weights on cpu"),
    ],
)
def test_bad_views(views, message):
    with pytest.raises(ValueError, match=message):
        PackedClip.from_tower(make())(views)


def hooked(tower):
    tower.encoder.layers[0].register_forward_hook(lambda *_: None)


def mixed(tower):
    tower.pre_layrnorm.half()


def adapted(tower):
    class Adapter(nn.Linear):
        pass

    tower.encoder.layers[1].mlp.fc1.__class__ = Adapter


@pytest.mark.parametrize(
    "change, message",
    [
        (hooked, "encoder.layers.0 has hooks"),
        (mixed, "expected one dtype and one device, got torch.float16 on cpu, torch.float32 on cpu"),
        (adapted, "encoder.layers.1.mlp.fc1 is .*test_clip.*Adapter, expected a plain layer"),
    ],
)
def test_towers_that_are_refused(change, message):
    tower = make()
    change(tower)
    with pytest.raises(ValueError, match=f"PackedClip: {message}"):
        PackedClip.from_tower(tower)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="expected a CLIPVisionModel of transformers, got Linear"):
        PackedClip.from_tower(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="expected quick_gelu, the tower has gelu"):
        PackedClip.from_tower(make(activation="gelu"))
    with pytest.raises(ValueError, match="the tower has 5 hidden states, select_layer=-6 is none of them"):
        PackedClip.from_tower(make(), -6)
