"""The feature synchronizer agrees with the original in outputs and gradients, and keeps the operation's identities."""

import copy

import pytest
import torch
from torch import nn

from mg_fast.modules import FeatureSynchronizer
from mg_fast.testing.tolerances import assert_accurate, relative_error
from tests.draws import normal
from tests.synchronizers import GOLDEN_CASES, SMALL, assert_golden, build, draw
from tests.waiting import no_waiting

BACKENDS = pytest.mark.parametrize("backend", ["reference", "torch"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def quick(one_thread):
    """All modules here are tiny, so one thread is fastest."""


@BACKENDS
@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_the_original_s_outputs_and_gradients(golden, case, backend):
    assert_golden(golden, case, backend)


# ---- names and initial values


def test_names_and_shapes_of_the_published_layers():
    language = FeatureSynchronizer(
        5120,
        1024,
        5120,
        inner_dim=1024,
        heads=16,
        points=8,
        spatial_shapes=[32, 16, 8],
        base=16,
        max_images=50,
        device="meta",
    )
    assert {name: list(tensor.shape) for name, tensor in language.state_dict().items()} == {
        "ignore_token": [1, 1, 1, 1024],
        "dynamic_offset_mask.weight": [5120, 5120],
        "dynamic_offset_mask.bias": [5120],
        "sampling_offsets.weight": [256, 5120],
        "sampling_offsets.bias": [256],
        "attention_weights.weight": [432, 5120],
        "attention_weights.bias": [432],
        "value_proj.weight": [1024, 1024],
        "value_proj.bias": [1024],
        "output_proj.weight": [5120, 1024],
        "output_proj.bias": [5120],
        "query_relpos.weight": [50, 5120],
    }
    assert [name for name, parameter in language.named_parameters() if not parameter.requires_grad] == ["ignore_token"]


def test_a_new_module_is_initialised_as_the_original():
    module = FeatureSynchronizer(16, 8, 12, **SMALL, offset_range=2.0)
    assert not module.sampling_offsets.weight.any() and not module.ignore_token.any()
    assert module.sampling_offsets.bias.abs().max() <= 2 and module.sampling_offsets.bias.std() > 0.5
    assert module.query_relpos.weight.std() < 0.05
    for name in ("dynamic_offset_mask", "attention_weights", "value_proj", "output_proj"):
        assert not module.get_submodule(name).bias.any() and module.get_submodule(name).weight.std() > 0.05


@BACKENDS
def test_projected_features_and_an_index_stand_for_features_and_mask(backend):
    module = build()
    inputs = draw(module)
    values, index = module.values(inputs.features), module.index(inputs.mask)
    read = module(inputs.query, None, inputs.reference_points, values=values, index=index, backend=backend)
    assert torch.equal(read, module(*inputs, backend=backend))


def test_copies_and_saved_weights_compute_the_same():
    module = build()
    inputs = draw(module)
    expected = module(*inputs)
    other = FeatureSynchronizer(20, 12, 24, **SMALL)
    other.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(other(*inputs), expected) and torch.equal(copy.deepcopy(module)(*inputs), expected)
    assert "max_images=6" in repr(module)


# ---- accuracy


def results(module, inputs, backend):
    """The output, and the gradients to the inputs and to every trainable parameter, of one call."""
    module = copy.deepcopy(module)
    given = [tensor.clone().requires_grad_() for tensor in inputs[:3]]
    out = module(*given, inputs.mask, backend=backend)
    (out * normal(5, *out.shape).to(out)).sum().backward()
    found = {"output": out.detach(), "query": given[0].grad, "features": given[1].grad, "points": given[2].grad}
    return found | {name: p.grad for name, p in module.named_parameters() if p.requires_grad}


@DTYPES
def test_accuracy_of_outputs_and_gradients(dtype):
    module = build().to(dtype)
    inputs = draw(module)
    exact = results(copy.deepcopy(module).double(), inputs._replace(**_doubled(inputs)), "reference")
    ours, plain = results(module, inputs, "torch"), results(module, inputs, "reference")
    assert len(ours) == 4 + 11
    for name, tensor in ours.items():
        assert tensor.dtype == (torch.float32 if name == "points" else dtype), name
        assert_accurate(tensor, plain[name], exact[name], rows=1 if name == "output" else inputs.query[..., 0].numel())


def _doubled(inputs):
    return {name: tensor.double() for name, tensor in inputs._asdict().items() if name != "mask"}


@BACKENDS
def test_unused_logits_get_no_gradient(backend):
    module = build()
    gradient = results(module, draw(module), backend)["attention_weights.weight"]
    used = gradient.abs().amax(-1).view(-1, SMALL["points"] + 1) > 0
    assert not used[:, -1].any() and used[:, :-1].all()


def test_the_published_width():
    torch.manual_seed(0)
    module = FeatureSynchronizer(
        5120, 1024, 5120, inner_dim=1024, heads=16, points=8, spatial_shapes=[32, 16, 8], base=16, max_images=50
    )
    nn.init.normal_(module.sampling_offsets.weight, std=0.02)
    query, features, center = torch.randn(1, 3, 5120), torch.randn(1, 2, 1344, 1024), torch.full((1, 1, 1, 2), 0.5)
    with torch.no_grad():
        ours, original = (module(query, features, center, backend=backend) for backend in ("torch", "reference"))
    assert relative_error(ours, original) < 1e-5


# ---- what the operation means


@BACKENDS
def test_a_query_that_sees_nothing(backend):
    module = build()
    inputs = draw(module)
    constant = module.output_proj(module.ignore_token.flatten())
    out = module(*inputs, backend=backend)
    torch.testing.assert_close(out[:, 0], constant.expand(2, -1), rtol=0, atol=1e-6)
    assert relative_error(out[:, -1], constant.expand(2, -1)) > 0.1
    none = module(*inputs._replace(features=inputs.features[:, :0], mask=inputs.mask[..., :0]), backend=backend)
    torch.testing.assert_close(none, constant.expand(2, 5, -1), rtol=0, atol=1e-6)


@BACKENDS
def test_pictures_that_are_not_seen_change_nothing(backend):
    module = build()
    query, features, points, mask = draw(module, pictures=2)
    expected = module(query, features, points, mask, backend=backend)
    more = torch.cat([features[:, :1], torch.full_like(features, 9.0), features[:, 1:]], dim=1)
    seen = torch.cat([mask[..., :1], torch.zeros_like(mask), mask[..., 1:]], dim=-1)
    torch.testing.assert_close(module(query, more, points, seen, backend=backend), expected, rtol=0, atol=2e-6)


@BACKENDS
def test_one_query_takes_the_last_row_of_a_longer_mask(backend):
    module = build()
    query, features, points, mask = draw(module)
    expected = module(query, features, points, mask, backend=backend)[:, -1:]
    last = module(query[:, -1:], features, points[:, -1:], mask, backend=backend)
    torch.testing.assert_close(last, expected, rtol=0, atol=2e-6)


@BACKENDS
def test_order_of_pictures_counts_from_the_newest(backend):
    """The index of a picture counts visible pictures only, so a picture that is not seen moves no other one."""
    module = build()
    query, features, points, _ = draw(module)
    all_of_two = module(query, features[:, ::2], points, None, backend=backend)
    two_of_three = module(query, features, points, torch.tensor([[1, 0, 1]]).expand(2, -1), backend=backend)
    torch.testing.assert_close(two_of_three, all_of_two, rtol=0, atol=2e-6)
    swapped = module(query, features[:, [2, 0]], points, None, backend=backend)
    assert relative_error(swapped, all_of_two) > 1e-3


@BACKENDS
def test_every_level_is_read_at_the_same_place(backend):
    """Maps that hold their own pixels' coordinates show where a head reads, at reference + offset / base."""
    module = FeatureSynchronizer(
        6, 2, 8, inner_dim=8, heads=4, points=1, spatial_shapes=[(8, 4), 4, (2, 16), 6], base=8, max_images=3
    )
    grids = [
        torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).flip(-1)
        for h, w in module.sizes.spatial_shapes
    ]
    with torch.no_grad():
        for linear in (module.value_proj, module.output_proj):
            linear.weight.zero_()
        module.output_proj.weight.copy_(torch.eye(8))
        module.value_proj.weight[::2, 0] = module.value_proj.weight[1::2, 1] = 1
        module.attention_weights.weight.zero_()
        # Head i reads level i alone.
        module.attention_weights.bias.copy_((60 * torch.eye(4)[..., None] - 30).expand(4, 4, 2).flatten())
        module.sampling_offsets.bias.view(4, 2).copy_(offset := torch.tensor([0.7, -1.1]))
    place = module(torch.randn(1, 1, 6), torch.cat(grids)[None, None], torch.full((1, 1, 1, 2), 0.5), backend=backend)
    torch.testing.assert_close(place.view(4, 2), (0.5 + offset / 8).expand(4, 2))


@BACKENDS
def test_masks_of_every_kind(backend):
    module = build()
    query, features, points, mask = draw(module)
    expected = module(query, features, points, mask, backend=backend)
    for kind in (torch.bool, torch.int32, torch.float32, torch.float16):
        assert torch.equal(module(query, features, points, mask.to(kind), backend=backend), expected)
    alike = mask[:, -1]
    per_query = alike[:, None].expand(-1, 5, -1)
    for short in (alike, alike[:, None]):
        torch.testing.assert_close(
            module(query, features, points, short, backend=backend),
            module(query, features, points, per_query, backend=backend),
            rtol=0,
            atol=2e-6,
        )
    all_seen = torch.ones_like(mask)
    assert torch.equal(
        module(query, features, points, backend=backend), module(query, features, points, all_seen, backend=backend)
    )


@BACKENDS
def test_reference_points_are_shared(backend):
    module = build()
    query, features, points, mask = draw(module)
    shared = points[:1, :1]
    assert torch.equal(
        module(query, features, shared, mask, backend=backend),
        module(query, features, shared.expand(2, 5, 1, 2).contiguous(), mask, backend=backend),
    )


@BACKENDS
def test_many_pictures_of_which_few_are_seen(backend):
    module = build(max_images=3)
    query, features, points, _ = draw(module, pictures=4)
    two = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0]])
    assert module(query, features, points, two, backend=backend).isfinite().all()
    with pytest.raises(ValueError, match="may see at most 2 pictures.* a row of the mask sees 3"):
        module(query, features, points, torch.tensor([[1, 0, 1, 1], [0, 1, 1, 0]]), backend=backend)
    with pytest.raises(ValueError, match="may see at most 2 pictures.* without a mask it sees all 4"):
        module(query, features, points, backend=backend)


# ---- compilers, graphs, autocast


@BACKENDS
def test_compiles_to_one_graph(backend):
    module = build()
    inputs = draw(module)
    compiled = torch.compile(lambda *given: module(*given, backend=backend), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), module(*inputs, backend=backend), rtol=0, atol=1e-6)


def test_waits_for_nothing():
    module = build()
    inputs = draw(module)
    with no_waiting():
        module(*inputs, backend="torch")
        module(*inputs[:3], backend="torch")


def test_autocast():
    module = build()
    inputs = draw(module)
    exact = copy.deepcopy(module).double()(*inputs._replace(**_doubled(inputs)), backend="reference")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out, plain = (module(*inputs, backend=backend) for backend in ("torch", "reference"))
    assert out.dtype == torch.bfloat16
    assert_accurate(out, plain, exact.detach())
