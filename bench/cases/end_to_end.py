"""A whole model, from a picture and a question to the answer, at the published sizes, with random weights made on the
device.

Measures: `first-token` (a new conversation: picture and question to the first token), `second-turn` (the same for a
second question, of text alone, after a first that is not timed), `decode` (milliseconds for one more token of every
sequence of a batch), `arrivals50`, `arrivals80`, `arrivals95` (first token of requests that arrive at random, at so
many per cent of what the reference can serve), `load` (from a checkpoint whose files the system has in memory) and
`ready` (the same, and the first answer's first token).

All by the host's clock, since that is what a user waits for. Weights' values do not change the work. All providers
decode the same given tokens, whose logits are held against those of the same weights in a wider dtype before anything
is timed.
"""

import contextlib
import copy
import gc
import random
import statistics
import tempfile
import time
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

import mg_fast
from mg_fast import MiniGeminiForConditionalGeneration, MiniGeminiProcessor, quantization, use_backend
from mg_fast.models.mini_gemini.checkpoint import decide_template, load_tokenizer
from mg_fast.models.mini_gemini.processing import MiniGeminiImageProcessor
from mg_fast.models.templates import render, stop_ids, with_picture_tags
from mg_fast.runtime import layer_dtypes
from mg_fast.testing import random_checkpoints as random_checkpoint

from ..registry import Call, Case, NotHere
from .settings import picture

QUESTION = "Describe the picture in detail: what is shown, what colours are there, and is anything written in it?"
SECOND = "And what is in the background?"
# of an answer, where more than its first token is timed; and those whose logits are compared
ANSWER, COMPARED = 33, 4
BATCHES = (1, 8, 32)
# per cent of what the reference can serve
LOADS = (50, 80, 95)
# requests that are really answered in one turn, and those that arrive on the virtual clock
SERVED, ARRIVALS = 4, 1000


@dataclass(frozen=True)
class Size:
    """One of `random_checkpoint.SIZES`, the dtype it is run in, the devices on which it is run unasked, and how its
    weights are rounded.
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
    # a language model large enough to time on a CPU, behind narrow towers
    Size("0.5b", False, "float32", ()),
    Size("0.5b", False, "bfloat16", ()),
    Size("0.5b", False, "bfloat16", (), "int8"),
    Size("tiny", False, "float32", ()),
)


@dataclass
class Session:
    """A model with what goes in; shared by the cases of its size."""

    device: str
    hd: bool
    model: MiniGeminiForConditionalGeneration
    processor: MiniGeminiProcessor
    photo: Image.Image
    # tokens of an answer that every provider is made to give
    answer: list[int]
    pipelines: dict[tuple, mg_fast.Pipeline] = field(default_factory=dict)
    request_s: float | None = None

    def pipeline(self, backend: str, *, graphs: bool = True, **options) -> mg_fast.Pipeline:
        """One for all cases that ask alike. Unless options say so it keeps nothing: every picture is encoded, every
        prompt computed.

        Args:
            graphs: capture CUDA graphs; without, for the memory alone: what lies in a graph's pool the allocator's peak
                leaves out.
            options: of Pipeline.
        """
        key = (backend, graphs, *options.items())
        if key not in self.pipelines:
            options = {"image_cache_bytes": 0, "kv_cache_bytes": 0, **options}
            pipeline = mg_fast.Pipeline(self.model, self.processor, backend=backend, cuda_graphs=graphs, **options)
            self.pipelines[key] = pipeline
        return self.pipelines[key]

    def watch(self, tokens: int) -> "ForcedAnswer":
        return ForcedAnswer(self.answer[:tokens], self.model.dtype)


class ForcedAnswer(LogitsProcessor):
    """Makes `generate` give the tokens that are set, keeps the last sequence's first logits, and takes the time of the
    first and last.

    Attributes:
        logits: [vocabulary] each, of the first tokens, in the model's dtype, which they were computed in.
        times: in seconds, when the first and the last token's logits were there.
    """

    def __init__(self, answer: Sequence[int], dtype: torch.dtype):
        self.answer, self.dtype = answer, dtype
        self.steps = 0
        self.logits: list[torch.Tensor] = []
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.steps in (0, len(self.answer) - 1):
            self.times.append(_now(scores.device.type))
        if self.steps < COMPARED:
            self.logits.append(scores[-1].to(self.dtype))
        forced = torch.full_like(scores, float("-inf"))
        forced[:, self.answer[min(self.steps, len(self.answer) - 1)]] = 0.0
        self.steps += 1
        return forced


def cases() -> list[Case]:
    found = []
    for size in SIZES:
        found += _of_size(size)
    return found


def _of_size(size: Size) -> list[Case]:
    def case(
        measure: str,
        take: Callable,
        batch: int = 1,
        *,
        decodes: bool = False,
        prefills: bool = False,
        kept: int | None = 0,
        **options,
    ) -> Case:
        pipeline = {"kv_cache_bytes": kept}
        providers = {"reference": _by(take, "reference"), "auto": _by(take, "auto", pipeline)}
        if prefills:
            providers["reference, flash attention"] = _with_flash_attention(take)
        memory = {"auto": _by(take, "auto", pipeline, graphs=False)}
        if decodes:
            # transformers' own: a cache of fixed size, its step compiled, on a GPU a graph
            providers["auto, static cache"] = _by(take, "auto", cache_implementation="static")
            memory["auto, static cache"] = _by(
                take, "auto", graphs=False, cache_implementation="static", disable_compile=True
            )
            # its memory is that of auto, and what torch.compile's kernels save of it
            providers["auto, compiled"] = _by(take, "auto", {**pipeline, "compiled": True})
        return Case(
            f"end-to-end/{size.name}-{measure}-b{batch}-{size.dtype}",
            lambda device: session(size, device),
            providers,
            devices=size.devices,
            clocked=True,
            release=release,
            own_graphs=frozenset(name for name in providers if not name.startswith("reference")),
            memory=memory,
            **options,
        )

    def first(count: int) -> Callable[[Session], torch.Tensor]:
        return lambda shared: exact_logits(shared, count)

    stages = {backend: _stages(backend) for backend in ("reference", "auto")}
    found = [case("first-token", _first_token, decodes=True, prefills=True, exact=first(1), stages=stages)]
    if not size.hd:
        # its picture is encoded before
        options = {"decodes": True, "exact": first(COMPARED)}
        decode = {
            batch: case("decode", _decoding(batch), batch, tokens=batch, profiled={"auto": _one_step(batch)}, **options)
            for batch in BATCHES
        }
        found += [
            decode[1],
            case("second-turn", _second_turn, kept=None, exact=_exact_second_turn),
            *(decode[batch] for batch in BATCHES[1:]),
        ]
        found += [case(f"arrivals{load}", _arrivals(load), exact=first(COMPARED)) for load in LOADS]
    if not size.hd and size.quantize is None:
        # by name only: they write a checkpoint of the model's size
        found += [
            Case(
                f"end-to-end/{size.name}-{measure}-b1-{size.dtype}",
                lambda device: checkpoint(size, device),
                {"auto": take},
                None,
                baseline="auto",
                devices=(),
                clocked=True,
                release=release,
            )
            for measure, take in (("load", _load), ("ready", _ready))
        ]
    return found


def _by(
    take: Callable[..., Call], backend: str, pipeline: dict | None = None, *, graphs: bool = True, **options
) -> Callable:
    """A measure of a backend.

    Args:
        take: from the session, a pipeline and options of `generate` to the call.
        pipeline: options of the pipeline.
        graphs: as of `Session.pipeline`.
        options: of `generate`, by which it decodes by transformers' own loop.
    """

    def build(shared: Session) -> Call:
        if shared.device == "cpu" and (options or (pipeline or {}).get("compiled")):
            raise NotHere("a decode step is compiled on GPUs only")
        return take(shared, shared.pipeline(backend, graphs=graphs, **(pipeline or {})), **options)

    return build


def _with_flash_attention(take: Callable[..., Call]) -> Callable[[Session], Call]:
    """The reference, the language model's attention by flash-attn."""

    def build(shared: Session) -> Call:
        language, pipeline = shared.model.model.language_model, shared.pipeline("reference")
        usual = language.config._attn_implementation
        try:
            language.set_attn_implementation("flash_attention_2")
        except (ImportError, ValueError) as error:
            raise NotHere(str(error).splitlines()[0]) from None
        finally:
            language.set_attn_implementation(usual)
        call = take(shared, pipeline)

        def with_flash_attention():
            language.set_attn_implementation("flash_attention_2")
            try:
                return call()
            finally:
                language.set_attn_implementation(usual)

        return with_flash_attention

    return build


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# one session or checkpoint at a time: of the largest model two would not fit
_kept: dict[tuple, Session | tempfile.TemporaryDirectory] = {}


def release() -> None:
    """Frees what was shared by the cases of one size."""
    _kept.clear()
    _free()


def _free() -> None:
    """Hands back what nothing needs any more."""
    # a pipeline and its own conversation hold each other
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
    with tempfile.TemporaryDirectory() as folder:
        text = model.config.text_config
        random_checkpoint.make_tokenizer(
            Path(folder), text.vocab_size, "gemma" if text.model_type == "gemma" else "vicuna_v1"
        )
        tokenizer = load_tokenizer(Path(folder))
    template = decide_template(model.config, tokenizer, None if text.model_type == "gemma" else "vicuna_v1")
    processor = MiniGeminiProcessor(MiniGeminiImageProcessor.from_config(model.config), tokenizer, template=template)
    model.generation_config.eos_token_id = stop_ids(template, tokenizer)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    # whole pieces of text: neither bytes nor the special tokens before them
    answer = random.Random(0).choices(range(300, len(tokenizer)), k=ANSWER)
    return Session(device, size.hd, model, processor, picture(), answer)


def make_model(size: Size, device: str) -> MiniGeminiForConditionalGeneration:
    """A size's model in its dtype, its weights drawn once, on the device."""
    config = random_checkpoint.make_config(size.size, hd=size.hd)
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
                # as wide as keeps the size of what goes in
                parameter.normal_(0.0, 0.02 if parameter is embedding else parameter[0].numel() ** -0.5)
    if size.quantize is not None:
        from torchao.quantization import quantize_

        named = quantization.named_config(size.quantize, config.text_config, {"": device}, model.dtype)
        quantize_(model.model.language_model.layers, named.quant_type)
        quantization.finish(model)
    return model


def _first_token(shared: Session, pipeline: mg_fast.Pipeline, **options) -> Call:
    def call():
        watch, began = shared.watch(1), _now(shared.device)
        _ask(pipeline.conversation(), QUESTION, [shared.photo], watch, **options)
        return torch.stack(watch.logits), [1e3 * (_now(shared.device) - began)]

    return call


def _ask(conversation, question: str, pictures: list, watch: ForcedAnswer, **options) -> mg_fast.engine.answers.Answer:
    return conversation.chat(
        question, pictures, max_new_tokens=len(watch.answer), logits_processor=LogitsProcessorList([watch]), **options
    )


def _stages(backend: str) -> Callable[[Session], list[dict]]:
    def stages(shared: Session) -> list[dict]:
        answer = _ask(shared.pipeline(backend).conversation(), QUESTION, [shared.photo], shared.watch(1), profile=True)
        # what follows the only token is no part of it
        return [
            {"name": s.name, "ms": 1e3 * s.seconds, "peak_mib": s.peak_mib} for s in answer.stages if s.name != "decode"
        ]

    return stages


def _second_turn(shared: Session, pipeline: mg_fast.Pipeline) -> Call:
    def call():
        # the last call's second turn is none of this one's history
        pipeline.clear_kv_cache()
        conversation = _after_first_turn(shared, pipeline)
        watch, began = shared.watch(1), _now(shared.device)
        _ask(conversation, SECOND, [], watch)
        return torch.stack(watch.logits), [1e3 * (_now(shared.device) - began)]

    return call


def _after_first_turn(shared: Session, pipeline: mg_fast.Pipeline):
    conversation = pipeline.conversation()
    _ask(conversation, QUESTION, [shared.photo], shared.watch(COMPARED))
    return conversation


def _decoding(batch: int) -> Callable[..., Call]:
    """So many like prompts, by the pipeline's loop; by `generate` where options ask for it, and for the reference."""

    def take(shared: Session, pipeline: mg_fast.Pipeline, **options) -> Call:
        ids, marks = shared.processor.encode(_prompt(shared))
        inputs = {
            "input_ids": torch.tensor([ids] * batch, device=shared.device),
            "attention_mask": torch.ones(batch, len(ids), dtype=torch.long, device=shared.device),
            "mm_token_type_ids": torch.tensor([marks] * batch, device=shared.device),
            "image_tokens": pipeline.see(shared.photo).expand(batch, -1, -1).contiguous(),
        }
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}

        def call():
            watch = shared.watch(ANSWER)
            loop = dict(options)
            if pipeline.backend != "reference" and not options:
                loop["custom_generate"] = pipeline.decoder.request()
            with use_backend(pipeline.backend), torch.inference_mode():
                shared.model.generate(
                    **inputs, max_new_tokens=ANSWER, logits_processor=LogitsProcessorList([watch]), **greedy, **loop
                )
            first, last = watch.times
            return torch.stack(watch.logits), [1e3 * (last - first) / (ANSWER - 1)]

        return call

    return take


def _one_step(batch: int) -> Callable[[Session], Call]:
    """The pass for one more token alone, over a prompt that was read before; for the table of its kernels."""

    def build(shared: Session) -> Call:
        passes = shared.pipeline("auto", kv_cache_bytes=0).decoder.runner
        ids, marks = shared.processor.encode(_prompt(shared))
        ids, marks = (torch.tensor([row] * batch, device=shared.device) for row in (ids, marks))
        image_tokens = shared.pipeline("auto", kv_cache_bytes=0).see(shared.photo).expand(batch, -1, -1).contiguous()
        sequences = passes.sequences(batch, ids.shape[1] + ANSWER)
        with torch.inference_mode():
            sequences.fill(None)
            passes.prefill(sequences, shared.model.model.embed(ids, image_tokens=image_tokens, mm_token_type_ids=marks))
        length, token = sequences.cache.length, torch.tensor([shared.answer[0]] * batch, device=shared.device)

        def call() -> torch.Tensor:
            # the same position every time
            sequences.cache.length = length
            with torch.inference_mode():
                return passes.step(sequences, token)

        return call

    return build


def _arrivals(load: int) -> Callable[..., Call]:
    """First tokens of requests that arrive at random and are answered one after another, in their order.

    What a request takes is measured; when it arrives, and so how long it waits, is on a clock of its own: nothing
    sleeps.
    """

    def take(shared: Session, pipeline: mg_fast.Pipeline) -> Call:
        if shared.request_s is None:
            reference = shared.pipeline("reference")
            shared.request_s = statistics.median(_answer(shared, reference)[2] for _ in range(3))
        per_second = load / 100 / shared.request_s

        def call():
            answered = [_answer(shared, pipeline) for _ in range(SERVED)]
            waits = first_tokens([(first, whole) for _, first, whole in answered], per_second, ARRIVALS)
            return answered[0][0], [1e3 * wait for wait in waits]

        return call

    return take


def _answer(shared: Session, pipeline: mg_fast.Pipeline) -> tuple[torch.Tensor, float, float]:
    """The first tokens' logits; seconds to the first token and to the last."""
    watch, began = shared.watch(ANSWER), _now(shared.device)
    _ask(pipeline.conversation(), QUESTION, [shared.photo], watch)
    return torch.stack(watch.logits), watch.times[0] - began, _now(shared.device) - began


def first_tokens(served: Sequence[tuple[float, float]], per_second: float, count: int, seed: int = 0) -> list[float]:
    """Seconds from each request's arrival to its first token, where one is answered after another, first come, first
    served.

    Args:
        served: seconds to the first token and to the end of an answer, as measured; every request takes one of them at
            random.
        per_second: requests arrive so often on average, independently of each other.
        count: requests.
        seed: of arrivals and of what is drawn: the same for every provider.
    """
    draw = random.Random(seed)
    arrival = free = 0.0
    waits = []
    for _ in range(count):
        arrival += draw.expovariate(per_second)
        first, whole = served[draw.randrange(len(served))]
        begun = max(arrival, free)
        waits.append(begun + first - arrival)
        free = begun + whole
    return waits


def checkpoint(size: Size, device: str) -> tuple[Path, str]:
    """The folder of a size's checkpoint, written when it is first asked for, and the device."""
    key = (size, device, "checkpoint")
    if key not in _kept:
        release()
        transformers_logging.disable_progress_bar()
        _kept[key] = tempfile.TemporaryDirectory(prefix="mg_fast_bench_")
        # drawn on the device: billions of random numbers take a CPU minutes
        random_checkpoint.save(make_model(size, device), _kept[key].name)
        _free()
    return Path(_kept[key].name), device


def _load(shared: tuple[Path, str]) -> Call:
    folder, device = shared

    def call():
        began = _now(device)
        pipeline = mg_fast.load(folder, device=device)
        return pipeline.model.lm_head.weight[:1, :1].clone(), [1e3 * (_now(device) - began)]

    return call


def _ready(shared: tuple[Path, str]) -> Call:
    folder, device = shared
    photo = picture()

    def call():
        began = _now(device)
        pipeline = mg_fast.load(folder, device=device)
        watch = ForcedAnswer([1], pipeline.model.dtype)
        _ask(pipeline.conversation(), QUESTION, [photo], watch)
        return torch.stack(watch.logits), [1e3 * (_now(device) - began)]

    return call


def _prompt(shared: Session, turns: Sequence[tuple[str, str | None]] = ()) -> str:
    return render(shared.processor.template, [*turns, (SECOND if turns else with_picture_tags(QUESTION, 1), None)])


def _exact_second_turn(shared: Session) -> torch.Tensor:
    return exact_logits(shared, 1, _after_first_turn(shared, shared.pipeline("reference")).turns)


def exact_logits(shared: Session, count: int, turns: Sequence[tuple[str, str | None]] = ()) -> torch.Tensor:
    """Logits [count, vocabulary] of the first tokens of the answer, by the same weights in a wider dtype: float64, or
    float32 for 16 bits.

    The language model is widened layer by layer as it runs, so that the largest has room beside itself.
    """
    dtype = torch.float64 if shared.model.dtype == torch.float32 else torch.float32
    model = shared.model.model
    pixels = shared.processor.image_processor(shared.photo).to(shared.device)
    towers = copy.deepcopy(model, {id(model.language_model): nn.Identity()}).to(dtype)
    # the original's mining of an HD picture would take more memory than a large model leaves
    with use_backend("torch" if shared.hd else "reference"), torch.no_grad():
        tokens = towers.get_image_features(**{name: value.to(dtype) for name, value in pixels.items()}).pooler_output
    ids, marks = shared.processor.encode(_prompt(shared, turns))
    given = shared.answer[: count - 1]
    inputs = {"input_ids": [[*ids, *given]], "mm_token_type_ids": [[*marks, *[0] * len(given)]]}
    inputs = {name: torch.tensor(value, device=shared.device) for name, value in inputs.items()}
    with _widened(shared.model, dtype), torch.no_grad():
        return shared.model(**inputs, image_tokens=tokens, logits_to_keep=count, use_cache=False).logits[0]


@contextlib.contextmanager
def _widened(model: MiniGeminiForConditionalGeneration, dtype: torch.dtype) -> Iterator[None]:
    """Within the block each part of the language model has its weights in `dtype` while it runs."""
    stored: list[tuple[nn.Module, str, nn.Parameter]] = []

    def widen(module: nn.Module, *_) -> None:
        for owner in module.modules():
            for name, parameter in list(owner.named_parameters(recurse=False)):
                stored.append((owner, name, parameter))
                # what was rounded is rounded in the exact result, too
                dense = parameter.dequantize() if hasattr(parameter, "__tensor_flatten__") else parameter
                owner._parameters[name] = nn.Parameter(dense.to(dtype), requires_grad=False)

    def restore(*_) -> None:
        while stored:
            owner, name, parameter = stored.pop()
            owner._parameters[name] = parameter

    language = model.model.language_model
    parts = [language.embed_tokens, *language.layers, language.norm, model.lm_head]
    hooks = [part.register_forward_pre_hook(widen) for part in parts] + [
        part.register_forward_hook(restore) for part in parts
    ]
    try:
        # the model would cast what goes into a part to the dtype that the part's weights have now, before they are
        # widened
        with unittest.mock.patch.object(layer_dtypes, "compute_dtype", lambda module: None):
            yield
    finally:
        for hook in hooks:
            hook.remove()
        restore()
