"""The pipeline of models that read and give texts and pictures in any order: a facade over the stages of the engine."""

from collections.abc import Sequence

from PIL import Image

from ..engine import batch
from ..engine.answers import Answer, Request
from ..engine.interleaved.answers import InterleavedAnswers
from ..engine.interleaved.conversation import InterleavedConversation
from ..engine.interleaved.drawing import DrawingStage
from ..engine.interleaved.first_use import warm_up
from ..engine.interleaved.items import read_items
from ..engine.interleaved.loop import Stages
from ..engine.interleaved.pictures import FeatureStage
from ..engine.interleaved.settings import check_task, sampling_for
from ..engine.options import CacheOptions
from ..engine.streaming import AnswerStream
from ..models.mm_interleaved.modeling import MMInterleavedForConditionalGeneration
from ..models.mm_interleaved.processing import MMInterleavedProcessor
from ..ops.backend import check_everywhere
from ..runtime.placement import execution_device
from .staged import StagedPipeline


class InterleavedPipeline(StagedPipeline):
    """A loaded MM-Interleaved model with its processor; `mg_fast.load` makes one.

    Items are texts and pictures in any order (see `read_items`). Calls of the pipeline itself do not depend on each
    other; `conversation` opens a sequence that grows with every call. In both cases keys, values, states and features
    of what was read before are found again and not computed again.

    Args:
        model: the MMInterleavedForConditionalGeneration.
        processor: its MMInterleavedProcessor.
        backend: the backend of every call of this pipeline; None leaves the choice to what is in force at the call.
        image_cache_bytes, kv_cache_bytes: see `CacheOptions`. Feature maps and what the language model reads of them
            count as image tokens, and states as keys and values.
        compiled: on a GPU, decode through torch.compile, which takes seconds to a minute at the first answer.
        cuda_graphs: on a GPU, capture the work in CUDA graphs; without graphs less memory is needed.

    Attributes:
        vision: the `FeatureStage`, which turns pictures into image tokens and feature maps.
        answers: the `InterleavedAnswers`, which write texts.
        drawing: the `DrawingStage`, which draws pictures.
    """

    # There is no prompt template: the model reads items word for word.
    template = None

    def __init__(
        self,
        model: MMInterleavedForConditionalGeneration,
        processor: MMInterleavedProcessor,
        *,
        backend: str | None = None,
        image_cache_bytes: int = CacheOptions.image_cache_bytes,
        kv_cache_bytes: int | None = CacheOptions.kv_cache_bytes,
        compiled: bool = False,
        cuda_graphs: bool = True,
    ):
        caches = CacheOptions(image_cache_bytes, kv_cache_bytes)
        check_everywhere(backend, execution_device(model.get_input_embeddings()))
        stage = {"backend": backend, "caches": caches}
        self.vision = FeatureStage(model, processor.image_processor, cuda_graphs=cuda_graphs, **stage)
        self.answers = InterleavedAnswers(
            model, processor, self.vision.cache, compiled=compiled, cuda_graphs=cuda_graphs, **stage
        )
        self.drawing = DrawingStage(model, self.answers, backend=backend, cuda_graphs=cuda_graphs)
        self._stages = Stages(self.vision, self.answers, self.drawing)

    @property
    def first_use(self) -> dict[str, float]:
        """Seconds spent so far on work that is done once: packing, compiling, and capturing graphs."""
        return {**self.vision.first_use, **self.answers.first_use, **self.drawing.first_use}

    def warm_up(self) -> dict[str, float]:
        """Writes and draws after a picture of noise, twice, so that the work of the first use is done.

        Returns:
            The seconds of each part, and under `all` of the whole.
        """
        return warm_up(self._stages)

    def conversation(self) -> InterleavedConversation:
        """Opens a conversation: a sequence of texts and pictures that grows with every call."""
        return InterleavedConversation(self._stages)

    def chat(self, items, images: Sequence | None = None, **options) -> "Answer | AnswerStream":
        """Writes a text after some items; see `InterleavedConversation.chat`. Nothing is kept for the next call."""
        return self.conversation().chat(items, images, **options)

    def draw(self, items, **options) -> list[Image.Image]:
        """Draws pictures that follow some items; see `InterleavedConversation.draw`."""
        return self.conversation().draw(items, **options)

    def interleave(
        self,
        items=(),
        *,
        rounds: int | None = None,
        max_pictures: int | None = None,
        seed: int | None = None,
        stream: bool = False,
        **options,
    ) -> "list[str | Image.Image] | AnswerStream":
        """Goes on with texts and pictures after some items; see `InterleavedConversation.interleave`."""
        how = {"rounds": rounds, "max_pictures": max_pictures, "seed": seed, "stream": stream}
        return self.conversation().interleave(items, **how, **options)

    def score(self, items, options: Sequence[str], *, allow_urls: bool = False) -> list[float]:
        """The logarithm of the probability of each option after some items; see `InterleavedConversation.score`."""
        return self.conversation().score(items, options, allow_urls=allow_urls)

    def chat_batch(
        self,
        questions: Sequence,
        *,
        task: str | None = None,
        batch_size: int = batch.DEFAULT_BATCH,
        seed: int | None = None,
        allow_urls: bool = False,
        progress: bool = True,
        **options,
    ) -> list[Answer]:
        """Writes a text after each of many rows of items, each by itself but several at once, in their order.

        What `Pipeline.chat_batch` says of batches and errors holds here, too.

        Args:
            questions: each a list of items, a text, (text, images) as a tuple, or {"text": ..., "images": [...]}.
            task: whose settings the original uses; see `sampling_for`.
            batch_size: most questions answered at once, 16 by default.
            seed: makes sampling repeatable for the same questions in the same batches.
            allow_urls: fetch pictures that are given as URLs.
            progress: show a progress bar on stderr.
            **options: how the texts are chosen.

        Raises:
            PromptError: an option would be ignored; raised before anything is generated.
        """
        sampling = sampling_for(task, seed=seed, **options)

        def read(item) -> tuple[Request, list]:
            found = read_items(item) if isinstance(item, list) else read_items(*batch.parts_of(item))
            check_task(task, found.pictures)
            return self.answers.request_of(found, sampling), found.pictures

        how = {"batch_size": batch_size, "allow_urls": allow_urls, "progress": progress}
        return batch.chat_batch(self.vision, self.answers, read, questions, sampling, **how)

    def clear_image_cache(self) -> None:
        """Drops the features of pictures seen before, the packed tower and the packed drawer.

        Conversations keep the features of their own pictures.
        """
        self.vision.clear()
        self.drawing.clear()
