"""DeformableAttention: the numbers, tensors and start of Deformable DETR's module, and what it refuses."""

import pytest
import torch
from torch import nn

import mg_fast
from mg_fast.modules import DeformableAttention
from mg_fast.testing.tolerances import assert_accurate, relative_error
from tests.integrations import ms_deform_attn
from tests.integrations.ms_deform_attn import MSDeformAttn

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = [(5, 7), (3, 4), (2, 2)]
PIXELS = sum(h * w for h, w in SIZES)
DIM, QUERIES = 24, 6
BACKENDS = pytest.mark.parametrize("backend", ["reference", "torch", "auto"])


@pytest.fixture
def original(monkeypatch):
    """The original's module, running on the CPU, with ratio 0.5 and with parameters that all matter."""
    monkeypatch.setattr(ms_deform_attn, "MSDeformAttnFunction", ms_deform_attn.OnCPU)
    torch.manual_seed(0)
    module = MSDeformAttn(DIM, n_levels=3, n_heads=4, n_points=2, ratio=0.5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return module


def make(**changes) -> DeformableAttention:
    return DeformableAttention(**{"d_model": DIM, "levels": 3, "heads": 4, "points": 2, "inner_dim": 12, **changes})


def inputs(numbers=2, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, QUERIES, DIM, generator=generator)
    points = torch.rand(2, QUERIES, len(SIZES), numbers, generator=generator)
    return query.to(dtype), points.to(dtype), torch.randn(2, PIXELS, DIM, generator=generator).to(dtype)


def mask() -> torch.Tensor:
    return torch.rand(2, PIXELS, generator=torch.Generator().manual_seed(2)) > 0.7


def by_original(original: MSDeformAttn, *given, padding_mask=None) -> torch.Tensor:
    return original(*given, torch.tensor(SIZES), torch.tensor([0, 35, 47]), padding_mask)


def loaded(original: MSDeformAttn) -> DeformableAttention:
    module = make()
    module.load_state_dict(original.state_dict(), strict=True)
    return module


@BACKENDS
@pytest.mark.parametrize("numbers", [2, 4])
def test_numbers_and_gradients_of_the_original(original, numbers, backend):
    module, given = loaded(original), inputs(numbers)
    ours = module(*given, SIZES, padding_mask=mask(), backend=backend)
    plain = by_original(original, *given, padding_mask=mask())
    oracle = by_original(original.double(), *(t.double() for t in given), padding_mask=mask())
    assert_accurate(ours, plain, oracle)
    ours.square().sum().backward()
    oracle.square().sum().backward()
    for (name, parameter), expected in zip(module.named_parameters(), original.parameters()):
        assert relative_error(parameter.grad, expected.grad) < 1e-4, name


def test_starts_as_the_original_does():
    torch.manual_seed(0)
    module = DeformableAttention(32, levels=2, heads=8, points=3)
    torch.manual_seed(0)
    expected = MSDeformAttn(32, n_levels=2, n_heads=8, n_points=3)
    for name, parameter in module.named_parameters():
        if name.startswith(("sampling_offsets", "attention_weights")) or name.endswith("bias"):
            assert torch.equal(parameter, expected.state_dict()[name]), name
    bound = (6 / 64) ** 0.5
    for layer in (module.value_proj, module.output_proj):
        assert 0.9 * bound < layer.weight.abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_locations_of_a_half_precision_module_are_float32(original, dtype):
    module, given = loaded(original).to(dtype), inputs(dtype=dtype)
    with torch.no_grad():
        oracle = by_original(original.to(dtype).double(), *(t.double() for t in given))
        plain = by_original(original.to(dtype), *given)
        ours = module(*given, SIZES)
    assert ours.dtype == dtype
    assert_accurate(ours, plain, oracle)
    assert (ours - oracle).square().mean() < (plain - oracle).square().mean()


def test_autocast(original):
    given = inputs()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours = loaded(original)(*given, SIZES)
    assert ours.dtype == torch.bfloat16
    assert relative_error(ours, by_original(original, *given)) < 2**-6


def test_no_queries(original):
    query, points, features = inputs()
    assert loaded(original)(query[:, :0], points[:, :0], features, SIZES).shape == (2, 0, DIM)


def test_one_set_of_points_for_all_pictures_and_levels(original):
    query, points, features = inputs()
    module = loaded(original)
    everywhere = points[:1, :, :1].expand_as(points)
    assert torch.equal(module(query, points[:1, :, :1], features, SIZES), module(query, everywhere, features, SIZES))


def test_padding_is_zero_and_not_the_bias_of_the_values(original):
    query, points, features = inputs()
    module = loaded(original)
    everything = torch.ones(2, PIXELS, dtype=torch.bool)
    out = module(query, points, features, SIZES, padding_mask=everything)
    assert torch.allclose(out, module.output_proj.bias.expand_as(out))


def test_layers_of_their_own_dtype(original):
    """A layer that is kept in float32 among layers of 16 bits gets its input in float32."""
    given = inputs(dtype=torch.bfloat16)
    module = loaded(original).to(torch.bfloat16)
    before = module(*given, SIZES)
    module.value_proj.float()
    assert relative_error(module(*given, SIZES), before) < 2**-5


def test_compiled_and_exported(original):
    module, given = loaded(original).eval(), inputs()
    expected = module(*given, SIZES, padding_mask=mask())
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert relative_error(compiled(*given, SIZES, padding_mask=mask()), expected) < 1e-5
    exported = torch.export.export(module, (*given, SIZES), {"padding_mask": mask()}).module()
    assert relative_error(exported(*given, SIZES, padding_mask=mask()), expected) < 1e-5


class Around(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, query, points, features):
        return self.attention(query, points, features, SIZES)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_recorded(original):
    model, given = Around(loaded(original)).eval(), inputs()
    expected = model(*given)
    assert relative_error(torch.jit.trace(model, given)(*given), expected) < 1e-5
    graph = torch.fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["attention"]
    assert relative_error(graph(*given), expected) < 1e-5
    with pytest.raises(TypeError, match="torch.jit.script cannot read DeformableAttention"):
        torch.jit.script(model)


def test_meta_device_and_text():
    module = make(device="meta", dtype=torch.float16)
    assert all(p.is_meta and p.dtype == torch.float16 for p in module.parameters())
    assert "(24, levels=3, heads=4, points=2, inner_dim=12" in repr(module).replace("\n", "").replace("  ", "")


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"levels": 0}, "levels must be a positive whole number, got 0"),
        ({"points": 2.5}, "points must be a positive whole number, got 2.5"),
        ({"d_model": "24"}, "d_model must be a positive whole number, got '24'"),
        ({"heads": True}, "heads must be a positive whole number, got True"),
        ({"inner_dim": 13}, "must be a multiple of the 4 heads, got 13"),
    ],
)
def test_bad_sizes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def wrong_input(name: str):
    """Arguments of forward in which one is wrong."""
    query, points, features = inputs()
    given = {"query": query, "reference_points": points, "features": features, "spatial_shapes": SIZES}
    changes = {
        "three numbers": {"reference_points": torch.rand(2, QUERIES, 3, 3)},
        "another number of points": {"reference_points": points[:, 1:]},
        "narrow query": {"query": query[..., 1:]},
        "flat query": {"query": query[0]},
        "wide features": {"features": torch.rand(2, PIXELS, DIM + 1)},
        "one picture": {"features": features[:1]},
        "whole numbers": {"features": features.long()},
        "device": {"reference_points": points.to("meta")},
        "sizes": {"spatial_shapes": [(4, 7), *SIZES[1:]]},
        "levels": {"spatial_shapes": [(PIXELS, 1)]},
        "sizes on a device": {"spatial_shapes": torch.tensor(SIZES)},
        "short mask": {"padding_mask": mask()[:, 1:]},
        "mask of numbers": {"padding_mask": mask().float()},
    }
    return given | changes[name]


@pytest.mark.parametrize(
    "name,message",
    [
        ("three numbers", r"reference_points must be \[2 or 1, 6, 3 or 1, 2 or 4\], got \[2, 6, 3, 3\]"),
        ("another number of points", r"reference_points must be \[2 or 1, 6, .*\], got \[2, 5, 3, 2\]"),
        ("narrow query", r"query must be \[any, any, 24\], got \[2, 6, 23\]"),
        ("flat query", r"query must be \[any, any, 24\], got \[6, 24\]"),
        ("wide features", r"features must be \[2, any, 24\], got \[2, 51, 25\]"),
        ("one picture", r"features must be \[2, any, 24\], got \[1, 51, 24\]"),
        ("whole numbers", "features must be floating point, got torch.int64"),
        ("device", "reference_points must be on cpu as query is, got meta"),
        ("sizes", "have 44 pixels, but value has 51"),
        ("levels", r"spatial_shapes must have 3 levels, got \[\(51, 1\)\]"),
        ("sizes on a device", r"must be a list of \(h, w\) on the host, got a tensor"),
        ("short mask", r"padding_mask must be \[2, 51\], got \[2, 50\]"),
        ("mask of numbers", "padding_mask must be of torch.bool, got torch.float32"),
    ],
)
def test_bad_input_is_named(name, message):
    with pytest.raises(ValueError, match=f"DeformableAttention: .*{message}"):
        make()(**wrong_input(name))


def test_already_ours():
    (finding,) = mg_fast.accelerate(nn.Sequential(make())).skipped
    assert str(finding) == "0 (deformable attention): already mg_fast.modules.DeformableAttention"
