"""accelerate() on a stand-in for the original's model.

Its attribute names and its call protocol are written after the specification.
"""

import copy
import pickle
import re
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mg_fast
from mg_fast.errors import MgFastError
from mg_fast.testing.tolerances import assert_accurate, relative_error

DIM, CHANNELS = 12, 48


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        for part, width in (("query", DIM), ("aux", CHANNELS), ("val", CHANNELS)):
            setattr(self, f"vlm_uni_{part}_projector", nn.Sequential(nn.LayerNorm(width), nn.Linear(width, DIM)))


class Resampler:
    def unified_resampler(self, images, images_aux):
        patches = int(images.shape[1] ** 0.5)
        size = images_aux.shape[-1] // patches
        images_aux = images_aux.permute(0, 2, 3, 1)
        images_aux = images_aux.reshape(len(images_aux), patches, size, patches, size, images_aux.shape[-1]).permute(
            0, 1, 3, 2, 4, 5
        )
        images_aux = images_aux.reshape(len(images_aux), patches**2, size**2, images_aux.shape[-1]).contiguous()
        query = self.get_model().vlm_uni_query_projector(images)
        key = self.get_model().vlm_uni_aux_projector(images_aux)
        value = self.get_model().vlm_uni_val_projector(images_aux)
        scores = query[:, :, None] @ (key.transpose(-1, -2) / (key.shape[-1] ** 0.5))
        return images, (scores.nan_to_num().softmax(-1) @ value).mean(2)

    def encode(self, images, hr_map, grid=1):
        """The original's calls: one for a single view; for HD, one for the global view and one for the cells.

        The global view is last in the input and first in the output.
        """
        if grid == 1:
            return sum(self.unified_resampler(images, hr_map))
        b, channels, size = len(hr_map), hr_map.shape[1], hr_map.shape[-1] // grid
        reduced = F.interpolate(hr_map.float(), scale_factor=1 / grid, mode="bilinear", align_corners=False).to(
            hr_map.dtype
        )
        cells = (
            hr_map.reshape(b, channels, grid, size, grid, size)
            .permute(0, 2, 4, 1, 3, 5)
            .reshape(-1, channels, size, size)
        )
        whole, local = (
            self.unified_resampler(images[-b:], reduced),
            self.unified_resampler(images[:-b], cells.contiguous()),
        )
        return sum(torch.cat([w, c.reshape(b, -1, DIM)], dim=1) for w, c in zip(whole, local))


class Original(Resampler, nn.Module):
    def __init__(self):
        super().__init__()
        self.model = Inner()

    def get_model(self):
        return self.model


class AllInOne(Resampler, Inner):
    def get_model(self):
        return self


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def make(kind=Original, dtype=torch.float32):
    torch.manual_seed(0)
    return kind().to(dtype)


def inputs(grid=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2 * (grid * grid + (grid > 1)), 9, DIM, generator=generator)
    return images.to(dtype), torch.randn(2, CHANNELS, grid * 24, grid * 24, generator=generator).to(dtype), grid


def state(model):
    """Everything in which a swap and its undo must leave no trace."""
    return [(type(m), sorted(vars(m))) for m in model.modules()], list(model.state_dict())


def assert_same_numbers(model, plain):
    with torch.no_grad():
        assert relative_error(model.encode(*inputs()), plain.encode(*inputs())) < 1e-5


def change_weights(*models):
    for model in models:
        with torch.no_grad():
            model.get_model().vlm_uni_aux_projector[1].weight.mul_(9)


@pytest.mark.parametrize("grid", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numbers(dtype, grid):
    model, given = make(dtype=dtype), inputs(grid, dtype)
    with torch.no_grad():
        plain = model.encode(*given)
        oracle = copy.deepcopy(model).double().encode(given[0].double(), given[1].double(), grid)
        report = mg_fast.accelerate(model)
        ours = model.encode(*given)
    assert [(e.name, e.what) for e in report.swapped] == [
        ("unified_resampler", "patch info mining of Original")
    ] and not report.skipped
    assert_accurate(ours, plain, oracle)
    # Another algebra rounds differently, so a difference shows that the swap took place.
    assert not torch.equal(ours, plain)


@pytest.mark.parametrize(
    "given,cast", [(torch.float32, torch.float16), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]
)
def test_autocast(given, cast):
    """Weights in float32 and features in the towers' dtype give accurate results under autocast.

    The features are large: their squares add up to more than float16 can hold.
    """
    model, (images, hr_map, _) = make(), inputs()
    images, hr_map = images.to(given), (100 * hr_map + 20).to(given)
    change_weights(model)
    with torch.no_grad():
        oracle = copy.deepcopy(model).double().unified_resampler(images.double(), hr_map.double())[1]
        with torch.autocast("cpu", cast):
            plain = model.unified_resampler(images, hr_map)[1]
            mg_fast.accelerate(model)
            returned, ours = model.unified_resampler(images=images, images_aux=hr_map)
            with mg_fast.use_backend("reference"):
                assert torch.equal(model.unified_resampler(images, hr_map)[1], plain)
            # Autocast does not change float64.
            assert model.double().unified_resampler(images.double(), hr_map.double())[1].dtype == torch.float64
    assert returned is images and ours.dtype == plain.dtype == cast
    assert_accurate(ours, plain, oracle)


def test_gradients_and_the_reference_backend():
    model, plain = make(), make()
    mg_fast.accelerate(model)
    for m in (model, plain):
        m.encode(*inputs()).square().sum().backward()
    for (name, ours), expected in zip(model.named_parameters(), plain.parameters()):
        assert (ours.grad - expected.grad).abs().max() < 1e-4 * max(expected.grad.abs().max().item(), 1.0), name
    with mg_fast.use_backend("reference"):
        assert torch.equal(model.encode(*inputs()), plain.encode(*inputs()))


def test_weights_are_read_at_each_call():
    model, plain = make(), make()
    mg_fast.accelerate(model)
    before = model.encode(*inputs())
    change_weights(model, plain)
    assert_same_numbers(model, plain)
    assert relative_error(model.encode(*inputs()), before) > 1e-3
    model.model = copy.deepcopy(model.model).double()
    model.load_state_dict(make().state_dict())
    change_weights(model)
    assert model.encode(*inputs(dtype=torch.float64)).dtype == torch.float64
    assert_same_numbers(model.float(), plain)


def test_undo_restores_everything():
    model, before = make(), state(make())
    report = mg_fast.accelerate(model)
    assert list(model.state_dict()) == before[1] and isinstance(model, Original) and type(model).__name__ == "Original"
    report.undo()
    report.undo()
    assert state(model) == before and torch.equal(model.encode(*inputs()), make().encode(*inputs()))
    assert state(pickle.loads(pickle.dumps(model))) == state(copy.deepcopy(model)) == before


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_twice(order):
    model, before = make(), state(make())
    reports = [mg_fast.accelerate(model), mg_fast.accelerate(model)]
    assert not reports[1].swapped and "already swapped" in reports[1].skipped[0].reason
    for i in order:
        reports[i].undo()
        assert state(model) == before
    # An undo that is spent does not affect a later swap.
    mg_fast.accelerate(model)
    reports[0].undo()
    assert state(model) != before


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), Original._replicate_for_data_parallel]
)
def test_copies_use_their_own_projectors(duplicate):
    model, plain, changed = make(), make(), make()
    mg_fast.accelerate(model)
    twin = duplicate(model)
    if twin.model is model.model:
        # DataParallel gives a replica its own inner model afterwards.
        twin._modules["model"] = copy.deepcopy(model.model)
    change_weights(twin, changed)
    assert_same_numbers(twin, changed)
    assert_same_numbers(model, plain)
    mg_fast.accelerate(twin).undo()
    assert type(twin) is Original and type(model) is not Original


def test_undo_out_of_turn():
    model = make()
    report, swapped = mg_fast.accelerate(model), type(model)
    model.__class__ = type("Sharded", (swapped,), {})
    with pytest.raises(MgFastError, match="unified_resampler: its class was exchanged again since, for Sharded"):
        report.undo()
    model.__class__ = swapped
    # The report does not keep the model alive, and undo() works without it.
    reference = weakref.ref(model)
    del model
    assert reference() is None
    report.undo()


class Wrapper(nn.Module):
    def __init__(self, *inside):
        super().__init__()
        self.inside = nn.ModuleList(inside)

    def __getattr__(self, name):
        # Attributes are passed through, as in adapters.
        return super().__getattr__(name) if name == "inside" else getattr(self.inside[0], name)


def test_found_where_it_sits():
    model = Wrapper(Wrapper(make()), make(AllInOne))
    report = mg_fast.accelerate(model)
    assert [e.name for e in report.swapped] == [
        "inside.0.inside.0.unified_resampler",
        "inside.1.unified_resampler",
    ] and not report.skipped
    assert "swapped      inside.1.unified_resampler (patch info mining of AllInOne): now mg_fast.ops" in str(report)
    for inside, kind in ((model.inside[0].inside[0], Original), (model.inside[1], AllInOne)):
        assert type(inside) is not kind
        assert_same_numbers(inside, make(kind))


UNUSUAL = {
    "LayerNorm and .*Doubled, expected a Sequential": lambda m: m.vlm_uni_aux_projector.__setitem__(
        1, Doubled(CHANNELS, DIM)
    ),
    "query_projector is .*Identity": lambda m: setattr(m, "vlm_uni_query_projector", nn.Identity()),
    "val_projector has hooks on its LayerNorm": lambda m: m.vlm_uni_val_projector[0].register_forward_hook(print),
    "forward of vlm_uni_val_projector's Linear was replaced": lambda m: setattr(
        m.vlm_uni_val_projector[1], "forward", torch.relu
    ),
    "eps of 1e-06, expected 1e-05": lambda m: setattr(m.vlm_uni_query_projector[0], "eps", 1e-6),
    "bias of vlm_uni_aux_projector's Linear is NoneType": lambda m: setattr(m.vlm_uni_aux_projector[1], "bias", None),
    r"Linear of \[7, 12\], expected \[12\] and \[12, 12\]": lambda m: m.vlm_uni_query_projector.__setitem__(
        1, nn.Linear(DIM, 7)
    ),
    "nor itself has vlm_uni_query_projector": lambda m: delattr(m, "vlm_uni_val_projector"),
    "meta device": lambda m: m.to("meta"),
}


@pytest.mark.parametrize("reason", UNUSUAL)
def test_unusual_projectors_stay(reason):
    model = make()
    UNUSUAL[reason](model.model)
    before = state(model)
    report = mg_fast.accelerate(model)
    assert not report.swapped and state(model) == before
    assert re.search(f"not swapped  unified_resampler .*{reason}", str(report))


def test_projectors_that_change_after_the_swap_are_the_originals_to_run():
    model, plain = make(), make()
    mg_fast.accelerate(model)
    model.model.vlm_uni_val_projector[1] = plain.model.vlm_uni_val_projector[1] = Doubled(CHANNELS, DIM)
    with pytest.warns(RuntimeWarning, match="vlm_uni_val_projector is .*Doubled"):
        assert torch.equal(model.encode(*inputs()), plain.encode(*inputs()))


def another(method):
    return make(type("Another", (Original,), {"unified_resampler": method}))


def test_another_method_of_that_name_stays():
    original, patched = Original.unified_resampler, make()
    patched.unified_resampler = lambda images, images_aux: (images, images)
    for model, reason in (
        (another(lambda self, a, b: (a, original(self, a, b)[1] + a)), "is .* away from the original's"),
        (another(lambda self, a, b: (a + 1, original(self, a, b)[1])), "does not return its first argument as it is"),
        (another(lambda self, a, b: original(self, a)), "fails: TypeError"),
        (another(lambda self, a, b, is_video=False: original(self, a, b)), "takes .*is_video=False.*two tensors"),
        (patched, "set on the object"),
        (make().model, "pass in the model around it"),
    ):
        before = state(model)
        assert re.search(reason, mg_fast.accelerate(model).skipped[0].reason) and state(model) == before


def test_nothing_recognised():
    report = mg_fast.accelerate(nn.Linear(2, 2))
    assert (report.swapped, report.skipped) == ([], [])
    assert re.search(
        "nothing recognised in Linear.*Looked for:.*`unified_resampler`.*ConvNeXtStage.*PatchInfoMining",
        str(report),
        re.DOTALL,
    )
    for wrong in ({}, Original, None):
        with pytest.raises(TypeError, match="expected a torch.nn.Module, got"):
            mg_fast.accelerate(wrong)


def test_shapes_that_do_not_fit_are_named():
    model = make()
    mg_fast.accelerate(model)
    for queries, shape, message in (
        # Here the original lets each query see the whole map. For the other shapes it fails in a reshape or a product.
        (3, (CHANNELS, 24, 24), "must be a square, got 3"),
        (9, (CHANNELS, 23, 23), "23x23 must be a multiple of the 3x3 query grid"),
        (9, (CHANNELS, 24), r"a map \[B, C, S, S\], got \[2, 9, 12\] and \[2, 48, 24\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model.unified_resampler(torch.zeros(2, queries, DIM), torch.zeros(2, *shape))


def test_our_own_model(model):
    before = state(model)
    report = mg_fast.accelerate(model)
    assert not report.swapped and state(model) == before
    assert [(e.name, e.reason) for e in report.skipped] == [
        ("model.vision_tower_aux", "already mg_fast.modules.ConvNeXtPyramid"),
        ("model.patch_mining", "already mg_fast.modules.PatchInfoMining"),
    ]
