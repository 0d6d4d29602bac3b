"""The packed picture encoder gives the model's own image tokens and refuses a model that it cannot stand for."""

import contextlib
import copy

import pytest
import torch
from safetensors.torch import load_file

import mg_fast
from mg_fast import MiniGeminiForConditionalGeneration, MiniGeminiProcessor, pipeline
from mg_fast.models.mini_gemini import encoder as encoders
from mg_fast.models.mini_gemini import seeing
from mg_fast.models.mini_gemini.encoder import PictureEncoder
from mg_fast.modules import ConvNeXtPyramid
from mg_fast.runtime.meter import Meter
from mg_fast.testing.tolerances import IMAGE_TOKENS, assert_accurate, relative_error

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="two streams and CUDA graphs need a GPU")


@pytest.fixture(params=["standard", "hd"])
def loaded(request):
    folder = request.getfixturevalue(request.param)
    return MiniGeminiForConditionalGeneration.from_pretrained(folder), MiniGeminiProcessor.from_pretrained(folder)


def test_image_tokens_are_the_models(loaded, photo, drawing):
    model, processor = loaded
    inputs = processor.image_processor([photo, drawing])
    tokens = PictureEncoder(model.model)(**inputs)
    with torch.no_grad():
        assert (
            relative_error(tokens, model.get_image_features(**inputs, backend="reference").pooler_output)
            <= IMAGE_TOKENS
        )


@pytest.mark.parametrize("name", ["mgm-gemma", "mgm-llama-hd"])
def test_original(golden, name):
    folder = golden / name
    model, processor = (
        MiniGeminiForConditionalGeneration.from_pretrained(folder),
        MiniGeminiProcessor.from_pretrained(folder),
    )
    tokens = PictureEncoder(model.model)(**processor.image_processor(folder / "image0.png"))
    assert relative_error(tokens, load_file(folder / "expected.safetensors")["image0.image_tokens"]) <= IMAGE_TOKENS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(loaded, photo, dtype):
    model, processor = loaded
    inputs = processor.image_processor(photo)
    with torch.no_grad():
        exact = (
            copy.deepcopy(model)
            .double()
            .get_image_features(**inputs.to(torch.float64), backend="reference")
            .pooler_output
        )
        model = model.to(dtype)
        plain = model.get_image_features(**inputs.to(torch.float32), backend="reference").pooler_output
    assert_accurate(PictureEncoder(model.model)(**inputs), plain, exact)


def test_stages_are_measured_one_after_the_other(loaded, photo):
    model, processor = loaded
    meter = Meter(torch.device("cpu"))
    PictureEncoder(model.model)(**processor.image_processor(photo), stage=meter.stage)
    assert [stage.name for stage in meter.stages] == ["LR tower", "HR tower", "patch info mining", "projector"]


@pytest.mark.parametrize("part", ["vision_tower", "vision_tower_aux"])
def test_changed_weights_are_noticed(loaded, photo, part):
    model, processor = loaded
    inputs, encoder = processor.image_processor(photo), PictureEncoder(model.model)
    with torch.no_grad():
        next(getattr(model.model, part).parameters()).mul_(2)
    with pytest.raises(RuntimeError, match="weights were changed since it was packed: pack it again"):
        encoder(**inputs)
    PictureEncoder(model.model)(**inputs)


def test_pixels_of_another_shape(loaded, photo):
    model, processor = loaded
    inputs = processor.image_processor(photo)
    with pytest.raises(ValueError, match="pixel_values_hr: expected"):
        PictureEncoder(model.model)(inputs["pixel_values"], inputs["pixel_values_hr"][..., 1:])


def test_a_tower_that_is_more_than_its_weights(loaded):
    model, _ = loaded
    handle = model.model.vision_tower_aux.vision_stages[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="the high-resolution tower: vision_stages.0 has hooks"):
        PictureEncoder(model.model)
    handle.remove()
    PictureEncoder(model.model)


@pytest.mark.parametrize("part", ["patch_mining", "mm_projector", "mm_projector.0"])
def test_hooks_on_mining_or_projector_keep_graphs_away(loaded, photo, monkeypatch, part):
    """Hooks on mining or projector keep graphs away, because a replay would not run them."""
    model, processor = loaded
    inputs, encoder, replayed, called = processor.image_processor(photo), PictureEncoder(model.model), [], []
    expected = encoder(**inputs)
    # This simulates a GPU, up to the graphs themselves.
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(encoder, "_replay", lambda pixels, backend: replayed.append(1))
    monkeypatch.setattr(encoder, "_graphs", {})
    encoder(**inputs)
    assert replayed
    handle = model.model.get_submodule(part).register_forward_hook(lambda *_: called.append(1))
    assert torch.equal(encoder(**inputs), expected) and called and len(replayed) == 1
    handle.remove()
    encoder(**inputs)
    assert len(replayed) == 2


def test_packing_does_not_touch_the_tower():
    tower = ConvNeXtPyramid.from_dims((8, 16, 24, 32), (1, 1, 1, 1))
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    packed = tower.pack()
    maps = packed(torch.randn(1, 3, 64, 64))
    assert not any(level.requires_grad for level in maps)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tower.state_dict().items())


@needs_gpu
@pytest.mark.parametrize("graphs", [True, False])
def test_on_a_gpu(loaded, photo, drawing, graphs):
    """The towers run at the same time on two streams and, once captured, are replayed on other pictures."""
    model, processor = loaded
    model = model.cuda()
    encoder = PictureEncoder(model.model, graphs=graphs)
    for picture in (photo, drawing, photo):
        inputs = processor.image_processor(picture).to("cuda")
        with torch.no_grad():
            expected = model.get_image_features(**inputs, backend="torch").pooler_output
        assert relative_error(encoder(**inputs), expected) <= 1e-4


def test_the_pipeline_packs_once_and_again_after_a_change(loaded, photo, drawing, monkeypatch):
    made = []
    monkeypatch.setattr(
        seeing, "PictureEncoder", lambda model, **options: made.append(PictureEncoder(model, **options)) or made[-1]
    )
    model, processor = loaded
    piped = pipeline.Pipeline(model, processor)
    piped.see(photo), piped.see(drawing)
    assert len(made) == 1
    with torch.no_grad():
        next(model.model.vision_tower_aux.parameters()).mul_(2)
        changed = piped.see(photo)
        assert len(made) == 2
        inputs = processor.image_processor(photo)
        assert (
            relative_error(changed, model.get_image_features(**inputs, backend="reference").pooler_output[0])
            <= IMAGE_TOKENS
        )
        model.config.mm_vision_select_layer = -3
        deeper = model.get_image_features(**inputs, backend="reference").pooler_output[0]
        assert relative_error(piped.see(photo), deeper) <= IMAGE_TOKENS and relative_error(changed, deeper) > 1e-3
        made.pop()
    model.to(torch.bfloat16)
    assert piped.see(photo).dtype == torch.bfloat16 and len(made) == 3
    with mg_fast.use_backend("reference"):
        piped.see(photo)
    assert len(made) == 3


def test_the_pipeline_looks_at_all_parameters_once_a_picture(loaded, photo, drawing, monkeypatch):
    model, processor = loaded
    piped = pipeline.Pipeline(model, processor)
    piped.see(photo)
    walks = []
    monkeypatch.setattr(
        encoders, "Fingerprint", lambda parts, walk=encoders.Fingerprint: walks.append(1) or walk(parts)
    )
    piped.see(drawing)
    assert len(walks) == 1


def test_the_pipeline_goes_through_the_modules_where_they_cannot_be_packed(loaded, photo, caplog):
    model, processor = loaded
    calls = []
    model.model.vision_tower_aux.vision_stages[0].register_forward_hook(lambda *_: calls.append(1))
    with caplog.at_level("INFO", logger="mg_fast.engine.vision"):
        tokens = pipeline.Pipeline(model, processor).see(photo)
    with torch.no_grad():
        expected = model.get_image_features(**processor.image_processor(photo), backend="reference").pooler_output[0]
    assert relative_error(tokens, expected) <= IMAGE_TOKENS
    assert (
        "the model's own modules: PictureEncoder: the high-resolution tower: vision_stages.0 has hooks" in caplog.text
        and calls
    )
