"""Asks many questions at once: at a set rate, with pauses where the other side asks for them, until stopped."""

import asyncio
import contextlib
import logging
import re
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from .errors import AskingError
from .journal import Journal, Reply
from .pace import Pace, waiting

logger = logging.getLogger(__name__)

# The run ends after this many questions in a row of which none was answered: then something is wrong with all of them.
MOST_UNANSWERED = 5


class Trouble(Exception):
    """A request that failed and may be sent again, now or in a later run.

    Args:
        cause: a few words for the report, such as `HTTP 503` or `no answer in time`.
        retry_after: seconds to wait before any request, if the other side says so.
        busy: whether the other side turned the request away because there are too many, so that fewer should follow.
    """

    def __init__(self, cause: str, *, retry_after: float | None = None, busy: bool = False):
        super().__init__(cause)
        self.cause, self.retry_after, self.busy = cause, retry_after, busy


class Refused(Exception):
    """A request that the other side will not take as it is, so that sending it again would be of no use."""


class Asker(Protocol):
    """What answers questions: an endpoint or a local model. `AskingError` ends the run.

    Attributes:
        where: how messages name it.
    """

    where: str

    async def ask(self, messages: Sequence[dict], name: str) -> Reply:
        """The reply to a chat; `name` tells one request from another. Raises Trouble, Refused or AskingError."""


@dataclass(frozen=True)
class Question:
    """A chat whose last message is to be answered, and the key of its source."""

    key: str
    messages: Sequence[dict]


@dataclass(frozen=True)
class Manners:
    """How requests are sent.

    Attributes:
        at_once: the most requests on their way at a time.
        per_minute: the most requests a minute; None sets no limit.
        attempts: how often one request is sent before it is left for a later run. Requests that were turned away
            because there were too many do not count.
        first_wait, longest_wait: seconds before the second attempt and the most before a later one. They double from
            attempt to attempt, and are shortened by up to half at random.
        longest_pause: the longest time, in seconds, for which the other side may ask to wait, or may turn away all
            requests; a longer one ends the run. A question that is turned away twice as long is left for a later run.
    """

    at_once: int = 8
    per_minute: float | None = None
    attempts: int = 6
    first_wait: float = 1.0
    longest_wait: float = 60.0
    longest_pause: float = 900.0


@dataclass
class Tally:
    """What happened in this run.

    Attributes:
        sent: requests that were sent.
        replies: replies that came.
        refused: questions that the other side will not take, and that are not asked again.
        troubles: how often requests failed, by cause.
        left: questions without a reply that are left for a later run, by cause.
        seconds: how long it took.
        stopped: whether the run was stopped before its end.
        cut_off: whether requests that were on their way were given up then.
    """

    sent: int = 0
    replies: int = 0
    refused: int = 0
    troubles: Counter = field(default_factory=Counter)
    left: Counter = field(default_factory=Counter)
    seconds: float = 0.0
    stopped: bool = False
    cut_off: bool = False


async def ask_all(
    questions: Sequence[Question],
    asker: Asker,
    journal: Journal,
    settled: Callable[[str], bool],
    manners: Manners,
    progress: Callable[[], None] = lambda: None,
) -> Tally:
    """Asks every question until it is settled, several at once, and writes every reply to the journal.

    An interrupt (SIGINT, SIGTERM) lets the requests that are on their way end and then stops; a second one gives them
    up. Either way the journal has every reply that came.

    A question that the other side refuses is written to the journal as refused, and not asked again. As long as the
    journal has no reply at all, a refusal may as well concern all questions: then the question is asked again after all
    others, and the run ends where several in a row are refused for the same reason.

    Args:
        questions: the questions; those that are settled from the start are not asked.
        asker: what answers.
        journal: where replies are written.
        settled: whether what the journal has about the question with a key is enough.
        progress: called whenever a question is settled or left.

    Raises:
        AskingError: nothing can be asked any more; its `tally` says what happened. The requests that were on their way
            have ended.
    """
    tally, began = Tally(), time.monotonic()
    open_questions, doubtful = [], []
    for question in questions:
        if settled(question.key):
            progress()
        elif question.key in journal.doubtful:
            doubtful.append(question)
        else:
            open_questions.append(question)
    waiting_questions = deque(open_questions + doubtful)
    run = _Run(asker, journal, settled, manners, progress, waiting_questions, tally)
    workers = [asyncio.ensure_future(run.work()) for _ in range(min(manners.at_once, len(waiting_questions)))]

    def give_up() -> None:
        tally.cut_off = True
        for worker in workers:
            worker.cancel()

    with _stopping(run.stop, give_up):
        try:
            await asyncio.gather(*workers)
        except asyncio.CancelledError:
            if not tally.cut_off:
                raise
            await asyncio.gather(*workers, return_exceptions=True)
    tally.seconds, tally.stopped = time.monotonic() - began, run.stop.is_set()
    if run.error is not None:
        run.error.tally = tally
        raise run.error
    return tally


class _Run:
    """One run, which several workers share."""

    def __init__(self, asker, journal, settled, manners, progress, questions, tally):
        self.stop = asyncio.Event()
        self.error: AskingError | None = None
        self._asker, self._journal, self._settled, self._manners = asker, journal, settled, manners
        self._progress, self._questions, self._tally = progress, questions, tally
        self._pace = Pace(manners.per_minute, first_wait=manners.first_wait, longest_wait=manners.longest_wait)
        self._unanswered = 0
        self._answered = time.monotonic()
        # Without its numbers, such as that of a request, a reason is the same for all whom it concerns.
        self._refusals: list[str] = []
        # Questions that are asked after all others, and those that were only now put there.
        self._last, self._postponed = set(journal.doubtful), set()

    async def work(self) -> None:
        """Takes one question after the other until there are none, or until the run stops."""
        while self._questions and not self.stop.is_set():
            question = self._questions.popleft()
            try:
                while not self.stop.is_set() and not self._settled(question.key):
                    if not await self._ask(question):
                        break
            except AskingError as error:
                # The other workers still take the replies that are on their way.
                self.error = self.error or error
                self.stop.set()
            if question.key in self._postponed:
                self._postponed.discard(question.key)
            elif not self.stop.is_set():
                self._progress()

    async def _ask(self, question: Question) -> bool:
        """Sends one request, again where that may help, and writes the reply; False if none came."""
        manners, attempt, first_away, cause = self._manners, 0, None, ""
        name = f"{self._journal.run}-{question.key}-{self._journal.lines[question.key] + 1}"
        while attempt < manners.attempts:
            await self._unless_stopped(self._pace.turn())
            if self.stop.is_set():
                return False
            began = time.monotonic()
            self._tally.sent += 1
            try:
                reply = await self._asker.ask(question.messages, name)
            except Refused as refused:
                self._note(str(refused))
                self._refused(question, str(refused))
                return False
            except Trouble as trouble:
                cause = trouble.cause
                self._note(cause)
                self._check_pause(trouble)
                if trouble.busy:
                    self._pace.turned_away(began, trouble.retry_after or 0.0)
                    first_away = first_away or began
                    # Others are answered meanwhile, as the run would have ended otherwise.
                    if time.monotonic() - first_away > 2 * manners.longest_pause:
                        break
                else:
                    attempt += 1
                    await self._wait(trouble, attempt)
                continue
            self._journal.add(question.key, reply)
            self._tally.replies += 1
            self._unanswered, self._answered = 0, time.monotonic()
            self._pace.answered()
            return True
        if not self.stop.is_set():
            self._leave(cause)
        return False

    def _note(self, cause: str) -> None:
        if not self._tally.troubles:
            # Until the run ends it may take long, and the cause may be one that somebody can mend meanwhile.
            logger.warning("%s: the first request that failed: %s", self._asker.where, cause)
        self._tally.troubles[cause] += 1

    def _check_pause(self, trouble: Trouble) -> None:
        longest, where = self._manners.longest_pause, self._asker.where
        if (trouble.retry_after or 0.0) > longest:
            raise AskingError(
                f"{where} asks to wait for {trouble.retry_after:.0f} seconds ({trouble.cause}), longer than the "
                f"{longest:.0f} that are allowed: call again then, and the run goes on"
            )
        if trouble.busy and time.monotonic() - self._answered > longest:
            raise AskingError(
                f"{where} has answered nothing for {longest:.0f} seconds, because it is busy ({trouble.cause}). "
                f"{self._kept()}"
            )

    async def _wait(self, trouble: Trouble, attempt: int) -> None:
        manners = self._manners
        if trouble.retry_after is not None:
            # It concerns everybody, not this request alone.
            self._pace.pause(trouble.retry_after)
        if attempt < manners.attempts:
            seconds = waiting(manners.first_wait, manners.longest_wait, attempt)
            await self._unless_stopped(asyncio.sleep(seconds))

    def _refused(self, question: Question, cause: str) -> None:
        known = bool(self._journal.replies)
        self._journal.refuse(question.key, cause)
        if known:
            self._tally.refused += 1
            return
        reason = re.sub(r"\S*\d\S*", "#", cause.partition(" ")[2])
        self._refusals = [*self._refusals, reason] if reason in self._refusals[-1:] else [reason]
        if len(self._refusals) >= MOST_UNANSWERED:
            raise AskingError(
                f"{self._asker.where} has answered nothing yet, and refused {len(self._refusals)} questions in a row, "
                f"the last one with: {cause}. Probably the request itself is wrong, such as one of its parameters"
            )
        if question.key in self._last:
            self._tally.left[cause] += 1
        else:
            self._last.add(question.key)
            self._postponed.add(question.key)
            self._questions.append(question)

    def _leave(self, cause: str) -> None:
        self._tally.left[cause] += 1
        self._unanswered += 1
        if self._unanswered >= MOST_UNANSWERED:
            raise AskingError(
                f"{self._asker.where}: {self._unanswered} questions in a row were not answered, the last one because "
                f"of: {cause}. {self._kept()}"
            )

    def _kept(self) -> str:
        if not self._journal.replies:
            return "There are no replies yet"
        return "The replies so far are in the journal, and another call goes on from there"

    async def _unless_stopped(self, waiting) -> None:
        """Waits for something, or until the run is to stop."""
        waits = [asyncio.ensure_future(waiting), asyncio.ensure_future(self.stop.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()


@contextlib.contextmanager
def _stopping(stop: asyncio.Event, give_up: Callable[[], None]):
    """Within it, the first interrupt sets the event, the second one calls a function, and more have no effect."""
    loop, numbers = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)

    def interrupted() -> None:
        if stop.is_set():
            give_up()
            return
        logger.warning("stopping: the requests that are on their way are waited for; interrupt again to give them up")
        stop.set()

    for number in numbers:
        # Windows has no such handlers, and neither have loops outside of the main thread.
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            loop.add_signal_handler(number, interrupted)
    try:
        yield
    finally:
        for number in numbers:
            with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
                loop.remove_signal_handler(number)
