"""The answer stage: it turns prompts and image tokens into answers."""

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
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

# The reason why an answer has no picture when nobody asked for one.
NOT_ASKED = "no picture was asked for (draw=True asks for one)"


@dataclass(frozen=True)
class Answer:
    """The answer to one question.

    Attributes:
        text: the answer, without special tokens and without white space at both ends.
        token_ids: the generated ids, including the one that ended the answer.
        finish_reason: `length` (max_new_tokens or the end of the context ended the answer), `stop` (the model or
            another criterion that was asked for ended it), or `error` (in a batch).
        prompt_tokens: number of positions of the prompt, image tokens included.
        image_tokens: how many of these positions are image tokens.
        cached_tokens: how many of these positions were not computed, because their keys and values were remembered.
        stages: time and memory of every stage, if `profile=True` asked for them.
        error: in a batch, the exception because of which this question has no answer.
        image_prompts: the prompts of the pictures that were drawn for this answer, in the order of `images`.
        images: the Pillow pictures that were drawn for this answer.
        no_image_reason: why a prompt has no picture, or why nothing was drawn, in one sentence; None if all went well.
        image_error: the exception with which drawing ended, if it failed.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    image_tokens: int
    cached_tokens: int = field(default=0, compare=False)
    stages: list[StageTime] = field(default_factory=list, compare=False)
    error: Exception | None = None
    image_prompts: list[str] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list, compare=False)
    no_image_reason: str | None = field(default=NOT_ASKED, compare=False)
    image_error: Exception | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Request:
    """An encoded prompt that fits the model; `AnswerStage.request` makes one.

    Attributes:
        ids: the ids of the prompt.
        marks: one number for each id, 1 where a picture stands, else 0.
        max_new_tokens: most tokens of the answer; the context has room for them.
    """

    ids: list[int]
    marks: list[int]
    max_new_tokens: int


class AnswerStage:
    """Answers prompts whose pictures are already image tokens.

    It owns the decoder with its keys and values, and decides how tokens are chosen.

    Args:
        model: the model that answers, such as MiniGeminiForConditionalGeneration.
        processor: the model's processor, whose `tokenizer`, `encode` and `filler_id` are used.
        backend: the backend of every call of this stage; None leaves the choice to what is in force at the call.
        caches: only `kv_cache_bytes` counts here.
        compiled: on a GPU, decode through torch.compile, which takes seconds to a minute at the first answer.
        cuda_graphs: on a GPU, capture passes of the language model in CUDA graphs; without graphs less memory is
            needed.

    Attributes:
        decoder: the decoder, which all backends but `reference` decode with.
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
        """The device of the language model's input; for offloaded weights, the device that they are brought to."""
        return execution_device(self.model.get_input_embeddings())

    @property
    def tokenizer(self):
        """What turns the ids of answers into text."""
        return self.processor.tokenizer

    @property
    def positions(self) -> int:
        """The number of positions of the longest conversation that fits the model."""
        return self.model.text_config.max_position_embeddings

    @property
    def first_use(self) -> dict[str, float]:
        """Seconds spent so far on work that is done once: compiling, and capturing graphs."""
        return self.decoder.runner.first_use

    def remembers(self) -> bool:
        """Whether keys and values are remembered here, so that pictures need digests to be found again."""
        with use_backend(self.backend):
            return self.decoder.prefixes.limit > 0 and requested() != "reference"

    def request(self, prompt: str, sampling: Sampling) -> Request:
        """Encodes a prompt.

        Raises:
            PromptError: the prompt is too long for the model's context, or leaves no room for an answer.
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
        scope: Hashable = None,
    ) -> list[Answer]:
        """Answers requests side by side.

        Args:
            rows: each request with its pictures. The longest prompt and the largest max_new_tokens together fit into
                the context.
            sampling: how tokens are chosen; their number comes from the requests.
            generator: draws the samples, on the stage's device; the global random state stays as it is. Default:
                torch's own.
            meter: measures the stages; for a single request only.
            emit: called with pieces of text as they become final; for a single request only.
            criterion: a further criterion, which ends all answers.
            scope: keys and values are remembered for requests of the same scope only; see `drop`.
        """
        model, options = self.model, sampling.of_generate()
        inputs = self.inputs(rows)
        width = inputs["input_ids"].shape[1]
        criteria = StoppingCriteriaList(options.pop("stopping_criteria", None) or [])
        if criterion is not None:
            criteria.append(criterion)
        # The answers of several requests are cut to their own lengths at the end. `generate` takes no streamer with
        # beams.
        alone = len(rows) == 1 and self._setting(options, "num_beams") in (None, 1)
        if strings := options.pop("stop_strings", None):
            # `generate` would make the same criterion, but it passes no tokenizer to custom loops.
            criteria.append(StopStringCriteria(self.processor.tokenizer, strings))
        first = True

        def on_token() -> None:
            nonlocal first
            if first and meter is not None:
                meter.start("decode")
            first = False

        stream = PieceStream(self.tokenizer, emit, on_token) if alone else None
        if meter is not None:
            meter.start("prefill to first token" if stream is not None else "prefill and decode")
        with use_backend(self.backend), torch.inference_mode(), contextlib.ExitStack() as stack:
            request = None
            if requested() != "reference" and self.decoder.refuses(options) is None:
                digests = self.digests(rows)
                request = self.decoder.request(digests if all(digests) else None, stream, generator, scope)
            elif generator is not None:
                stack.enter_context(_as_global(generator))
            stack.enter_context(mixed_dtypes_named({"language_model": model.language_model}))
            out = model.generate(
                **inputs,
                max_new_tokens=max(row.max_new_tokens for row, _ in rows),
                **({} if sampling.allow_long is None else {"allow_long": sampling.allow_long}),
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
        """Drops the keys and values of prompts and answers, and all captured graphs."""
        self.decoder.forget()

    def drop(self, scope: Hashable) -> None:
        """Drops the keys and values that are remembered for a scope."""
        self.decoder.prefixes.drop(scope)

    def forget_prompts(self) -> None:
        """Drops the keys and values of prompts and answers, but no captured graphs."""
        self.decoder.prefixes.clear()

    def rest(self) -> None:
        """Frees the memory in which several answers were decoded at once; remembered keys and values stay."""
        self.decoder.rest()

    def _answers(
        self, requests: Sequence[Request], rows: list[list[int]], lengths: list[int] | None, options: dict, **shared
    ) -> list[Answer]:
        """Makes answers of generated rows of ids, which are filled up after their ends to the longest answer."""
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
                    text=decode_answer(self.tokenizer, ids),
                    token_ids=ids,
                    finish_reason="stop" if ended else "length",
                    prompt_tokens=len(request.ids),
                    image_tokens=sum(request.marks),
                    **shared,
                )
            )
        return answers

    def _setting(self, options: dict, name: str):
        """The value that `generate` has for a setting: the options', their generation_config's, or the model's own."""
        if name in options:
            return options[name]
        given = getattr(options.get("generation_config"), name, None)
        return getattr(self.model.generation_config, name) if given is None else given

    def inputs(self, rows: Sequence[tuple[Request, Sequence[SeenPicture]]]) -> dict:
        """The inputs of `generate`: prompts filled up on the left to the longest, and the pictures of all requests."""
        padded, requests = self.padded, [request for request, _ in rows]
        inputs = {
            "input_ids": padded([request.ids for request in requests], self.processor.filler_id),
            "attention_mask": padded([[1] * len(request.ids) for request in requests], 0),
        }
        if pictures := [picture.tokens for _, pictures in rows for picture in pictures]:
            inputs["mm_token_type_ids"] = padded([request.marks for request in requests], 0)
            inputs["image_tokens"] = torch.stack(pictures)
        return inputs

    def digests(self, rows: Sequence[tuple[Request, Sequence[SeenPicture]]]) -> list[bytes]:
        """The digests of all pictures in order, by which keys and values of requests are found again."""
        return [picture.digest for _, pictures in rows for picture in pictures]

    def padded(self, rows: Sequence[list[int]], filling: int) -> torch.Tensor:
        """Rows of numbers as int64 [B, L] on the stage's device, filled up on the left to the longest."""
        width = max(map(len, rows))
        return torch.tensor([[filling] * (width - len(row)) + row for row in rows], device=self.device)


@contextlib.contextmanager
def _as_global(generator: torch.Generator) -> Iterator[None]:
    """Makes torch's own generator of the device draw what this one would, because `generate` takes no generator."""
    device = generator.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        own = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
        own.set_state(generator.get_state())
        try:
            yield
        finally:
            generator.set_state(own.get_state())
