"""Conversations without a model, for tests of the web page: their answers come when a test lets them."""

import threading
import time
from types import SimpleNamespace

import torch
from PIL import Image

from mg_fast.engine.answers import Answer
from mg_fast.web.limits import Limits
from mg_fast.web.line import WaitingLine
from mg_fast.web.sessions import BrowserSessions
from mg_fast.web.store import PictureStore
from mg_fast.web.talk import Talk

FOLDER = "/tmp/mg_fast_web_test"
# Seconds that a picture takes.
DRAWN_S = 0.05


class QuietMetrics:
    """Keeps what it is told to count."""

    content_type = "text/plain"

    def __init__(self):
        self.counted = []

    def refused(self, kind):
        self.counted.append((kind, "refused"))

    def asked(self, outcome, turn, pictures):
        self.counted.append(("ask", outcome))

    def done(self, kind, outcome):
        self.counted.append((kind, outcome))

    def uploaded(self, *, taken):
        self.counted.append(("upload", taken))

    def text(self):
        return b"# nothing\n"


class WordStream:
    """Gives the words of an answer; like `AnswerStream`, it has the answer at its end."""

    def __init__(self, conversation, text, options):
        self.conversation, self.text, self.options = conversation, text, options
        self.answer = None

    def __iter__(self):
        said, stops = "", self.options["stopping_criteria"]
        for word in self.conversation.words(self.text):
            self.conversation.pace(word)
            said += word
            yield word
            if stops[0](torch.zeros(1, 1), None).any():
                break
        self.conversation.heard.append((self.text, self.options))
        draw = self.options.get("draw")
        if draw:
            time.sleep(DRAWN_S)
            draw["on_step"](1, 2)
        images = [Image.new("RGB", (8, 8), "red")] if draw and "draw" in self.text else []
        self.answer = Answer(
            said.strip(),
            [1] * len(said.split()),
            "stop",
            10,
            4,
            cached_tokens=3,
            images=images,
            image_prompts=["a red square"] * len(images),
            no_image_reason=None if images else "the model wrote no prompt",
        )


class SaidConversation:
    """Answers every question with its own words; a test may hold it back (`pace`) or make it fail."""

    def __init__(self, pace=None):
        self.pace = pace or (lambda word: None)
        self.heard, self.pictures_seen, self.closed = [], [], False

    def __copy__(self):
        other = SaidConversation(self.pace)
        other.heard = list(self.heard)
        return other

    def words(self, text):
        if text == "fail":
            raise ZeroDivisionError("a secret that a user wrote")
        return [f"{word} " for word in f"You said {text}".split()]

    def chat(self, text, images, *, stream, **options):
        assert stream
        self.pictures_seen.append(list(images))
        return WordStream(self, text, options)

    def reset(self):
        self.heard = []

    def close(self):
        self.closed = True


class SpokenPipeline:
    """A pipeline without a model, whose answers a test may hold back."""

    painter = None

    def __init__(self, pace=None):
        self.pace = pace

    def conversation(self, *, private):
        assert private, "what users write must not be found by others"
        return SaidConversation(self.pace)


class HeldWords:
    """Holds answers back until a test lets some words through."""

    def __init__(self):
        self.allowed = threading.Semaphore(0)
        self.reached = threading.Event()

    def __call__(self, word):
        self.reached.set()
        assert self.allowed.acquire(timeout=20), "no test let this word through"

    def let(self, words=1000):
        for _ in range(words):
            self.allowed.release()


def parts(limits=None, pace=None, clock=None, **more):
    """A store, sessions, a line and a talk around conversations without a model."""
    limits = limits or Limits()
    ticking = {} if clock is None else {"clock": clock}
    store = PictureStore(FOLDER, 2**20, **ticking)
    sessions = BrowserSessions(limits, lambda: SaidConversation(pace), store, **ticking, **more)
    line, metrics = WaitingLine(limits.parallel, limits.queue), QuietMetrics()
    talk = Talk(limits, line, store, metrics, can_draw=True)
    return SimpleNamespace(limits=limits, store=store, sessions=sessions, line=line, metrics=metrics, talk=talk)
