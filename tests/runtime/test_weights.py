"""One set of rules decides whether modules compute only what their weights say, and whether these have changed."""

import copy
import gc
import pickle
import re
import types

import pytest
import torch
from timm.models.convnext import ConvNeXt
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoder

from mg_fast.decoding import model_runner
from mg_fast.integrations.accelerate import timm_convnext
from mg_fast.models.mini_gemini.vision import low_resolution_features
from mg_fast.modules import ConvNeXtPyramid
from mg_fast.modules import convnext_channels_last as channels_last
from mg_fast.modules.clip import PackedClip
from mg_fast.runtime.weights import Fingerprint, why_more_than_weights, why_not_plain
from tests.families import family

KNOWN = {nn.Sequential, nn.Linear}


def layers():
    return nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3)))


class Other(nn.Linear):
    pass


class Quantized(torch.Tensor):
    pass


def quantize(layer):
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(Quantized))


CHANGES = {
    "1.0 has hooks on its Linear": [
        lambda layer: layer.register_forward_hook(print),
        lambda layer: layer.register_forward_pre_hook(print),
        lambda layer: layer.register_full_backward_hook(print),
        lambda layer: layer.register_full_backward_pre_hook(print),
    ],
    "the forward of 1.0's Linear was replaced": [lambda layer: setattr(layer, "forward", layer.forward)],
    "1.0 is .*Other, expected a plain layer": [lambda layer: setattr(layer, "__class__", Other)],
    "the weight of 1.0's Linear is Quantized, expected a plain parameter": [quantize],
}


@pytest.mark.parametrize(
    "reason, change", [(reason, change) for reason, changes in CHANGES.items() for change in changes]
)
def test_one_layer_and_a_module_around_it_are_judged_alike(reason, change):
    module = layers()
    assert why_more_than_weights(module, KNOWN) is None and why_not_plain("1.0", module[1][0], known=KNOWN) is None
    change(module[1][0])
    said = why_more_than_weights(module, KNOWN)
    assert said == why_not_plain("1.0", module[1][0], known=KNOWN)
    assert re.match(reason, said)


@pytest.mark.parametrize(
    "register", ["forward_pre_hook", "forward_hook", "full_backward_hook", "full_backward_pre_hook"]
)
def test_hooks_on_all_modules_count_for_one_layer(register):
    handle = getattr(nn.modules.module, f"register_module_{register}")(lambda *_: None)
    try:
        assert "registered for all modules" in why_not_plain("it", nn.Linear(2, 2))
        assert "registered for all modules" in why_more_than_weights(layers(), KNOWN)
    finally:
        handle.remove()


def test_a_module_that_is_called_has_its_own_hooks_run():
    module = layers()
    module.register_forward_hook(lambda *_: None)
    assert "it has hooks" in why_more_than_weights(module, KNOWN)
    assert why_more_than_weights(module, KNOWN, called=True) is None


def test_weights_that_are_read_must_be_there():
    layer = nn.Linear(2, 2, bias=False)
    assert why_not_plain("it", layer) is None
    assert (
        why_not_plain("it", layer, reads=("weight", "bias"))
        == "the bias of it's Linear is NoneType, expected a plain parameter"
    )
    quantize(layer)
    assert why_not_plain("it", layer, reads=()) is None


def tower(kind=CLIPVisionModel):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    return kind(CLIPVisionConfig(**sizes)).eval()


class HalvedAttention(CLIPAttention):
    def forward(self, *args, **kwargs):
        out, weights = super().forward(*args, **kwargs)
        return out / 2, weights


class HalvedEncoder(CLIPEncoder):
    def forward(self, *args, **kwargs):
        inputs = kwargs.pop("inputs_embeds") / 2
        return super().forward(inputs_embeds=inputs, **kwargs)


class HalvedTower(CLIPVisionModel):
    def forward(self, pixels, **kwargs):
        return super().forward(pixels / 2, **kwargs)


def test_a_tower_with_layers_of_a_subclass_is_not_packed():
    """All layers are of the subclass here, so the class of the first layer does not show what is usual."""
    halved = tower()
    for layer in halved.encoder.layers:
        layer.self_attn.__class__ = HalvedAttention
    with pytest.raises(ValueError, match="self_attn is .*HalvedAttention, expected a plain layer"):
        PackedClip.from_tower(halved)


@pytest.mark.parametrize("kind", [HalvedEncoder, HalvedTower])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_tower_with_a_forward_of_its_own_is_called(kind, backend):
    halved = tower(kind if kind is HalvedTower else CLIPVisionModel)
    if kind is HalvedEncoder:
        halved.encoder.__class__ = kind
    with pytest.raises(ValueError, match=f"{kind.__name__}, expected a plain layer"):
        PackedClip.from_tower(halved)
    views = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        expected = halved(views, output_hidden_states=True).hidden_states[-2][:, 1:]
        assert torch.equal(low_resolution_features(halved, views, backend=backend), expected)


def test_a_tower_called_with_other_weights_takes_its_own_form(monkeypatch):
    """torch.func.functional_call puts plain tensors in place of parameters, which are still read."""
    runs = []
    run_tower = channels_last.run_tower
    monkeypatch.setattr(channels_last, "run_tower", lambda *args: runs.append(1) or run_tower(*args))
    pyramid = ConvNeXtPyramid.from_dims((8, 16, 24, 32), (1, 1, 1, 1))
    pixels, others = torch.randn(1, 3, 64, 64), {name: 2 * p.detach() for name, p in pyramid.named_parameters()}
    ours = torch.func.functional_call(pyramid, others, (pixels,), {"backend": "torch"})
    assert runs
    theirs = torch.func.functional_call(pyramid, others, (pixels,), {"backend": "reference"})
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-4) for one, other in zip(ours, theirs))


def test_a_stage_that_is_traced_with_fake_weights_is_plain():
    stage, mode = ConvNeXt(dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_classes=0).eval().stages[1], FakeTensorMode()
    for part in stage.modules():
        part._parameters.update(
            {name: mode.from_tensor(weight) for name, weight in part._parameters.items() if weight is not None}
        )
    assert timm_convnext.why_not_a_first_version(stage, timm_convnext.roles_in_a_stage()) is None


class Language(nn.Sequential):
    """A language model that appears to be on one GPU."""

    def parameters(self, recurse=True):
        return iter([types.SimpleNamespace(device=torch.device("cuda", 0))])


HOOKS = {
    "all modules": lambda language, head: nn.modules.module.register_module_forward_hook(lambda *_: None),
    "backward": lambda language, head: language[0].register_full_backward_hook(lambda *_: None),
    "within the head": lambda language, head: head[0].register_forward_hook(lambda *_: None),
    "forward": lambda language, head: language[0].register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("where", HOOKS)
def test_passes_are_not_captured_with_hooks_anywhere(where):
    own = family("standard")
    language, head = Language(nn.Linear(2, 2)), Language(nn.Linear(2, 2))
    runner = model_runner.ModelRunner(
        types.SimpleNamespace(text_config=own.model.text_config, language_model=language, head=head)
    )
    assert runner.graphs_refused(512) is None
    # Quantized weights are captured as they are.
    quantize(language[0])
    assert runner.graphs_refused(512) is None
    handle = HOOKS[where](language, head)
    try:
        assert runner.graphs_refused(512) == "hooks on the language model would run only while a graph is captured"
    finally:
        handle.remove()


def test_a_fingerprint_says_what_was_written_and_what_was_moved():
    module = layers()
    taken = Fingerprint([module])
    assert taken == Fingerprint([module]) and not taken.weights_written()
    with torch.no_grad():
        module[0].weight.add_(1)
    written = Fingerprint([module])
    assert taken.weights_written() and taken != written and taken.places == written.places
    module.double()
    moved = Fingerprint([module])
    assert not written.weights_written() and moved.places != written.places and moved != written


def test_a_fingerprint_keeps_no_weights_and_ignores_those_that_are_gone():
    module = layers()
    taken = Fingerprint([module])
    with torch.no_grad():
        module[0].weight.add_(1)
    assert taken.weights_written()
    del module
    gc.collect()
    assert not taken.weights_written()


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda taken: pickle.loads(pickle.dumps(taken))])
def test_a_copy_of_a_fingerprint_knows_nothing(again):
    module = layers()
    copied = again(Fingerprint([module]))
    with torch.no_grad():
        module[0].weight.add_(1)
    assert not copied.weights_written() and copied == Fingerprint()


def test_inference_weights_count_no_changes():
    with torch.inference_mode():
        module = layers()
        taken = Fingerprint([module])
        module[0].weight.add_(1)
    assert not taken.weights_written() and taken == Fingerprint([module])
