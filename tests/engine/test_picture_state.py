"""Once anything that the picture side computes with has changed, earlier image tokens are not given again."""

import pytest
import torch
from torch import nn

from mg_fast import MiniGeminiForConditionalGeneration, Pipeline
from mg_fast.models.mini_gemini import encoder
from mg_fast.models.mini_gemini.encoder import PictureEncoder
from mg_fast.testing.tolerances import IMAGE_TOKENS, relative_error
from tests.families import family

BACKENDS = pytest.mark.parametrize("backend", ["auto", "reference"])
LAYERS = {
    "mining": "patch_mining",
    "a layer of mining": "patch_mining.vlm_uni_val_projector.1",
    "projector": "mm_projector",
    "a layer of the projector": "mm_projector.0",
    "low-resolution tower": "vision_tower.encoder",
    "a layer of it": "vision_tower.encoder.layers.0.mlp.fc1",
    "high-resolution tower": "vision_tower_aux.vision_stages.1",
    "a layer of that": "vision_tower_aux.vision_stages.1.blocks.0.mlp.fc1",
}


@pytest.fixture(autouse=True)
def quick(one_thread):
    """One thread is enough, because all models here are tiny."""


@pytest.fixture
def found():
    return family("standard")


@pytest.fixture
def model(found):
    return MiniGeminiForConditionalGeneration.from_pretrained(found.folder)


def fresh(pipe, found):
    """The image tokens of a new pipeline, which has seen nothing before."""
    return Pipeline(pipe.model, found.processor, backend=pipe.backend).see(found.pictures[0])


def assert_noticed(pipe, found, before):
    after = pipe.see(found.pictures[0])
    assert relative_error(after, fresh(pipe, found)) <= IMAGE_TOKENS
    assert relative_error(after, before) > 1e-3


def adapted(model, *names):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    targets = r".*(patch_mining\..*\.1|mm_projector\.[02])"
    config = LoraConfig(r=4, lora_alpha=16, target_modules=targets, init_lora_weights=False)
    tuned = get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        tuned.add_adapter(name, config)
    return tuned.eval()


@BACKENDS
def test_adapters_that_are_switched_off_and_on(model, found, backend):
    pipe = Pipeline(model, found.processor, backend=backend)
    plain = pipe.see(found.pictures[0])
    tuned = adapted(model, "one")
    with_adapter = pipe.see(found.pictures[0])
    assert relative_error(with_adapter, plain) > 1e-3
    with tuned.disable_adapter():
        assert relative_error(pipe.see(found.pictures[0]), plain) <= IMAGE_TOKENS
    assert relative_error(pipe.see(found.pictures[0]), with_adapter) <= IMAGE_TOKENS


@BACKENDS
def test_another_adapter_another_factor_and_a_merge(model, found, backend):
    tuned = adapted(model, "one", "two")
    pipe = Pipeline(model, found.processor, backend=backend)
    before = pipe.see(found.pictures[0])
    tuned.set_adapter("two")
    assert_noticed(pipe, found, before)
    before = pipe.see(found.pictures[0])
    model.model.patch_mining.vlm_uni_val_projector[1].scaling["two"] *= 4
    assert_noticed(pipe, found, before)
    before = pipe.see(found.pictures[0])
    tuned.merge_adapter()
    assert relative_error(pipe.see(found.pictures[0]), before) <= IMAGE_TOKENS


@BACKENDS
def test_a_step_of_an_optimizer(model, found, backend):
    adapted(model, "one")
    pipe = Pipeline(model, found.processor, backend=backend)
    before = pipe.see(found.pictures[0])
    weight = model.model.patch_mining.vlm_uni_val_projector[1].lora_B["one"].weight
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.1).step()
    assert_noticed(pipe, found, before)


@pytest.mark.slow
@BACKENDS
@pytest.mark.parametrize(
    "layer", ["mm_projector.0", "patch_mining.vlm_uni_val_projector.1", "vision_tower.encoder.layers.0.mlp.fc1"]
)
@pytest.mark.parametrize("hooked", ["", "vision_tower.encoder.layers.0", "vision_tower_aux"])
def test_weights_changed_in_place(model, found, layer, hooked, backend):
    """Weights changed in place are noticed, also where a hook keeps the towers from being packed."""
    if hooked:
        model.model.get_submodule(hooked).register_forward_hook(lambda *_: None)
    pipe = Pipeline(model, found.processor, backend=backend)
    before = pipe.see(found.pictures[0])
    with torch.no_grad():
        model.model.get_submodule(layer).weight.mul_(3)
    assert_noticed(pipe, found, before)


@pytest.mark.slow
@pytest.mark.parametrize("where", LAYERS)
@pytest.mark.parametrize("kind", ["hook", "pre-hook", "forward"])
def test_what_is_put_on_a_layer(model, found, where, kind):
    pipe = Pipeline(model, found.processor)
    before = pipe.see(found.pictures[0])
    called = []
    layer = model.model.get_submodule(LAYERS[where])
    if kind == "hook":
        handle = layer.register_forward_hook(lambda *_: called.append(1))
    elif kind == "pre-hook":
        handle = layer.register_forward_pre_hook(lambda *_: called.append(1))
    else:
        original = layer.forward
        layer.forward = lambda *args, **kwargs: called.append(1) or original(*args, **kwargs)
    assert relative_error(pipe.see(found.pictures[0]), before) <= IMAGE_TOKENS and called
    if kind != "forward":
        handle.remove()
        called.clear()
        assert relative_error(pipe.see(found.pictures[0]), before) <= IMAGE_TOKENS and not called


def test_an_activation_of_the_projector_is_exchanged(model, found):
    pipe = Pipeline(model, found.processor)
    before = pipe.see(found.pictures[0])
    model.model.mm_projector[1] = nn.ReLU()
    assert_noticed(pipe, found, before)


def test_a_change_of_the_language_model_alone_is_none(model, found):
    pipe = Pipeline(model, found.processor)
    pipe.see(found.pictures[0])
    number = pipe.vision.version
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    pipe.see(found.pictures[0])
    pipe.chat("What?", [found.pictures[0]], max_new_tokens=2)
    assert pipe.vision.version == number


def test_turns_without_pictures_do_not_ask(model, found, monkeypatch):
    pipe = Pipeline(model, found.processor)
    pipe.chat("What?", [found.pictures[0]], max_new_tokens=2)
    monkeypatch.setattr("mg_fast.models.mini_gemini.seeing.picture_state", lambda _: pytest.fail("asked"))
    pipe.chat("And?", max_new_tokens=2)


def test_an_encoder_refuses_a_tower_with_a_later_hook(model, found):
    packed = PictureEncoder(model.model)
    inputs = found.processor.image_processor(found.pictures[0])
    packed(**inputs)
    handle = model.model.vision_tower.encoder.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="a tower was changed, by a hook"):
        packed(**inputs)
    handle.remove()
    packed(**inputs)


def test_one_state_is_equal_to_itself(model, found):
    pipe = Pipeline(model, found.processor)
    before = encoder.picture_state(model.model)
    pipe.see(found.pictures[0])
    pipe.explain(found.pictures[0])
    assert encoder.picture_state(model.model) == before
