"""What the end-to-end cases of one size share: the model with what is asked of it, or its checkpoint."""

import gc
import random
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from transformers.utils import logging as transformers_logging

import mg_fast
from mg_fast import MiniGeminiForConditionalGeneration, MiniGeminiProcessor
from mg_fast.models.mini_gemini.checkpoint import decide_template, load_tokenizer
from mg_fast.models.mini_gemini.processing import MiniGeminiImageProcessor
from mg_fast.models.templates import stop_ids
from mg_fast.testing import random_checkpoints

from .forced_answer import ANSWER, ForcedAnswer
from .random_models import Size, make_model
from .settings import picture


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

        By default it keeps nothing: every picture is encoded, and every prompt is computed. A pipeline without graphs
        serves to measure memory, since the allocator's peak leaves out what lies in a CUDA graph's pool.
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
_shared: dict[tuple, Session | tempfile.TemporaryDirectory] = {}


def release() -> None:
    """Frees what was shared by the cases of one size."""
    _shared.clear()
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
    if key not in _shared:
        release()
        _shared[key] = make_session(size, device)
    return _shared[key]


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


def checkpoint(size: Size, device: str) -> tuple[Path, str]:
    """The folder of a size's checkpoint, written when it is first asked for, and the device."""
    key = (size, device, "checkpoint")
    if key not in _shared:
        release()
        transformers_logging.disable_progress_bar()
        _shared[key] = tempfile.TemporaryDirectory(prefix="mg_fast_bench_")
        # The weights are drawn on the device: billions of random numbers take a CPU minutes.
        random_checkpoints.save(make_model(size, device), _shared[key].name)
        _free()
    return Path(_shared[key].name), device
