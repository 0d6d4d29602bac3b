"""Conversations, which keep their turns and pictures and give answers whole or piece by piece."""

import copy
import logging
import os
import secrets
import threading
from collections.abc import Mapping, Sequence

from PIL import Image

from ..errors import PromptError, quoted
from ..hints import ocr as reading
from ..models.templates import IMAGE_TAG, render, with_picture_tags, without_picture_tags
from ..runtime.arguments import check_text
from ..runtime.meter import Meter
from .answers import Answer, AnswerStage
from .drawing import MARKER, drawing_options, with_pictures
from .options import Sampling
from .streaming import AnswerStream, pieces
from .vision import SeenPicture, VisionStage, decoded

logger = logging.getLogger(__name__)


class Conversation:
    """The turns and pictures of one dialogue.

    A picture is seen once, and its image tokens are kept until `reset` or `close`. The whole history is sent in every
    turn, as in the original project, but the part whose keys and values the answer stage still has is not computed
    again. Threads may share a conversation: whole answers are given one after another, in the order in which they were
    asked for.

    Args:
        vision: the stage that sees the pictures.
        answers: the stage that answers the prompts.
        template: name of the prompt template.
        painter: draws the pictures that answers ask for (`mg_fast.drawing.Painter`); None: nothing can be drawn.
        private: what the stages remember of this conversation (keys, values, image tokens) is found by it and by its
            copies alone, and is dropped at `reset` and `close`. Otherwise other conversations that begin alike find
            it, and it stays until there is no more room.

    Attributes:
        turns: questions and answers so far.
        pictures: image tokens [T, hidden] of the pictures so far, each with its digest.
        last_drawn: the picture that was drawn last; None before the first one.
        picture_seed: the seed that a turn last gave its pictures. Pictures of later turns without a seed of their own
            have it too, so that they are alike. None before the first one, which leaves the seed to chance.
    """

    def __init__(
        self, vision: VisionStage, answers: AnswerStage, template: str, painter=None, *, private: bool = False
    ):
        self.vision, self.answers, self.template, self.painter = vision, answers, template, painter
        self._scope = secrets.token_bytes(16) if private else None
        self.turns: list[tuple[str, str]] = []
        self.pictures: list[SeenPicture] = []
        self.last_drawn: Image.Image | None = None
        self.picture_seed: int | None = None
        # An answer is kept only if this number is still the one with which the question was asked.
        self._version = 0
        self._answering = threading.RLock()
        # This lock is held only for moments, while turns, pictures and version are read or written together.
        self._changing = threading.Lock()

    def __copy__(self) -> "Conversation":
        """Another conversation with the same past and the same stages; from here on, each goes on by itself."""
        other = type(self)(self.vision, self.answers, self.template, self.painter)
        other._scope = self._scope
        with self._changing:
            # Neither turns nor image tokens are ever changed in place.
            other.turns, other.pictures = list(self.turns), list(self.pictures)
            other.last_drawn, other.picture_seed = self.last_drawn, self.picture_seed
        return other

    def __deepcopy__(self, memo: dict) -> "Conversation":
        return copy.copy(self)

    def __reduce_ex__(self, protocol):
        raise TypeError(
            "a Conversation cannot be pickled, as its model cannot: keep its `turns` and the picture files; "
            "copy.copy makes another conversation with the same past"
        )

    def reset(self) -> None:
        """Forgets turns and pictures, and for a private conversation what the stages remember of it."""
        with self._changing:
            self.turns, self.pictures, self.last_drawn, self.picture_seed = [], [], None, None
            self._version += 1
        self._drop_remembered()

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
        draw: bool | Mapping[str, object] = False,
        ocr: bool = False,
        **generate_options,
    ) -> "Answer | AnswerStream":
        """Asks a question, and keeps the question and its answer in the conversation.

        Args:
            text: the question. `<image>` may mark where each picture stands; without it, pictures come before the text.
            images: new pictures of this turn: Pillow images, paths, bytes, uint8 arrays or tensors.
            max_new_tokens, temperature, top_p, seed, allow_long, **generate_options: how the answer is chosen, see
                `Sampling`.
            stream: yield pieces of text that join to the text of the answer. The conversation stays as it was if the
                stream is not read to its end, or if the conversation went on or was reset meanwhile.
            allow_urls: fetch pictures that are given as URLs.
            draw: ask for a picture. The marker that Mini-Gemini was trained with is added to the text, and the prompts
                that the model writes between `<h>` and `</h>` are drawn (see `Answer.images`). A dict has options of
                `mg_fast.drawing.Painter.draw`. Without a seed of its own the picture has the answer's, and without
                that the conversation's `picture_seed`; a seed of None leaves it to chance. With `{"like": "last"}` a
                picture follows the one that was drawn before it in this conversation. A stream
                has the pictures once it has been read to its end.
            ocr: read the text in the new pictures (`mg_fast.hints.ocr`) and add it to the question, as the original's
                command line does. A picture without text adds nothing.
            profile: measure time and memory of every stage, for `Answer.stages`; a stream has them in its `answer`.
                Towers run one after the other then, and a picture that was seen before has no stages of towers.

        Raises:
            PromptError, PictureError: the question cannot be asked; raised before anything is generated.
            DrawingError: an option of `draw` is out of range; raised before anything is generated.
            FloatingPointError: the model's numbers are not finite; the message names the layers where that begins.
        """
        sampling = Sampling(max_new_tokens, temperature, top_p, seed, allow_long, generate_options)
        sampling.check_for(self.answers.model.prompt_inputs)
        if stream and sampling.generate_options.get("num_beams", 1) > 1:
            raise PromptError("beams cannot be streamed: their text is not final before the end")
        options = drawing_options(draw, sampling.seed)
        generator = sampling.generator(self.answers.device)
        question, images = as_question(text, images)
        if ocr:
            images = [decoded(image, allow_urls) for image in images]
            question += "".join(reading.hint(reading.read(image)) for image in images)
        if options is not None:
            question += MARKER

        def ask():
            """Prepares the question; returns one function that answers it and one that keeps the answer."""
            with self._changing:
                turns, pictures, version = list(self.turns), list(self.pictures), self._version
            meter = Meter(self.answers.device) if profile else None
            see = {"allow_urls": allow_urls, "meter": meter, "with_digest": self.answers.remembers()}
            see["scope"] = self._scope
            seen = [*pictures, *(self.vision.see(image, **see) for image in images)]
            prompt = render(self.template, [*turns, (question, None)])
            request = self.answers.request(prompt, sampling)

            def run(**streamed) -> Answer:
                how = {"generator": generator, "meter": meter, "scope": self._scope, **streamed}
                try:
                    return self.answers.answer([(request, seen)], sampling, **how)[0]
                finally:
                    if self._version != version:
                        # The conversation was reset meanwhile, and nothing of it may be remembered after that.
                        self._drop_remembered()

            def keep(answer: Answer) -> Answer:
                with self._changing:
                    kept = self._version == version
                    if kept:
                        # A tag that the model itself wrote is text, not the place of a picture.
                        self.turns = [*turns, (question, without_picture_tags(answer.text))]
                        self.pictures = seen
                        self._version += 1
                        if options is not None and options.get("seed") is not None:
                            self.picture_seed = options["seed"]
                    last, seed = self.last_drawn, self.picture_seed
                if not kept:
                    logger.warning(
                        "the conversation went on or was reset before this answer was complete, so the answer is not "
                        "kept"
                    )
                # The text is kept first, so that nothing that happens while drawing can lose it.
                asked = options if options is None else {"seed": seed, **options}
                answer = with_pictures(answer, self.painter, asked, last)
                if answer.images:
                    with self._changing:
                        if self._version == version + kept:
                            self.last_drawn = answer.images[-1]
                return answer

            return run, keep

        if stream:
            return pieces(*ask(), self.answers.device)
        with self._answering:
            run, keep = ask()
            return keep(run())

    def _drop_remembered(self) -> None:
        if self._scope is not None:
            self.vision.drop(self._scope)
            self.answers.drop(self._scope)


def as_question(text: str, images: Sequence | None) -> tuple[str, list]:
    """A user's text with a tag for every picture, and the pictures as a list.

    Raises:
        PromptError: the text is empty or no text, or its tags are not as many as the pictures.
    """
    if not isinstance(text, str) or not text.strip():
        raise PromptError(f"expected a user text, got {quoted(text)}")
    check_text(text, "the text")
    if isinstance(images, (str, bytes, os.PathLike)) or (images is not None and not isinstance(images, (list, tuple))):
        images = [images]
    images = list(images or [])
    tags = text.count(IMAGE_TAG)
    if tags not in (0, len(images)):
        raise PromptError(f"the text has {tags} {IMAGE_TAG} tag(s), but {len(images)} picture(s) came")
    return with_picture_tags(text, len(images)), images
