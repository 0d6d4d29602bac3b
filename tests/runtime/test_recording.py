"""torch.jit.trace, torch.jit.script, torch.fx, torch.export and torch.compile record accelerated and own modules."""

import copy
import io
import warnings

import pytest
import torch
from timm.models.convnext import ConvNeXt
from torch import nn

import mg_fast
from mg_fast.modules import ConvNeXtPyramid, PatchInfoMining
from mg_fast.testing.tolerances import relative_error
from tests.integrations.test_unified_resampler import inputs, make

# The widths are large enough for oneDNN's products with an epilogue, which no trace can hold.
WIDE = dict(dims=(96, 192, 384, 24), depths=(1, 1, 1, 1), num_classes=5)


def picture(size=64):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def traced(model, *given):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return torch.jit.trace(model, given)


def scripted(model, *given):
    return torch.jit.script(model)


def symbolic(model, *given):
    return torch.fx.symbolic_trace(model)


def exported(model, *given):
    return torch.export.export(model, given).module()


def compiled(model, *given):
    return torch.compile(model, backend="aot_eager", fullgraph=True)


def copied(model, *given):
    return copy.deepcopy(model)


def saved(model, *given):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


RECORDERS = [traced, scripted, symbolic, exported, compiled, copied, saved]


@pytest.fixture(scope="module")
def accelerated():
    torch.manual_seed(0)
    model = ConvNeXt(**WIDE, ls_init_value=1.0).eval()
    with torch.no_grad():
        plain = model(picture())
    assert len(mg_fast.accelerate(model).swapped) == 4
    return model, plain


@pytest.mark.slow
@pytest.mark.parametrize("recorder", RECORDERS)
def test_an_accelerated_timm_model(accelerated, recorder):
    model, plain = accelerated
    types = [type(part) for part in model.modules()]
    with torch.no_grad():
        assert relative_error(recorder(model, picture())(picture()), plain) < 1e-5
        assert relative_error(model(picture()), plain) < 1e-5
    # The model stays accelerated.
    assert types == [type(part) for part in model.modules()]


@pytest.mark.parametrize("recorder", [traced, scripted, symbolic])
def test_the_recording_takes_other_sizes_and_knows_nothing_of_us(accelerated, recorder):
    model, _ = accelerated
    recorded = recorder(model, picture())
    with torch.no_grad():
        assert relative_error(recorded(picture(96)[:1]), model(picture(96)[:1])) < 1e-5
    assert "mg_fast" not in str(recorded.graph)


def test_a_traced_model_is_trained(accelerated):
    recorded = traced(copy.deepcopy(accelerated[0]), picture())
    recorded(picture()).sum().backward()
    assert all(parameter.grad is not None for parameter in recorded.parameters())


def test_a_warning_points_to_the_caller():
    stage = ConvNeXt(**WIDE).eval().stages[0]
    mg_fast.accelerate(stage)
    stage.grad_checkpointing = True
    with pytest.warns(RuntimeWarning, match="gradient checkpointing is on") as caught:
        stage.forward(torch.randn(1, 96, 8, 8))
    assert caught[0].filename == __file__


@pytest.mark.slow
@pytest.mark.parametrize("recorder", RECORDERS)
def test_our_tower(recorder):
    torch.manual_seed(0)
    tower = ConvNeXtPyramid.from_dims(WIDE["dims"], WIDE["depths"]).eval()
    with torch.no_grad():
        for ours, expected in zip(
            recorder(tower, picture())(picture()), tower(picture(), backend="reference"), strict=True
        ):
            assert relative_error(ours, expected) < 1e-5


class Front(nn.Module):
    """A module that holds mining, as a model does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mining = PatchInfoMining(16, (8, 12)).eval()

    def forward(self, queries, pyramid):
        return queries + self.mining(queries, pyramid)


MINED = torch.randn(1, 4, 16), [torch.randn(1, 8, 8, 8), torch.randn(1, 4, 4, 12)]


@pytest.mark.slow
@pytest.mark.parametrize("recorder", [traced, symbolic, exported, compiled, copied, saved])
def test_our_mining(recorder):
    front = Front()
    with torch.no_grad():
        assert relative_error(recorder(front, *MINED)(*MINED), front(*MINED)) < 1e-5


def test_a_call_of_mining_stays_one_with_its_adapters():
    front = Front()
    recorded = symbolic(front)
    front.mining.vlm_uni_val_projector.register_forward_hook(lambda module, given, result: 2 * result)
    with torch.no_grad():
        assert torch.equal(recorded(*MINED), front(*MINED))


def test_what_cannot_be_had_is_one_line():
    with pytest.raises(
        TypeError, match="^torch.jit.script cannot read PatchInfoMining, .*: use torch.jit.trace or torch.export$"
    ):
        torch.jit.script(Front())
    with pytest.raises(
        TypeError, match="^torch.fx cannot trace PatchInfoMining by itself, .*: trace the module that holds it, or use"
    ):
        torch.fx.symbolic_trace(PatchInfoMining(16, (8, 12)))


def test_accelerated_mining_is_traced_as_the_originals():
    model = make()
    images, hr_map, _ = inputs()
    with torch.no_grad():
        plain = model.unified_resampler(images, hr_map)
        mg_fast.accelerate(model)

        class Call(nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self, images, hr_map):
                return self.model.unified_resampler(images, hr_map)

        for ours, expected in zip(traced(Call(), images, hr_map)(images, hr_map), plain, strict=True):
            assert torch.equal(ours, expected)
