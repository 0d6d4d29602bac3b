"""Questions are asked at a set rate, again where that helps, never once they are settled, and until a stop."""

import asyncio
import os
import signal
import threading
import time

import pytest

from recipes.data.asking import MOST_UNANSWERED, Manners, Pace, Question, Refused, Tally, Trouble, ask_all
from recipes.data.errors import AskingError
from recipes.data.journal import Journal, Reply

QUICK = {"first_wait": 0.001, "longest_wait": 0.002}


class Scripted:
    """An asker that does what it is told for each question, and then answers.

    Args:
        script: for a key, what its requests meet one after the other: an exception or a reply.
        seconds: how long every request takes.
    """

    def __init__(self, script=None, seconds=0.0):
        self.script, self.seconds = script or {}, seconds
        self.names, self.at_once, self.most_at_once = [], 0, 0

    async def ask(self, messages, name):
        self.names.append(name)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await asyncio.sleep(self.seconds)
            planned = self.script.get(name.rpartition("-")[0])
            step = planned.pop(0) if planned else Reply("good")
        finally:
            self.at_once -= 1
        if isinstance(step, Exception):
            raise step
        return step


@pytest.fixture
def journal(tmp_path):
    with Journal(tmp_path / "journal.jsonl", {}) as opened:
        yield opened


def run(asker, journal, count=4, tries=2, done=None, **manners) -> Tally:
    """Asks `count` questions, which one good or `tries` bad replies settle."""
    questions = [Question(f"q{i}", [{"role": "user", "content": "?"}]) for i in range(count)]

    def settled(key):
        replies = journal.replies.get(key, [])
        return any(reply.text == "good" for reply in replies) or len(replies) >= tries

    progress = done.append if done is not None else lambda _: None
    return asyncio.run(
        ask_all(questions, asker, journal, settled, Manners(**{**QUICK, **manners}), lambda: progress(1))
    )


def test_bad_replies_are_asked_again_until_tries_are_spent(journal):
    asker, done = Scripted({"q1": [Reply("bad")], "q2": [Reply("bad"), Reply("worse"), Reply("good")]}), []
    tally = run(asker, journal, done=done)
    assert sorted(asker.names) == ["q0-1", "q1-1", "q1-2", "q2-1", "q2-2", "q3-1"]
    assert [reply.text for reply in journal.replies["q2"]] == ["bad", "worse"]
    assert (tally.sent, tally.replies, len(done), tally.stopped) == (6, 6, 4, False)
    # All are settled now, so another run asks nothing.
    assert run(asker, journal, done=done).sent == 0 and len(done) == 8


def test_trouble_is_met_with_patience(journal):
    asker = Scripted({"q0": [Trouble("HTTP 503"), Trouble("no answer in time")], "q1": [Trouble("HTTP 503")] * 9})
    tally = run(asker, journal, attempts=3)
    assert tally.troubles == {"HTTP 503": 4, "no answer in time": 1} and tally.left == {"HTTP 503": 1}
    assert "q1" not in journal.replies and len(journal.replies) == 3
    # The same name is sent again, so that an endpoint can tell a repeated request.
    assert asker.names.count("q0-1") == 3
    assert run(Scripted(), journal).replies == 1


def test_a_refused_request_is_not_sent_again_in_this_run(journal):
    asker = Scripted({"q0": [Refused("HTTP 400: too long")]})
    tally = run(asker, journal)
    assert asker.names.count("q0-1") == 1 and tally.left == {"HTTP 400: too long": 1}
    assert "q0" not in journal.replies


def test_it_ends_where_nothing_is_answered(journal):
    asker = Scripted({f"q{i}": [Refused("HTTP 400: no such field")] for i in range(20)})
    with pytest.raises(AskingError, match=f"^{MOST_UNANSWERED} questions in a row.*no such field"):
        run(asker, journal, count=20, at_once=1)
    assert len(asker.names) == MOST_UNANSWERED


def test_replies_on_their_way_are_kept_where_another_request_ends_the_run(journal):
    class Late(Scripted):
        async def ask(self, messages, name):
            if name == "q0-1":
                await asyncio.sleep(0.02)
                raise AskingError("the key is wrong")
            return await super().ask(messages, name)

    asker = Late(seconds=0.05)
    with pytest.raises(AskingError, match="the key is wrong"):
        run(asker, journal, count=9, at_once=3)
    assert sorted(journal.replies) == sorted(name.rpartition("-")[0] for name in asker.names) == ["q1", "q2"]


def test_no_more_than_allowed_are_on_their_way(journal):
    asker = Scripted(seconds=0.01)
    run(asker, journal, count=12, at_once=3)
    assert asker.most_at_once == 3


def test_the_rate_is_kept(journal):
    began = time.monotonic()
    run(Scripted(), journal, count=5, at_once=5, per_minute=1200)
    # Between five requests lie four intervals of 50 ms.
    assert time.monotonic() - began >= 4 * 0.05


def test_a_pause_holds_everybody():
    async def starts():
        pace, began = Pace(None), time.monotonic()
        await pace.turn()
        waiting = [asyncio.ensure_future(pace.turn()) for _ in range(3)]
        pace.pause(0.1)
        await asyncio.sleep(0.05)
        # A longer pause that is asked for meanwhile counts, too.
        pace.pause(0.15)
        await asyncio.gather(*waiting)
        return time.monotonic() - began

    assert asyncio.run(starts()) >= 0.2


def test_a_pause_that_is_asked_for_counts_for_all_and_a_long_one_ends_the_run(journal):
    asker = Scripted({"q0": [Trouble("HTTP 429", retry_after=0.2)]})
    began = time.monotonic()
    tally = run(asker, journal, count=3, at_once=1)
    assert time.monotonic() - began >= 0.2 and tally.replies == 3
    asker = Scripted({"q3": [Trouble("HTTP 429", retry_after=3600.0)]})
    with pytest.raises(AskingError, match="to wait for 3600 seconds"):
        run(asker, journal, count=5, at_once=1)


def test_an_interrupt_lets_requests_end_and_asks_no_more(journal):
    if threading.current_thread() is not threading.main_thread() or os.name != "posix":
        pytest.skip("loops take signals only in the main thread, and not on Windows")

    class Interrupting(Scripted):
        async def ask(self, messages, name):
            if name == "q2-1":
                os.kill(os.getpid(), signal.SIGINT)
            return await super().ask(messages, name)

    asker = Interrupting(seconds=0.05)
    tally = run(asker, journal, count=20, at_once=3)
    assert tally.stopped and sorted(journal.replies) == ["q0", "q1", "q2"] and len(asker.names) == 3
    # The usual handler is back.
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert run(Scripted(), journal, count=20).replies == 17


def test_an_interrupt_ends_a_long_pause(journal):
    if threading.current_thread() is not threading.main_thread() or os.name != "posix":
        pytest.skip("loops take signals only in the main thread, and not on Windows")

    class Pausing(Scripted):
        async def ask(self, messages, name):
            asyncio.get_running_loop().call_later(0.05, os.kill, os.getpid(), signal.SIGINT)
            raise Trouble("HTTP 429", retry_after=60.0)

    began = time.monotonic()
    tally = run(Pausing(), journal)
    assert tally.stopped and not journal.replies and time.monotonic() - began < 30
