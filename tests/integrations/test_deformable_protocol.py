"""accelerate() on modules with the call of Deformable DETR's `MSDeformAttn`: a stand-in after the published steps."""

import copy
import pickle
import re
from unittest import mock

import pytest
import torch
from torch import nn

import mg_fast
from mg_fast import ops
from mg_fast.errors import MgFastError
from mg_fast.testing.tolerances import assert_accurate, relative_error
from tests.integrations import ms_deform_attn
from tests.integrations.ms_deform_attn import MSDeformAttn

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = [(5, 7), (3, 4), (2, 2)]
PIXELS = sum(h * w for h, w in SIZES)
DIM, QUERIES = 24, 6


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Lets the original run here, which its CUDA operation does not."""
    monkeypatch.setattr(ms_deform_attn, "MSDeformAttnFunction", ms_deform_attn.OnCPU)


def make(kind=MSDeformAttn, ratio=1.0, **changes) -> MSDeformAttn:
    """A module in which every parameter matters."""
    torch.manual_seed(0)
    module = kind(**{"d_model": DIM, "n_levels": 3, "n_heads": 4, "n_points": 2, "ratio": ratio, **changes})
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return module


def inputs(numbers=2, masked=True, dtype=torch.float32) -> list:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, QUERIES, DIM, generator=generator).to(dtype)
    points = torch.rand(2, QUERIES, len(SIZES), numbers, generator=generator).to(dtype)
    features = torch.randn(2, PIXELS, DIM, generator=generator).to(dtype)
    starts = torch.tensor([0, 35, 47])
    mask = torch.rand(2, PIXELS, generator=generator) > 0.7 if masked else None
    return [query, points, features, torch.tensor(SIZES), starts, mask]


def gradients(module: nn.Module, given: list) -> dict[str, torch.Tensor]:
    given = [t.clone().requires_grad_() if t is not None and t.is_floating_point() else t for t in given]
    module(*given).square().sum().backward()
    found = {str(i): t.grad for i, t in enumerate(given) if t is not None and t.requires_grad}
    return found | {name: p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("numbers", [2, 4])
@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_same_numbers_and_gradients(on_the_cpu, ratio, numbers, masked):
    module, given = make(ratio=ratio), inputs(numbers, masked)
    plain = copy.deepcopy(module)
    report = mg_fast.accelerate(module)
    assert len(report.swapped) == 1 and list(module.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        oracle = copy.deepcopy(plain).double()(
            *(t.double() if t is not None and t.is_floating_point() else t for t in given)
        )
        assert_accurate(module(*given), plain(*given), oracle)
    ours, expected = gradients(module, given), gradients(plain, given)
    for name in expected:
        assert (ours[name] - expected[name]).abs().max() <= 1e-4 * expected[name].abs().max(), name
    report.undo()
    assert type(module) is MSDeformAttn and torch.equal(module(*given), plain(*given))


def test_reference_points_for_all_pictures_and_levels(on_the_cpu):
    """The adapter of MM-Interleaved passes one set of points for all of them."""
    query, points, *rest = inputs()
    module, plain = make(ratio=0.5), make(ratio=0.5)
    mg_fast.accelerate(module)
    assert relative_error(module(query, points[:1, :, :1], *rest), plain(query, points[:1, :, :1], *rest)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_closer_than_the_original(on_the_cpu, dtype):
    """The locations are computed in float32, while the original's have the module's dtype."""
    module, given = make().to(dtype), inputs(dtype=dtype)
    with torch.no_grad():
        plain = module(*given)
        oracle = copy.deepcopy(module).double()(*(t.double() if t.is_floating_point() else t for t in given))
        mg_fast.accelerate(module)
        ours = module(*given)
    assert ours.dtype == dtype
    assert_accurate(ours, plain, oracle)
    assert (ours - oracle).square().mean() < (plain - oracle).square().mean()


def test_it_runs_where_the_original_cannot():
    """The original has no operation for a CPU, and is tried with ours in its place."""
    module = make()
    with pytest.raises(RuntimeError, match="Not implemented on the CPU"):
        module(*inputs())
    state = torch.random.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        report = mg_fast.accelerate(module)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.random.get_rng_state(), state)
    with mock.patch.object(ops, "deformable_attention", wraps=ops.deformable_attention) as operation:
        assert module(*inputs()).shape == (2, QUERIES, DIM)
    assert operation.call_count == 1
    assert str(report).splitlines()[1] == (
        "  swapped      model (deformable attention MSDeformAttn): now mg_fast.ops.deformable_attention with the "
        "module's own layers. Each call reads the sizes of the maps from input_spatial_shapes, for which it waits for "
        "a GPU once"
    )


def test_copies(on_the_cpu):
    module, plain = nn.ModuleList([make()]), make()
    mg_fast.accelerate(module)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        with torch.no_grad():
            twin[0].value_proj.weight.mul_(2)
            plain.value_proj.load_state_dict(twin[0].value_proj.state_dict())
        assert relative_error(twin[0](*inputs()), plain(*inputs())) < 1e-5
        mg_fast.accelerate(twin).undo()
        assert type(twin[0]) is MSDeformAttn and type(module[0]) is not MSDeformAttn


def test_adapters_and_hooks_run(on_the_cpu):
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=2, target_modules=["value_proj", "sampling_offsets"], init_lora_weights=False)
    torch.manual_seed(0)
    tuned = get_peft_model(nn.ModuleDict({"attention": make()}), lora)
    module = tuned.base_model.model["attention"]
    before = module(*inputs())
    seen = []
    module.attention_weights.register_forward_hook(lambda layer, given, out: seen.append(layer))
    assert mg_fast.accelerate(tuned).swapped
    assert relative_error(module(*inputs()), before) < 1e-5 and seen == [module.attention_weights]
    module(*inputs()).sum().backward()
    adapted = {name for name, p in module.named_parameters() if p.requires_grad}
    assert len(adapted) == 4 and all(p.grad is not None for p in module.parameters() if p.requires_grad)


def test_on_the_meta_device():
    """Only a twin is tried, so the module's own weights need not be there yet."""
    assert mg_fast.accelerate(make().to("meta")).swapped


class Renamed(MSDeformAttn):
    pass


def test_the_call_counts_and_not_the_name(on_the_cpu):
    module = make(Renamed)
    (finding,) = mg_fast.accelerate(module).swapped
    assert finding.what == "deformable attention Renamed"
    assert relative_error(module(*inputs()), make(Renamed)(*inputs())) < 1e-5
    (finding,) = mg_fast.accelerate(module).skipped
    assert "already swapped" in finding.reason


def varied(forward) -> MSDeformAttn:
    return make(type("MSDeformAttn", (MSDeformAttn,), {"forward": forward}))


def doubled(
    self, query, reference_points, input_flatten, input_spatial_shapes, input_level_start_index, input_padding_mask=None
):
    rest = input_spatial_shapes, input_level_start_index, input_padding_mask
    return 2 * MSDeformAttn.forward(self, query, reference_points, input_flatten, *rest)


def unmasked(
    self, query, reference_points, input_flatten, input_spatial_shapes, input_level_start_index, input_padding_mask=None
):
    rest = input_spatial_shapes, input_level_start_index
    return MSDeformAttn.forward(self, query, reference_points, input_flatten, *rest)


def dropped(
    self, query, reference_points, input_flatten, input_spatial_shapes, input_level_start_index, input_padding_mask=None
):
    """Differs from the original in training alone."""
    rest = input_spatial_shapes, input_level_start_index, input_padding_mask
    out = MSDeformAttn.forward(self, query, reference_points, input_flatten, *rest)
    return nn.functional.dropout(out, 0.5, self.training)


def boxed(
    self, query, reference_points, input_flatten, input_spatial_shapes, input_level_start_index, input_padding_mask=None
):
    """Differs from the original for boxes alone."""
    rest = input_spatial_shapes, input_level_start_index, input_padding_mask
    out = MSDeformAttn.forward(self, query, reference_points, input_flatten, *rest)
    return out + 1 if reference_points.shape[-1] == 4 else out


def with_norm():
    module = make()
    module.norm = nn.LayerNorm(DIM)
    return module


def with_token():
    module = make()
    module.ignore_token = nn.Parameter(torch.zeros(DIM))
    return module


def replaced():
    module = make()
    module.forward = lambda *arguments: arguments[0]
    return module


def wider():
    module = make()
    module.attention_weights = nn.Linear(DIM, 25)
    return module


def without_points():
    module = make()
    module.n_points = None
    return module


OTHERS = {
    "doubled": (
        lambda: varied(doubled),
        "is .* away from Deformable DETR's attention with reference points of 2 numbers",
    ),
    "unmasked": (lambda: varied(unmasked), "is .* away from .* 2 numbers"),
    "dropped in training": (lambda: varied(dropped).eval(), "is .* away from .* 2 numbers"),
    "other boxes": (lambda: varied(boxed), "is .* away from .* 4 numbers"),
    "other arguments": (
        lambda: varied(lambda self, query, maps: query),
        "it takes query, maps, expected query, reference",
    ),
    "norm": (with_norm, "its layers are .*, norm, expected sampling_offsets"),
    "token": (with_token, "it has ignore_token of its own, beside its four layers"),
    "forward replaced": (replaced, "forward was set on the object"),
    "widths": (wider, r"the widths of its layers \(.*attention_weights 24 to 25.*\) do not fit 24 samples in 4 heads"),
    "no points": (without_points, "it has no whole number n_points"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_others_stay(on_the_cpu, name):
    build, reason = OTHERS[name]
    module = build()
    kind = type(module)
    report = mg_fast.accelerate(module)
    assert not report.swapped and type(module) is kind
    assert re.search(reason, report.skipped[0].reason), report.skipped[0].reason


def test_layers_that_change_after_the_swap_are_the_originals_to_run(on_the_cpu):
    module, plain = make(), make()
    mg_fast.accelerate(module)
    for m in (module, plain):
        m.output_proj = nn.Sequential(nn.Tanh(), m.output_proj)
    with pytest.warns(RuntimeWarning, match="MSDeformAttn runs as the original wrote it, because the widths of its"):
        assert torch.equal(module(*inputs()), plain(*inputs()))


def test_bad_input_is_named():
    module = make()
    mg_fast.accelerate(module)
    query, points, features, shapes, starts, mask = inputs()
    with pytest.raises(ValueError, match=r"reference points must be \(x, y\) or \(x, y, w, h\), got \[2, 6, 3, 3\]"):
        module(query, torch.rand(2, QUERIES, 3, 3), features, shapes, starts, mask)
    with pytest.raises(ValueError, match=r"expected the sizes of 3 levels, got \[\(17, 3\)\]"):
        module(query, points, features, torch.tensor([(17, 3)]), starts[:1], mask)
    with pytest.raises(ValueError, match="have 43 pixels, but value has 51"):
        module(query, points, features, torch.tensor([(3, 9), *SIZES[1:]]), starts, mask)


def test_undo_out_of_turn():
    module = make()
    report, swapped = mg_fast.accelerate(module), type(module)
    module.__class__ = type("Sharded", (swapped,), {})
    with pytest.raises(MgFastError, match="its class was exchanged again since, for Sharded"):
        report.undo()
