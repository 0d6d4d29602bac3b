"""Conversations in which texts and pictures come in any order, from both sides."""

import copy
import functools
import logging
import threading
from collections.abc import Callable, Sequence

from PIL import Image

from ...errors import PromptError
from ...runtime.meter import Meter
from ..answers import Answer
from ..streaming import AnswerStream, pieces
from . import scoring
from .drawing import drawing_options
from .items import Items, read_items
from .loop import Stages, Told, go_on
from .sequence import InterleavedSequence, split_end
from .settings import Loop, check_task, sampling_for

logger = logging.getLogger(__name__)

# Options of a loop that concern pictures; the other ones concern texts.
DRAWING_OPTIONS = ("guidance_scale", "num_inference_steps", "scheduler", "generator", "latents")


class InterleavedConversation:
    """A sequence of texts and pictures that grows with every call.

    There are no turns and no template: the model reads what it is given, word for word, and goes on. Keys, values,
    states and the features of pictures are kept, so every call runs only what is new. Threads may share a conversation:
    its calls run one after another.

    Args:
        stages: the stages of the model.

    Attributes:
        sequence: everything so far, in ids and features of pictures.
        last_drawn: the picture that `draw` kept last; None before, and after `reset`.
    """

    def __init__(self, stages: Stages):
        self.stages = stages
        self.sequence = InterleavedSequence()
        self.last_drawn: Image.Image | None = None
        # What a call gives is kept only if this number is still the one with which it began.
        self._version = 0
        self._running = threading.RLock()
        # This lock is held only for moments, while sequence and version are read or written together.
        self._changing = threading.Lock()

    def __copy__(self) -> "InterleavedConversation":
        """Another conversation with the same past and the same stages; from here on, each goes on by itself."""
        other = type(self)(self.stages)
        with self._changing:
            # A sequence is never changed.
            other.sequence, other.last_drawn = self.sequence, self.last_drawn
        return other

    def __deepcopy__(self, memo: dict) -> "InterleavedConversation":
        return copy.copy(self)

    def __reduce_ex__(self, protocol):
        raise TypeError(
            "an InterleavedConversation cannot be pickled, as its model cannot: keep its items; copy.copy makes "
            "another conversation with the same past"
        )

    def reset(self) -> None:
        """Forgets everything so far."""
        with self._changing:
            self.sequence, self.last_drawn = InterleavedSequence(), None
            self._version += 1

    close = reset

    def chat(
        self,
        items,
        images: Sequence | None = None,
        *,
        task: str | None = None,
        seed: int | None = None,
        stream: bool = False,
        allow_urls: bool = False,
        profile: bool = False,
        **options,
    ) -> "Answer | AnswerStream":
        """Goes on with a text after some items, and keeps both.

        Args:
            items, images: see `read_items`.
            task: whose settings the original uses: see `sampling_for`. None decodes greedily.
            seed: makes sampling repeatable.
            stream: yield pieces of text that join to the text of the answer. The conversation stays as it was if the
                stream is not read to its end, or if the conversation went on or was reset meanwhile.
            allow_urls: fetch pictures that are given as URLs.
            profile: measure time and memory of every stage, for `Answer.stages`; cannot be combined with `stream`.
            **options: how the text is chosen, such as `max_new_tokens`, `temperature` and `top_p`; they take the place
                of the task's settings.

        Raises:
            PromptError, PictureError: the items cannot be used; raised before anything is generated.
            FloatingPointError: the model's numbers are not finite; the message names the layers where that begins.
        """
        sampling = sampling_for(task, seed=seed, **options)
        sampling.check_for(self.stages.answers.model.prompt_inputs)
        if stream and profile:
            raise PromptError("profile=True measures whole answers and cannot be combined with stream=True")
        if stream and sampling.generate_options.get("num_beams", 1) > 1:
            raise PromptError("beams cannot be streamed: their text is not final before the end")
        read, answers = read_items(items, images), self.stages.answers
        if read.empty:
            raise PromptError("expected at least one text or picture, got an empty list")
        check_task(task, read.pictures or self.sequence.pictures)
        generator = sampling.generator(answers.device)

        def ask() -> tuple[Callable, Callable]:
            """Prepares the request; returns one function that answers it and one that keeps the answer."""
            meter = Meter(answers.device) if profile else None
            version, sequence = self._begin(read, allow_urls=allow_urls, meter=meter)
            request = answers.request_after(sequence, sampling)

            def run(**streamed) -> Answer:
                rows = [(request, sequence.pictures)]
                return answers.answer(rows, sampling, generator=generator, meter=meter, **streamed)[0]

            def keep(answer: Answer) -> Answer:
                self._keep(version, sequence.extended(split_end(answer.token_ids, answers.model.config)[0]))
                return answer

            return run, keep

        if stream:
            return pieces(*ask(), answers.device)
        with self._running:
            run, keep = ask()
            return keep(run())

    def draw(self, items=(), *, seed: int | None = None, allow_urls: bool = False, **options) -> list[Image.Image]:
        """Draws pictures that follow some items, and keeps the items and the first picture.

        Args:
            items: see `read_items`; the picture that is drawn is not among them.
            seed: of the first picture; see `drawing_options`.
            allow_urls: fetch pictures that are given as URLs.
            **options: the fields of `DrawingOptions`: guidance_scale=7.5, num_inference_steps=30, num_images=1, ...

        Raises:
            PromptError, PictureError: the items cannot be used; raised before anything is computed.
            ValueError: an option is out of range.
        """
        stages = self.stages
        drawing = drawing_options(seed, stages.answers.model.config, stages.answers.device, **options)
        stages.drawing.check(drawing)
        read = read_items(items).before_picture()
        with self._running:
            version, sequence = self._begin(read, allow_urls=allow_urls)
            if not sequence.ids:
                raise PromptError("expected at least one text or picture that a picture can follow, got an empty list")
            pictures = stages.drawing.draw(sequence, drawing)
            config = stages.answers.model.config
            if self._keep(version, sequence.with_picture(stages.vision.see(pictures[0]), config)) != version:
                self.last_drawn = pictures[0]
        return pictures

    def interleave(
        self,
        items=(),
        *,
        rounds: int | None = None,
        max_pictures: int | None = None,
        force_pictures: bool = False,
        texts: Sequence[str] | None = None,
        auto_end: bool = False,
        start_with_picture: bool = False,
        task: str | None = "story",
        seed: int | None = None,
        stream: bool = False,
        allow_urls: bool = False,
        **options,
    ) -> "list[str | Image.Image] | AnswerStream":
        """Goes on with texts and pictures after some items.

        Args:
            items: see `read_items`. A loop that begins with a text needs a picture before it, as in the original.
            rounds, max_pictures, force_pictures, texts, auto_end, start_with_picture: see `Loop`.
            task: whose settings texts are chosen by; see `sampling_for`. The original samples stories; `temperature=0`
                makes them greedy.
            seed: of the samples and of every picture, each of which begins with the same seed, as in the original.
                None: the checkpoint's for pictures, and torch's random state for texts.
            stream: yield pieces of text, and pictures, as they come. Pieces of texts that follow each other are
                separated by a blank. Closing the stream ends a text or a drawing at its next step. The conversation
                keeps the texts and pictures that were complete by then. Once the stream has been read to its end, its
                `answer` is the list that a call without `stream` returns.
            allow_urls: fetch pictures that are given as URLs.
            **options: how pictures are drawn (`guidance_scale`, `num_inference_steps`, `scheduler`) and texts are
                chosen (all others; see `sampling_for`).

        Raises:
            PromptError, PictureError: items or options cannot be used; raised before anything is generated.
        """
        stages = self.stages
        drawn = {name: options.pop(name) for name in DRAWING_OPTIONS if name in options}
        loop = Loop(rounds, max_pictures, force_pictures, texts, auto_end, start_with_picture)
        sampling = sampling_for(task, seed=seed, **options)
        sampling.check_for(stages.answers.model.prompt_inputs)
        if stream and sampling.generate_options.get("num_beams", 1) > 1:
            raise PromptError("beams cannot be streamed: their text is not final before the end")

        def drawing():
            return drawing_options(seed, stages.answers.model.config, stages.answers.device, **drawn)

        stages.drawing.check(drawing())  # Errors come before any work.
        read = read_items(items)
        if loop.start_with_picture:
            read = read.before_picture()
        if not (loop.start_with_picture or read.pictures or self.sequence.pictures):
            raise PromptError(
                "expected at least one picture before the first text, got none: start_with_picture=True draws one first"
            )
        if read.empty and not self.sequence.ids:
            raise PromptError("expected at least one text or picture to go on from, got an empty list")

        def begin() -> Callable[..., Told]:
            """Sees the pictures; returns the function that goes on."""
            version, sequence = self._begin(read, allow_urls=allow_urls)
            kept = [version]

            def keep(longer: InterleavedSequence) -> None:
                kept[0] = self._keep(kept[0], longer)

            return functools.partial(go_on, stages, sequence, loop, sampling, drawing, keep=keep)

        if stream:
            return pieces(begin(), lambda told: told.parts, stages.answers.device)
        with self._running:
            return begin()().parts

    def score(self, items, options: Sequence[str], *, images=None, allow_urls: bool = False) -> list[float]:
        """The logarithm of the probability of each option after some items; see `scoring.score`. Nothing is kept."""
        read = read_items(items, images)
        with self._running:
            _, sequence = self._begin(read, allow_urls=allow_urls)
            return scoring.score(self.stages.answers, sequence, options)

    def _begin(self, read: Items, *, allow_urls: bool, meter: Meter | None = None) -> tuple[int, InterleavedSequence]:
        """The version, and the sequence with the items at its end."""
        with self._changing:
            version, sequence = self._version, self.sequence
        return version, extended_by(self.stages, sequence, read, allow_urls=allow_urls, meter=meter)

    def _keep(self, version: int, sequence: InterleavedSequence) -> int:
        """Keeps a longer sequence, if the conversation is still at this version; returns the new version."""
        with self._changing:
            if self._version == version:
                self.sequence = sequence
                self._version += 1
                return self._version
        logger.warning("the conversation went on or was reset meanwhile, so what came now is not kept")
        return version


def extended_by(
    stages: Stages,
    sequence: InterleavedSequence,
    read: Items,
    *,
    allow_urls: bool = False,
    meter: Meter | None = None,
) -> InterleavedSequence:
    """A sequence with some items at its end."""
    if read.empty:
        return sequence
    # The ids come first, because their faults are found quickly.
    ids = stages.answers.read(read.text, first=not sequence.ids)
    seen: list = []
    for image in read.pictures:
        at_hand = [*sequence.pictures, *seen]
        seen.append(stages.vision.see(image, allow_urls=allow_urls, meter=meter, at_hand=at_hand))
    longer = sequence.extended(ids, seen)
    longer.check(stages.answers.model.config)
    return longer
