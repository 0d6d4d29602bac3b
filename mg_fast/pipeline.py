"""From a picture and a question to the answer: load -> see -> answer. Every stage can be called alone."""

import contextlib
import hashlib
import itertools
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence

import torch
from PIL import Image

from . import decoding
from .engine.answers import Answer, SeenPicture
from .engine.batch import chat_batch
from .engine.conversation import Conversation
from .engine.explain import Explanation, explain
from .engine.image_cache import DEFAULT_BYTES, ImageCache, picture_digest
from .errors import BackendError, PictureError, quoted
from .models import builtin as boxed
from .models.mini_gemini.encoder import PictureEncoder, picture_state
from .models.mini_gemini.modeling import MiniGeminiForConditionalGeneration
from .models.mini_gemini.processing import MiniGeminiProcessor
from .models.pictures import open_picture
from .models.tensor_files import resolve_folder
from .ops.backend import OPERATIONS, check_everywhere, choose, requested, use_backend
from .quantization import WeightBytes, weight_bytes
from .runtime import cpu_dtype
from .runtime.dtypes import wanted_dtype
from .runtime.execution import execution_device, mixed_dtypes_named
from .runtime.meter import Meter

logger = logging.getLogger(__name__)


class Pipeline:
    """A loaded model with its processor and one conversation of its own; `load` makes one.

    Pictures go through packed copies of the towers (`PictureEncoder`), made at the first picture and of a third of their size; by the
    `reference` backend, or where a tower is more than its weights, through the model's own modules. Image tokens are kept by picture
    content, for all conversations. Both are made anew once the picture side has changed: weights that were written to in place, moved or
    exchanged, hooks, and adapters that were added, switched, scaled or merged. Whoever writes to weights through `.data` (or to offloaded
    ones, or to inference tensors), calls `clear_image_cache`.

    Args:
        model: the MiniGeminiForConditionalGeneration.
        processor: its MiniGeminiProcessor.
        backend: for every call of this pipeline.
        image_cache_bytes: most bytes of image tokens kept, on the model's device; 0 keeps none.
        kv_cache_bytes: most bytes of keys and values kept of prompts and answers, on the model's devices; 0 keeps none. Default: 1 GiB, or
            as many as the longest conversation has that the model can hold. Not counted is the memory that the last answer was decoded in,
            of its length rounded up to 2048 positions, which stays for the next one until `clear_kv_cache`.
        compiled: on a GPU, decode through torch.compile: seconds to a minute at the first answer.

    Attributes:
        model: the MiniGeminiForConditionalGeneration.
        processor: its MiniGeminiProcessor.
        decoder: the LeanDecoder, by which all backends but `reference` decode.
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
        kv_cache_bytes: int | None = None,
        compiled: bool = False,
    ):
        check_everywhere(backend, execution_device(model.get_input_embeddings()))
        self.decoder = decoding.LeanDecoder(model, kv_cache_bytes=kv_cache_bytes, compiled=compiled)
        self._image_cache = ImageCache(image_cache_bytes)
        self._encoder: PictureEncoder | None = None
        self._packing = threading.Lock()
        # towers are packed anew after a change, and the tokens of one picture are others then
        self._packing_number = 0
        self._picture_state: tuple | None = None
        self.model, self.processor, self.backend = model, processor, backend
        self.template = processor.template
        self.load_seconds: float | None = None
        self._own = Conversation(self)

    def __reduce_ex__(self, protocol):
        """Copying and pickling, which the locks and the memory of a decoder do not allow."""
        raise TypeError(
            "a Pipeline cannot be copied or pickled: pipeline.conversation() opens another conversation over the same model, "
            "mg_fast.Pipeline(model, processor) makes another pipeline over it, and another process calls mg_fast.load itself"
        )

    @property
    def device(self) -> torch.device:
        """The device that the language model's input goes to; where its weights are offloaded, the one that they are brought to."""
        return execution_device(self.model.get_input_embeddings())

    @property
    def weights(self) -> WeightBytes:
        """Bytes of the language model and of the vision part, as they are stored now."""
        return weight_bytes(self.model)

    @property
    def first_use(self) -> dict[str, float]:
        """Seconds spent so far on what is done once: packing towers, compiling, capturing graphs."""
        return {**(self._encoder.first_use if self._encoder is not None else {}), **self.decoder.steps.first_use}

    def warm_up(self) -> dict[str, float]:
        """Answers two questions about a picture of noise, twice, so that what is done at first use is done.

        On a GPU, passes over longer conversations than these are still captured when an answer reaches them.

        Returns:
            Seconds of each part, and `all` of them; conversations and the image tokens at hand stay as they are.
        """
        began = time.perf_counter()
        noise = Image.effect_noise((64, 64), 64).convert("RGB")
        # passes are captured when their shape comes again
        for _ in range(2):
            # and all of the prompt is to be computed both times
            self.decoder.prefixes.clear()
            conversation = Conversation(self)
            for question, images in (("What is shown here?", [noise]), ("And what else?", None)):
                conversation.chat(question, images, stopping_criteria=[_after(4)])
        self.decoder.prefixes.clear()
        return {**self.first_use, "all": time.perf_counter() - began}

    def chat(self, text: str, images: Sequence | None = None, **options) -> "Answer | Iterator[str]":
        """Asks in the pipeline's own conversation; see `Conversation.chat`."""
        return self._own.chat(text, images, **options)

    def reset(self) -> None:
        """Forgets the pipeline's own conversation."""
        self._own.reset()

    def conversation(self) -> "Conversation":
        """Opens another conversation over the same model."""
        return Conversation(self)

    def chat_batch(self, questions: Sequence, **options) -> list[Answer]:
        """Answers many questions, each by itself, several at once; in their order.

        Prompts of like length go together, filled up on the left. A picture that several ask about is encoded once. What cannot be answered
        (a broken picture, a prompt too long, numbers that are not finite) stands in its place as an Answer with `finish_reason="error"`
        and the exception in `error`; the rest goes on. Where memory is short a batch is halved.

        Args:
            questions: each a text, (text, images) or {"text": ..., "images": [...]}; pictures as of `Conversation.chat`.
            batch_size: most questions at once, default 16.
            max_new_tokens, temperature, top_p, allow_long, allow_urls: as of `Conversation.chat`, for each.
            seed: makes sampling repeatable, for the same questions in the same order and batches.
            progress: show a progress bar on stderr; default True.
            **generate_options: anything else `generate` takes for one answer.

        Raises:
            PromptError: options that would be ignored; before anything is generated.
        """
        return chat_batch(self, questions, **options)

    def explain(
        self,
        image,
        question: str | None = None,
        *,
        max_new_tokens: int | None = None,
        allow_long: bool | None = None,
        allow_urls: bool = False,
        windows: bool = False,
    ) -> Explanation:
        """Shows which high-resolution pixels each query of a picture mined, and which of them the answer to a question came from.

        Without a question every query counts alike. With one, each counts by how much the greedy answer may depend on its image token:
        the length of the gradient, to the token, of by how much the answer's words beat the best other word in each place (the difference
        of the two logits, summed over the whole answer in one pass, its end left out), times how far the token lies from the mean of the
        picture's tokens. To first order the difference changes by no more where the token becomes like any other. Of the log probability
        instead, words that the model is sure of would have next to no gradient. The form was chosen among a dozen by trial on the
        package's small model; it is an estimate, not a proof.

        Towers and language model run by themselves, apart from conversations and caches; the model stays as it is. With a question the
        activations of one whole pass of the language model are held.

        Args:
            image: as of `see`.
            question: `<image>` may mark where the picture stands.
            max_new_tokens: as of `Conversation.chat`.
            allow_long: accept a prompt longer than the model was trained on.
            allow_urls: fetch a picture given as URL.
            windows: draw the borders of the windows, too.

        Raises:
            PromptError, PictureError: before anything is computed.
            BackendError: a question, and quantised weights without gradients (int4).
            FloatingPointError: the model's numbers are not finite.
        """
        if image is None:
            raise PictureError("explain: expected a picture, got None: a question alone mines no pixels")
        picture = _decoded(image, allow_urls)
        return explain(self, picture, question, max_new_tokens=max_new_tokens, allow_long=allow_long, windows=windows)

    def see(self, image, *, allow_urls: bool = False, meter: Meter | None = None) -> torch.Tensor:
        """Image tokens [T, hidden] of one picture (T 576, HD 2880; unscaled, global view first); the caller's own to change.

        A picture that was seen before, in whatever file or conversation, is decoded and found in the cache by its pixels.

        Args:
            image: a Pillow image, path, bytes, or uint8 array or tensor; a URL where `allow_urls` is set.
            meter: measures the stages.
        """
        # outside of inference mode: a tensor that anything may be done with
        return self._see(image, allow_urls=allow_urls, meter=meter).tokens.clone()

    @torch.inference_mode()
    def _see(
        self, image, *, allow_urls: bool = False, meter: Meter | None = None, seen: Iterable[SeenPicture] | None = None
    ) -> SeenPicture:
        """`see`, with a digest where anything is kept by it; `seen` are pictures at hand, which are not encoded again."""
        stage = meter.stage if meter is not None else contextlib.nullcontext
        with self._backend():
            with stage("preprocess"):
                # first: what was seen with other weights is forgotten with their copies
                number, encoder = self._current_encoder(packed=requested() != "reference")
                digest = b""
                if self._image_cache.limit or seen is not None or (encoder is not None and self.decoder.prefixes.limit):
                    image = _decoded(image, allow_urls)
                    digest = hashlib.sha256(repr((picture_digest(image), number, *self._circumstances())).encode()).digest()
                    if (known := next((picture for picture in seen or () if picture.digest == digest), None)) is not None:
                        return known
                    if (tokens := self._image_cache.get(digest)) is not None:
                        return SeenPicture(tokens, digest)
                # the same pixels to the last bit; on a CPU Pillow is the faster one
                device = self.device if self.device.type == "cuda" and requested() != "reference" else None
                pixels = self.processor.image_processor(image, allow_urls=allow_urls, device=device).to(self.device)
            measured = {"stage": meter.stage} if meter is not None else {}
            if encoder is not None:
                tokens = encoder.encode(**pixels, **measured)[0]
            else:
                inner = self.model.model
                with mixed_dtypes_named({"vision_tower": inner.vision_tower, "vision_tower_aux": inner.vision_tower_aux}):
                    tokens = inner.get_image_features(**pixels, **measured).pooler_output[0]
            if digest:
                self._image_cache.put(digest, tokens)
            return SeenPicture(tokens, digest)

    def _see_all(self, images: Sequence, before: Iterable[Sequence[SeenPicture]], *, allow_urls: bool) -> list[SeenPicture]:
        """Pictures of one question of a batch, with those of the questions `before` at hand."""
        seen = [picture for pictures in before for picture in pictures]
        own: list[SeenPicture] = []
        for image in images:
            own.append(self._see(image, allow_urls=allow_urls, seen=[*seen, *own]))
        return own

    def _current_encoder(self, *, packed: bool) -> tuple[int, PictureEncoder | None]:
        """The number of the picture side's present state, and the packed towers of it.

        Image tokens and towers of another state are dropped. The towers are None where none are asked for, or the model cannot be packed.
        """
        with self._packing:
            state = picture_state(self.model.model)
            if state != self._picture_state:
                if self._picture_state is not None:
                    self.clear_image_cache()
                self._picture_state = state
            if packed and self._encoder is None:
                try:
                    # its weights must not be inference tensors, which count no changes
                    with torch.inference_mode(False):
                        self._encoder = PictureEncoder(self.model.model)
                except ValueError as error:
                    logger.info("pictures go through the model's own modules: %s", error)
            return self._packing_number, self._encoder if packed else None

    def clear_image_cache(self) -> None:
        """Forgets the image tokens of pictures seen before and the packed towers; conversations keep the tokens of their own pictures."""
        self._image_cache.clear()
        self._encoder = None
        self._packing_number += 1

    def clear_kv_cache(self) -> None:
        """Forgets keys and values of prompts and answers; conversations go on, their history is computed once more.

        Other weights, hooks and adapters are noticed; for whoever writes into the language model's weights through `.data`.
        """
        self.decoder.forget()

    def _circumstances(self) -> tuple:
        """What image tokens depend on beside the picture and the state of the model."""
        device, images = self.device, self.processor.image_processor
        backends = tuple(choose(operation, None, device) for operation in OPERATIONS)
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        # what settles the arithmetic of float32 products
        settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv)
        precision = tuple(setting.fp32_precision for setting in settings)
        processing = (images.hr_size, images.lr_size, images.grid, images.global_view, images.pad)
        return (
            str(device),
            self.model.dtype,
            backends,
            autocast,
            precision,
            processing,
        )

    def _backend(self):
        return use_backend(self.backend) if self.backend is not None else contextlib.nullcontext()


def _after(tokens: int):
    """A stopping criterion: so many new tokens."""
    calls = itertools.count(1)
    return lambda ids, scores, **_: torch.full((len(ids),), next(calls) >= tokens, device=ids.device)


def _decoded(image, allow_urls: bool) -> Image.Image:
    """The picture in RGB, named as what it was read from."""
    picture = open_picture(image, allow_urls=allow_urls)
    if name := getattr(image, "filename", None):
        picture.filename = name
    return picture


def _known_device(device: str | torch.device) -> torch.device:
    """The device, if it is there; `BackendError` if not, before any weight is read."""
    try:
        known = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    except RuntimeError as error:
        raise BackendError(f"unknown device {quoted(device)}: {str(error).splitlines()[0]}") from None
    if known.type == "cuda" and not torch.cuda.is_available():
        raise BackendError(f"device {quoted(str(device))}: torch finds no CUDA device here (mg-fast doctor tells more)")
    return known


def load(
    path: str | os.PathLike,
    *,
    dtype: str | torch.dtype | dict | None = "auto",
    device: str | torch.device | None = None,
    backend: str | None = None,
    quantize=None,
    template: str | None = None,
    base_model: str | os.PathLike | None = None,
    attn_implementation: str | None = None,
    allow_long: bool = False,
    image_cache_bytes: int = DEFAULT_BYTES,
    kv_cache_bytes: int | None = None,
    compiled: bool = False,
) -> Pipeline:
    """Loads a Mini-Gemini checkpoint with everything around it.

    Args:
        path: folder or hub id of a checkpoint in the published layout, or the name of one in the package (`nano`).
        dtype: weights' dtype, by any usual name. `auto`, or None, takes the one that config.json names, else the stored one; on a
            CPU, for a checkpoint of 16-bit weights, the one that the CPU multiplies fastest in, float32 only where it fits in the
            memory (`cpu_dtype`). A dict is handed on to transformers, which loads the weights in the one under its empty key.
        device: `cuda`, `cpu`, ..., or `auto` to spread over what is there; default: a GPU if there is one.
        backend: `auto`, `reference`, `torch` or `triton`, for every call of this pipeline.
        quantize: `int8`, `int4` or `fp8` (torchao's weight-only ones), or a transformers quantization configuration, for the language
            model's layers; towers, mining, projector and head keep their dtype.
        template: overrides the prompt template.
        base_model: the base language model, for a stage-1 adapter.
        attn_implementation: as of transformers: `sdpa` (the default, torch's own choice of kernels, and the only one that is captured in
            CUDA graphs), `flash_attention_2`, `eager`.
        allow_long: accept prompts longer than the model was trained on.
        image_cache_bytes: most bytes of image tokens kept, by picture content, on the model's device; 0 keeps none.
        kv_cache_bytes: most bytes of keys and values kept of prompts and answers, on the model's devices; 0 keeps none. Default: 1 GiB, or
            as many as the longest conversation has that the model can hold.
        compiled: on a GPU, decode through torch.compile: seconds to a minute at the first answer.

    Raises:
        CheckpointError, BackendError (a dtype that is none, too), PromptError (unknown template), ValueError (a cache's bytes below 0).
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    known_device = _known_device(device)
    dtype = wanted_dtype(dtype)
    check_everywhere(backend, known_device)
    began = time.perf_counter()
    adapter = {} if base_model is None else {"base_model": base_model}
    path = boxed.resolve(path)
    # a hub id is fetched whole before anything is made of it: the views' size is read from a tensor's shape
    resolve_folder(path)
    # the processor first: it is quick, and most things that can be wrong with a folder are found there
    processor = MiniGeminiProcessor.from_pretrained(path, template=template, **adapter)
    if known_device.type == "cpu":
        dtype = cpu_dtype.resolve(dtype, path, quantize=quantize, **adapter)
    optional = {"quantization_config": quantize, "attn_implementation": attn_implementation}
    optional = {name: value for name, value in optional.items() if value is not None}
    model = MiniGeminiForConditionalGeneration.from_pretrained(
        path, dtype=dtype, device_map=device, template=template, allow_long=allow_long, **optional, **adapter
    )
    caches = {"image_cache_bytes": image_cache_bytes, "kv_cache_bytes": kv_cache_bytes}
    pipeline = Pipeline(model, processor, backend=backend, compiled=compiled, **caches)
    pipeline.load_seconds = time.perf_counter() - began
    return pipeline
