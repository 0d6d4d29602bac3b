"""The attention that can be asked for by name: what is refused before any weight is read, and that the rest runs.

flash-attn is not on this machine. A stand-in computes what it documents, behind transformers' own wrapper.
"""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
import transformers.modeling_utils
from transformers import PreTrainedModel
from transformers.integrations import flash_attention

import mg_fast
from bench.cases import all_cases
from bench.registry import NotHere
from mg_fast.errors import BackendError
from mg_fast.runtime import attention

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def installed(monkeypatch):
    """A module with the name of flash-attn, on a Hopper."""
    package = types.ModuleType("flash_attn")
    package.__spec__ = types.SimpleNamespace(name="flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test where a model is made."""

    def made(*given, **options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(mg_fast.pipeline.MiniGeminiForConditionalGeneration, "from_pretrained", made)


def test_each_reason(installed, monkeypatch):
    flash = attention.FLASH
    assert attention.why_not(flash, CUDA, torch.bfloat16) is attention.why_not(flash, CUDA) is None
    assert attention.why_not(flash, CPU, torch.bfloat16) == "flash-attn runs on GPUs, got the device cpu"
    assert attention.why_not(flash, CUDA, torch.float32) == "flash-attn takes float16 or bfloat16, got float32"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert attention.why_not(flash, CUDA) == "flash-attn needs a GPU of compute capability 8.0 or later, got 7.5"

    def broken(name):
        raise ImportError("undefined symbol: _ZN3c104cuda\nand more lines")

    monkeypatch.setattr(attention.importlib, "import_module", broken)
    assert attention.why_not(flash, CUDA) == (
        "flash-attn is installed, but cannot be imported: undefined symbol: _ZN3c104cuda"
    )
    assert all(attention.why_not(name, CPU, torch.float32) is None for name in ("sdpa", "eager"))


@pytest.mark.skipif(attention.importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_a_package_that_is_not_installed_is_named():
    with pytest.raises(BackendError, match=r"'flash_attention_2': expected the package flash-attn .*not installed"):
        attention.check(attention.FLASH, CUDA, torch.float16)


@pytest.mark.parametrize("name", ["flash", "flash_attention_3", "paged|sdpa", "", 2])
def test_unknown_names_are_refused(standard, no_weights, name):
    with pytest.raises(BackendError, match="attn_implementation: expected one of sdpa, eager, flash_attention_2, got"):
        mg_fast.load(standard, device="cpu", attn_implementation=name)


def test_flash_attention_on_a_cpu_is_refused(standard, no_weights):
    with pytest.raises(BackendError, match="flash-attn runs on GPUs, got the device cpu"):
        mg_fast.load(standard, device="cpu", attn_implementation="flash_attention_2")


@pytest.mark.parametrize("kind, dtype", [("llama", "auto"), ("bfloat16", "float32"), ("bfloat16", {"": "fp32"})])
def test_the_dtype_of_the_weights_counts(built, no_weights, installed, monkeypatch, kind, dtype):
    """`auto` is what the checkpoint has, of which only headers are read."""
    monkeypatch.setattr(mg_fast.pipeline, "_known_device", lambda device: CUDA)
    monkeypatch.setattr(mg_fast.pipeline, "check_everywhere", lambda backend, device: None)
    options = dict(template="vicuna_v1", device="cuda", attn_implementation="flash_attention_2")
    with pytest.raises(BackendError, match="flash-attn takes float16 or bfloat16, got float32"):
        mg_fast.load(built[kind], dtype=dtype, **options)
    with pytest.raises(AssertionError, match="a model was loaded"):
        mg_fast.load(built["bfloat16"], **options)


def only_flash(case):
    return case.providers["reference, flash attention"]


def test_the_benchmark_says_why_not(installed):
    """Both groups have it as a provider: CLIP's 577 tokens, and the prompt of a whole model."""
    clip = only_flash(all_cases()["clip/768-b1-bfloat16"])
    inputs = types.SimpleNamespace(x=torch.empty(1, 3, 336, 336, dtype=torch.bfloat16), module=None, device="cpu")
    with pytest.raises(NotHere, match="flash-attn runs on GPUs, got the device cpu"):
        clip(inputs)
    for name in ("7b-first-token-b1-bfloat16", "7b-hd-first-token-b1-bfloat16"):
        prefill = only_flash(all_cases()[f"end-to-end/{name}"])
        inner = types.SimpleNamespace(language_model=None)
        for device, dtype, reason in (("cpu", torch.bfloat16, "on GPUs"), ("cuda", torch.float32, "got float32")):
            model = types.SimpleNamespace(model=inner, dtype=dtype)
            with pytest.raises(NotHere, match=reason):
                prefill(types.SimpleNamespace(device=device, model=model))


def stand_in(query, key, value, attention_mask, query_length, is_causal, softmax_scale=None, **further):
    """flash-attn for [B, Q, heads, d]: causal masks end at the last key, and filling [B, S] is no key."""
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    groups, tokens, keys = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    mask = torch.ones(tokens, keys, dtype=torch.bool)
    mask = (mask.tril(keys - tokens) if is_causal else mask)[None, None]
    if attention_mask is not None:
        assert attention_mask.shape == (len(query), keys)
        # flash-attn leaves rows that attend to nothing at zero.
        mask = mask & attention_mask[:, None, None].bool() | torch.eye(tokens, keys, dtype=torch.bool)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=softmax_scale).transpose(1, 2)


def test_it_is_handed_over_and_decodes(standard, photo, drawing, monkeypatch):
    used = []
    monkeypatch.setattr(attention, "check", lambda *given: None)
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda self, *given, **options: True)
    monkeypatch.setattr(transformers.modeling_utils, "lazy_import_flash_attention", lambda *given, **options: None)
    monkeypatch.setattr(
        flash_attention,
        "_flash_attention_forward",
        lambda *given, **options: used.append(options["is_causal"]) or stand_in(*given, **options),
    )
    monkeypatch.setattr(flash_attention, "get_target_dtype", lambda query, module: None)
    answers = []
    for name in ("flash_attention_2", "sdpa"):
        pipeline = mg_fast.load(standard, device="cpu", template="vicuna_v1", attn_implementation=name)
        assert pipeline.model.config.text_config._attn_implementation == name
        batch = [("What is it?", [photo]), ("Hi.", []), ("Compare them.", [photo, drawing])]
        found = pipeline.chat_batch(batch, max_new_tokens=6, progress=False)
        turns = [pipeline.chat("What is it?", [photo], max_new_tokens=6), pipeline.chat("Why?", max_new_tokens=6)]
        answers.append([answer.token_ids for answer in (*found, *turns)])
        # The packed form of CLIP does not ask for it, so that all of these passes are causal.
        assert set(used) == ({True} if name == "flash_attention_2" else set())
        used.clear()
    assert answers[0] == answers[1]
