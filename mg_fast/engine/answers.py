"""The answer stage: prompts and image tokens to answers."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, StopStringCriteria

from ..decoding import Decoder
from ..models.protocol import AnsweringModel
from ..ops.backend import requested, use_backend
from ..runtime.layer_dtypes import mixed_dtypes_named
from ..runtime.meter import Meter, StageTime
from ..runtime.placement import execution_device
from .options import DEFAULT_NEW_TOKENS, CacheOptions, Sampling
from .streaming import PieceStream, decode_answer
from .vision import SeenPicture


@dataclass(frozen=True)
class Answer:
    """What came back for one question.

    Attributes:
        text: the answer, special tokens left out, white space at both ends removed.
        token_ids: the generated ids, the one that ended the answer included.
        finish_reason: `length` (max_new_tokens or the end of the context ended it), `stop` (the model did, or another
            criterion that was asked for), or `error` (in a batch).
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
    stages: list[StageTime] = field(default_factory=list, compare=False)
    error: Exception | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Request:
    """An encoded prompt that fits the model; `AnswerStage.request` makes one.

    Attributes:
        ids: of the prompt.
        marks: 1 where a picture stands, as long as ids.
        max_new_tokens: at most so many tokens of answer; as many fit.
    """

    ids: list[int]
    marks: list[int]
    max_new_tokens: int


class AnswerStage:
    """Answers prompts whose pictures are image tokens already. It owns the decoder with its keys and values, and how
    tokens are chosen.

    Args:
        model: what answers, as MiniGeminiForConditionalGeneration does.
        processor: its processor, of which `tokenizer`, `encode` and `filler_id` are used.
        backend: for every call of this stage; None leaves the choice to what is in force where it is called.
        caches: `kv_cache_bytes` of it counts here.
        compiled: on a GPU, decode through torch.compile: seconds to a minute at the first answer.
        cuda_graphs: on a GPU, capture passes of the language model; without, less memory is taken.

    Attributes:
        decoder: the decoder, by which all backends but `reference` decode.
    """

    def __init__(
        self,
        model: AnsweringModel,
        processor,
        *,
        backend: str | None = None,
        caches: CacheOptions | None = None,
        compiled: bool = False,
        cuda_graphs: bool = True,
    ):
        self.model, self.processor, self.backend = model, processor, backend
        kv_cache_bytes = (caches or CacheOptions()).kv_cache_bytes
        self.decoder = Decoder(model, kv_cache_bytes=kv_cache_bytes, graphs=cuda_graphs, compiled=compiled)

    @property
    def device(self) -> torch.device:
        """The device that the language model's input goes to; where its weights are offloaded, the one that they are
        brought to.
        """
        return execution_device(self.model.get_input_embeddings())

    @property
    def positions(self) -> int:
        """How many positions the longest conversation has that the model can hold."""
        return self.model.text_config.max_position_embeddings

    @property
    def first_use(self) -> dict[str, float]:
        """Seconds spent so far on what is done once: compiling, capturing graphs."""
        return self.decoder.runner.first_use

    def remembers(self) -> bool:
        """Whether keys and values of what is answered here are kept, so that pictures need digests by which they are
        found again.
        """
        with use_backend(self.backend):
            return self.decoder.prefixes.limit > 0 and requested() != "reference"

    def request(self, prompt: str, sampling: Sampling) -> Request:
        """Encodes a prompt; `PromptError` where it is too long for the model's context, or leaves no room for an
        answer.
        """
        ids, marks = self.processor.encode(prompt)
        most = DEFAULT_NEW_TOKENS if sampling.max_new_tokens is None else sampling.max_new_tokens
        wanted = min(most, max(1, self.positions - len(ids)))
        self.model.check_length(len(ids), wanted, sampling.allow_long)
        return Request(ids, marks, wanted)

    def answer(
        self,
        rows: Sequence[tuple[Request, Sequence[SeenPicture]]],
        sampling: Sampling,
        *,
        generator: torch.Generator | None = None,
        meter: Meter | None = None,
        emit: Callable[[str], None] | None = None,
        criterion: StoppingCriteria | None = None,
    ) -> list[Answer]:
        """Answers requests side by side.

        Args:
            rows: each request with its pictures; the longest one's prompt and the largest max_new_tokens fit the
                context together.
            sampling: how tokens are chosen; how many there may be is said by the requests.
            generator: what samples are drawn by, on the stage's device; the global random state stays as it is.
                Default: torch's own.
            meter: measures the stages, of one request.
            emit: called with pieces of text as they become final, of one request.
            criterion: ends all answers.
        """
        tokenizer, model, options = self.processor.tokenizer, self.model, sampling.of_generate()
        inputs = self._inputs(rows)
        width = inputs["input_ids"].shape[1]
        criteria = StoppingCriteriaList(options.pop("stopping_criteria", None) or [])
        if criterion is not None:
            criteria.append(criterion)
        # A request that asks for less than its neighbours is cut below. `generate` takes no streamer with beams.
        alone = len(rows) == 1 and self._setting(options, "num_beams") in (None, 1)
        if strings := options.pop("stop_strings", None):
            # `generate` would make the same criterion, but it hands no tokenizer on to other loops.
            criteria.append(StopStringCriteria(tokenizer, strings))
        first = True

        def on_token() -> None:
            nonlocal first
            if first and meter is not None:
                meter.start("decode")
            first = False

        stream = PieceStream(tokenizer, emit, on_token) if alone else None
        if meter is not None:
            meter.start("prefill to first token" if stream is not None else "prefill and decode")
        with use_backend(self.backend), torch.inference_mode(), contextlib.ExitStack() as stack:
            request = None
            if requested() != "reference" and self.decoder.refuses(options) is None:
                digests = [picture.digest for _, pictures in rows for picture in pictures]
                request = self.decoder.request(digests if all(digests) else None, stream, generator)
            elif generator is not None:
                stack.enter_context(_as_global(generator))
            stack.enter_context(mixed_dtypes_named({"language_model": model.language_model}))
            out = model.generate(
                **inputs,
                max_new_tokens=max(row.max_new_tokens for row, _ in rows),
                allow_long=sampling.allow_long,
                **({"streamer": stream} if request is None else {"custom_generate": request}),
                **options,
                stopping_criteria=criteria,
            )
        if meter is not None:
            meter.stop()
        lengths, reused = (request.lengths, request.reused) if request is not None else (None, 0)
        stages = meter.stages if meter is not None else []
        return self._answers(
            [row for row, _ in rows], out[:, width:].tolist(), lengths, options, cached_tokens=reused, stages=stages
        )

    def forget(self) -> None:
        """Drops keys and values of prompts and answers, and captured graphs."""
        self.decoder.forget()

    def forget_prompts(self) -> None:
        """Drops keys and values of prompts and answers alone."""
        self.decoder.prefixes.clear()

    def rest(self) -> None:
        """Hands back the memory in which several answers were decoded at once; what is remembered stays."""
        self.decoder.rest()

    def _answers(
        self, requests: Sequence[Request], rows: list[list[int]], lengths: list[int] | None, options: dict, **told
    ) -> list[Answer]:
        """Answers of generated rows of ids; what follows the end of a row is filling, up to the longest answer."""
        stops = self._setting(options, "eos_token_id")
        stops = set(stops if isinstance(stops, list) else [stops])
        answers = []
        for i, (request, row) in enumerate(zip(requests, rows)):
            end = (
                next((j + 1 for j, token in enumerate(row) if token in stops), len(row))
                if lengths is None
                else lengths[i]
            )
            ids = row[: min(end, request.max_new_tokens)]
            ended = len(ids) < request.max_new_tokens or ids[-1] in stops
            answers.append(
                Answer(
                    text=decode_answer(self.processor.tokenizer, ids),
                    token_ids=ids,
                    finish_reason="stop" if ended else "length",
                    prompt_tokens=len(request.ids),
                    image_tokens=sum(request.marks),
                    **told,
                )
            )
        return answers

    def _setting(self, options: dict, name: str):
        """What `generate` takes for a setting: from its options, a generation_config among them, or the model's own."""
        if name in options:
            return options[name]
        given = getattr(options.get("generation_config"), name, None)
        return getattr(self.model.generation_config, name) if given is None else given

    def _inputs(self, rows: Sequence[tuple[Request, Sequence[SeenPicture]]]) -> dict:
        """What `generate` takes: prompts filled up on the left to the longest, and the pictures of all."""
        device, filler = self.device, self.processor.filler_id
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
