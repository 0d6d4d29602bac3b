"""Every backend calls layers that are more than their weights: adapters, hooks, parametrized, quantized, offloaded."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import mg_fast
from mg_fast import MiniGeminiForConditionalGeneration, Pipeline
from mg_fast.testing.tolerances import IMAGE_TOKENS, relative_error
from tests.families import family

BACKENDS = pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
PROJECTORS = ("vlm_uni_query_projector", "vlm_uni_aux_projector", "vlm_uni_val_projector")


@pytest.fixture(autouse=True)
def quick(one_thread):
    """All models here are tiny, so one thread is fastest."""


@pytest.fixture(params=["standard", "hd"])
def found(request):
    return family(request.param)


@pytest.fixture
def model(found):
    return MiniGeminiForConditionalGeneration.from_pretrained(found.folder)


def tokens(model, found, backend=None, **options):
    return Pipeline(model, found.processor, backend=backend, **options).see(found.pictures[0])


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


def hooked(linear):
    linear.register_forward_hook(lambda module, args, output: 2 * output)


def hooked_before(linear):
    linear.register_forward_pre_hook(lambda module, args: (2 * (args[0] + 1),))


def parametrized(linear):
    parametrize.register_parametrization(linear, "weight", Twice())


def forward_replaced(linear):
    original = linear.forward
    linear.forward = lambda x: 2 * original(x)


# A change of a layer, and the weight and bias that would make a plain layer compute the same.
CHANGES = {
    "forward hook": (hooked, lambda w, b: (2 * w, 2 * b)),
    "forward pre-hook": (hooked_before, lambda w, b: (2 * w, b + 2 * w.sum(1))),
    "parametrized": (parametrized, lambda w, b: (2 * w, b)),
    "replaced forward": (forward_replaced, lambda w, b: (2 * w, 2 * b)),
}


@pytest.mark.slow
@BACKENDS
@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("change", CHANGES)
def test_mining_calls_what_is_not_plain(model, found, change, projector, backend):
    plain = copy.deepcopy(model)
    alter, weights = CHANGES[change]
    alter(getattr(model.model.patch_mining, projector)[1])
    layer = getattr(plain.model.patch_mining, projector)[1]
    with torch.no_grad():
        layer.weight.copy_((changed := weights(layer.weight, layer.bias))[0])
        layer.bias.copy_(changed[1])
    expected = tokens(plain, found, "reference")
    assert relative_error(tokens(model, found, backend), expected) <= IMAGE_TOKENS
    # A change of the key's bias alone would cancel in the softmax; every change here does more than that.
    assert relative_error(expected, tokens(found.model, found, "reference")) > 1e-3


@BACKENDS
def test_a_hook_on_a_whole_projector_runs(model, found, backend):
    seen = []
    model.model.patch_mining.vlm_uni_val_projector.register_forward_hook(
        lambda module, args, output: seen.append(output.shape)
    )
    assert relative_error(tokens(model, found, backend), tokens(found.model, found)) <= IMAGE_TOKENS and seen


@BACKENDS
def test_quantized_mining_is_called(model, found, backend):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    mining = model.model.patch_mining
    quantize_(mining, Int8WeightOnlyConfig())
    plain = copy.deepcopy(found.model)
    for name in PROJECTORS:
        with torch.no_grad():
            getattr(plain.model.patch_mining, name)[1].weight.copy_(getattr(mining, name)[1].weight.dequantize())
    assert relative_error(tokens(model, found, backend), tokens(plain, found, "reference")) <= 1e-4
    assert relative_error(tokens(plain, found), tokens(found.model, found)) > 1e-4


@pytest.mark.slow
@BACKENDS
def test_adapters_on_everything_merge_to_the_same_tokens(model, found, backend):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = tokens(model, found)
    pipeline = Pipeline(model, found.processor, backend=backend)
    tuned = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    ).eval()
    adapted, answer = (
        pipeline.see(found.pictures[0]),
        pipeline.chat("What?", [found.pictures[0]], max_new_tokens=6).token_ids,
    )
    shown = pipeline.explain(found.pictures[0]).weights
    pipeline.reset()
    merged = Pipeline(tuned.merge_and_unload(), found.processor, backend=backend)
    assert relative_error(adapted, merged.see(found.pictures[0])) <= IMAGE_TOKENS
    assert relative_error(adapted, base) > 0.1
    assert merged.chat("What?", [found.pictures[0]], max_new_tokens=6).token_ids == answer
    torch.testing.assert_close(shown, merged.explain(found.pictures[0]).weights, rtol=0, atol=5e-6)


@BACKENDS
def test_adapters_of_mining_are_trained(model, found, backend):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).train()
    inputs = found.processor(text="<image>\nWhat?", images=found.pictures[0], return_tensors="pt")
    with mg_fast.use_backend(backend):
        tuned(**inputs, labels=inputs["input_ids"]).loss.backward()
    gradients = {name: p.grad for name, p in tuned.named_parameters() if "patch_mining" in name and p.requires_grad}
    assert len(gradients) == 2 * len(PROJECTORS)
    for name, gradient in gradients.items():
        assert gradient is not None and gradient.abs().max() > 0, name


@pytest.mark.slow
@BACKENDS
@pytest.mark.parametrize(
    "part", ["vision_tower", "vision_tower.encoder", "vision_tower.encoder.layers.1.mlp", "vision_tower_aux"]
)
def test_hooks_on_the_towers_run(model, found, part, backend):
    called = []
    model.model.get_submodule(part).register_forward_hook(lambda *_: called.append(1))
    assert relative_error(tokens(model, found, backend), tokens(found.model, found)) <= IMAGE_TOKENS and called


@pytest.mark.parametrize(
    "part", ["patch_mining.vlm_uni_aux_projector.1", "vision_tower_aux.vision_stages.1.blocks.0.mlp.fc1"]
)
def test_backward_hooks_run(model, found, part):
    called = []
    model.model.get_submodule(part).register_full_backward_hook(lambda *_: called.append(1))
    model.get_image_features(**found.processor.image_processor(found.pictures[0])).pooler_output.sum().backward()
    assert called


def test_plain_mining_reads_its_weights(found):
    """Projections that are plain are not called, because calling them takes fifty times the operations."""
    assert not any(
        isinstance(p, mg_fast.ops.reference.CalledProjection) for p in found.model.model.patch_mining.projections()
    )


@BACKENDS
def test_hooks_on_all_modules_run(model, found, backend):
    """A hook that is registered for every module, as profilers and probes register theirs, doubles the result."""
    pipeline = Pipeline(model, found.processor, backend=backend)
    before = pipeline.see(found.pictures[0])
    changed = (
        model.model.patch_mining.vlm_uni_val_projector[1],
        model.model.vision_tower_aux.vision_stages[1].blocks[0].mlp.fc1,
    )
    plain, called = copy.deepcopy(model), set()

    def double(module, args, output):
        called.add(module)
        return 2 * output if module in changed else None

    handle = nn.modules.module.register_module_forward_hook(double)
    try:
        doubled = pipeline.see(found.pictures[0])
    finally:
        handle.remove()
    with torch.no_grad():
        for layer in (
            plain.model.patch_mining.vlm_uni_val_projector[1],
            plain.model.vision_tower_aux.vision_stages[1].blocks[0].mlp.fc1,
        ):
            layer.weight.mul_(2)
            layer.bias.mul_(2)
    assert called >= {*model.model.patch_mining.modules(), *changed}
    assert relative_error(doubled, tokens(plain, found, "reference")) <= IMAGE_TOKENS < relative_error(doubled, before)
    assert relative_error(pipeline.see(found.pictures[0]), before) <= IMAGE_TOKENS


def test_counting_flop_changes_nothing(model):
    """The hooks that torch's counter registers for all modules only observe."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        assert not any(
            isinstance(p, mg_fast.ops.reference.CalledProjection) for p in model.model.patch_mining.projections()
        )
