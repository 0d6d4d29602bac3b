"""One question, or several at once, with what belongs to them: encoded, checked, decoded, answered."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, StopStringCriteria

from ..errors import PromptError, quoted
from ..models.mini_gemini.modeling import PICTURE_INPUTS
from ..ops.backend import requested
from ..quantization import check_cache
from ..runtime.arguments import check_stop_strings, plain_numbers, real_number, whole_number
from ..runtime.layer_dtypes import mixed_dtypes_named
from ..runtime.meter import Meter, Stage
from .streaming import PieceStream, decode_answer

if TYPE_CHECKING:
    from ..models.mini_gemini.modeling import MiniGeminiForConditionalGeneration
    from ..pipeline import Pipeline

# what an answer may grow to when the caller does not say (the original's command line)
DEFAULT_NEW_TOKENS = 512


@dataclass(frozen=True)
class Answer:
    """What came back for one question.

    Attributes:
        text: the answer, special tokens left out, white space at both ends removed.
        token_ids: the generated ids, the one that ended the answer included.
        finish_reason: `length` (max_new_tokens or the end of the context ended it), `stop` (the model did, or another criterion that was
            asked for), or `error` (in a batch).
        prompt_tokens: positions of the prompt, image tokens included.
        image_tokens: how many of those were image tokens.
        cached_tokens: how many of the prompt's positions were not computed: their keys and values were at hand.
        stages: time and memory by stage, where `profile=True` asked for it.
        error: in a batch, what kept this question from an answer.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    image_tokens: int
    cached_tokens: int = field(default=0, compare=False)
    stages: list[Stage] = field(default_factory=list, compare=False)
    error: Exception | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, eq=False)
class SeenPicture:
    """A picture as the language model gets it: image tokens [T, hidden], and a digest that only the same tokens have."""

    tokens: torch.Tensor
    digest: bytes


@dataclass(frozen=True)
class Request:
    """An encoded prompt that fits the model.

    Attributes:
        ids: of the prompt.
        marks: 1 where a picture stands, as long as ids.
        max_new_tokens: at most so many tokens of answer; as many fit.
    """

    ids: list[int]
    marks: list[int]
    max_new_tokens: int

    @classmethod
    def encode(cls, pipeline: "Pipeline", prompt: str, max_new_tokens: int | None, allow_long: bool | None) -> "Request":
        """A prompt, checked against the model's context; `PromptError` where it is too long, or leaves no room for an answer."""
        ids, marks = pipeline.processor.encode(prompt)
        room = pipeline.model.config.text_config.max_position_embeddings - len(ids)
        wanted = min(DEFAULT_NEW_TOKENS if max_new_tokens is None else max_new_tokens, max(1, room))
        pipeline.model.check_length(len(ids), wanted, allow_long)
        return cls(ids, marks, wanted)


def check_options(
    temperature: float, top_p: float | None, max_new_tokens: int | None, options: dict
) -> tuple[float, float | None, int | None, dict]:
    """Refuses what would be ignored or contradict itself.

    Returns:
        The same as Python's own numbers, those among `options` too: transformers takes no others.
    """
    given = temperature, top_p, max_new_tokens
    temperature = real_number(temperature)
    if temperature is None or not math.isfinite(temperature) or temperature < 0:
        raise PromptError(f"temperature: expected a number of 0 or more, got {quoted(given[0])}")
    if top_p is not None and ((top_p := real_number(top_p)) is None or not 0 <= top_p <= 1):
        raise PromptError(f"top_p: expected a share from 0 to 1, got {quoted(given[1])}")
    if top_p is not None and temperature == 0:
        raise PromptError(f"top_p={top_p} is for sampling: give a temperature above 0 with it")
    if max_new_tokens is not None and ((max_new_tokens := whole_number(max_new_tokens)) is None or max_new_tokens < 1):
        raise PromptError(f"max_new_tokens: expected a whole number of 1 or more, got {quoted(given[2])}")
    options = {name: plain_numbers(value) for name, value in options.items()}
    check_cache(options)
    if callable(options.get("stopping_criteria")):
        raise PromptError("stopping_criteria: expected a list of criteria, got one")
    for name, instead in (
        ("do_sample", "temperature decides"),
        ("num_return_sequences", "a question has one answer; use model.generate"),
        ("streamer", "stream=True of chat yields the text"),
        ("return_dict_in_generate", "use model.generate"),
        ("stream", "chat streams"),
        *((name, "it is made of the text and its images; use model.generate") for name in ("input_ids", "attention_mask", *PICTURE_INPUTS)),
    ):
        if name in options:
            raise PromptError(f"{name} is not an option here: {instead}")
    check_stop_strings(options.get("stop_strings"))
    return temperature, top_p, max_new_tokens, options


def sampling(temperature: float, top_p: float | None, options: dict) -> dict:
    """Options of `generate` for a temperature, 0 for greedy."""
    if temperature > 0:
        return {**options, "do_sample": True, "temperature": temperature, "top_p": 1.0 if top_p is None else top_p}
    return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, **options}


def answer(
    pipeline: "Pipeline",
    rows: Sequence[tuple[Request, Sequence[SeenPicture]]],
    options: dict,
    *,
    generator: torch.Generator | None = None,
    allow_long: bool | None = None,
    meter: Meter | None = None,
    emit: Callable[[str], None] | None = None,
    criterion: StoppingCriteria | None = None,
) -> list[Answer]:
    """Answers requests side by side.

    Args:
        rows: each request with its pictures; the longest one's prompt and the largest max_new_tokens fit the context together.
        options: of `generate`.
        generator: what samples are drawn by, on the pipeline's device; the global random state stays as it is. Default: torch's own.
        allow_long: accept prompts longer than the model was trained on.
        meter: measures the stages, of one request.
        emit: called with pieces of text as they become final, of one request.
        criterion: ends all answers.
    """
    tokenizer, model = pipeline.processor.tokenizer, pipeline.model
    inputs = _inputs(pipeline, rows)
    width = inputs["input_ids"].shape[1]
    criteria = StoppingCriteriaList(options.get("stopping_criteria") or [])
    if criterion is not None:
        criteria.append(criterion)
    # a request that asks for less than its neighbours is cut below; generate() takes no streamer with beams
    alone = len(rows) == 1 and _setting(model, options, "num_beams") in (None, 1)
    if strings := options.get("stop_strings"):
        # as `generate` does, which would have to be given the tokenizer, and does not hand it on
        criteria.append(StopStringCriteria(tokenizer, strings))
        options = {name: value for name, value in options.items() if name != "stop_strings"}
    first = True

    def on_token() -> None:
        nonlocal first
        if first and meter is not None:
            meter.start("decode")
        first = False

    stream = PieceStream(tokenizer, emit, on_token) if alone else None
    if meter is not None:
        meter.start("prefill to first token" if stream is not None else "prefill and decode")
    with pipeline._backend(), torch.inference_mode(), contextlib.ExitStack() as stack:
        lean = None
        if requested() != "reference" and pipeline.decoder.refuses(options) is None:
            digests = [picture.digest for _, pictures in rows for picture in pictures]
            lean = pipeline.decoder.request(digests if all(digests) else None, stream, generator)
        elif generator is not None:
            stack.enter_context(_as_global(generator))
        stack.enter_context(mixed_dtypes_named({"language_model": model.model.language_model}))
        out = model.generate(
            **inputs,
            max_new_tokens=max(request.max_new_tokens for request, _ in rows),
            allow_long=allow_long,
            **({"streamer": stream} if lean is None else {"custom_generate": lean}),
            **{**options, "stopping_criteria": criteria},
        )
    if meter is not None:
        meter.stop()
    stops = _setting(model, options, "eos_token_id")
    stops = set(stops if isinstance(stops, list) else [stops])
    answers = []
    for i, ((request, _), row) in enumerate(zip(rows, out[:, width:].tolist())):
        # what follows the end is filling, up to the longest answer
        end = lean.lengths[i] if lean is not None else next((j + 1 for j, token in enumerate(row) if token in stops), len(row))
        ids = row[: min(end, request.max_new_tokens)]
        answers.append(
            Answer(
                text=decode_answer(tokenizer, ids),
                token_ids=ids,
                finish_reason="length" if len(ids) >= request.max_new_tokens and ids[-1] not in stops else "stop",
                prompt_tokens=len(request.ids),
                image_tokens=sum(request.marks),
                cached_tokens=lean.reused if lean is not None else 0,
                stages=meter.stages if meter is not None else [],
            )
        )
    return answers


def _setting(model: "MiniGeminiForConditionalGeneration", options: dict, name: str):
    """What `generate` takes for a setting: from its options, a generation_config among them, or the model's own."""
    if name in options:
        return options[name]
    given = getattr(options.get("generation_config"), name, None)
    return getattr(model.generation_config, name) if given is None else given


def _inputs(pipeline: "Pipeline", rows: Sequence[tuple[Request, Sequence[SeenPicture]]]) -> dict:
    """What `generate` takes: prompts filled up on the left to the longest, and the pictures of all."""
    device, filler = pipeline.device, pipeline.processor.filler_id
    width = max(len(request.ids) for request, _ in rows)
    pads = [width - len(request.ids) for request, _ in rows]

    def padded(values: Sequence[list[int]], filling: int) -> torch.Tensor:
        return torch.tensor([[filling] * pad + value for pad, value in zip(pads, values)], device=device)

    inputs = {
        "input_ids": padded([request.ids for request, _ in rows], filler),
        "attention_mask": padded([[1] * len(request.ids) for request, _ in rows], 0),
    }
    if pictures := [picture.tokens for _, pictures in rows for picture in pictures]:
        inputs["mm_token_type_ids"] = padded([request.marks for request, _ in rows], 0)
        inputs["image_tokens"] = torch.stack(pictures)
    return inputs


def seeded(seed: int | None, device: torch.device) -> torch.Generator | None:
    """A generator on the device for `answer`; None where there is no seed. It draws what torch's own would after `manual_seed`.

    Raises:
        PromptError: no seed that torch takes.
    """
    if seed is None:
        return None
    number = whole_number(seed)
    if number is None or not -(2**63) <= number < 2**64:
        raise PromptError(f"seed: expected a whole number of at most 64 bits, got {quoted(seed)}")
    return torch.Generator(device).manual_seed(number)


@contextlib.contextmanager
def _as_global(generator: torch.Generator) -> Iterator[None]:
    """Torch's own generator of the device draws in the place of this one: `generate` takes none."""
    device = generator.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        own = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
        own.set_state(generator.get_state())
        try:
            yield
        finally:
            generator.set_state(own.get_state())
