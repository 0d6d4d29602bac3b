"""Answers many questions at once, for work that nobody waits for at a terminal."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from tqdm.auto import tqdm

from ..errors import MgFastError, PromptError, quoted
from ..runtime.arguments import whole_number
from .answers import Answer, AnswerStage, Request
from .options import Sampling
from .vision import VisionStage

logger = logging.getLogger(__name__)

# Keys and values of this many prompts with a picture take about 5 GiB for a 7B model.
DEFAULT_BATCH = 16

# Errors that are expected of a question: its picture cannot be read, its prompt does not fit, or memory is short.
_EXPECTED = (MgFastError, OSError, ValueError, FloatingPointError, torch.OutOfMemoryError)
# After this error nothing runs on the GPU any more. Older versions of torch have no class for it.
_BROKEN_DEVICE = (torch.AcceleratorError,) if hasattr(torch, "AcceleratorError") else ()


def chat_batch(
    vision: VisionStage,
    answers: AnswerStage,
    read: Callable[[object], tuple[Request, Sequence]],
    questions: Sequence,
    sampling: Sampling,
    *,
    batch_size: int = DEFAULT_BATCH,
    allow_urls: bool = False,
    progress: bool = True,
) -> list[Answer]:
    """Answers many questions, each by itself but several at once, and returns the answers in their order.

    `Pipeline.chat_batch` describes the details.

    Args:
        vision: the stage that sees the pictures.
        answers: the stage that answers the prompts.
        read: makes a request of one of the questions, and returns it with the question's pictures as a list.
        questions: anything that `read` takes.
        sampling: how the answers are chosen.
        batch_size: most questions answered at once.
        allow_urls: fetch pictures given as URLs.
        progress: show a progress bar on stderr.

    Raises:
        PromptError: `questions` is not a list, or `batch_size` is not a whole number of 1 or more.
    """
    if isinstance(questions, (str, Mapping)) or not isinstance(questions, Iterable):
        raise PromptError(
            f"expected a list of questions, got {type(questions).__name__}: a single question goes to chat"
        )
    rows = whole_number(batch_size)
    if rows is None or rows < 1:
        raise PromptError(f"batch_size: expected a whole number of 1 or more, got {quoted(batch_size)}")
    sampling.check_for(answers.model.prompt_inputs)
    questions = list(questions)
    # All batches share one generator: if each had its own with the same seed, all would draw the same numbers.
    generator = sampling.generator(answers.device)

    logged: set[type] = set()
    found: dict[int, Answer] = {}
    requests: dict[int, tuple[Request, list]] = {}
    for i, item in enumerate(questions):
        try:
            requests[i] = read(item)
        except Exception as error:
            # An item may be anything, and a tokenizer or a caller's own class may raise anything.
            _check_and_log(error, logged)
            found[i] = failed(error)

    def run(numbers: list[int]) -> None:
        """Answers some of the requests at once; if one of them spoils the pass or memory is short, in two halves."""
        asked = [(requests[i][0], seen[i]) for i in numbers]
        try:
            given = answers.answer(asked, sampling, generator=generator)
        except (FloatingPointError, torch.OutOfMemoryError) as error:
            if len(numbers) == 1:
                given = [failed(error, requests[numbers[0]][0])]
            else:
                logger.warning(
                    "%d questions at once have failed and are tried again in two halves: %s", len(numbers), error
                )
                # Otherwise the frames of the error would keep their memory.
                error.__traceback__ = None
                for half in (numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]):
                    run(half)
                return
        found.update(zip(numbers, given))

    bar = tqdm(total=len(questions), initial=len(found), desc="questions", disable=not progress)
    try:
        with bar:
            for batch in _batches(requests, rows, answers.positions):
                seen = {}
                for i in batch:
                    try:
                        at_hand = [picture for pictures in seen.values() for picture in pictures]
                        seen[i] = vision.see_all(requests[i][1], at_hand, allow_urls=allow_urls)
                    except Exception as error:
                        # Libraries that read pictures raise errors of many kinds, and the other questions go on.
                        _check_and_log(error, logged)
                        found[i] = failed(error, requests[i][0])
                if seen:
                    run(list(seen))
                bar.update(len(batch))
    finally:
        answers.rest()
    return [found[i] for i in range(len(questions))]


def _check_and_log(error: Exception, logged: set[type]) -> None:
    """Raises an error after which no other question can be answered, and logs unexpected errors, each kind once.

    Args:
        error: the error of one question.
        logged: the kinds of errors that were already logged in this batch.
    """
    if isinstance(error, _BROKEN_DEVICE):
        raise error
    if not isinstance(error, _EXPECTED) and type(error) not in logged:
        logged.add(type(error))
        logger.warning("a question of the batch failed with an unexpected %s", type(error).__name__, exc_info=error)


def failed(error: Exception, request: Request | None = None) -> Answer:
    """The Answer that stands in the place of one that could not be given."""
    tokens, images = (len(request.ids), sum(request.marks)) if request is not None else (0, 0)
    # Otherwise the frames of the error would keep their memory for as long as the answers live.
    return Answer("", [], "error", tokens, images, error=error.with_traceback(None))


def parts_of(item) -> tuple:
    """The text and the pictures of a question: a text, (text, images) or {"text": ..., "images": [...]}."""
    if isinstance(item, str):
        return item, None
    if isinstance(item, Mapping) and "text" in item and not item.keys() - {"text", "images"}:
        return item["text"], item.get("images")
    if isinstance(item, (tuple, list)) and len(item) == 2:
        return tuple(item)
    raise PromptError(f"expected a text, (text, images) or {{'text': ..., 'images': [...]}}, got {quoted(item)}")


def _batches(requests: Mapping[int, tuple[Request, list]], size: int, positions: int) -> list[list[int]]:
    """The numbers of the requests that are answered together, batch by batch, the longest prompts first.

    The longest come first so that too little memory shows at once. A shorter prompt is filled up to the longest of its
    batch, and the longest answer must still fit after it. A request that does not fit so begins the next batch.
    """
    batches: list[list[int]] = []
    width = new = 0
    for i in sorted(requests, key=lambda i: -len(requests[i][0].ids)):
        request = requests[i][0]
        if batches and len(batches[-1]) < size and width + max(new, request.max_new_tokens) <= positions:
            batches[-1].append(i)
            new = max(new, request.max_new_tokens)
        else:
            batches.append([i])
            width, new = len(request.ids), request.max_new_tokens
    return batches
