"""accelerate() on tiny random models of every family of transformers with deformable attention."""

import copy
import functools
import inspect
import pickle
import re
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from torch import nn

import mg_fast
from mg_fast import ops
from mg_fast.testing.tolerances import assert_accurate, relative_error
from tests.integrations.deformable_detectors import (
    EXCHANGED,
    SAMPLING,
    SKIPPED,
    WHOLE,
    make,
    rt_detr_v2,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = [(6, 8), (3, 4), (1, 2)]
QUERIES, HEADS, POINTS, CHANNELS = 5, 2, 3, 8


def numbers(output) -> dict[str, torch.Tensor]:
    """The tensors of a model's output in which its attention can be seen; masked logits are set to zero."""
    found = {name: t for name, t in output.items() if isinstance(t, torch.Tensor) and t.is_floating_point()}
    return {name: t.masked_fill(~t.isfinite(), 0) for name, t in found.items()}


def gradients(model: nn.Module, inputs: dict) -> dict[str, torch.Tensor]:
    """The gradients of a model's parameters by their names."""
    sum(t.square().mean() for t in numbers(model(**inputs)).values() if t.requires_grad).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@functools.cache
def prepared(family: str) -> tuple[nn.Module, dict]:
    return make(family)


def fresh(family: str) -> tuple[nn.Module, dict]:
    """A model of its own, and inputs."""
    model, inputs = prepared(family)
    return copy.deepcopy(model), inputs


def attentions(model: nn.Module) -> list[nn.Module]:
    """The modules that are exchanged."""
    names = [m for m in model.modules() if type(m).__name__ == "MultiScaleDeformableAttention"]
    return names or [m for m in model.modules() if type(m).__name__.endswith("MultiscaleDeformableAttention")]


@pytest.mark.parametrize("family", EXCHANGED)
def test_same_outputs(family):
    model, inputs = fresh(family)
    kinds, state = [type(m) for m in model.modules()], list(model.state_dict())
    with torch.no_grad():
        plain = numbers(copy.deepcopy(model)(**inputs))
        report = mg_fast.accelerate(model)
        assert len(report.swapped) == len(attentions(model)) >= 2 and not report.skipped
        assert list(model.state_dict()) == state
        with mock.patch.object(ops, "deformable_attention", wraps=ops.deformable_attention) as operation:
            ours = numbers(model(**inputs))
    assert operation.call_count == len(report.swapped)
    for name, expected in plain.items():
        assert relative_error(ours[name], expected) < 1e-5, name
    report.undo()
    assert [type(m) for m in model.modules()] == kinds


@pytest.mark.parametrize("family", EXCHANGED)
def test_same_gradients(family):
    """In float64, because gradients through a whole random model are too badly conditioned in float32."""
    model, inputs = fresh(family)
    inputs = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    expected = gradients(copy.deepcopy(model.double()), inputs)
    mg_fast.accelerate(model)
    ours = gradients(model, inputs)
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (ours[name] - gradient).abs().max() <= 1e-7 * max(gradient.abs().max(), 1e-4 * largest), name
        if "sampling_offsets" in name:
            assert gradient.abs().max() > 1e-5 * largest, name


def test_report():
    model, _ = fresh("rt_detr")
    lines = str(mg_fast.accelerate(model)).splitlines()
    where = "model.decoder.layers.{}.encoder_attn.attn (deformable sampling of rt_detr)"
    assert lines == [
        "mg_fast.accelerate: RTDetrForObjectDetection, 2 swapped, 0 not swapped",
        *(f"  swapped      {where.format(i)}: now mg_fast.ops.deformable_attention" for i in range(2)),
    ]
    again = mg_fast.accelerate(model)
    assert not again.swapped and all("already swapped" in finding.reason for finding in again.skipped)


@pytest.mark.parametrize("family", ["rt_detr", "rt_detr_v2"])
def test_saved_and_loaded(family, tmp_path):
    model, inputs = fresh(family)
    mg_fast.accelerate(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert not any(hasattr(type(m), "_mg_fast_original") for m in loaded.modules())
    with torch.no_grad():
        assert relative_error(loaded(**inputs).logits, model(**inputs).logits) < 1e-5


@pytest.mark.parametrize("family", ["rt_detr", "rt_detr_v2"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_stay_accelerated(family, duplicate):
    model, inputs = fresh(family)
    mg_fast.accelerate(model)
    twin = duplicate(model)
    with torch.no_grad(), mock.patch.object(ops, "deformable_attention", wraps=ops.deformable_attention) as operation:
        assert torch.equal(twin(**inputs).logits, model(**inputs).logits)
    assert operation.call_count == 4
    mg_fast.accelerate(twin).undo()
    assert not any(hasattr(type(m), "_mg_fast_original") for m in twin.modules())


# ---- which families there are


def blocks(text: str) -> dict[str, str]:
    """The classes and functions of a source file by their names."""
    found = re.split(r"^(?=(?:class|def) \w+)", text, flags=re.MULTILINE)[1:]
    return {re.match(r"\w+ (\w+)", block)[1]: block for block in found}


def test_every_family_is_known():
    """Whoever updates transformers sees here that a family has come or has changed."""
    with_module, with_function = set(), set()
    for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        text = file.read_text(encoding="utf-8")
        if "grid_sample(" not in text or "eformable" not in text:
            continue
        for name, block in blocks(text).items():
            if "eformable" in name and "grid_sample(" in block:
                (with_module if name == "MultiScaleDeformableAttention" else with_function).add(file.parent.name)
    assert with_module == set(SAMPLING)
    assert with_function == {*WHOLE, *SKIPPED}


@pytest.mark.parametrize("family", SKIPPED)
def test_other_sampling_is_named(family):
    model, _ = fresh(family)
    before = [type(m) for m in model.modules()]
    report = mg_fast.accelerate(model)
    assert not report.swapped and [type(m) for m in model.modules()] == before
    assert [finding.what for finding in report.skipped] == [f"deformable attention of {family}"] * 2
    assert "samples by a function, multi_scale_deformable_attention_v2, which" in report.skipped[0].reason


@pytest.mark.parametrize(
    "changes,reason",
    [
        ({"decoder_method": "discrete"}, "its method is 'discrete', expected 'default'"),
        ({"decoder_offset_scale": 0.25}, "its offset_scale is 0.25, expected 0.5"),
    ],
)
def test_another_arithmetic_stays(changes, reason):
    report = mg_fast.accelerate(rt_detr_v2(**changes))
    assert not report.swapped and [reason in finding.reason for finding in report.skipped] == [True, True]


def test_a_method_that_is_chosen_after_the_swap_is_the_originals_to_run():
    model, inputs = fresh("rt_detr_v2")
    plain = copy.deepcopy(model)
    mg_fast.accelerate(model)
    for m in (model, plain):
        for attention in attentions(m):
            attention.method = "discrete"
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="runs as transformers wrote it, because its method is"):
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)


def test_every_kind_of_attention_is_tried():
    """Whatever computes something else than its attributes say is left alone."""
    model, _ = fresh("mask2former")
    attention = attentions(model)[0]
    original = type(attention).forward

    def doubled(self, *arguments, **options):
        out, weights = original(self, *arguments, **options)
        return 2 * out, weights

    doubled.__signature__ = inspect.signature(original)
    with mock.patch.object(type(attention), "forward", doubled):
        report = mg_fast.accelerate(model)
    assert not report.swapped
    assert re.search("tried on maps of .*, it is .* away from Deformable DETR's", report.skipped[0].reason)


# ---- the sampling module


def sampling() -> nn.Module:
    from transformers.models.rt_detr.modeling_rt_detr import MultiScaleDeformableAttention

    return MultiScaleDeformableAttention()


def given(dtype=torch.float32, locations_dtype=None) -> tuple:
    generator, pixels = torch.Generator().manual_seed(0), [h * w for h, w in SIZES]
    value = torch.randn(2, sum(pixels), HEADS, CHANNELS, generator=generator)
    locations = torch.rand(2, QUERIES, HEADS, len(SIZES), POINTS, 2, generator=generator) * 1.4 - 0.2
    weights = torch.rand(2, QUERIES, HEADS, len(SIZES) * POINTS, generator=generator).softmax(-1)
    starts = torch.tensor([sum(pixels[:i]) for i in range(len(pixels))])
    locations, weights = locations.to(locations_dtype or dtype), weights.view(locations.shape[:-1]).to(dtype)
    return value.to(dtype), torch.tensor(SIZES), SIZES, starts, locations, weights, 64


def exact(*arguments) -> torch.Tensor:
    return sampling()(*(t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in arguments))


def accelerated() -> nn.Module:
    module = sampling()
    assert mg_fast.accelerate(module).swapped
    return module


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_closer_than_the_original(dtype):
    arguments = given(dtype)
    ours, plain, oracle = accelerated()(*arguments), sampling()(*arguments), exact(*arguments)
    assert ours.dtype == plain.dtype == dtype
    assert_accurate(ours, plain, oracle)
    assert (ours - oracle).square().mean() < (plain - oracle).square().mean()


def test_half_precision_model():
    model, inputs = fresh("rt_detr")
    mg_fast.accelerate(model.to(torch.bfloat16))
    with torch.no_grad():
        out = model(pixel_values=inputs["pixel_values"].to(torch.bfloat16))
    assert out.logits.dtype == torch.bfloat16 and out.logits.isfinite().all()


def test_float32_locations_beside_half_precision():
    """The original refuses two dtypes."""
    arguments = given(torch.bfloat16, torch.float32)
    with pytest.raises(RuntimeError, match="expected scalar type BFloat16 but found Float"):
        sampling()(*arguments)
    assert relative_error(accelerated()(*arguments), exact(*arguments)) < 2**-7


def test_autocast():
    arguments = given(torch.bfloat16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = accelerated()(*arguments), sampling()(*arguments)
    assert ours.dtype == plain.dtype == torch.float32
    assert relative_error(ours, plain) < 2**-7


def test_reference_is_the_original():
    arguments = given()
    with mg_fast.use_backend("reference"):
        assert torch.equal(accelerated()(*arguments), sampling()(*arguments))


def test_sizes_on_the_device_are_the_originals_to_read():
    value, shapes, _, *rest = given()
    with pytest.warns(RuntimeWarning, match="runs as transformers wrote it, because the sizes are .* but Tensor"):
        ours = accelerated()(value, shapes, shapes, *rest)
    assert torch.equal(ours, sampling()(value, shapes, shapes, *rest))


def test_shapes_that_do_not_fit_are_named():
    value, shapes, sizes, *rest = given()
    with pytest.raises(ValueError, match="have 49 pixels, but value has 62"):
        accelerated()(value, shapes, [(5, 7), *sizes[1:]], *rest)


@pytest.mark.parametrize("family", ["rt_detr", "rt_detr_v2"])
def test_compiled_as_one_graph(family):
    model, _ = fresh(family)
    attention = model.model.decoder.layers[0].encoder_attn
    sizes = [(8, 8), (4, 4), (2, 2)]
    inputs = {
        "hidden_states": torch.randn(2, 10, 32),
        "encoder_hidden_states": torch.randn(2, 84, 32),
        "reference_points": torch.rand(2, 10, 1, 4),
        "spatial_shapes": torch.tensor(sizes),
        "spatial_shapes_list": sizes,
    }
    expected = attention(**inputs)[0]
    mg_fast.accelerate(model)
    torch.compiler.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="eager")(**inputs)[0]
    assert relative_error(compiled, expected) < 1e-5


def test_kernels_from_the_hub_stay():
    """The package `kernels` sets a forward on each object, and older releases of it on the class."""
    module = sampling()
    module.forward = types.MethodType(lambda self, *arguments: arguments[0], module)
    (finding,) = mg_fast.accelerate(module).skipped
    assert "forward was set on the object" in finding.reason and "use_kernels=True" in finding.reason
    with mock.patch.object(type(sampling()), "forward", nn.Linear.forward):
        (finding,) = mg_fast.accelerate(sampling()).skipped
    assert "replaced by one of torch.nn.modules.linear" in finding.reason


def changed(forward) -> nn.Module:
    """A sampling module as another release of transformers might have it."""
    forward.__module__ = "transformers.models.rt_detr.modeling_rt_detr"
    names = {"forward": forward, "__module__": forward.__module__}
    return type("MultiScaleDeformableAttention", (type(sampling()),), names)()


def test_changed_sampling_stays():
    original = type(sampling()).forward
    parameters = [*inspect.signature(original).parameters.values()]

    def doubled(self, *arguments):
        return 2 * original(self, *arguments)

    doubled.__signature__ = inspect.Signature(parameters)
    with_state = sampling()
    with_state.gain = nn.Parameter(torch.ones(1))
    for module, reason in (
        (changed(lambda self, value, shapes: value), "it takes value, shapes, expected value, value_spatial_shapes, "),
        (changed(doubled), "tried on maps of .* it is .* away from deformable attention"),
        (with_state, "it has tensors or modules of its own"),
    ):
        (finding,) = mg_fast.accelerate(module).skipped
        assert re.search(reason, finding.reason)


def test_attention_that_changes_after_the_swap_is_the_originals_to_run():
    model, inputs = fresh("rt_detr_v2")
    mg_fast.accelerate(model)
    plain = copy.deepcopy(prepared("rt_detr_v2")[0])
    for m in (model, plain):
        attention = m.model.decoder.layers[0].encoder_attn
        attention.output_proj = nn.Sequential(attention.output_proj, nn.Tanh())
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="runs as transformers wrote it, because the widths of"):
        assert relative_error(model(**inputs).logits, plain(**inputs).logits) < 1e-5
