"""From a picture and a question to the answer: the facade over the stages, and loading."""

import dataclasses
import os
import time
from collections.abc import Iterator, Sequence

import torch

from .engine import batch
from .engine import explain as explaining
from .engine.answers import Answer, AnswerStage
from .engine.conversation import Conversation
from .engine.first_use import warm_up
from .engine.options import CacheOptions, Sampling
from .engine.vision import VisionStage, decoded
from .errors import BackendError, PictureError, quoted
from .models import builtin
from .models.mini_gemini import loading_dtype
from .models.mini_gemini.modeling import MiniGeminiForConditionalGeneration
from .models.mini_gemini.processing import MiniGeminiProcessor
from .models.tensor_files import resolve_folder
from .ops.backend import check_everywhere
from .quantization import WeightBytes, weight_bytes
from .runtime.dtypes import wanted_dtype
from .runtime.meter import Meter
from .runtime.placement import execution_device


class Pipeline:
    """A loaded model with its processor and one conversation of its own; `load` makes one.

    It owns a vision stage, an answer stage, and the conversation, and hands every call on to them.

    Args:
        model: the MiniGeminiForConditionalGeneration.
        processor: its MiniGeminiProcessor.
        backend: for every call of this pipeline.
        image_cache_bytes, kv_cache_bytes: as of `CacheOptions`.
        compiled: on a GPU, decode through torch.compile: seconds to a minute at the first answer.
        cuda_graphs: on a GPU, capture what is launched in CUDA graphs; without, less memory is taken.

    Attributes:
        vision: the `VisionStage`, pictures to image tokens.
        answers: the `AnswerStage`, prompts and image tokens to answers.
        load_seconds: how long loading took, where `load` did it.
    """

    def __init__(
        self,
        model: MiniGeminiForConditionalGeneration,
        processor: MiniGeminiProcessor,
        *,
        backend: str | None = None,
        image_cache_bytes: int = CacheOptions.image_cache_bytes,
        kv_cache_bytes: int | None = CacheOptions.kv_cache_bytes,
        compiled: bool = False,
        cuda_graphs: bool = True,
    ):
        caches = CacheOptions(image_cache_bytes, kv_cache_bytes)
        check_everywhere(backend, execution_device(model.get_input_embeddings()))
        stage = {"backend": backend, "caches": caches, "cuda_graphs": cuda_graphs}
        self.vision = VisionStage(model, processor.image_processor, **stage)
        self.answers = AnswerStage(model, processor, compiled=compiled, **stage)
        self.load_seconds: float | None = None
        self._own = Conversation(self.vision, self.answers, processor.template)

    def __reduce_ex__(self, protocol):
        """Copying and pickling, which the locks and the memory of a decoder do not allow."""
        raise TypeError(
            "a Pipeline cannot be copied or pickled: pipeline.conversation() opens another conversation over the same model, "
            "mg_fast.Pipeline(model, processor) makes another pipeline over it, and another process calls mg_fast.load itself"
        )

    @property
    def model(self) -> MiniGeminiForConditionalGeneration:
        """The model that everything runs on."""
        return self.answers.model

    @property
    def processor(self) -> MiniGeminiProcessor:
        """The model's processor."""
        return self.answers.processor

    @property
    def backend(self) -> str | None:
        """The backend of every call; None leaves the choice to what is in force."""
        return self.answers.backend

    @property
    def template(self) -> str:
        """Name of the prompt template."""
        return self._own.template

    @property
    def device(self) -> torch.device:
        """The device that the language model's input goes to; where its weights are offloaded, the one that they are
        brought to.
        """
        return self.answers.device

    @property
    def decoder(self):
        """The answer stage's decoder, by which all backends but `reference` decode."""
        return self.answers.decoder

    @property
    def weights(self) -> WeightBytes:
        """Bytes of the language model and of the vision part, as they are stored now."""
        return weight_bytes(self.model)

    @property
    def first_use(self) -> dict[str, float]:
        """Seconds spent so far on what is done once: packing towers, compiling, capturing graphs."""
        return {**self.vision.first_use, **self.answers.first_use}

    def warm_up(self) -> dict[str, float]:
        """Answers two questions about a picture of noise, twice, so that what is done at first use is done.

        On a GPU, passes over longer conversations than these are still captured when an answer reaches them.

        Returns:
            Seconds of each part, and `all` of them; conversations and the image tokens at hand stay as they are.
        """
        return warm_up(self.vision, self.answers, self.template)

    def chat(self, text: str, images: Sequence | None = None, **options) -> "Answer | Iterator[str]":
        """Asks in the pipeline's own conversation; see `Conversation.chat`."""
        return self._own.chat(text, images, **options)

    def reset(self) -> None:
        """Forgets the pipeline's own conversation."""
        self._own.reset()

    def conversation(self) -> Conversation:
        """Opens another conversation over the same model."""
        return Conversation(self.vision, self.answers, self.template)

    def chat_batch(
        self,
        questions: Sequence,
        *,
        batch_size: int = batch.DEFAULT_BATCH,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float | None = None,
        seed: int | None = None,
        allow_long: bool | None = None,
        allow_urls: bool = False,
        progress: bool = True,
        **generate_options,
    ) -> list[Answer]:
        """Answers many questions, each by itself, several at once; in their order.

        Prompts of like length go together, filled up on the left. A picture that several ask about is encoded once.
        What cannot be answered (a broken picture, a prompt too long, numbers that are not finite) stands in its place
        as an Answer with `finish_reason="error"` and the exception in `error`; the rest goes on. Where memory is short
        a batch is halved.

        Args:
            questions: each a text, (text, images) or {"text": ..., "images": [...]}; pictures as of
                `Conversation.chat`.
            batch_size: most questions at once, default 16.
            max_new_tokens, temperature, top_p, seed, allow_long, **generate_options: of each answer, see `Sampling`.
            allow_urls: fetch pictures given as URLs.
            progress: show a progress bar on stderr; default True.

        Raises:
            PromptError: options that would be ignored; before anything is generated.
        """
        sampling = Sampling(max_new_tokens, temperature, top_p, seed, allow_long, generate_options)
        options = {"batch_size": batch_size, "allow_urls": allow_urls, "progress": progress}
        return batch.chat_batch(self.vision, self.answers, self.template, questions, sampling, **options)

    def explain(
        self,
        image,
        question: str | None = None,
        *,
        max_new_tokens: int | None = None,
        allow_long: bool | None = None,
        allow_urls: bool = False,
        windows: bool = False,
    ) -> explaining.Explanation:
        """Shows which high-resolution pixels each query of a picture mined, and which of them the answer to a question
        came from.

        Without a question every query counts alike. With one, each counts by how much the greedy answer may depend on
        its image token:
        the length of the gradient, to the token, of by how much the answer's words beat the best other word in each
        place (the difference of the two logits, summed over the whole answer in one pass, its end left out), times how
        far the token lies from the mean of the picture's tokens. To first order the difference changes by no more where
        the token becomes like any other. Of the log probability instead, words that the model is sure of would have
        next to no gradient. The form was chosen among a dozen by trial on the package's small model; it is an estimate,
        not a proof.

        Towers and language model run by themselves, apart from conversations and caches; the model stays as it is. With
        a question the activations of one whole pass of the language model are held.

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
        picture = decoded(image, allow_urls)
        sampling = Sampling(max_new_tokens=max_new_tokens, allow_long=allow_long)
        return explaining.explain(
            self.vision, self.answers, self.template, picture, question, sampling, windows=windows
        )

    def see(self, image, *, allow_urls: bool = False, meter: Meter | None = None) -> torch.Tensor:
        """Image tokens [T, hidden] of one picture (T 576, HD 2880; unscaled, global view first); the caller's own to
        change.

        A picture that was seen before, in whatever file or conversation, is decoded and found in the cache by its
        pixels.

        Args:
            image: a Pillow image, path, bytes, or uint8 array or tensor; a URL where `allow_urls` is set.
            allow_urls: fetch a picture given as URL.
            meter: measures the stages.
        """
        # The copy is made outside of inference mode, so that anything may be done with it.
        return self.vision.see(image, allow_urls=allow_urls, meter=meter).tokens.clone()

    def clear_image_cache(self) -> None:
        """Forgets the image tokens of pictures seen before and the packed towers; conversations keep the tokens of
        their own pictures.
        """
        self.vision.clear()

    def clear_kv_cache(self) -> None:
        """Forgets keys and values of prompts and answers; conversations go on, their history is computed once more.

        Other weights, hooks and adapters are noticed; for whoever writes into the language model's weights through
        `.data`.
        """
        self.answers.forget()


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
    image_cache_bytes: int = CacheOptions.image_cache_bytes,
    kv_cache_bytes: int | None = CacheOptions.kv_cache_bytes,
    compiled: bool = False,
    cuda_graphs: bool = True,
) -> Pipeline:
    """Loads a Mini-Gemini checkpoint with everything around it.

    Args:
        path: folder or hub id of a checkpoint in the published layout, or the name of one in the package (`nano`).
        dtype: weights' dtype, by any usual name. `auto`, or None, takes the one that config.json names, else the stored
            one; on a CPU, for a checkpoint of 16-bit weights, the one that the CPU multiplies fastest in, float32 only
            where it fits in the memory (`loading_dtype`). A dict is handed on to transformers, which loads the weights
            in the one under its empty key.
        device: `cuda`, `cpu`, ..., or `auto` to spread over what is there; default: a GPU if there is one.
        backend: `auto`, `reference`, `torch` or `triton`, for every call of this pipeline.
        quantize: `int8`, `int4` or `fp8` (torchao's weight-only ones), or a transformers quantization configuration,
            for the language model's layers; towers, mining, projector and head keep their dtype.
        template: overrides the prompt template.
        base_model: the base language model, for a stage-1 adapter.
        attn_implementation: as of transformers: `sdpa` (the default, torch's own choice of kernels, and the only one
            that is captured in CUDA graphs), `flash_attention_2`, `eager`.
        allow_long: accept prompts longer than the model was trained on.
        image_cache_bytes, kv_cache_bytes: as of `CacheOptions`.
        compiled: on a GPU, decode through torch.compile: seconds to a minute at the first answer.
        cuda_graphs: on a GPU, capture what is launched in CUDA graphs; without, less memory is taken.

    Raises:
        CheckpointError, BackendError (a dtype that is none, too), PromptError (unknown template), ValueError (a cache's
        bytes below 0).
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    known_device = _known_device(device)
    dtype = wanted_dtype(dtype)
    caches = CacheOptions(image_cache_bytes, kv_cache_bytes)
    check_everywhere(backend, known_device)
    began = time.perf_counter()
    adapter = {} if base_model is None else {"base_model": base_model}
    path = builtin.resolve(path)
    # a hub id is fetched whole before anything is made of it: the views' size is read from a tensor's shape
    resolve_folder(path)
    # the processor first: it is quick, and most things that can be wrong with a folder are found there
    processor = MiniGeminiProcessor.from_pretrained(path, template=template, **adapter)
    if known_device.type == "cpu":
        dtype = loading_dtype.resolve(dtype, path, quantize=quantize, **adapter)
    optional = {"quantization_config": quantize, "attn_implementation": attn_implementation}
    optional = {name: value for name, value in optional.items() if value is not None}
    model = MiniGeminiForConditionalGeneration.from_pretrained(
        path, dtype=dtype, device_map=device, template=template, allow_long=allow_long, **optional, **adapter
    )
    pipeline = Pipeline(
        model, processor, backend=backend, compiled=compiled, cuda_graphs=cuda_graphs, **dataclasses.asdict(caches)
    )
    pipeline.load_seconds = time.perf_counter() - began
    return pipeline
