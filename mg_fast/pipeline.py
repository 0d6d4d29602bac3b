"""From a picture and a question to the answer: load -> see -> answer. Every stage can be called alone."""

import contextlib
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList

from .backend import IMPLEMENTED, check_everywhere, choose, requested, use_backend
from .conversation import IMAGE_TAG, render, with_picture_tags
from .errors import BackendError, PromptError
from .image_cache import DEFAULT_BYTES, ImageCache, picture_digest
from .meter import Meter, Stage
from .mini_gemini.encoder import PictureEncoder
from .mini_gemini.modeling import MiniGeminiForConditionalGeneration
from .mini_gemini.pictures import open_picture
from .mini_gemini.processing import MiniGeminiProcessor
from .mini_gemini.tensor_files import resolve_folder
from .quantization import WeightBytes, check_cache, weight_bytes
from .streaming import PieceStream, decode_answer

logger = logging.getLogger(__name__)

# what an answer may grow to when the caller does not say (the original's command line)
DEFAULT_NEW_TOKENS = 512


@dataclass(frozen=True)
class Answer:
    """What came back for one question.

    Attributes:
        text: the answer, special tokens left out, white space at both ends removed.
        token_ids: the generated ids, the one that ended the answer included.
        finish_reason: `length` (max_new_tokens ended it) or `stop` (the model did, or another criterion that was asked for).
        prompt_tokens: positions of the prompt, image tokens included.
        image_tokens: how many of those were image tokens.
        stages: time and memory by stage, where `profile=True` asked for it.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    image_tokens: int
    stages: list[Stage] = field(default_factory=list)

    def __str__(self) -> str:
        return self.text


class Pipeline:
    """A loaded model with its processor and one conversation of its own; `load` makes one.

    Pictures go through packed copies of the towers (`PictureEncoder`), made at the first picture and of a third of their size; by the
    `reference` backend, or where a tower is more than its weights, through the model's own modules. Image tokens are kept by picture
    content, for all conversations. Both are made anew after the weights were changed in place or moved; whoever changes them through
    `.data`, or adds hooks or adapters to a tower, calls `clear_image_cache`.

    Args:
        model: the MiniGeminiForConditionalGeneration.
        processor: its MiniGeminiProcessor.
        backend: for every call of this pipeline.
        image_cache_bytes: most bytes of image tokens kept, on the model's device; 0 keeps none.

    Attributes:
        model: the MiniGeminiForConditionalGeneration.
        processor: its MiniGeminiProcessor.
        template: name of the prompt template.
        load_seconds: how long loading took, where `load` did it.
    """

    def __init__(
        self,
        model: MiniGeminiForConditionalGeneration,
        processor: MiniGeminiProcessor,
        *,
        backend: str | None = None,
        image_cache_bytes: int = DEFAULT_BYTES,
    ):
        check_everywhere(backend, model.device)
        self._image_cache = ImageCache(image_cache_bytes)
        self._encoder: PictureEncoder | None = None
        self._packing = threading.Lock()
        self.model, self.processor, self.backend = model, processor, backend
        self.template = processor.template
        self.load_seconds: float | None = None
        self._own = Conversation(self)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def weights(self) -> WeightBytes:
        """Bytes of the language model and of the vision part, as they are stored now."""
        return weight_bytes(self.model)

    def chat(self, text: str, images: Sequence | None = None, **options) -> "Answer | Iterator[str]":
        """Asks in the pipeline's own conversation; see `Conversation.chat`."""
        return self._own.chat(text, images, **options)

    def reset(self) -> None:
        """Forgets the pipeline's own conversation."""
        self._own.reset()

    def conversation(self) -> "Conversation":
        """Opens another conversation over the same model."""
        return Conversation(self)

    @torch.inference_mode()
    def see(self, image, *, allow_urls: bool = False, meter: Meter | None = None) -> torch.Tensor:
        """Image tokens [T, hidden] of one picture (T 576, HD 2880; unscaled, global view first); the caller's own to change.

        A picture that was seen before, in whatever file or conversation, is decoded and found in the cache by its pixels.

        Args:
            image: a Pillow image, path, bytes, or uint8 array or tensor; a URL where `allow_urls` is set.
            meter: measures the stages.
        """
        stage = meter.stage if meter is not None else contextlib.nullcontext
        with self._backend():
            with stage("preprocess"):
                # first: what was seen with other weights is forgotten with their copies
                encoder = self._packed_encoder() if requested() != "reference" else None
                key = None
                if self._image_cache.limit:
                    image = _decoded(image, allow_urls)
                    key = (picture_digest(image), *self._circumstances())
                    if (tokens := self._image_cache.get(key)) is not None:
                        return tokens
                # the same pixels to the last bit; on a CPU Pillow is the faster one
                device = self.device if self.device.type == "cuda" and requested() != "reference" else None
                pixels = self.processor.image_processor(image, allow_urls=allow_urls, device=device).to(self.device)
            measured = {"stage": meter.stage} if meter is not None else {}
            if encoder is not None:
                tokens = encoder.encode(**pixels, **measured)[0]
            else:
                tokens = self.model.model.get_image_features(**pixels, **measured).pooler_output[0]
            if key is not None:
                self._image_cache.put(key, tokens)
            return tokens

    def _packed_encoder(self) -> PictureEncoder | None:
        """The one at hand, or another where the model has been changed, moved or converted since; None where the model cannot be packed."""
        with self._packing:
            if self._encoder is not None:
                if self._encoder.is_current():
                    return self._encoder
                self.clear_image_cache()
            try:
                # its weights must not be inference tensors, which count no changes
                with torch.inference_mode(False):
                    self._encoder = PictureEncoder(self.model.model)
            except ValueError as error:
                logger.info("pictures go through the model's own modules: %s", error)
            return self._encoder

    def clear_image_cache(self) -> None:
        """Forgets the image tokens of pictures seen before and the packed towers; conversations keep the tokens of their own pictures."""
        self._image_cache.clear()
        self._encoder = None

    def _circumstances(self) -> tuple:
        """What image tokens depend on beside the picture and the weights."""
        device, config, images = self.device, self.model.config, self.processor.image_processor
        backends = tuple(choose(operation, None, device) for operation in IMPLEMENTED)
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        # what settles the arithmetic of float32 products
        settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv)
        precision = tuple(setting.fp32_precision for setting in settings)
        processing = (images.hr_size, images.lr_size, images.grid, images.global_view, images.pad)
        return (str(device), self.model.dtype, backends, autocast, precision, processing, config.mm_vision_select_layer)

    def _backend(self):
        return use_backend(self.backend) if self.backend is not None else contextlib.nullcontext()


def _decoded(image, allow_urls: bool) -> Image.Image:
    """The picture in RGB, named as what it was read from."""
    picture = open_picture(image, allow_urls=allow_urls)
    # orientation and transparency are settled: nothing may apply them, or warn of them, again
    picture.info = {}
    if name := getattr(image, "filename", None):
        picture.filename = name
    return picture


class Conversation:
    """Turns and pictures of one dialogue. Pictures are seen once and their image tokens kept until `reset` or `close`."""

    def __init__(self, pipeline: Pipeline):
        self.pipeline = pipeline
        self.turns: list[tuple[str, str]] = []
        self.image_tokens: list[torch.Tensor] = []
        # a stream is kept only if the conversation is still the one it was asked in
        self._version = 0

    def reset(self) -> None:
        """Forgets turns and pictures."""
        self.turns, self.image_tokens = [], []
        self._version += 1

    close = reset

    def chat(
        self,
        text: str,
        images: Sequence | None = None,
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float | None = None,
        seed: int | None = None,
        stream: bool = False,
        allow_long: bool | None = None,
        allow_urls: bool = False,
        profile: bool = False,
        **generate_options,
    ) -> "Answer | Iterator[str]":
        """Asks a question and keeps it, with its answer, in the conversation.

        Args:
            text: the question. `<image>` may mark where each picture stands; without it pictures go before the text.
            images: new pictures of this turn: Pillow images, paths, bytes, uint8 arrays or tensors.
            max_new_tokens: at most so many tokens; default 512, or what the context still holds.
            temperature: 0 decodes greedily; above 0 samples.
            top_p: nucleus of the sampling, with a temperature above 0.
            seed: makes sampling repeatable; the global random state stays as it is. A stream is repeatable as long as nothing else in the
                process draws from torch's global generator while it runs.
            stream: yield pieces of text that join to the answer's text. A stream that is not read to its end, or whose conversation went on
                or was reset meanwhile, leaves the conversation as it was.
            allow_long: accept a prompt longer than the model was trained on.
            allow_urls: fetch pictures given as URLs.
            profile: measure time and memory of every stage into `Answer.stages`; not with `stream`.
            **generate_options: anything else `generate` takes for one answer.

        Raises:
            PromptError, PictureError: before anything is generated.
        """
        _check_options(temperature, top_p, max_new_tokens, stream, profile, generate_options)
        if not isinstance(text, str) or not text.strip():
            raise PromptError(f"expected a user text, got {text!r}")
        if isinstance(images, (str, bytes, os.PathLike)) or (images is not None and not isinstance(images, (list, tuple))):
            images = [images]
        images = list(images or [])
        tags = text.count(IMAGE_TAG)
        if tags not in (0, len(images)):
            raise PromptError(f"the text has {tags} {IMAGE_TAG} tag(s), but {len(images)} picture(s) came")
        question = with_picture_tags(text, len(images))
        turns, version = list(self.turns), self._version
        prompt = render(self.pipeline.template, [*turns, (question, None)])

        meter = Meter(self.pipeline.device) if profile else None
        seen = [*self.image_tokens, *(self.pipeline.see(image, meter=meter, allow_urls=allow_urls) for image in images)]
        request = _Request(self.pipeline, prompt, seen, max_new_tokens, allow_long, meter)
        if temperature > 0:
            generate_options |= {"do_sample": True, "temperature": temperature, "top_p": 1.0 if top_p is None else top_p}
        else:
            generate_options = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, **generate_options}

        def keep(answer: Answer) -> None:
            if self._version != version:
                logger.warning("the conversation went on or was reset while an answer was streamed; that answer is not kept")
                return
            # a tag that the model itself wrote is text, not the place of a picture
            self.turns = [*turns, (question, answer.text.replace(IMAGE_TAG, "< image>"))]
            self.image_tokens = seen
            self._version += 1

        if stream:
            return _stream(request, generate_options, seed, keep)
        answer = request.run(generate_options, seed)
        keep(answer)
        return answer


class _Request:
    """One prompt, encoded and checked, ready to be generated from."""

    def __init__(self, pipeline: Pipeline, prompt: str, seen: list[torch.Tensor], max_new_tokens, allow_long, meter: Meter | None):
        self.pipeline, self.meter, self.allow_long = pipeline, meter, allow_long
        model, device = pipeline.model, pipeline.device
        ids, marks = pipeline.processor.encode(prompt)
        self.length, self.image_tokens = len(ids), sum(marks)
        self.max_new_tokens = max_new_tokens
        if max_new_tokens is None:
            room = model.config.text_config.max_position_embeddings - self.length
            self.max_new_tokens = max(1, min(DEFAULT_NEW_TOKENS, room))
        # an error here comes before a stream begins
        model.check_length(self.length, self.max_new_tokens, allow_long)
        self.inputs = {
            "input_ids": torch.tensor([ids], device=device),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.long, device=device),
        }
        if seen:
            self.inputs["mm_token_type_ids"] = torch.tensor([marks], device=device)
            self.inputs["image_tokens"] = torch.stack(seen)

    def run(self, options: dict, seed: int | None, emit=None, criterion: StoppingCriteria | None = None) -> Answer:
        pipeline, meter = self.pipeline, self.meter
        tokenizer = pipeline.processor.tokenizer
        first = True

        def on_token() -> None:
            nonlocal first
            if first and meter is not None:
                meter.start("decode")
            first = False

        criteria = StoppingCriteriaList(options.get("stopping_criteria") or [])
        if criterion is not None:
            criteria.append(criterion)
        # generate() takes no streamer with beams
        stream = PieceStream(tokenizer, emit, on_token) if options.get("num_beams", 1) == 1 else None
        if meter is not None:
            meter.start("prefill to first token" if stream is not None else "prefill and decode")
        with pipeline._backend(), _seeded(seed, pipeline.device), torch.inference_mode():
            out = pipeline.model.generate(
                **self.inputs,
                max_new_tokens=self.max_new_tokens,
                allow_long=self.allow_long,
                streamer=stream,
                **{**options, "stopping_criteria": criteria},
            )
        if meter is not None:
            meter.stop()
        ids = out[0, self.length :].tolist()
        stops = options.get("eos_token_id", pipeline.model.generation_config.eos_token_id)
        ended = bool(ids) and ids[-1] in (stops if isinstance(stops, list) else [stops])
        return Answer(
            text=decode_answer(tokenizer, ids),
            token_ids=ids,
            finish_reason="length" if len(ids) >= self.max_new_tokens and not ended else "stop",
            prompt_tokens=self.length,
            image_tokens=self.image_tokens,
            stages=meter.stages if meter is not None else [],
        )


def _stream(request: _Request, options: dict, seed: int | None, keep) -> Iterator[str]:
    """Pieces of text from a generation in a thread of its own; errors come out here."""
    pieces: queue.SimpleQueue = queue.SimpleQueue()
    abandoned = threading.Event()
    # the choice of backend is per thread, so it is handed over
    backend = requested()

    class Abandoned(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), abandoned.is_set(), device=input_ids.device)

    def work() -> None:
        try:
            with use_backend(backend):
                pieces.put(request.run(options, seed, pieces.put, Abandoned()))
        except BaseException as error:  # handed to the reader, whoever raised it
            pieces.put(error)

    def read() -> Iterator[str]:
        thread = threading.Thread(target=work, name="mg_fast-stream", daemon=True)
        thread.start()
        try:
            while isinstance(piece := pieces.get(), str):
                yield piece
            if isinstance(piece, BaseException):
                raise piece
            keep(piece)
        finally:
            abandoned.set()
            thread.join()

    return read()


def _check_options(temperature, top_p, max_new_tokens, stream: bool, profile: bool, options: dict) -> None:
    """Refuses what would be ignored or contradict itself."""
    if not math.isfinite(temperature) or temperature < 0:
        raise PromptError(f"temperature: expected a number of 0 or more, got {temperature}")
    if top_p is not None and temperature == 0:
        raise PromptError(f"top_p={top_p} is for sampling: give a temperature above 0 with it")
    if max_new_tokens is not None and (not isinstance(max_new_tokens, int) or max_new_tokens < 1):
        raise PromptError(f"max_new_tokens: expected a whole number of 1 or more, got {max_new_tokens}")
    if stream and profile:
        raise PromptError("profile=True measures whole answers: not with stream=True")
    if stream and options.get("num_beams", 1) > 1:
        raise PromptError("beams cannot be streamed: their text is not final before the end")
    check_cache(options)
    for name, instead in (
        ("do_sample", "temperature decides"),
        ("num_return_sequences", "a conversation goes on with one answer; use model.generate"),
        ("streamer", "stream=True yields the text"),
        ("return_dict_in_generate", "use model.generate"),
    ):
        if name in options:
            raise PromptError(f"{name} is not an option of chat: {instead}")


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device):
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _known_device(device: str | torch.device) -> torch.device:
    """The device, if it is there; `BackendError` if not, before any weight is read."""
    try:
        known = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    except RuntimeError as error:
        raise BackendError(f"unknown device {device!r}: {str(error).splitlines()[0]}") from None
    if known.type == "cuda" and not torch.cuda.is_available():
        raise BackendError(f"device {str(device)!r}: torch finds no CUDA device here (mg-fast doctor tells more)")
    return known


def load(
    path: str | os.PathLike,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    backend: str | None = None,
    quantize=None,
    template: str | None = None,
    base_model: str | os.PathLike | None = None,
    allow_long: bool = False,
    image_cache_bytes: int = DEFAULT_BYTES,
) -> Pipeline:
    """Loads a Mini-Gemini checkpoint with everything around it.

    Args:
        path: folder or hub id of a checkpoint in the published layout.
        dtype: weights' dtype; `auto` takes the stored one.
        device: `cuda`, `cpu`, ..., or `auto` to spread over what is there; default: a GPU if there is one.
        backend: `auto`, `reference`, `torch` or `triton`, for every call of this pipeline.
        quantize: `int8`, `int4` or `fp8` (torchao's weight-only ones), or a transformers quantization configuration, for the language
            model's layers; towers, mining, projector and head keep their dtype.
        template: overrides the prompt template.
        base_model: the base language model, for a stage-1 adapter.
        allow_long: accept prompts longer than the model was trained on.
        image_cache_bytes: most bytes of image tokens kept, by picture content, on the model's device; 0 keeps none.

    Raises:
        CheckpointError, BackendError, PromptError (unknown template), ValueError (image_cache_bytes below 0).
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    check_everywhere(backend, _known_device(device))
    began = time.perf_counter()
    adapter = {} if base_model is None else {"base_model": base_model}
    # a hub id is fetched whole before anything is made of it: the views' size is read from a tensor's shape
    resolve_folder(path)
    # the processor first: it is quick, and most things that can be wrong with a folder are found there
    processor = MiniGeminiProcessor.from_pretrained(path, template=template, **adapter)
    quantized = {} if quantize is None else {"quantization_config": quantize}
    model = MiniGeminiForConditionalGeneration.from_pretrained(
        path, dtype=dtype, device_map=device, template=template, allow_long=allow_long, **quantized, **adapter
    )
    pipeline = Pipeline(model, processor, backend=backend, image_cache_bytes=image_cache_bytes)
    pipeline.load_seconds = time.perf_counter() - began
    return pipeline
