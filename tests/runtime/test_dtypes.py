"""Parts of one model may have different dtypes: numbers are cast where they pass from one part to the next."""

import copy
import itertools
import random
import re

import pytest
import torch

from mg_fast import BackendError, MiniGeminiForConditionalGeneration, Pipeline
from mg_fast.runtime.layer_dtypes import compute_dtype
from mg_fast.testing.tolerances import relative_error
from tests.families import family

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PARTS = ("vision_tower", "vision_tower_aux", "patch_mining", "mm_projector", "language_model", "lm_head")
QUESTION = "What is written in the picture?"


@pytest.fixture(autouse=True)
def quick(one_thread):
    """All models here are tiny, so one thread is fastest."""


def part(model, name):
    return model.lm_head if name == "lm_head" else getattr(model.model, name)


def in_dtypes(found, dtypes):
    """The model with its parts in these dtypes, and a copy with the same rounded weights that computes in float32."""
    model = MiniGeminiForConditionalGeneration.from_pretrained(found.folder, template=found.processor.template)
    for name, dtype in zip(PARTS, dtypes):
        part(model, name).to(dtype)
    return model, copy.deepcopy(model).float()


def assert_near(actual, exact, dtypes, context):
    # The bound is a unit in the last place of the coarsest part, which a few layers have enlarged.
    bound = 64 * max(torch.finfo(dtype).eps for dtype in dtypes) if set(dtypes) != {torch.float32} else 1e-4
    assert actual.isfinite().all() and relative_error(actual, exact) <= min(bound, 0.15), context


def assert_works(found, dtypes, backend=None):
    model, exact = in_dtypes(found, dtypes)
    inputs = found.processor(text=f"<image>\n{QUESTION}", images=found.pictures[0], return_tensors="pt")
    pipeline = Pipeline(model, found.processor, backend=backend)
    with torch.no_grad():
        expected = exact(**inputs)
        out = model(**inputs, labels=inputs["input_ids"])
    assert_near(out.logits, expected.logits, dtypes, "logits")
    assert out.loss.isfinite()
    # The pipeline uses the packed encoder, unless the backend is the reference.
    seen = pipeline.see(found.pictures[0])
    assert_near(seen, expected.image_hidden_states[0], dtypes, "image tokens")
    assert seen.dtype == dtypes[PARTS.index("mm_projector")]
    answer = pipeline.chat(QUESTION, [found.pictures[0]], max_new_tokens=3)
    plain = model.generate(
        **found.processor(text=rendered(pipeline), images=found.pictures[0], return_tensors="pt"),
        max_new_tokens=3,
        do_sample=False,
    )
    assert len(answer.token_ids) == 3 or answer.finish_reason == "stop"
    assert plain.shape[1] > inputs["input_ids"].shape[1]
    weights = pipeline.explain(found.pictures[0], QUESTION, max_new_tokens=2).weights
    torch.testing.assert_close(
        weights, Pipeline(exact, found.processor).explain(found.pictures[0]).weights, rtol=0, atol=0.05
    )


def rendered(pipeline):
    from mg_fast.models.templates import render

    return render(pipeline.template, [(f"<image>\n{QUESTION}", None)])


@pytest.mark.slow
@pytest.mark.parametrize(
    "base, other", itertools.permutations(DTYPES, 2), ids=lambda dtype: str(dtype).removeprefix("torch.")
)
@pytest.mark.parametrize("alone", PARTS)
def test_one_part_in_another_dtype(alone, base, other):
    assert_works(family("standard"), [other if name == alone else base for name in PARTS])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "name, backend", [("hd", None), ("standard", "reference"), ("mgm-gemma", None), ("mgm-mixtral", "torch")]
)
def test_any_mixture(name, backend, seed):
    assert_works(family(name), random.Random(seed).choices(DTYPES, k=len(PARTS)), backend)


def test_gradients_pass_the_seams():
    found = family("standard")
    model, _ = in_dtypes(
        found, [torch.float32, torch.bfloat16, torch.float32, torch.bfloat16, torch.float32, torch.bfloat16]
    )
    inputs = found.processor(text=f"<image>\n{QUESTION}", images=found.pictures[0], return_tensors="pt")
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name in PARTS:
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in part(model, name).parameters()), name


def test_autocast_is_left_alone():
    """Autocast casts by itself, and float32 weights remain wider than its results."""
    found = family("standard")
    inputs = found.processor.image_processor(found.pictures[0])
    with torch.no_grad():
        expected = found.model.get_image_features(**inputs).pooler_output
        with torch.autocast("cpu", dtype=torch.bfloat16):
            tokens = found.model.get_image_features(**inputs).pooler_output
    assert tokens.dtype == torch.bfloat16
    assert_near(tokens, expected, [torch.bfloat16], "autocast")


INSIDE = [
    *(f"model.patch_mining.vlm_uni_{name}_projector" for name in ("query", "aux", "val")),
    *(f"model.patch_mining.vlm_uni_{name}_projector.{layer}" for name in ("query", "aux", "val") for layer in (0, 1)),
    "model.mm_projector.0",
    "model.mm_projector.2",
]


def assert_near_in_float32(model, found, backend, text):
    exact = Pipeline(copy.deepcopy(model).float(), found.processor)
    pipeline = Pipeline(model, found.processor, backend=backend)
    dtypes = [torch.bfloat16]
    assert_near(pipeline.see(found.pictures[0]), exact.see(found.pictures[0]), dtypes, text)
    assert pipeline.chat(QUESTION, [found.pictures[0]], max_new_tokens=2).token_ids
    weights = pipeline.explain(found.pictures[0]).weights
    torch.testing.assert_close(weights, exact.explain(found.pictures[0]).weights, rtol=0, atol=0.05)
    return pipeline


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", INSIDE)
def test_a_layer_of_a_part_in_float32(name, backend):
    """Users often keep LayerNorms in float32 in a model of 16 bits."""
    found = family("standard")
    model = MiniGeminiForConditionalGeneration.from_pretrained(found.folder, dtype=torch.bfloat16)
    model.get_submodule(name).float()
    assert_near_in_float32(model, found, backend, name)


def test_hooks_and_layers_in_float32_at_once():
    found = family("standard")
    model = MiniGeminiForConditionalGeneration.from_pretrained(found.folder, dtype=torch.bfloat16)
    called = []
    for name in ("patch_mining.vlm_uni_val_projector", "mm_projector"):
        projector = model.model.get_submodule(name)
        projector[0].float()
        projector.register_forward_hook(lambda *_: called.append(1))
    Pipeline(model, found.processor).see(found.pictures[0])
    assert len(called) == 2


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", ["mm_projector", "lm_head", "vlm_uni_val_projector"])
def test_a_trained_copy_in_float32(name, backend):
    """peft computes with the copy while its adapters are on, and with the original while they are off."""
    from peft import LoraConfig, get_peft_model

    found = family("standard")
    model = MiniGeminiForConditionalGeneration.from_pretrained(found.folder, dtype=torch.bfloat16)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[name])).eval()
    wrapper = next(module for path, module in model.named_modules() if path.endswith(name))
    wrapper.modules_to_save["default"].float()
    assert compute_dtype(wrapper) == torch.float32
    pipeline = assert_near_in_float32(model, found, backend, name)
    with tuned.disable_adapter():
        assert compute_dtype(wrapper) == torch.bfloat16
        assert pipeline.see(found.pictures[0]).dtype == torch.bfloat16
        pipeline.reset()
        assert pipeline.chat(QUESTION, [found.pictures[0]], max_new_tokens=2).token_ids


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(
    "part, layer",
    [
        ("vision_tower", "encoder.layers.0.mlp.fc1"),
        ("vision_tower", "encoder.layers.0.self_attn.q_proj"),
        ("vision_tower_aux", "vision_stages.1.blocks.0.mlp.fc1"),
        ("vision_tower_aux", "vision_stages.1.blocks.0.conv_dw"),
        ("language_model", "layers.0.mlp.up_proj"),
        ("language_model", "layers.1.self_attn.q_proj"),
    ],
)
def test_a_layer_that_nothing_casts_for_is_named(part, layer, backend):
    """Inside towers and the language model, layers call each other without a cast between them."""
    found = family("standard")
    model = MiniGeminiForConditionalGeneration.from_pretrained(found.folder, dtype=torch.bfloat16)
    model.model.get_submodule(f"{part}.{layer}").float()
    expected = (
        rf"^{part}: expected all of its layers in one dtype, got {re.escape(layer)}.weight in torch.float32 "
        "among torch.bfloat16"
    )
    with pytest.raises(BackendError, match=expected):
        Pipeline(model, found.processor, backend=backend).chat(QUESTION, [found.pictures[0]], max_new_tokens=2)
