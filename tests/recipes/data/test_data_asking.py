"""Questions are asked at a set rate, again where that helps, never once they are settled, and until a stop."""

import asyncio
import os
import signal
import threading
import time

import pytest

from recipes.data.asking import MOST_UNANSWERED, Manners, Question, Refused, Tally, Trouble, ask_all
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
        self.where = "a script"

    async def ask(self, messages, name):
        # The first part is the journal's own name.
        name = name.partition("-")[2]
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
        return key in journal.refused or any(reply.text == "good" for reply in replies) or len(replies) >= tries

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


def test_a_question_that_is_refused_beside_answers_is_settled(journal):
    asker = Scripted({f"q{i}": [Refused("HTTP 400: too long")] for i in range(1, 9)})
    tally = run(asker, journal, count=10, at_once=1)
    # Not even eight in a row end the run, because one was answered.
    assert len(asker.names) == 10 and tally.refused == 8 and sorted(journal.replies) == ["q0", "q9"]
    assert journal.refused == {f"q{i}": "HTTP 400: too long" for i in range(1, 9)}
    assert run(asker, journal, count=10).sent == 0


def test_a_question_that_is_refused_first_is_asked_again_last(journal):
    asker = Scripted({"q0": [Refused("HTTP 400: filtered")] * 2, "q1": [Refused("HTTP 400: too long")]})
    done = []
    tally = run(asker, journal, at_once=1, done=done)
    # Another request may be answered otherwise, so it has another name.
    assert asker.names == ["q0-1", "q1-1", "q2-1", "q3-1", "q0-2", "q1-2"] and len(done) == 4
    assert journal.refused == {"q0": "HTTP 400: filtered"} and len(journal.replies) == 3 and tally.refused == 1


def test_it_ends_where_nothing_was_ever_answered(journal):
    asker = Scripted({f"q{i}": [Refused(f"HTTP 400: no such field (request {i})")] for i in range(20)})
    with pytest.raises(
        AskingError, match=f"a script.*refused {MOST_UNANSWERED} questions in a row.*no such field"
    ) as caught:
        run(asker, journal, count=20, at_once=1)
    assert (
        len(asker.names) == MOST_UNANSWERED == caught.value.tally.sent == len(journal.doubtful) and not journal.refused
    )
    # In the next run, the others are asked first, and then these.
    asker = Scripted()
    assert run(asker, journal, count=20, at_once=1).replies == 20
    assert asker.names[-MOST_UNANSWERED:] == [f"q{i}-2" for i in range(MOST_UNANSWERED)]


def test_refusals_for_different_reasons_do_not_end_a_run(journal):
    reasons = ["HTTP 400: filtered", "HTTP 413: too long"]
    asker = Scripted({f"q{i}": [Refused(reasons[i % 2])] for i in range(8)})
    assert run(asker, journal, count=9, at_once=1).replies == 9


def test_it_ends_where_nobody_answers(journal, caplog):
    asker = Scripted({f"q{i}": [Trouble("no connection")] * 9 for i in range(20)})
    with pytest.raises(
        AskingError, match="^a script: 5 questions in a row.*no connection. There are no replies yet"
    ) as caught:
        run(asker, journal, count=20, at_once=1, attempts=2)
    assert len(asker.names) == 2 * MOST_UNANSWERED and caught.value.tally.troubles == {"no connection": 10}
    assert [record.getMessage() for record in caplog.records] == [
        "a script: the first request that failed: no connection"
    ]


class Bucket(Scripted):
    """Answers one request in some seconds, and turns all others away."""

    def __init__(self, seconds, retry_after):
        super().__init__()
        self.every, self.retry_after, self.next, self.away = seconds, retry_after, 0.0, 0

    async def ask(self, messages, name):
        await asyncio.sleep(0.001)
        if time.monotonic() < self.next:
            self.away += 1
            raise Trouble("HTTP 429", retry_after=self.retry_after, busy=True)
        self.next = time.monotonic() + self.every
        return await super().ask(messages, name)


@pytest.mark.parametrize("retry_after", [None, 0.0, 0.01])
def test_a_rate_limit_leaves_nothing_unasked(journal, retry_after):
    asker = Bucket(0.01, retry_after)
    tally = run(asker, journal, count=40, at_once=8, attempts=2, first_wait=0.01, longest_wait=0.6)
    assert tally.replies == 40 and not tally.left
    # All at once at each turn would be four times as many as the questions.
    assert tally.troubles == {"HTTP 429": asker.away} and asker.away < 40


def test_a_question_that_is_turned_away_while_others_are_answered_is_left(journal):
    asker = Scripted({"q0": [Trouble("HTTP 429", busy=True)] * 10_000}, seconds=0.005)
    tally = run(asker, journal, count=120, at_once=2, longest_pause=0.2)
    assert tally.left == {"HTTP 429": 1} and tally.replies == 119


def test_a_server_that_stays_busy_ends_the_run(journal):
    asker = Bucket(3600.0, 0.0)
    with pytest.raises(AskingError, match="has answered nothing for 0 seconds, because it is busy .HTTP 429."):
        run(asker, journal, longest_pause=0.05)
    assert len(journal.replies) == 1


def test_replies_on_their_way_are_kept_where_another_request_ends_the_run(journal):
    class Late(Scripted):
        async def ask(self, messages, name):
            if name.endswith("-q0-1"):
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
            if name.endswith("-q2-1"):
                os.kill(os.getpid(), signal.SIGINT)
            return await super().ask(messages, name)

    asker = Interrupting(seconds=0.05)
    tally = run(asker, journal, count=20, at_once=3)
    assert tally.stopped and sorted(journal.replies) == ["q0", "q1", "q2"] and len(asker.names) == 3
    # The usual handler is back after the run.
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


def test_a_second_interrupt_gives_up_what_is_on_its_way(journal):
    if threading.current_thread() is not threading.main_thread() or os.name != "posix":
        pytest.skip("loops take signals only in the main thread, and not on Windows")

    class Deaf(Scripted):
        async def ask(self, messages, name):
            for seconds in (0.02, 0.1):
                asyncio.get_running_loop().call_later(seconds, os.kill, os.getpid(), signal.SIGINT)
            await asyncio.sleep(30)

    began = time.monotonic()
    tally = run(Deaf(), journal, at_once=1)
    assert tally.stopped and tally.cut_off and tally.sent == 1 and 0.1 <= time.monotonic() - began < 10
