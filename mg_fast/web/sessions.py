"""Browser sessions: each has a conversation of its own, and gives everything back when it is left."""

import copy
import math
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from .limits import Limits, RequestRefused
from .store import PictureStore

# A page that has lost its connection may come back within this time.
GRACE_S = 60.0
_KEY = re.compile(r"[0-9A-Za-z_-]{6,64}")


class NoPlace(RequestRefused):
    """A session that there is no place for."""


@dataclass(frozen=True)
class AskedQuestion:
    """A question with its pictures and with how it is to be answered.

    Attributes:
        text: the question.
        pictures: names of its pictures in the store.
        draw: ask for a picture.
        ocr: read the text in the pictures first.
        temperature, top_p, tokens, seed: as for `Conversation.chat`; tokens are the most tokens of the answer.
        measure: measure the stages.
    """

    text: str
    pictures: tuple[str, ...] = ()
    draw: bool = False
    ocr: bool = False
    temperature: float = 0.0
    top_p: float | None = None
    tokens: int | None = None
    seed: int | None = None
    measure: bool = False


@dataclass(frozen=True)
class AnswerFigures:
    """What an answer took.

    Attributes:
        wait_s: seconds in the line.
        first_s: seconds from the turn to the first piece of text.
        whole_s: seconds from the turn to the end.
        tokens_per_s: new tokens in a second, after the first piece; None for an answer of one piece.
        new_tokens, prompt_tokens, cached_tokens: as in `Answer`.
        finish: `stop`, `length`, or `stopped` by the user.
    """

    wait_s: float
    first_s: float
    whole_s: float
    tokens_per_s: float | None
    new_tokens: int
    prompt_tokens: int
    cached_tokens: int
    finish: str


@dataclass(frozen=True)
class AnsweredTurn:
    """A question with its answer.

    Attributes:
        question: what was asked.
        text: the answer.
        figures: what it took.
        drawn: pairs of a drawn picture's name in the store and its prompt.
        no_picture: why no picture came; None where none was asked for, or where all came.
        stages: pairs of a stage's name and its seconds; empty where they were not measured.
        before: the conversation as it was before this question.
    """

    question: AskedQuestion
    text: str
    figures: AnswerFigures
    drawn: tuple[tuple[str, str], ...] = ()
    no_picture: str | None = None
    stages: tuple[tuple[str, float], ...] = ()
    before: object = field(default=None, repr=False)


class BrowserSession:
    """What belongs to one page in one browser.

    Attributes:
        key: the name that the page gave itself.
        browser: the browser's secret; empty for a client without one.
        address: of the client that began it; empty where it is not known.
        conversation: its conversation.
        turns: its questions and answers so far.
        editing: whether the page edits the last question, whose place the next one takes.
        follows: whether another session of this key ended while its page was open; the page is told of it once.
        answering: whether a question waits or is being answered.
        stop: set when the answer shall end.
        stream_ended: when its last stream of events was ended, in seconds of `time.monotonic`.
        seen: when it was last used, in seconds of the clock.
        looked: names of pictures that explain the last answer.
        explanation: what these pictures show (`LookedAt`); None where nothing was explained since the last answer.
    """

    def __init__(self, key: str, browser: str, conversation, now: float, address: str = ""):
        self.key, self.browser, self.conversation, self.address = key, browser, conversation, address
        self.turns: list[AnsweredTurn] = []
        self.editing = self.follows = False
        self.answering = False
        self.closed = False
        self.stop = threading.Event()
        self.stream_ended = -math.inf
        self.seen = now
        self.looked: tuple[str, ...] = ()
        self.explanation: object | None = None

    def take_back(self) -> AnsweredTurn | None:
        """Undoes the last turn, in the conversation too, and returns it; None where there is none."""
        if not self.turns:
            return None
        turn = self.turns.pop()
        self.conversation = copy.copy(turn.before)
        return turn

    def clear(self) -> None:
        """Forgets the conversation."""
        self.turns, self.editing, self.follows, self.explanation = [], False, False, None
        self.conversation.reset()

    def pictures(self) -> list[str]:
        """The names of the pictures of all questions, in their order."""
        return [name for turn in self.turns for name in turn.question.pictures]


class BrowserSessions:
    """The sessions of a server. It is used from one event loop.

    Args:
        limits: of the server.
        converse: makes a new conversation.
        store: the pictures of all sessions.
        on_close: called with a session that has been closed, and with the names of its pictures.
        grace_s: seconds for which a session without a connection is kept.
        clock: what tells the time.
    """

    def __init__(
        self,
        limits: Limits,
        converse: Callable[[], object],
        store: PictureStore,
        *,
        on_close: Callable[[BrowserSession, list[str]], None] | None = None,
        grace_s: float = GRACE_S,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.limits, self.store, self.grace_s = limits, store, grace_s
        self.on_close = on_close
        self._converse, self._clock = converse, clock
        self._sessions: dict[str, BrowserSession] = {}
        # Connections that keep sessions alive, by key and browser: a page keeps its connection when its session ends.
        self._listeners: Counter[tuple[str, str]] = Counter()
        self._ended: set[tuple[str, str]] = set()

    def __len__(self) -> int:
        return len(self._sessions)

    def open(self, key: object, browser: str, address: str = "") -> BrowserSession:
        """The session of this key, which is made if there is none.

        Args:
            key: the name that the page gave itself.
            browser: the browser's secret.
            address: of the client; empty where it is not known.

        Raises:
            NoPlace: all places are taken, or as many as one address may have.
            RequestRefused: the key has not the form of one, or it belongs to another browser.
        """
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            raise RequestRefused("a session's name has 6 to 64 letters, digits, - and _")
        session = self.find(key, browser)
        if session is None:
            self._check_place(address)
            session = self._sessions[key] = BrowserSession(key, browser, self._converse(), self._clock(), address)
            session.follows = (key, browser) in self._ended
            self._ended.discard((key, browser))
        session.seen = self._clock()
        return session

    def _check_place(self, address: str) -> None:
        for last in (False, True):
            full = len(self._sessions) >= self.limits.sessions
            own = sum(bool(address) and session.address == address for session in self._sessions.values())
            if not full and own < self.limits.address_sessions:
                return
            if not last:
                self.sweep()
        if full:
            raise NoPlace(f"all {self.limits.sessions} places of this server are taken: try again in a few minutes")
        raise NoPlace(f"{own} sessions of this address are open, which is the most for one: try again in a few minutes")

    def find(self, key: str, browser: str) -> BrowserSession | None:
        """The session of this key; None where there is none.

        Raises:
            RequestRefused: it belongs to another browser.
        """
        session = self._sessions.get(key)
        if session is not None and session.browser != browser:
            raise RequestRefused("this session belongs to another browser")
        return session

    def listen(self, session: BrowserSession) -> None:
        """Notes a connection that keeps a session alive."""
        self._listeners[session.key, session.browser] += 1
        session.seen = self._clock()

    def unlisten(self, session: BrowserSession) -> None:
        """Notes that such a connection has ended."""
        page = session.key, session.browser
        self._listeners[page] -= 1
        if self._listeners[page] <= 0:
            del self._listeners[page]
            self._ended.discard(page)
        session = self._sessions.get(session.key, session)
        session.seen = self._clock()

    def listeners(self, session: BrowserSession) -> int:
        """How many connections keep a session alive."""
        return self._listeners[session.key, session.browser]

    def sweep(self) -> None:
        """Closes the sessions that have been left, and drops uploads that no question has used."""
        now = self._clock()
        for session in list(self._sessions.values()):
            unused = now - session.seen
            left = not self.listeners(session) and unused > self.grace_s
            if not left and unused <= 60 * self.limits.idle_minutes:
                continue
            if session.answering:
                # Its answer ends first. The next sweep closes the session.
                session.stop.set()
            else:
                self.close(session)
        self.store.drop_unused()

    def close(self, session: BrowserSession) -> None:
        """Ends a session's answer, and frees its conversation and its pictures."""
        self._sessions.pop(session.key, None)
        session.closed = True
        if (page := (session.key, session.browser)) in self._listeners:
            self._ended.add(page)
        session.stop.set()
        session.turns = []
        session.conversation.close()
        names = self.store.drop_all_of(session.key)
        if self.on_close is not None:
            self.on_close(session, names)

    def stop_all(self) -> None:
        """Ends the answers of all sessions where they are."""
        for session in self._sessions.values():
            session.stop.set()

    def close_all(self) -> None:
        """Closes every session."""
        for session in list(self._sessions.values()):
            self.close(session)
