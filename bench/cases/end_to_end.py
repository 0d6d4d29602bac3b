"""A whole model, from a picture and a question to the answer, at the published sizes with random weights.

docs/benchmarks.md says what each case measures. All times are by the host's clock, since that is what a user waits for.
All providers decode the same given tokens, whose logits are held against those of the same weights in a wider dtype
before anything is timed. `load` finds the checkpoint's files in the system's memory.
"""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import LogitsProcessorList

import mg_fast
from mg_fast import use_backend
from mg_fast.models.templates import render, with_picture_tags
from mg_fast.runtime import attention

from ..registry import Call, Case, NotHere, Provider
from .arrivals import first_tokens
from .exact_logits import exact_logits
from .forced_answer import COMPARED, ForcedAnswer, now
from .random_models import SIZES, Size
from .sessions import Session, checkpoint, release, session
from .settings import picture

QUESTION = "Describe the picture in detail: what is shown, what colours are there, and is anything written in it?"
SECOND = "And what is in the background?"
BATCHES = (1, 8, 32)
# Per cent of the rate of requests that the reference can serve.
LOADS = (50, 80, 95)
# How many requests are really answered in one turn, and how many arrive on the virtual clock.
SERVED, ARRIVALS = 4, 1000
# The language model's attention, as transformers chooses it.
USUAL_ATTENTION = "sdpa"

# A measure is a function that makes the timed call from the session, a pipeline and options of `generate`.
Measure = Callable[..., Call]


def cases() -> list[Case]:
    return [case for size in SIZES for case in cases_of(size)]


def cases_of(size: Size) -> list[Case]:
    """The cases of one size; HD has only the first token, because a picture is encoded before decoding begins."""

    def case(name: str, providers: dict[str, Provider], exact: Callable[[Session], torch.Tensor], **options) -> Case:
        return Case(
            f"end-to-end/{size.name}-{name}-{size.dtype}",
            lambda device: session(size, device),
            providers,
            exact,
            devices=size.devices,
            clocked=True,
            release=release,
            **options,
        )

    def decode(batch: int) -> Case:
        providers = _providers(partial(_decoding, batch), decodes=True, profiled=partial(_one_step, batch))
        return case(f"decode-b{batch}", providers, partial(_exact, COMPARED), tokens=batch)

    first_token = _providers(_first_token, decodes=True, prefills=True, stages=True)
    found = [case("first-token-b1", first_token, partial(_exact, 1))]
    if size.hd:
        return found
    found += [decode(1), case("second-turn-b1", _providers(_second_turn, kv_cache_bytes=None), _exact_second_turn)]
    found += [decode(batch) for batch in BATCHES[1:]]
    for load in LOADS:
        found.append(case(f"arrivals{load}-b1", _providers(partial(_arrivals, load)), partial(_exact, COMPARED)))
    if size.quantize is None:
        # These run by name only, since they write a checkpoint of the model's size.
        options = {"exact": None, "baseline": "auto", "devices": (), "clocked": True, "release": release}
        for name, answers in (("load", False), ("ready", True)):
            providers, name = {"auto": partial(_loading, answers)}, f"end-to-end/{size.name}-{name}-b1-{size.dtype}"
            found.append(Case(name, lambda device: checkpoint(size, device), providers, **options))
    return found


def _providers(
    take: Measure,
    *,
    decodes: bool = False,
    prefills: bool = False,
    stages: bool = False,
    profiled: Callable[[Session], Call] | None = None,
    kv_cache_bytes: int | None = 0,
) -> dict[str, Provider]:
    """The providers of a measure.

    Args:
        decodes: more than one token is decoded, so that other ways to decode are opponents.
        prefills: the prompt is a part of what is timed, so that flash attention is an opponent.
    """
    pipeline = {"kv_cache_bytes": kv_cache_bytes}
    providers = {
        "reference": Provider(_by(take, "reference"), stages=partial(_stages, "reference") if stages else None),
        "auto": Provider(
            _by(take, "auto", pipeline),
            stages=partial(_stages, "auto") if stages else None,
            profiled=profiled,
            own_graphs=True,
            without_graphs=_by(take, "auto", pipeline, graphs=False),
        ),
    }
    if prefills:
        providers["reference, flash attention"] = Provider(partial(_with_flash_attention, take))
    if decodes:
        # transformers' own way: a cache of fixed size, whose step is compiled, on a GPU as a graph.
        static = {"cache_implementation": "static"}
        providers["auto, static cache"] = Provider(
            _by(take, "auto", **static),
            own_graphs=True,
            without_graphs=_by(take, "auto", graphs=False, **static, disable_compile=True),
        )
        # Its memory is not measured: it is that of `auto`, minus what the kernels of torch.compile save.
        providers["auto, compiled"] = Provider(_by(take, "auto", {**pipeline, "compiled": True}), own_graphs=True)
    return providers


def _by(
    take: Measure, backend: str, pipeline: dict | None = None, *, graphs: bool = True, **options
) -> Callable[[Session], Call]:
    """A measure of a backend; with `options`, `generate` decodes by transformers' own loop."""

    def build(shared: Session) -> Call:
        if shared.device == "cpu" and (options or (pipeline or {}).get("compiled")):
            raise NotHere("a decode step is compiled on GPUs only")
        return take(shared, shared.pipeline(backend, graphs=graphs, **(pipeline or {})), **options)

    return build


def _with_flash_attention(take: Measure, shared: Session) -> Call:
    """The reference, with flash-attn as the language model's attention."""
    language = shared.model.model.language_model
    if reason := attention.why_not(attention.FLASH, torch.device(shared.device), shared.model.dtype):
        raise NotHere(reason)

    def with_flash_attention(call: Call):
        try:
            language.set_attn_implementation(attention.FLASH)
            return call()
        finally:
            language.set_attn_implementation(USUAL_ATTENTION)

    try:
        with_flash_attention(lambda: None)
    except (ImportError, ValueError) as error:
        raise NotHere(str(error).splitlines()[0]) from None
    call = take(shared, shared.pipeline("reference"))
    return lambda: with_flash_attention(call)


def _exact(count: int, shared: Session) -> torch.Tensor:
    return exact_logits(shared, count, _prompt(shared))


def _exact_second_turn(shared: Session) -> torch.Tensor:
    return exact_logits(shared, 1, _prompt(shared, _after_first_turn(shared, shared.pipeline("reference")).turns))


def _prompt(shared: Session, turns: Sequence[tuple[str, str | None]] = ()) -> str:
    return render(shared.processor.template, [*turns, (SECOND if turns else with_picture_tags(QUESTION, 1), None)])


def _ask(conversation, question: str, pictures: list, forced: ForcedAnswer, **options) -> mg_fast.engine.answers.Answer:
    forcing = LogitsProcessorList([forced])
    return conversation.chat(question, pictures, max_new_tokens=len(forced.answer), logits_processor=forcing, **options)


def _timed(
    shared: Session, conversation, question: str, pictures: list, tokens: int, **options
) -> tuple[torch.Tensor, float, float]:
    """The first tokens' logits of an answer with so many tokens; seconds to the first token and to the end."""
    forced, began = shared.forced(tokens), now(shared.device)
    _ask(conversation, question, pictures, forced, **options)
    ended = now(shared.device)
    return torch.stack(forced.logits), forced.times[0] - began, ended - began


def _first_token(shared: Session, pipeline: mg_fast.Pipeline, **options) -> Call:
    def call():
        logits, _, whole = _timed(shared, pipeline.conversation(), QUESTION, [shared.photo], 1, **options)
        return logits, [1e3 * whole]

    return call


def _stages(backend: str, shared: Session) -> list[dict]:
    conversation = shared.pipeline(backend).conversation()
    answer = _ask(conversation, QUESTION, [shared.photo], shared.forced(1), profile=True)
    # Only the stages up to the first token are wanted.
    first = [stage for stage in answer.stages if stage.name != "decode"]
    return [{"name": stage.name, "ms": 1e3 * stage.seconds, "peak_mib": stage.peak_mib} for stage in first]


def _second_turn(shared: Session, pipeline: mg_fast.Pipeline) -> Call:
    def call():
        # Otherwise the second turn of the call before would be found in the cache.
        pipeline.clear_kv_cache()
        logits, _, whole = _timed(shared, _after_first_turn(shared, pipeline), SECOND, [], 1)
        return logits, [1e3 * whole]

    return call


def _after_first_turn(shared: Session, pipeline: mg_fast.Pipeline):
    conversation = pipeline.conversation()
    _ask(conversation, QUESTION, [shared.photo], shared.forced(COMPARED))
    return conversation


def _batch(shared: Session, pipeline: mg_fast.Pipeline, batch: int) -> dict[str, torch.Tensor]:
    """A batch of equal prompts."""
    ids, marks = shared.processor.encode(_prompt(shared))
    return {
        "input_ids": torch.tensor([ids] * batch, device=shared.device),
        "mm_token_type_ids": torch.tensor([marks] * batch, device=shared.device),
        "image_tokens": pipeline.see(shared.photo).expand(batch, -1, -1).contiguous(),
    }


def _decoding(batch: int, shared: Session, pipeline: mg_fast.Pipeline, **options) -> Call:
    """A batch of equal prompts, by the pipeline's loop; for the reference, and with options, by `generate` alone."""
    inputs = _batch(shared, pipeline, batch)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    tokens = len(shared.answer)

    def call():
        forced = shared.forced(tokens)
        loop = {"max_new_tokens": tokens, "logits_processor": LogitsProcessorList([forced]), **greedy, **options}
        if pipeline.backend != "reference" and not options:
            loop["custom_generate"] = pipeline.decoder.request()
        with use_backend(pipeline.backend), torch.inference_mode():
            shared.model.generate(**inputs, **loop)
        first, last = forced.times
        return torch.stack(forced.logits), [1e3 * (last - first) / (tokens - 1)]

    return call


def _one_step(batch: int, shared: Session) -> Call:
    """The pass for one more token, over a prompt that was read before; its kernels are listed in a table."""
    pipeline = shared.pipeline("auto", kv_cache_bytes=0)
    passes, inputs = pipeline.decoder.runner, _batch(shared, pipeline, batch)
    sequences = passes.sequences(batch, inputs["input_ids"].shape[1] + len(shared.answer))
    with torch.inference_mode():
        sequences.fill(None)
        passes.prefill(sequences, shared.model.model.embed(**inputs))
    length, token = sequences.cache.length, torch.tensor([shared.answer[0]] * batch, device=shared.device)

    def call() -> torch.Tensor:
        # Every call computes the same position.
        sequences.cache.length = length
        with torch.inference_mode():
            return passes.step(sequences, token)

    return call


def _arrivals(load: int, shared: Session, pipeline: mg_fast.Pipeline) -> Call:
    """The first tokens of requests that arrive at random and are answered one after another, in their order.

    What a request takes is measured. When it arrives, and so how long it waits, is on a virtual clock.
    """

    def answer(by: mg_fast.Pipeline) -> tuple[torch.Tensor, float, float]:
        return _timed(shared, by.conversation(), QUESTION, [shared.photo], len(shared.answer))

    if shared.request_s is None:
        reference = shared.pipeline("reference")
        shared.request_s = statistics.median(answer(reference)[2] for _ in range(3))
    per_second = load / 100 / shared.request_s

    def call():
        answered = [answer(pipeline) for _ in range(SERVED)]
        waits = first_tokens([(first, whole) for _, first, whole in answered], per_second, ARRIVALS)
        return answered[0][0], [1e3 * wait for wait in waits]

    return call


def _loading(answers: bool, shared: tuple[Path, str]) -> Call:
    """From a checkpoint to its model, or to the first token of its first answer."""
    (folder, device), photo = shared, picture()

    def call():
        began = now(device)
        pipeline = mg_fast.load(folder, device=device)
        if not answers:
            return pipeline.model.lm_head.weight[:1, :1].clone(), [1e3 * (now(device) - began)]
        forced = ForcedAnswer([1], pipeline.model.dtype)
        _ask(pipeline.conversation(), QUESTION, [photo], forced)
        return torch.stack(forced.logits), [1e3 * (now(device) - began)]

    return call
