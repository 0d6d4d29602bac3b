"""The loop in which a model goes on with a sequence by itself, with texts and pictures in turn."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from PIL import Image
from transformers import StoppingCriteria

from ...errors import PromptError
from ...models.mm_interleaved.drawing_options import DrawingOptions
from ..options import Sampling
from .answers import InterleavedAnswers
from .drawing import DrawingStage
from .pictures import FeatureStage
from .sequence import InterleavedSequence, split_end
from .settings import Loop

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stages:
    """The stages that the sequences of one model share."""

    vision: FeatureStage
    answers: InterleavedAnswers
    drawing: DrawingStage


class Interrupted(Exception):
    """Ends a drawing that nobody waits for any more."""


@dataclass(frozen=True)
class Told:
    """What a loop gave.

    Attributes:
        parts: texts and pictures in their order; a text without words is left out.
        sequence: the sequence that was begun with, and everything that the model wrote and drew after it.
        complete: whether the loop came to its end.
    """

    parts: list
    sequence: InterleavedSequence
    complete: bool = True


def go_on(
    stages: Stages,
    sequence: InterleavedSequence,
    loop: Loop,
    sampling: Sampling,
    drawing: Callable[[], DrawingOptions],
    *,
    keep: Callable[[InterleavedSequence], None] = lambda sequence: None,
    emit: Callable[[object], None] = lambda part: None,
    criterion: StoppingCriteria | None = None,
) -> Told:
    """Writes and draws after a sequence, as the original's loop does.

    Each round runs only the positions that are new. The original runs the whole sequence again.

    Args:
        stages: of the model.
        sequence: what the loop begins with.
        loop: how texts and pictures follow each other.
        sampling: how texts are chosen.
        drawing: makes the options of a picture; called for every picture, because generators are used up.
        keep: called with the longer sequence after every round.
        emit: called with pieces of text, and with pictures, as they become final. Texts that follow each other are
            separated by a blank.
        criterion: ends texts, and drawings between two steps, when it says so.

    Raises:
        PromptError: nothing fits after the sequence. A loop that reaches the end of the context later ends there, with
            a warning.
    """
    config, answers = stages.answers.model.config, stages.answers
    generator = sampling.generator(answers.device)
    parts: list[str | Image.Image] = []
    draws, pictures = loop.start_with_picture, 0

    def stopped() -> bool:
        return criterion is not None and bool(criterion(torch.zeros(1, 1), None).any())

    def check(step: int, latents: torch.Tensor) -> None:
        if stopped():
            raise Interrupted

    for number in range(loop.rounds):
        if draws and loop.max_pictures is not None and pictures >= loop.max_pictures:
            break
        try:
            if draws:
                options = replace(drawing(), on_step=check)
                picture = stages.drawing.draw(sequence, options)[0]
                sequence = sequence.with_picture(stages.vision.see(picture), config)
                parts.append(picture)
                emit(picture)
                draws, pictures, ended = False, pictures + 1, False
            else:
                pieces = _Separated(bool(parts) and isinstance(parts[-1], str), emit)
                text, ids = _write(answers, sequence, loop.text_of(number), sampling, generator, pieces, criterion)
                if stopped():
                    return Told(parts, sequence, complete=False)
                ids, end = split_end(ids, config)
                draws = loop.force_pictures or end == config.soi_token_id
                ended = end is not None and end != config.soi_token_id
                sequence = sequence.extended(ids)
                if text:
                    parts.append(text)
        except Interrupted:
            return Told(parts, sequence, complete=False)
        except PromptError as error:
            if number == 0:
                raise
            logger.warning("the story ends after %d of %d rounds: %s", number, loop.rounds, error)
            break
        keep(sequence)
        if ended and loop.auto_end:
            break
    return Told(parts, sequence)


class _Separated:
    """Emits pieces of a text, with a blank before the first one where the text follows another text."""

    def __init__(self, separate: bool, emit: Callable[[object], None]):
        self._separate, self._emit = separate, emit

    def __call__(self, piece: str) -> None:
        if self._separate:
            self._separate = False
            self._emit(" ")
        self._emit(piece)


def _write(
    answers: InterleavedAnswers,
    sequence: InterleavedSequence,
    given: str,
    sampling: Sampling,
    generator: torch.Generator | None,
    emit: Callable[[str], None],
    criterion: StoppingCriteria | None,
) -> tuple[str, list[int]]:
    """A text and its ids: the given one, or where that is empty, one that the model writes."""
    if given.strip():
        ids = answers.read(given.strip(), first=False)
        answers.model.check_length(len(sequence.ids) + len(ids), 1)
        emit(given)
        return given, ids
    request = answers.request_after(sequence, sampling)
    how = {"generator": generator, "emit": emit, "criterion": criterion}
    [answer] = answers.answer([(request, sequence.pictures)], sampling, **how)
    return answer.text, answer.token_ids
