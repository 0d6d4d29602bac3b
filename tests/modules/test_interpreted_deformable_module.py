"""DeformableAttention and accelerated modules on the kernel: numbers, gradients, one graph of torch.compile."""

import copy

import pytest
import torch

import mg_fast
from mg_fast.modules import DeformableAttention
from mg_fast.testing.tolerances import assert_accurate, relative_error
from tests.integrations.deformable_detectors import rt_detr
from tests.integrations.ms_deform_attn import MSDeformAttn

SIZES = [(3, 4), (2, 2)]
DIM, QUERIES = 16, 3


@pytest.fixture(autouse=True)
def kernels(one_thread):
    """Every operation runs on its kernel."""
    with mg_fast.use_backend("triton"):
        yield


def make(dtype=torch.float32) -> DeformableAttention:
    torch.manual_seed(0)
    module = DeformableAttention(DIM, levels=2, heads=2, points=2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    return module.to(dtype)


def inputs(dtype=torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(1)
    query, points, features = torch.randn(1, QUERIES, DIM), torch.rand(1, QUERIES, 2, 2), torch.randn(1, 16, DIM)
    return [query.to(dtype), points.to(dtype), features.to(dtype)]


def mask() -> torch.Tensor:
    return torch.arange(16)[None] % 5 == 0


def gradients(module, given, **options) -> list[torch.Tensor]:
    given = [t.clone().requires_grad_() for t in given]
    module(*given, SIZES, **options).square().sum().backward()
    return [t.grad for t in (*given, *module.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numbers(dtype):
    module, given = make(dtype), inputs(dtype)
    with torch.no_grad():
        ours = module(*given, SIZES, padding_mask=mask())
        plain = module(*given, SIZES, padding_mask=mask(), backend="reference")
        exact = copy.deepcopy(module).double()
        oracle = exact(*(t.double() for t in given), SIZES, padding_mask=mask(), backend="reference")
    assert_accurate(ours, plain, oracle)


def test_gradients():
    module, given = make(), inputs()
    exact = gradients(copy.deepcopy(module).double(), [t.double() for t in given], backend="reference")
    for ours, expected in zip(gradients(module, given), exact, strict=True):
        assert relative_error(ours, expected) < 1e-5


def test_one_graph():
    module, given = make(), inputs()
    expected = module(*given, SIZES)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(*given, SIZES), expected) < 1e-5


def test_a_detectors_attention_as_one_graph():
    torch.manual_seed(0)
    attention = rt_detr().model.decoder.layers[0].encoder_attn
    sizes = [(2, 3), (2, 2), (1, 2)]
    given = {
        "hidden_states": torch.randn(1, QUERIES, 32),
        "encoder_hidden_states": torch.randn(1, 12, 32),
        "reference_points": torch.rand(1, QUERIES, 1, 4),
        "spatial_shapes": torch.tensor(sizes),
        "spatial_shapes_list": sizes,
    }
    expected = attention(**given)[0]
    assert mg_fast.accelerate(attention).swapped
    torch.compiler.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")(**given)[0]
    assert relative_error(compiled, expected) < 1e-5
    compiled.sum().backward()
    assert attention.sampling_offsets.bias.grad.abs().max() > 0


def test_the_originals_module():
    module = MSDeformAttn(DIM, n_levels=2, n_heads=2, n_points=2)
    assert mg_fast.accelerate(module).swapped
    ours = make()
    module.load_state_dict(ours.state_dict())
    query, points, features = inputs()
    found = module(query, points, features, torch.tensor(SIZES), torch.tensor([0, 12]), mask())
    expected = ours(query, points, features, SIZES, padding_mask=mask(), backend="reference")
    assert relative_error(found, expected) < 1e-5
