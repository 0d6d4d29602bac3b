"""The pipeline of models that answer questions about pictures: a facade over the stages of the engine."""

import os
from collections.abc import Sequence

import torch

from ..engine import batch
from ..engine import explain as explaining
from ..engine.answers import Answer, AnswerStage, Request
from ..engine.conversation import Conversation, as_question
from ..engine.first_use import warm_up
from ..engine.options import CacheOptions, Sampling
from ..engine.streaming import AnswerStream
from ..engine.vision import VisionStage, decoded
from ..errors import CheckpointError, PictureError, quoted
from ..models.mini_gemini.modeling import MiniGeminiForConditionalGeneration
from ..models.mini_gemini.processing import MiniGeminiProcessor
from ..models.templates import render
from ..ops.backend import check_everywhere
from ..runtime.meter import Meter
from ..runtime.placement import execution_device
from .staged import StagedPipeline


class Pipeline(StagedPipeline):
    """A loaded model with its processor and one conversation of its own; `load` makes one.

    It owns a vision stage, an answer stage and the conversation, and passes every call on to them.

    Args:
        model: the MiniGeminiForConditionalGeneration.
        processor: its MiniGeminiProcessor.
        backend: the backend of every call of this pipeline; None leaves the choice to what is in force at the call.
        image_cache_bytes, kv_cache_bytes: see `CacheOptions`.
        compiled: on a GPU, decode through torch.compile, which takes seconds to a minute at the first answer.
        cuda_graphs: on a GPU, capture the work in CUDA graphs; without graphs less memory is needed.
        painter: the `mg_fast.drawing.Painter` that draws what answers ask for, or a folder, a hub id or the
            name `nano` for `mg_fast.drawing.load_painter`; None: nothing can be drawn.

    Attributes:
        vision: the `VisionStage`, which turns pictures into image tokens.
        answers: the `AnswerStage`, which turns prompts and image tokens into answers.
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
        painter=None,
    ):
        caches = CacheOptions(image_cache_bytes, kv_cache_bytes)
        check_everywhere(backend, execution_device(model.get_input_embeddings()))
        stage = {"backend": backend, "caches": caches, "cuda_graphs": cuda_graphs}
        self.vision = VisionStage(model, processor.image_processor, **stage)
        self.answers = AnswerStage(model, processor, compiled=compiled, **stage)
        self._own = Conversation(self.vision, self.answers, processor.template, as_painter(painter, self.device))

    @property
    def template(self) -> str:
        """The name of the prompt template."""
        return self._own.template

    @property
    def painter(self):
        """The painter of the pipeline's own conversation, and of those that are opened from now on."""
        return self._own.painter

    @painter.setter
    def painter(self, painter) -> None:
        self._own.painter = as_painter(painter, self.device)

    @property
    def last_drawn(self):
        """The picture that was drawn last in the pipeline's own conversation; None before the first one."""
        return self._own.last_drawn

    @property
    def first_use(self) -> dict[str, float]:
        """Seconds spent so far on work that is done once: packing the towers, compiling, and capturing graphs."""
        return {**self.vision.first_use, **self.answers.first_use}

    def warm_up(self) -> dict[str, float]:
        """Answers two questions about a picture of noise, twice, so that the work of the first use is done.

        Conversations and the image tokens kept so far stay as they are. On a GPU, passes over conversations longer than
        these two questions are still captured when an answer first reaches them.

        Returns:
            The seconds of each part, and under `all` of the whole.
        """
        return warm_up(self.vision, self.answers, self.template)

    def chat(self, text: str, images: Sequence | None = None, **options) -> "Answer | AnswerStream":
        """Asks a question in the pipeline's own conversation; see `Conversation.chat`."""
        return self._own.chat(text, images, **options)

    def reset(self) -> None:
        """Forgets the pipeline's own conversation."""
        self._own.reset()

    def conversation(self, *, private: bool = False) -> Conversation:
        """Opens another conversation over the same model.

        Args:
            private: what is remembered of it is found by no other conversation, and is dropped at its `reset` or
                `close`; see `Conversation`.
        """
        return Conversation(self.vision, self.answers, self.template, self.painter, private=private)

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
        """Answers many questions, each by itself but several at once, and returns the answers in their order.

        Prompts of similar length are answered together, filled up on the left. A picture that several questions are
        about is encoded once. A question that cannot be answered (a broken picture, a prompt that is too long, numbers
        that are not finite) gets an Answer with `finish_reason="error"` and the exception in `error`, and the other
        questions go on. If memory is short, a batch is halved.

        Args:
            questions: each a text, (text, images) or {"text": ..., "images": [...]}; for the pictures see
                `Conversation.chat`.
            batch_size: most questions answered at once, 16 by default.
            max_new_tokens, temperature, top_p, seed, allow_long, **generate_options: how each answer is chosen, see
                `Sampling`.
            allow_urls: fetch pictures that are given as URLs.
            progress: show a progress bar on stderr; True by default.

        Raises:
            PromptError: an option would be ignored; raised before anything is generated.
        """
        sampling = Sampling(max_new_tokens, temperature, top_p, seed, allow_long, generate_options)

        def read(item) -> tuple[Request, list]:
            question, images = as_question(*batch.parts_of(item))
            return self.answers.request(render(self.template, [(question, None)]), sampling), images

        options = {"batch_size": batch_size, "allow_urls": allow_urls, "progress": progress}
        return batch.chat_batch(self.vision, self.answers, read, questions, sampling, **options)

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
        """Shows which high-resolution pixels each query of a picture mined, and which of them an answer depends on.

        Without a question, every query counts alike. With a question, each query counts by how much the greedy answer
        may depend on its image token. This is the product of two lengths:

        - The length of a gradient with respect to the token: that of the margin by which the answer's words beat the
          best other word in each place. The margin is the difference of the two logits, summed over the whole answer in
          one pass, without the token that ends it.
        - The distance of the token from the mean of the picture's tokens.

        To first order, the margin changes by no more than this product if the token is replaced by that mean. The
        gradient is not that of the log probability, because there words that the model is sure of would have next to no
        gradient. This form was chosen by trial among a dozen, on the package's small model. It is an estimate, not a
        proof.

        The towers and the language model run apart from conversations and caches, and the model stays as it is. With a
        question, the activations of one whole pass of the language model are held in memory.

        Args:
            image: as for `see`.
            question: the question; `<image>` may mark where the picture stands.
            max_new_tokens: as for `Conversation.chat`.
            allow_long: accept a prompt longer than the model was trained on.
            allow_urls: fetch a picture that is given as a URL.
            windows: also draw the borders of the windows.

        Raises:
            PromptError, PictureError: raised before anything is computed.
            BackendError: a question is given, but the quantized weights (int4) have no gradients.
            FloatingPointError: the model's numbers are not finite.
        """
        if image is None:
            raise PictureError(
                "explain: expected a picture, got None: without a picture there are no pixels to explain"
            )
        picture = decoded(image, allow_urls)
        sampling = Sampling(max_new_tokens=max_new_tokens, allow_long=allow_long)
        return explaining.explain(
            self.vision, self.answers, self.template, picture, question, sampling, windows=windows
        )

    def see(self, image, *, allow_urls: bool = False, meter: Meter | None = None) -> torch.Tensor:
        """Image tokens [T, hidden] of one picture (T is 576, in HD 2880; unscaled, the global view first).

        The tokens are a copy, which the caller may change. A picture that was seen before, in any file or conversation,
        is decoded and then found in the cache by its pixels.

        Args:
            image: a Pillow image, path, bytes, or uint8 array or tensor; also a URL if `allow_urls` is set.
            allow_urls: fetch a picture that is given as a URL.
            meter: measures the stages.
        """
        # The copy is made outside of inference mode, so that the caller may do anything with it.
        return self.vision.see(image, allow_urls=allow_urls, meter=meter).tokens.clone()

    def clear_image_cache(self) -> None:
        """Drops the image tokens of pictures seen before and the packed towers; conversations keep their own tokens."""
        self.vision.clear()


def as_painter(painter, device: torch.device):
    """A painter as it is, or the one that a folder or hub id names, on the pipeline's device.

    Raises:
        CheckpointError: this is neither, or there is no such pipeline.
    """
    if painter is None or callable(getattr(painter, "draw", None)):
        return painter
    if not isinstance(painter, (str, os.PathLike)):
        raise CheckpointError(
            "painter: expected a mg_fast.drawing.Painter (load_painter makes one, also of a loaded pipeline), a "
            f"folder, a hub id or nano, got {quoted(painter)}"
        )
    from ..drawing import load_painter

    return load_painter(painter, device=device if device.type in ("cpu", "cuda") else None)
