"""All settings that change float arithmetic are in one key, and everything that is kept or captured goes by it."""

import contextlib

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mg_fast.decoding import Decoder, model_runner
from mg_fast.models.mini_gemini.encoder import PictureEncoder
from mg_fast.runtime.graphs import Captures, GraphCache
from mg_fast.runtime.numerics import numerics
from tests.families import family

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
CUDA, CUDNN, MKLDNN = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn


@contextlib.contextmanager
def setting(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def called(set_to, value, before):
    set_to(value)
    try:
        yield
    finally:
        set_to(before)


OTHERWISE = {
    **{
        f"float32 in {name}": lambda part=part: setting(
            part, "fp32_precision", "ieee" if part.fp32_precision != "ieee" else "tf32"
        )
        for name, part in {
            "products of cuBLAS": CUDA.matmul,
            "convolutions of cuDNN": CUDNN.conv,
            "recurrent layers of cuDNN": CUDNN.rnn,
            "products of oneDNN": MKLDNN.matmul,
            "convolutions of oneDNN": MKLDNN.conv,
            "recurrent layers of oneDNN": MKLDNN.rnn,
        }.items()
    },
    "float16 sums": lambda: setting(CUDA.matmul, "allow_fp16_reduced_precision_reduction", False),
    "bfloat16 sums": lambda: setting(CUDA.matmul, "allow_bf16_reduced_precision_reduction", False),
    "bfloat16 sums in parts": lambda: called(
        lambda value: setattr(CUDA.matmul, "allow_bf16_reduced_precision_reduction", value),
        (False, False),
        (True, True),
    ),
    "float16 accumulation": lambda: setting(CUDA.matmul, "allow_fp16_accumulation", True),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast in float16": lambda: torch.autocast("cpu", torch.float16),
    "default dtype": lambda: called(torch.set_default_dtype, torch.float64, torch.float32),
    "attention without flash": lambda: sdpa_kernel(
        [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION]
    ),
    "attention step by step": lambda: sdpa_kernel(SDPBackend.MATH),
    "other attention first": lambda: sdpa_kernel(
        [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION],
        set_priority=True,
    ),
    "attention's sums in 16 bits": lambda: called(CUDA.allow_fp16_bf16_reduction_math_sdp, True, False),
    "no oneDNN": lambda: MKLDNN.flags(enabled=False),
    "no cuDNN": lambda: setting(CUDNN, "enabled", False),
    "tried kernels of cuDNN": lambda: setting(CUDNN, "benchmark", not CUDNN.benchmark),
    "deterministic kernels of cuDNN": lambda: setting(CUDNN, "deterministic", True),
    "deterministic kernels": lambda: called(torch.use_deterministic_algorithms, True, False),
}


@pytest.mark.parametrize("what", OTHERWISE)
def test_every_setting_is_in_the_key(what):
    before = numerics(CPU)
    with OTHERWISE[what]():
        otherwise = numerics(CPU)
        assert otherwise != before and hash(otherwise) != hash(before) and repr(otherwise) != repr(before)
    assert numerics(CPU) == before


def test_all_of_a_setting_for_several_backends():
    before = numerics(CPU)
    set_to = torch.set_float32_matmul_precision
    keys = set()
    try:
        for precision in ("high", "medium"):
            set_to(precision)
            keys.add(numerics(CPU))
    finally:
        set_to("highest")
        CUDA.matmul.fp32_precision, MKLDNN.matmul.fp32_precision = before[0], before[3]
    assert len(keys) == 2 and numerics(CPU) == before


# The settings that each cache missed when it had a key of its own.
MISSED_BY_IMAGE_TOKENS = [
    "attention step by step",
    "no oneDNN",
    "bfloat16 sums",
    "default dtype",
    "deterministic kernels",
]
MISSED_BY_KEYS_AND_VALUES = [
    "attention step by step",
    "no oneDNN",
    "float32 in convolutions of oneDNN",
    "bfloat16 sums",
]
MISSED_BY_GRAPHS = ["attention step by step", "bfloat16 sums", "float16 accumulation", "deterministic kernels"]
MISSED_BY_PASSES = [*MISSED_BY_GRAPHS, "float32 in convolutions of cuDNN"]


@pytest.fixture
def own():
    return family("standard")


@pytest.mark.parametrize("what", MISSED_BY_IMAGE_TOKENS)
def test_image_tokens_seen_otherwise_are_not_given_again(own, what):
    pipeline = own.pipeline()
    pipeline.see(own.pictures[0])
    with OTHERWISE[what]():
        before = len(pipeline.vision.cache)
        pipeline.see(own.pictures[0])
        assert len(pipeline.vision.cache) == before + 1
    pipeline.see(own.pictures[0])
    assert len(pipeline.vision.cache) == before + 1


def test_image_tokens_of_another_attention_are_its_own(own):
    pipeline = own.pipeline()
    pipeline.see(own.pictures[0])
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.equal(pipeline.see(own.pictures[0]), own.pipeline().see(own.pictures[0]))


@pytest.mark.parametrize("what", MISSED_BY_KEYS_AND_VALUES)
def test_keys_and_values_computed_otherwise_are_not_reused(own, what):
    decoder = Decoder(own.model)
    ids = torch.randint(3, 400, (1, 20), generator=torch.Generator().manual_seed(0))

    def reused():
        request = decoder.request()
        own.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=2,
            do_sample=False,
            custom_generate=request,
        )
        return request.reused

    assert reused() == 0 and reused() > 0
    with OTHERWISE[what]():
        assert reused() == 0


@pytest.mark.parametrize("what", MISSED_BY_GRAPHS)
def test_a_graph_of_a_picture_is_of_one_arithmetic(own, monkeypatch, what):
    encoder, captured = PictureEncoder(own.model.model), []
    monkeypatch.setattr(encoder, "_graphs", GraphCache(4, Captures()))
    monkeypatch.setattr(encoder, "_capture", lambda *_: captured.append(1))
    inputs = own.processor.image_processor(own.pictures[0])
    pixels = inputs["pixel_values"], inputs["pixel_values_hr"]

    def replay():
        with torch.inference_mode():
            encoder._replay(pixels, None)
        return len(captured)

    assert replay() == replay() == 1
    with OTHERWISE[what]():
        assert replay() == 2
    assert replay() == 2


@pytest.mark.parametrize("what", MISSED_BY_PASSES)
def test_a_graph_of_a_pass_is_of_one_arithmetic(own, monkeypatch, what):
    monkeypatch.setattr(model_runner.ModelRunner, "graphs_refused", lambda self, capacity: None)
    monkeypatch.setattr(model_runner._Graph, "_capture", lambda self: None)
    passes = Decoder(own.model).runner
    sequences = passes.sequences(1, 64)

    def graphs():
        sequences.cache.length = 0
        with torch.no_grad():
            passes.prefill(sequences, torch.zeros(1, 20, own.model.config.text_config.hidden_size))
        return len(sequences.graphs)

    assert graphs() == graphs() == 1
    with OTHERWISE[what]():
        assert graphs() == 2
    assert graphs() == 2
