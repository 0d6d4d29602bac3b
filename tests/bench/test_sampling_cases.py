"""The cases of deformable attention and of the synchronizer: small ones on a CPU, and the real sizes by count alone."""

import dataclasses
import sys
import types

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.cases import all_cases, deformable_attention, feature_sync, operations, samplers
from bench.cases.synchronizer_blocks import SynchronizerBlock, packed_block, pixel_centres, synchronizer
from bench.check import check
from bench.costs import sampling
from bench.costs.sampling import SamplingSizes, SyncSizes
from bench.registry import NotHere
from bench.rows import empty_row
from mg_fast.ops.operation import OPERATIONS, operators

CASES = all_cases()
DTYPES = (torch.float32, torch.bfloat16)
SMALL = SamplingSizes(torch.float32, ((5, 7), (3, 2)), 6, batch=2, heads=2, channels=8, points=3)
GRID = dataclasses.replace(SMALL, queries=41, grid=True)
TEXT = SyncSizes(
    torch.float32, 1, 3, width=40, levels=(4, 2), base=4, relations=6, inner=32, features=24, heads=2, points=2
)
BLOCK = dataclasses.replace(TEXT, queries=16, pictures=1, width=24, block=True)
BLOCKS = [BLOCK, dataclasses.replace(BLOCK, queries=4, base=2)]


def test_the_published_shapes_are_there():
    shapes = {
        "detr-encoder",
        "detr-decoder",
        "rt-detr",
        "adapter-injector",
        "adapter-extractor",
        "detr-encoder-training",
    }
    for dtype in ("float32", "bfloat16", "float16"):
        assert {f"deformable_attention/{shape}-b1-{dtype}" for shape in shapes} <= CASES.keys()
        prompts = {f"llm-prefill{queries}-n{n}" for queries in (512, 2048) for n in (4, 8)}
        steps = {f"llm-decode-n{n}" for n in (1, 4, 8)}
        blocks = {"unet-64", "unet-32-narrow", "unet-32", "unet-16-narrow", "unet-16", "unet-8", "unet-all"}
        assert {f"feature_sync/{name}-b1-{dtype}" for name in prompts | steps | blocks} <= CASES.keys()
    assert sampling.SAMPLERS["detr-encoder"].queries == sampling.SAMPLERS["detr-encoder"].pixels == 12502
    assert sum(count for _, _, count in sampling.BLOCKS.values()) == 13


@pytest.mark.parametrize("group", ["deformable_attention", "feature_sync"])
def test_opponents_and_our_own_forms(group):
    for case in CASES.values():
        if case.group == group:
            assert {"reference", *OPERATIONS[group].forms} <= case.providers.keys()
            if group == "deformable_attention":
                assert {f"reference, {name}" for name in ("deformops", "hub kernel", "CUDA extension")} <= (
                    case.providers.keys()
                )


def small_case(name, dtype):
    options = {"dtype": dtype}
    if name.startswith("deformable"):
        sizes = dataclasses.replace(GRID if "grid" in name else SMALL, **options)
        return deformable_attention.sampling_case(f"{name}", sizes, training="training" in name)
    if "blocks" in name:
        return feature_sync.blocks_case(name, [dataclasses.replace(block, **options) for block in BLOCKS])
    if "prompt" in name:
        options |= {"queries": 7}
    return feature_sync.language_case(name, dataclasses.replace(TEXT, **options, batch=4 if "rows" in name else 1))


NAMES = [
    "deformable_attention/few",
    "deformable_attention/grid",
    "deformable_attention/training",
    "feature_sync/step",
    "feature_sync/rows",
    "feature_sync/prompt",
    "feature_sync/blocks",
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_providers_agree(name, dtype, monkeypatch):
    """Everything that runs on a CPU is right, with the exact result made of several parts."""
    monkeypatch.setattr(deformable_attention, "TOGETHER", 4)
    monkeypatch.setattr(feature_sync, "SAMPLES_TOGETHER", 2000)
    case = small_case(name, dtype)
    case = case.restricted([provider for provider in case.providers if "compiled" not in provider])
    rows = {provider: empty_row(case, provider) for provider in case.providers}
    with torch.no_grad():
        check(case, case.make("cpu"), "cpu", rows)
    for provider, row in rows.items():
        assert row["ok"] or row["why"].startswith("not here: "), f"{provider}: {row['why']}"
    assert rows["reference"]["ok"]
    assert rows["torch"]["ok"]


def test_what_no_call_of_a_kept_form_does(monkeypatch):
    """The values are made before the call that is timed, unless a provider says otherwise."""
    case = small_case("feature_sync/blocks", torch.float32)
    inputs = case.make("cpu")
    calls = {name: case.providers[name](inputs) for name in ("torch", "torch, values each call")}
    made = []
    monkeypatch.setattr(feature_sync, "packed_values", lambda packed, features: made.append(1) or inputs.features)
    with pytest.raises(ValueError, match="values must be"):
        calls["torch, values each call"]()
    before = len(made)
    calls["torch"]()
    assert before and len(made) == before


def test_masks_grow_with_the_prompt():
    sizes = dataclasses.replace(TEXT, queries=6)
    mask = feature_sync._language_inputs(sizes, "cpu").mask
    assert mask[0].sum(1).tolist() == [1, 1, 2, 2, 3, 3]
    rows = feature_sync._language_inputs(dataclasses.replace(TEXT, batch=4), "cpu").mask
    assert rows[:, 0].sum(1).tolist() == [1, 2, 3, 1]


def test_locations_are_where_a_gradient_is_smooth():
    inputs = deformable_attention.make_inputs(GRID, "cpu")
    widths = torch.tensor([(w, h) for h, w in GRID.levels])[:, None]
    pixels = inputs.locations.double() * widths - 0.5
    from_centres = (pixels - pixels.round()).abs()
    assert from_centres.min() > 0.9 * deformable_attention.AWAY
    # They lie around the query's own place: most within a few pixels, and not all on the map.
    places = deformable_attention._grid(GRID.levels, "cpu")
    assert ((inputs.locations - places[:, None, None, None]) * widths).abs().median() < 4
    torch.testing.assert_close(inputs.weights.sum((3, 4)), torch.ones(2, 41, 2))


# Libraries.


def reference_sampler(levels):
    """What each of the libraries computes, with their arguments."""

    def sample(value, sizes, starts, locations, weights):
        assert sizes.tolist() == [list(level) for level in levels] and starts.tolist() == [0, 35]
        return deformable_attention.ops.deformable_attention(value, levels, locations, weights, backend="reference")

    return sample


def test_libraries_are_called_as_they_are_written(monkeypatch):
    inputs = deformable_attention.make_inputs(SMALL, "cpu")
    sample = reference_sampler(SMALL.levels)
    expected = sample(inputs.value, torch.tensor(SMALL.levels), torch.tensor([0, 35]), inputs.locations, inputs.weights)
    registry = types.ModuleType("deformops.registry")
    registry.msda = sample
    monkeypatch.setitem(sys.modules, "deformops", types.ModuleType("deformops"))
    monkeypatch.setitem(sys.modules, "deformops.registry", registry)
    by_library = samplers.deformops_sampler(SMALL.levels, "cpu")
    torch.testing.assert_close(by_library(*inputs.tensors), expected)


def test_the_extension_and_its_gradients():
    """A stand-in for Deformable DETR's two functions gives the same gradients as the reference."""
    extension = types.ModuleType("MultiScaleDeformableAttention")
    sample = reference_sampler(SMALL.levels)

    def forward(value, sizes, starts, locations, weights, together):
        assert len(value) % together == 0
        return sample(value, sizes, starts, locations, weights)

    def backward(value, sizes, starts, locations, weights, gradient, together):
        tensors = [tensor.detach().requires_grad_() for tensor in (value, locations, weights)]
        with torch.enable_grad():
            out = sample(tensors[0], sizes, starts, *tensors[1:])
        return torch.autograd.grad(out, tensors, gradient)

    extension.ms_deform_attn_forward, extension.ms_deform_attn_backward = forward, backward
    inputs = deformable_attention.make_inputs(SMALL, "cpu")
    found = deformable_attention._forward_and_backward(
        inputs, samplers.extension_sampler(extension, SMALL.levels, "cpu")
    )()
    exact = deformable_attention._exact(True, inputs)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


def test_what_is_missing_is_said(monkeypatch):
    empty = types.ModuleType("kernels")
    monkeypatch.setitem(sys.modules, "kernels", empty)
    with pytest.raises(NotHere, match="kernels has no get_kernel"):
        samplers.hub_kernel()
    asked = []

    def get_kernel(name, version):
        asked.append((name, version, samplers.huggingface_hub.constants.HF_HUB_OFFLINE))
        raise FileNotFoundError("no such snapshot")

    before = samplers.huggingface_hub.constants.HF_HUB_OFFLINE
    empty.get_kernel = get_kernel
    with pytest.raises(NotHere, match="not in the local cache for this machine: no such snapshot"):
        samplers.hub_kernel()
    # It asks nothing of the network, and leaves the setting as it was.
    assert asked == [("kernels-community/deformable-detr", 1, True)]
    assert before == samplers.huggingface_hub.constants.HF_HUB_OFFLINE
    monkeypatch.setitem(sys.modules, "MultiScaleDeformableAttention", None)
    with pytest.raises(NotHere, match="MultiScaleDeformableAttention cannot be imported"):
        samplers.cuda_extension()
    for device, dtype, message in (("cpu", torch.float32, "for GPUs"), ("cuda", torch.bfloat16, "takes float32")):
        with pytest.raises(NotHere, match=message):
            samplers.require_float32_on_gpu(device, dtype)


# Formulas.


def counted_flop(call):
    with FlopCounterMode(display=False) as flop, torch.no_grad():
        call()
    return flop.get_total_flops()


def assert_packed(flop, sizes):
    """The products of the packed form, and those of its samples if it adds these up by a product."""
    assert flop in (sampling.packed_sync_flop(sizes), sampling.sync_floor(sizes).flop)


@pytest.mark.parametrize("changes", [{}, {"queries": 7}, {"batch": 2, "pictures": 2}], ids=str)
def test_flop_of_the_synchronizer(changes):
    sizes = dataclasses.replace(TEXT, **changes)
    inputs = feature_sync._language_inputs(sizes, "cpu")
    packed = inputs.module.pack()
    values = packed.values(inputs.features)
    original = counted_flop(feature_sync._unpacked(inputs, "reference"))
    kept = counted_flop(lambda: packed(inputs.query, values, inputs.points, inputs.mask, backend="torch"))
    assert original == sampling.reference_sync_flop(sizes)
    assert_packed(kept, sizes)
    assert counted_flop(lambda: packed.values(inputs.features)) == sampling.values_flop(sizes)


@pytest.mark.parametrize("sizes", BLOCKS, ids=lambda sizes: f"{sizes.side} a side")
def test_flop_of_a_block(sizes):
    block = SynchronizerBlock(sizes)
    map, features = torch.randn(1, sizes.width, sizes.side, sizes.side), torch.randn(1, 1, sizes.pixels, sizes.features)
    points, index = pixel_centres(sizes.side, "cpu"), torch.ones(1, 1, dtype=torch.int64)
    assert counted_flop(lambda: block(map, features, points, backend="reference")) == sampling.reference_sync_flop(
        sizes
    )
    packed = block.pack()
    values = packed.values(features)
    assert_packed(counted_flop(lambda: packed_block(packed, map, values, points, index, "torch")), sizes)


def test_decoding_needs_a_hundredth_of_the_originals_flop():
    """One token at the real width with four pictures, counted without values."""
    sizes = dataclasses.replace(sampling.LANGUAGE, pictures=4)
    with torch.device("meta"):
        module = synchronizer(sizes)
        query, features = torch.empty(1, 1, sizes.width), torch.empty(1, 4, sizes.pixels, sizes.features)
        points, mask = torch.empty(1, 1, 1, 2), torch.empty(1, 1, 4, dtype=torch.bool)
        packed = module.pack()
        values = packed.values(features)
        original = counted_flop(lambda: module(query, features, points, mask, backend="reference"))
        ours = counted_flop(lambda: packed(query, values, points, mask, backend="torch"))
    assert original == sampling.reference_sync_flop(sizes) == pytest.approx(11.5e9, rel=0.01)
    assert_packed(ours, sizes)
    assert 100 * ours <= original


def test_flop_of_each_block_at_its_real_size():
    """GFLOP of the original's products and of ours, worked out by hand: 11.41 of each are the values."""
    expected = {
        "unet-64": (17.95, 4.70),
        "unet-32-narrow": (13.05, 1.17),
        "unet-32": (15.52, 2.35),
        "unet-16-narrow": (12.44, 0.59),
        "unet-16": (14.31, 1.17),
        "unet-8": (12.14, 0.29),
    }
    for name, (side, width, _) in sampling.BLOCKS.items():
        sizes = sampling.block_sizes(side, width, torch.float32)
        found = sampling.reference_sync_flop(sizes) / 1e9, sampling.packed_sync_flop(sizes) / 1e9
        assert found == pytest.approx(expected[name], abs=0.02), name


def test_samples_count_as_the_records_declare():
    sizes = dataclasses.replace(TEXT, queries=7)
    inputs = feature_sync._language_inputs(sizes, "meta")
    width = sizes.offsets + sizes.logits
    arguments = (
        torch.empty(1, 3, sizes.pixels, sizes.heads, sizes.inner // sizes.heads),
        torch.empty(1, 7, width),
        torch.empty(sizes.relations, width),
        torch.empty(1, 7, 3, dtype=torch.int64),
        inputs.points,
        [side for pair in sizes.shapes for side in pair],
        sizes.base,
        None,
    )
    declared = operators()["mg_fast::feature_sync"].flop(*arguments)
    assert declared == sampling.sync_floor(sizes).flop - sampling.packed_sync_flop(sizes)
    sampler = deformable_attention.make_inputs(SMALL, "cpu")
    arguments = sampler.value, [side for level in SMALL.levels for side in level], sampler.locations, sampler.weights
    declared = operators()["mg_fast::deformable_attention"].flop(*arguments)
    assert declared == sampling.deformable_floor(SMALL).flop
    backward = operators()["mg_fast::deformable_attention_backward"].flop
    floor = sampling.deformable_training_floor(SMALL)
    assert declared + backward(sampler.gradient, *arguments, [True, True, True]) == floor.flop


def test_our_kernel_in_training_adds_in_one_order(monkeypatch):
    """Only then it gives equal bits again, which the check asks of a kernel alone. The atomics are measured beside."""
    modes = {}

    def attend(value, levels, locations, weights, backend):
        modes[name] = torch.are_deterministic_algorithms_enabled()
        return deformable_attention_function(value, levels, locations, weights, backend="reference")

    deformable_attention_function = deformable_attention.ops.deformable_attention
    monkeypatch.setattr(deformable_attention.ops, "deformable_attention", attend)
    monkeypatch.setattr(operations, "require", lambda *_: None)
    case = small_case("deformable_attention/training", torch.float32)
    for name in ("reference", "triton", "triton, atomics"):
        case.providers[name](case.make("cpu"))()
    assert modes == {"reference": False, "triton": True, "triton, atomics": False}
    assert not torch.are_deterministic_algorithms_enabled()


def test_floors_hold_what_nobody_can_do_without():
    few = dataclasses.replace(SMALL, queries=1, points=1, batch=1)
    # One query of two heads has four pixels of each level, of 8 channels each, two locations and weights.
    floor = sampling.deformable_floor(few)
    assert floor.bytes_read == 4 * (2 * 8 * (4 + 4) + 2 * 2 * 3) and floor.bytes_written == 4 * 2 * 8
    # More queries read no pixel twice.
    many = sampling.deformable_floor(dataclasses.replace(few, queries=1000))
    assert many.bytes_read == 4 * (2 * 8 * (35 + 6) + 1000 * 2 * 2 * 3)
    training = sampling.deformable_training_floor(few)
    assert training.bytes_read == 2 * floor.bytes_read + floor.bytes_written and training.flop == 3 * floor.flop
    assert training.bytes_written == floor.bytes_written + 4 * (2 * 8 * 41 + 2 * 2 * 3)
    sizes = dataclasses.replace(sampling.LANGUAGE, pictures=4, dtype=torch.float16)
    # The table of costs for one token and four pictures: 17.9 MB.
    assert sampling.sync_floor(sizes).bytes == pytest.approx(17.9e6, rel=0.01)
