"""From a question of a session to its answer: it waits in line, is written piece by piece, and can be stopped."""

import asyncio
import contextlib
import copy
import logging
import secrets
import time
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePath

import torch

from ..engine.answers import Answer
from ..errors import MgFastError, quoted
from .limits import Limits, RequestRefused
from .line import LineTicket, WaitingLine
from .sessions import AnsweredTurn, AnswerFigures, AskedQuestion, BrowserSession
from .store import PictureStore
from .uploads import written

logger = logging.getLogger("mg_fast.web")

# Pieces that come within this time are shown together, because each update of a page takes the server some work.
UPDATE_S = 0.05
STOPPING = "this server is about to stop: ask again in a minute"
# Errors whose messages are meant for the person who asked.
TOLD = (MgFastError, torch.OutOfMemoryError, FloatingPointError)


@dataclass(frozen=True)
class InLine:
    """The question waits; it has this place in a line of this length."""

    place: int
    length: int


@dataclass(frozen=True)
class TextSoFar:
    """The answer is being written."""

    text: str


@dataclass(frozen=True)
class DrawingSteps:
    """The answer is complete, and its picture is being drawn."""

    text: str
    step: int
    total: int


@dataclass(frozen=True)
class TurnDone:
    """The answer is there."""

    turn: AnsweredTurn


@dataclass(frozen=True)
class LastUpdate:
    """Stands in a queue of updates around the last one."""

    value: object


AskUpdate = InLine | TextSoFar | DrawingSteps | TurnDone


class Talk:
    """Answers the questions of all sessions. It is used from one event loop; answers are made in threads.

    Args:
        limits: of the server.
        line: in which questions wait.
        store: of the pictures.
        metrics: counts what was done (`ServerMetrics`).
        can_draw: whether there is a painter.
    """

    def __init__(self, limits: Limits, line: WaitingLine, store: PictureStore, metrics, *, can_draw: bool = False):
        self.limits, self.line, self.store, self.metrics, self.can_draw = limits, line, store, metrics, can_draw
        self.draining = False
        self._threads = ThreadPoolExecutor(max_workers=limits.parallel, thread_name_prefix="mg_fast-web")
        self._tasks: set[asyncio.Task] = set()

    def check(self, session: BrowserSession, question: AskedQuestion, *, replacing: bool = False) -> None:
        """Raises RequestRefused for a question that this server does not answer; see `ask`."""
        limits = self.limits
        if self.draining:
            raise RequestRefused(STOPPING)
        if session.closed:
            raise RequestRefused("this session has ended: reload the page")
        if session.answering:
            raise RequestRefused("the last question is still being answered: stop it, or wait for its end")
        if not isinstance(question.text, str) or not question.text.strip():
            raise RequestRefused("expected a question, got an empty text, or none at all")
        if len(question.text) > limits.characters:
            raise RequestRefused(
                f"a question may have {limits.characters:,} characters, this one has {len(question.text):,}"
            )
        if "<image>" in question.text:
            raise RequestRefused("<image> is the mark of a picture within a prompt, and no text here: leave it out")
        if len(question.pictures) > limits.pictures:
            raise RequestRefused(
                f"a question may have {limits.pictures} pictures, this one has {len(question.pictures)}"
            )
        if len(session.turns) - bool(replacing) >= limits.turns:
            raise RequestRefused(f"a conversation may have {limits.turns} questions: clear it to go on")
        if question.tokens is not None and not (type(question.tokens) is int and question.tokens <= limits.tokens):
            raise RequestRefused(f"an answer may have {limits.tokens} tokens, {quoted(question.tokens)} were asked for")
        if type(question.temperature) not in (int, float):
            raise RequestRefused(f"temperature: expected a number, got {quoted(question.temperature)}")
        if question.draw and not self.can_draw:
            raise RequestRefused("this server has no painter, so it draws no pictures")
        for name in question.pictures:
            self.store.claim(name, session.browser, session.key)
        if question.pictures:
            self._check_room(session)

    async def ask(
        self,
        session: BrowserSession,
        question: AskedQuestion,
        request_id: str | None = None,
        *,
        replacing: bool = False,
    ) -> AsyncIterator[AskUpdate]:
        """Yields how a question comes to its answer.

        The answer is made to its end, or until `session.stop` is set, whether or not anybody goes on reading.

        Args:
            request_id: names the request in the log.
            replacing: the last question of the session is undone when the turn of this one comes.

        Raises:
            RequestRefused: the question cannot be asked, or its answer failed; the message is for its user.
        """
        request_id = request_id or secrets.token_hex(8)
        try:
            self.check(session, question, replacing=replacing)
            ticket = self.line.enter()
        except RequestRefused:
            self.metrics.refused("ask")
            logger.info("request=%s kind=ask outcome=refused", request_id)
            raise
        following = self.follow(
            session, lambda updates: self._answer(session, question, ticket, updates, request_id, replacing)
        )
        async with contextlib.aclosing(following):
            async for update in following:
                yield update

    async def follow(
        self, session: BrowserSession, work: Callable[[asyncio.Queue], Coroutine]
    ) -> AsyncIterator[object]:
        """Starts work for a session, and yields what it puts into a queue, until a `LastUpdate`; an error is raised.

        The work goes on to its end whether or not anybody goes on reading. If nobody does, the session's `stop` is set.
        """
        session.answering = True
        session.stop.clear()
        updates: asyncio.Queue = asyncio.Queue()
        # The task has the place in line, so that it is given back when the work has ended and not before.
        task = asyncio.create_task(work(updates))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            while True:
                update = await updates.get()
                # Of several updates that have come meanwhile, the last one says all.
                while not updates.empty() and not isinstance(update, BaseException | LastUpdate):
                    update = updates.get_nowait()
                if isinstance(update, BaseException):
                    raise update
                if isinstance(update, LastUpdate):
                    yield update.value
                    return
                yield update
                await asyncio.sleep(UPDATE_S)
        finally:
            if not task.done():
                # Nobody reads any more, so the rest would be made in vain.
                session.stop.set()

    async def turn(self, session: BrowserSession, ticket: LineTicket, updates: asyncio.Queue) -> None:
        """Waits until it is the ticket's turn, and tells of its places meanwhile.

        Raises:
            RequestRefused: the user has stopped, or the server is about to.
        """
        while ticket.place:
            updates.put_nowait(InLine(ticket.place, self.line.waiting))
            moved = asyncio.ensure_future(ticket.moved())
            while not moved.done():
                await asyncio.wait([moved], timeout=0.2)
                if session.stop.is_set() or self.draining:
                    moved.cancel()
                    raise RequestRefused(STOPPING if self.draining else "stopped before its turn")

    async def wait(self, seconds: float) -> bool:
        """Waits until no answer is being made; says whether that is so after these seconds at most."""
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=seconds)
        return not self._tasks

    async def run(self, work: Callable[[], object]) -> object:
        """Runs work in the threads that also make the answers, for a caller who has a turn in the line."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        """Ends the threads when they have nothing to do any more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _answer(
        self,
        session: BrowserSession,
        question: AskedQuestion,
        ticket: LineTicket,
        updates: asyncio.Queue,
        request_id: str,
        replacing: bool,
    ) -> None:
        """Waits for the turn, makes the answer, and puts all updates in their queue; an error is the last of them."""
        asked, outcome, turn, undone = time.monotonic(), "error", None, None
        last: object = RequestRefused(f"the answer failed; the server's log tells more under {request_id}")
        try:
            with ticket:
                await self.turn(session, ticket, updates)
                if replacing:
                    undone = session.conversation, session.take_back()
                waited = time.monotonic() - asked
                turn = await self._in_thread(session, question, waited, updates)
            if not session.closed:
                session.turns.append(turn)
                session.looked, session.explanation = (), None
                self._tidy(session)
            outcome, last = "ok", LastUpdate(TurnDone(turn))
        except RequestRefused as refusal:
            outcome, last = "refused", refusal
        except TOLD as error:
            outcome, last = "refused", RequestRefused(str(error) or type(error).__name__)
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        except Exception as error:
            # The error's own text may repeat what the user wrote, which is no business of a log.
            logger.error("request=%s kind=ask error=%s at=%s", request_id, type(error).__name__, place_of(error))
        finally:
            if turn is None and undone is not None and undone[1] is not None and not session.closed:
                # The question that should have been replaced is still the last one.
                session.conversation, kept = undone
                session.turns.append(kept)
            session.answering = False
            session.stop.clear()
            updates.put_nowait(last)
            self.metrics.asked(outcome, turn, len(question.pictures))
            logger.info("request=%s kind=ask outcome=%s %s", request_id, outcome, _figures(turn, question))

    async def _in_thread(
        self, session: BrowserSession, question: AskedQuestion, waited: float, updates: asyncio.Queue
    ) -> AnsweredTurn:
        loop = asyncio.get_running_loop()
        conversation, stop = session.conversation, session.stop
        before = copy.copy(conversation)
        tokens = self.limits.tokens if question.tokens is None else question.tokens
        pictures = [self.store.claim(name, session.browser, session.key).data for name in question.pictures]

        def tell(update: AskUpdate) -> None:
            loop.call_soon_threadsafe(updates.put_nowait, update)

        def make() -> tuple:
            began, text, first, last = time.monotonic(), "", None, None

            def drawing(step: int, total: int) -> None:
                if stop.is_set():
                    raise RequestRefused("stopped while drawing")
                tell(DrawingSteps(text, step, total))

            stream = conversation.chat(
                question.text, pictures, stream=True, **_options(question, tokens, stop, drawing)
            )
            for piece in stream:
                last = time.monotonic()
                first = first or last
                text += piece
                tell(TextSoFar(text))
            ended = time.monotonic()
            files = [written(picture) for picture in stream.answer.images]
            return stream.answer, files, began, first or ended, last or ended, ended

        try:
            answer, files, began, first, last, ended = await self.run(make)
        except BaseException:
            # The model must not remember an answer that nobody sees.
            session.conversation = before
            raise
        after_first = len(answer.token_ids) - 1
        figures = AnswerFigures(
            wait_s=waited,
            first_s=first - began,
            whole_s=ended - began,
            # What is drawn is drawn after the last piece.
            tokens_per_s=after_first / (last - first) if after_first > 0 and last > first else None,
            new_tokens=len(answer.token_ids),
            prompt_tokens=answer.prompt_tokens,
            cached_tokens=answer.cached_tokens,
            finish="stopped" if stop.is_set() else answer.finish_reason,
        )
        drawn, no_picture = [], _no_picture(answer) if question.draw else None
        stages = [(stage.name, stage.seconds) for stage in answer.stages]
        if stages and question.draw and (files or answer.image_error is not None):
            stages.append(("drawing", ended - last))
        if not session.closed:
            try:
                for (data, kind), prompt in zip(files, answer.image_prompts):
                    self._check_room(session, len(data))
                    drawn.append((self.store.put(data, kind, browser=session.browser, owner=session.key), prompt))
            except RequestRefused as refusal:
                # The answer is complete, and the model remembers it: it is shown with the reason.
                no_picture = str(refusal)
        return AnsweredTurn(
            question,
            answer.text,
            figures,
            tuple(drawn),
            no_picture,
            tuple(stages),
            before,
        )

    def _check_room(self, session: BrowserSession, more: int = 0) -> None:
        """Raises RequestRefused where the pictures of a session, with so many more bytes, are too large together."""
        if self.store.bytes_of(session.key) + more > self.limits.session_bytes:
            raise RequestRefused(
                f"the pictures of a session may have {self.limits.session_megabytes} MiB: clear the conversation to go "
                "on"
            )

    def _tidy(self, session: BrowserSession) -> None:
        """Drops pictures of a session that none of its turns names any more."""
        named = {name for turn in session.turns for name in (*turn.question.pictures, *(n for n, _ in turn.drawn))}
        self.store.drop_all_of(session.key, keep=named)


def place_of(error: BaseException) -> str:
    """Where an error arose: a file's name and a line, without any text of the error."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{PurePath(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "unknown"


def _options(question: AskedQuestion, tokens: int, stop, on_step: Callable[[int, int], None]) -> dict:
    """The options of `Conversation.chat` for a question."""

    def stopped(ids, scores, **_):
        return torch.full((len(ids),), stop.is_set(), device=ids.device)

    options = {
        "max_new_tokens": tokens,
        "temperature": question.temperature,
        "top_p": question.top_p if question.temperature > 0 else None,
        "seed": question.seed,
        "ocr": question.ocr,
        "profile": question.measure,
        "stopping_criteria": [stopped],
    }
    return options | ({"draw": {"on_step": on_step}} if question.draw else {})


def _no_picture(answer: Answer) -> str | None:
    """Why not all pictures came; None where they did."""
    stopped = isinstance(answer.image_error, RequestRefused)
    return str(answer.image_error) if stopped else answer.no_image_reason


def _figures(turn: AnsweredTurn | None, question: AskedQuestion) -> str:
    """What the log says of a request: numbers, and nothing that a user wrote or a model answered."""
    found = f"pictures={len(question.pictures)} draw={int(question.draw)} ocr={int(question.ocr)}"
    if turn is None:
        return found
    took = turn.figures
    return (
        f"{found} wait_s={took.wait_s:.3f} first_s={took.first_s:.3f} whole_s={took.whole_s:.3f} "
        f"prompt_tokens={took.prompt_tokens} cached_tokens={took.cached_tokens} new_tokens={took.new_tokens} "
        f"drawn={len(turn.drawn)} finish={took.finish}"
    )
