"""Whole models at the published sizes, with random weights made on the device, and what is asked of them."""

import gc
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from transformers import LogitsProcessor
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

import mg_fast
from mg_fast import MiniGeminiForConditionalGeneration, MiniGeminiProcessor, quantization
from mg_fast.models.mini_gemini.checkpoint import decide_template, load_tokenizer
from mg_fast.models.mini_gemini.processing import MiniGeminiImageProcessor
from mg_fast.models.templates import stop_ids
from mg_fast.testing import random_checkpoints

from .settings import picture

# The number of tokens of an answer if more than the first is timed, and how many of them have their logits compared.
ANSWER, COMPARED = 33, 4


@dataclass(frozen=True)
class Size:
    """A size of `random_checkpoints.SIZES` and how it is run.

    Args:
        devices: on which it is run without being named.
        quantize: how its weights are rounded.
    """

    size: str
    hd: bool
    dtype: str
    devices: tuple[str, ...]
    quantize: str | None = None

    @property
    def name(self) -> str:
        return "-".join([self.size, *["hd"] * self.hd, *[self.quantize] * (self.quantize is not None)])


SIZES = (
    Size("demo", False, "float32", ("cpu",)),
    Size("2b", False, "bfloat16", ("cuda",)),
    Size("7b", False, "bfloat16", ("cuda",)),
    Size("7b", True, "bfloat16", ("cuda",)),
    Size("13b", False, "bfloat16", ("cuda",)),
    Size("34b", False, "bfloat16", ("cuda",)),
    Size("7b", False, "bfloat16", ("cuda",), "int8"),
    # A language model that is large enough to time on a CPU, behind narrow towers.
    Size("0.5b", False, "float32", ()),
    Size("0.5b", False, "bfloat16", ()),
    Size("0.5b", False, "bfloat16", (), "int8"),
    Size("tiny", False, "float32", ()),
)


class ForcedAnswer(LogitsProcessor):
    """Makes `generate` give the tokens that are set, and keeps the first logits and two times.

    Attributes:
        logits: [vocabulary] each, of the last sequence's first tokens, in the model's dtype, which they were computed
            in.
        times: in seconds, when the first and the last token's logits were there.
    """

    def __init__(self, answer: Sequence[int], dtype: torch.dtype):
        self.answer, self.dtype = answer, dtype
        self.steps = 0
        self.logits: list[torch.Tensor] = []
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.steps in (0, len(self.answer) - 1):
            self.times.append(now(scores.device.type))
        if self.steps < COMPARED:
            self.logits.append(scores[-1].to(self.dtype))
        forced = torch.full_like(scores, float("-inf"))
        forced[:, self.answer[min(self.steps, len(self.answer) - 1)]] = 0.0
        self.steps += 1
        return forced


def now(device: str) -> float:
    """The host's clock in seconds, once the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass
class Session:
    """A model with what goes in, shared by the cases of its size.

    Attributes:
        answer: the tokens that every provider is made to answer.
        request_s: seconds of the reference for a whole answer, once they are measured.
    """

    device: str
    hd: bool
    model: MiniGeminiForConditionalGeneration
    processor: MiniGeminiProcessor
    photo: Image.Image
    answer: list[int]
    pipelines: dict[tuple, mg_fast.Pipeline] = field(default_factory=dict)
    request_s: float | None = None

    def pipeline(self, backend: str, *, graphs: bool = True, **options) -> mg_fast.Pipeline:
        """Returns the pipeline with these options, which all cases that ask for it share.

        By default it keeps nothing: every picture is encoded, and every prompt is computed.

        Args:
            graphs: capture CUDA graphs. A pipeline without them serves to measure memory, since the allocator's peak
                leaves out what lies in a graph's pool.
            options: of Pipeline.
        """
        key = (backend, graphs, *options.items())
        if key not in self.pipelines:
            options = {"image_cache_bytes": 0, "kv_cache_bytes": 0, **options}
            pipeline = mg_fast.Pipeline(self.model, self.processor, backend=backend, cuda_graphs=graphs, **options)
            self.pipelines[key] = pipeline
        return self.pipelines[key]

    def forced(self, tokens: int) -> ForcedAnswer:
        """Forces this many tokens of the answer."""
        return ForcedAnswer(self.answer[:tokens], self.model.dtype)


# There is one session or checkpoint at a time: two of the largest model would not fit.
_kept: dict[tuple, Session | tempfile.TemporaryDirectory] = {}


def release() -> None:
    """Frees what was shared by the cases of one size."""
    _kept.clear()
    _free()


def _free() -> None:
    """Frees memory that nothing refers to any more."""
    # A pipeline and its own conversation hold each other.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def session(size: Size, device: str) -> Session:
    """The model of a size on a device, made when it is first asked for; another one is freed before."""
    key = (size, device)
    if key not in _kept:
        release()
        _kept[key] = make_session(size, device)
    return _kept[key]


def make_session(size: Size, device: str) -> Session:
    model = make_model(size, device)
    template = "gemma" if model.config.text_config.model_type == "gemma" else "vicuna_v1"
    with tempfile.TemporaryDirectory() as folder:
        random_checkpoints.make_tokenizer(Path(folder), model.config.text_config.vocab_size, template)
        tokenizer = load_tokenizer(Path(folder))
    template = decide_template(model.config, tokenizer, None if template == "gemma" else template)
    processor = MiniGeminiProcessor(MiniGeminiImageProcessor.from_config(model.config), tokenizer, template=template)
    model.generation_config.eos_token_id = stop_ids(template, tokenizer)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    # These are whole pieces of text: the tokens before them are bytes and special tokens.
    answer = random.Random(0).choices(range(300, len(tokenizer)), k=ANSWER)
    return Session(device, size.hd, model, processor, picture(), answer)


def make_model(size: Size, device: str) -> MiniGeminiForConditionalGeneration:
    """A size's model in its dtype, whose weights are drawn once, on the device."""
    config = random_checkpoints.make_config(size.size, hd=size.hd)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, size.dtype))
    try:
        with torch.device(device), no_init_weights():
            model = MiniGeminiForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.tie_weights()
    torch.manual_seed(0)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".gamma"):
                parameter.uniform_(0.2, 0.8)
            elif parameter.dim() == 1:
                parameter.normal_(0.0 if name.endswith("bias") else 1.0, 0.1)
            else:
                # This width keeps the size of what goes in.
                parameter.normal_(0.0, 0.02 if parameter is embedding else parameter[0].numel() ** -0.5)
    if size.quantize is not None:
        from torchao.quantization import quantize_

        named = quantization.named_config(size.quantize, config.text_config, {"": device}, model.dtype)
        quantize_(model.model.language_model.layers, named.quant_type)
        quantization.finish(model)
    return model


def checkpoint(size: Size, device: str) -> tuple[Path, str]:
    """The folder of a size's checkpoint, written when it is first asked for, and the device."""
    key = (size, device, "checkpoint")
    if key not in _kept:
        release()
        transformers_logging.disable_progress_bar()
        _kept[key] = tempfile.TemporaryDirectory(prefix="mg_fast_bench_")
        # The weights are drawn on the device: billions of random numbers take a CPU minutes.
        random_checkpoints.save(make_model(size, device), _kept[key].name)
        _free()
    return Path(_kept[key].name), device
