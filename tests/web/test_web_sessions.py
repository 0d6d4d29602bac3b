"""Sessions and answers without a model: who sees what, what is undone, stopped, refused, and given back."""

import asyncio
import contextlib
import gc
import weakref

import pytest

from mg_fast.web.limits import Limits, RequestRefused
from mg_fast.web.sessions import AskedQuestion
from mg_fast.web.talk import DrawingSteps, InLine, TextSoFar, TurnDone
from tests.web.conversing import DRAWN_S, HeldWords, parts

ONE, OTHER = "session-one", "session-two"


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


async def read(talk, session, question, **more):
    return [update async for update in talk.ask(session, question, **more)]


def answers(*questions, site=None, session=None, **more):
    site = site or parts()
    session = session or site.sessions.open(ONE, "")
    return site, session, [asyncio.run(read(site.talk, session, question, **more))[-1].turn for question in questions]


# ---- answers


def test_an_answer_comes_in_pieces_and_is_kept():
    gate = HeldWords()
    site = parts(pace=gate)
    session = site.sessions.open(ONE, "")

    async def follow():
        texts = []
        gate.let(1)
        async for update in site.talk.ask(session, AskedQuestion("something")):
            if isinstance(update, TextSoFar):
                texts.append(update.text)
                gate.let(1)
        return texts, update

    texts, last = asyncio.run(follow())
    # The last words may come together with the end.
    assert texts[:2] == ["You ", "You said "] and isinstance(last, TurnDone)
    turn = session.turns[0]
    assert turn is last.turn and turn.text == "You said something"
    took = turn.figures
    assert (took.new_tokens, took.prompt_tokens, took.cached_tokens, took.finish) == (3, 10, 3, "stop")
    assert 0 <= took.first_s <= took.whole_s and took.tokens_per_s > 0
    assert not session.answering and site.line.running == 0 and site.metrics.counted == [("ask", "ok")]


def test_drawn_pictures_and_the_reason_for_none():
    site, session, (drawn, none) = answers(AskedQuestion("draw it", draw=True), AskedQuestion("no", draw=True))
    [(name, prompt)] = drawn.drawn
    assert prompt == "a red square" and site.store.get(name, "").media_type == "image/png" and drawn.no_picture is None
    assert none.drawn == () and none.no_picture == "the model wrote no prompt"
    # Drawing belongs to the whole time, and not to that of the tokens.
    took = drawn.figures
    assert (took.new_tokens - 1) / took.tokens_per_s <= took.whole_s - took.first_s - DRAWN_S + 1e-6

    async def steps():
        found = await read(site.talk, session, AskedQuestion("draw again", draw=True))
        return [update for update in found if isinstance(update, DrawingSteps)]

    assert all((step.step, step.total) == (1, 2) for step in asyncio.run(steps()))
    # Who did not ask for a picture is not told why there is none.
    assert answers(AskedQuestion("hello"))[2][0].no_picture is None


def test_the_last_question_is_replaced():
    site, session, _ = answers(AskedQuestion("first"), AskedQuestion("second"))
    site, session, _ = answers(AskedQuestion("third"), site=site, session=session, replacing=True)
    assert [turn.text for turn in session.turns] == ["You said first", "You said third"]
    # The conversation has forgotten the second question, too.
    assert [text for text, _ in session.conversation.heard] == ["first", "third"]
    assert session.take_back().text == "You said third" and [text for text, _ in session.conversation.heard] == [
        "first"
    ]
    session.clear()
    assert session.turns == [] and session.conversation.heard == [] and session.take_back() is None


def test_a_question_is_not_replaced_by_one_that_fails():
    site, session, _ = answers(AskedQuestion("first"), AskedQuestion("second"))
    with pytest.raises(RequestRefused, match="the answer failed"):
        asyncio.run(read(site.talk, session, AskedQuestion("fail"), replacing=True))
    assert [turn.text for turn in session.turns] == ["You said first", "You said second"]
    assert [text for text, _ in session.conversation.heard] == ["first", "second"]


def test_stop_ends_an_answer_and_keeps_it():
    gate = HeldWords()
    site = parts(pace=gate)
    session = site.sessions.open(ONE, "")

    async def stopped():
        gate.let(2)
        async for update in site.talk.ask(session, AskedQuestion("a b c d e")):
            if isinstance(update, TextSoFar) and update.text == "You said ":
                session.stop.set()
                gate.let()
        return update

    turn = asyncio.run(stopped()).turn
    assert turn.figures.finish == "stopped" and turn.text in ("You said", "You said a")
    assert session.turns == [turn] and not session.stop.is_set()
    # The next answer is not stopped.
    assert answers(AskedQuestion("x"), site=site, session=session)[2][0].text == "You said x"


def test_whoever_waits_is_told_its_place_and_may_stop():
    gate = HeldWords()
    site = parts(pace=gate)
    sessions = [site.sessions.open(f"session-{i}", "") for i in range(4)]

    async def waiting():
        places = []

        async def ask(session):
            async for update in site.talk.ask(session, AskedQuestion(session.key)):
                if isinstance(update, InLine):
                    places.append((session.key, update.place))
            return update.turn.text

        tasks = []
        for session in sessions:
            tasks.append(asyncio.create_task(ask(session)))
            await asyncio.sleep(0.05)
        sessions[1].stop.set()
        with pytest.raises(RequestRefused, match="stopped before its turn"):
            await tasks[1]
        gate.let()
        return places, [await task for task in (tasks[0], *tasks[2:])]

    places, texts = asyncio.run(waiting())
    assert {("session-1", 1), ("session-2", 2), ("session-3", 3), ("session-2", 1), ("session-3", 2)} <= set(places)
    assert texts == [f"You said session-{i}" for i in (0, 2, 3)]


def test_a_reader_that_goes_away_ends_its_answer_and_no_other():
    gate = HeldWords()
    site = parts(Limits(parallel=2), pace=gate)
    gone, stays = site.sessions.open(ONE, ""), site.sessions.open(OTHER, "")

    async def leave():
        asking = site.talk.ask(gone, AskedQuestion("a b c d e f"))
        gate.let(1)
        async with contextlib.aclosing(asking):
            await asking.__anext__()
            other = asyncio.create_task(read(site.talk, stays, AskedQuestion("a b c d e f")))
            await asyncio.sleep(0.05)
        assert gone.stop.is_set()
        gate.let()
        await site.talk.wait(20)
        return (await other)[-1].turn

    turn = asyncio.run(leave())
    assert turn.text == "You said a b c d e f" and turn.figures.finish == "stop"
    assert site.line.running == 0 and not gone.answering


# ---- what is refused


@pytest.mark.parametrize(
    "question, message",
    [
        (AskedQuestion(" "), "expected a question, got an empty text"),
        (AskedQuestion("x" * 1_000_000), "may have 8,000 characters, this one has 1,000,000"),
        (AskedQuestion("<image> what"), "<image> is the mark of a picture"),
        (AskedQuestion("x", tuple("abcde")), "may have 4 pictures, this one has 5"),
        (AskedQuestion("x", ("/etc/passwd",)), "not here any more"),
        (AskedQuestion("x", tokens=513), "may have 512 tokens, 513 were asked for"),
        (AskedQuestion("x", tokens="5"), "may have 512 tokens, '5' were asked for"),
        (AskedQuestion("x", temperature="1"), "temperature: expected a number, got '1'"),
        (AskedQuestion(["x"]), "got an empty text, or none at all"),
    ],
)
def test_refused_questions(question, message):
    site = parts()
    session = site.sessions.open(ONE, "")
    with pytest.raises(RequestRefused, match=message):
        asyncio.run(read(site.talk, session, question))
    assert not session.answering and session.turns == [] and site.line.running == 0
    assert site.metrics.counted == [("ask", "refused")]


def test_limits_of_a_session():
    site, session, _ = answers(AskedQuestion("1"), AskedQuestion("2"), site=parts(Limits(turns=2, session_megabytes=1)))
    with pytest.raises(RequestRefused, match="may have 2 questions: clear it"):
        asyncio.run(read(site.talk, session, AskedQuestion("3")))
    assert asyncio.run(read(site.talk, session, AskedQuestion("3"), replacing=True))[-1].turn.text == "You said 3"
    session.clear()
    site.talk.can_draw = False
    with pytest.raises(RequestRefused, match="no painter"):
        asyncio.run(read(site.talk, session, AskedQuestion("3", draw=True)))
    site.store.most_bytes = 2**24
    names = tuple(site.store.put(b"x" * 600_000, "image/png") for _ in range(2))
    with pytest.raises(RequestRefused, match="may have 1 MiB"):
        asyncio.run(read(site.talk, session, AskedQuestion("3", names)))


def test_one_user_s_error_is_no_other_s(caplog):
    site = parts()
    session, other = site.sessions.open(ONE, ""), site.sessions.open(OTHER, "")
    caplog.set_level("INFO", "mg_fast.web")
    with pytest.raises(RequestRefused, match="the server's log tells more under request-7") as refused:
        asyncio.run(read(site.talk, session, AskedQuestion("fail"), request_id="request-7"))
    assert "secret" not in str(refused.value)
    # The log has the place of the fault, and nothing of what the user or the error said.
    text = caplog.text
    assert "request=request-7 kind=ask error=ZeroDivisionError at=conversing.py:" in text
    assert "secret" not in text and "fail" not in text.replace("failed", "")
    assert asyncio.run(read(site.talk, other, AskedQuestion("hi")))[-1].turn.text == "You said hi"
    assert asyncio.run(read(site.talk, session, AskedQuestion("hi")))[-1].turn.text == "You said hi"
    assert site.line.running == 0


def test_a_second_question_waits_for_the_first():
    gate = HeldWords()
    site = parts(pace=gate)
    session = site.sessions.open(ONE, "")

    async def twice():
        first = asyncio.create_task(read(site.talk, session, AskedQuestion("first")))
        await asyncio.sleep(0.05)
        with pytest.raises(RequestRefused, match="still being answered"):
            await read(site.talk, session, AskedQuestion("second"))
        gate.let()
        return await first

    assert asyncio.run(twice())[-1].turn.text == "You said first"


def test_a_server_that_stops_lets_running_answers_end_and_begins_no_other():
    gate = HeldWords()
    site = parts(pace=gate)
    running, waits = site.sessions.open(ONE, ""), site.sessions.open(OTHER, "")

    async def drained():
        first = asyncio.create_task(read(site.talk, running, AskedQuestion("first")))
        second = asyncio.create_task(read(site.talk, waits, AskedQuestion("second")))
        await asyncio.sleep(0.05)
        site.talk.draining = True
        with pytest.raises(RequestRefused, match="about to stop"):
            await read(site.talk, site.sessions.open("session-new", ""), AskedQuestion("third"))
        with pytest.raises(RequestRefused, match="about to stop"):
            await second
        assert not await site.talk.wait(0.05)
        gate.let()
        assert await site.talk.wait(20)
        return (await first)[-1].turn.text

    assert asyncio.run(drained()) == "You said first"


def test_an_answer_has_the_server_s_most_tokens_where_none_are_given():
    _, session, _ = answers(AskedQuestion("x"), AskedQuestion("y", tokens=3), site=parts(Limits(tokens=7)))
    assert [options["max_new_tokens"] for _, options in session.conversation.heard] == [7, 3]


@pytest.mark.parametrize("full", ["server", "session"])
def test_an_answer_whose_picture_finds_no_room_is_kept(full):
    site = parts()
    session = site.sessions.open(ONE, "")
    if full == "server":
        site.store.most_bytes = 1
    else:
        site.store.most_bytes = 2**27
        site.store.put(b"x" * site.limits.session_bytes, "image/png", owner=ONE)
    [turn] = answers(AskedQuestion("draw it", draw=True), site=site, session=session)[2]
    reason = "as many pictures as it can" if full == "server" else "of a session may have 64 MiB"
    assert turn.drawn == () and reason in turn.no_picture
    # What is shown and what the model remembers are the same.
    assert [t.question.text for t in session.turns] == [text for text, _ in session.conversation.heard] == ["draw it"]


def test_the_model_forgets_an_answer_that_fails_after_its_end(monkeypatch):
    site, session, _ = answers(AskedQuestion("first"))
    monkeypatch.setattr("mg_fast.web.talk.written", lambda picture: 1 / 0)
    with pytest.raises(RequestRefused, match="the answer failed"):
        asyncio.run(read(site.talk, session, AskedQuestion("draw", draw=True)))
    assert [t.question.text for t in session.turns] == [text for text, _ in session.conversation.heard] == ["first"]


# ---- sessions


def test_a_session_belongs_to_one_browser():
    site = parts()
    mine = site.sessions.open(ONE, "my secret")
    assert site.sessions.open(ONE, "my secret") is mine and site.sessions.open(OTHER, "") is not mine
    for browser in ("another", ""):
        with pytest.raises(RequestRefused, match="belongs to another browser"):
            site.sessions.open(ONE, browser)
        with pytest.raises(RequestRefused, match="belongs to another browser"):
            site.sessions.find(ONE, browser)
    for key in (None, 7, "short", "x" * 65, "../../etc", "a b c d e", ["session-one"]):
        with pytest.raises(RequestRefused, match="6 to 64 letters"):
            site.sessions.open(key, "")


def test_places_are_counted_and_given_back():
    clock, closed = Clock(), []
    site = parts(Limits(sessions=2), clock=clock, on_close=lambda session, names: closed.append((session.key, names)))
    one, two = site.sessions.open(ONE, ""), site.sessions.open(OTHER, "")
    site.sessions.listen(one)
    with pytest.raises(RequestRefused, match="all 2 places of this server are taken"):
        site.sessions.open("session-three", "")
    name = site.store.put(b"picture", "image/png")
    site.store.claim(name, "", OTHER)
    # One has a connection, the other has none.
    clock.now += 61
    conversation = two.conversation
    site.sessions.open("session-three", "")
    assert closed == [(OTHER, [name])] and two.closed and conversation.closed and site.store.held_bytes == 0
    # A page that is open, but that nobody uses.
    clock.now += 60 * site.limits.idle_minutes + 1
    site.sessions.sweep()
    assert len(site.sessions) == 0 and one.closed
    site.sessions.unlisten(one)
    with pytest.raises(RequestRefused, match="has ended: reload"):
        asyncio.run(read(site.talk, one, AskedQuestion("hi")))


def test_a_page_whose_session_ended_is_told_once_and_keeps_the_next_one():
    clock = Clock()
    site = parts(clock=clock)
    sessions = site.sessions
    first = sessions.open(ONE, "me")
    sessions.listen(first)
    assert not first.follows
    clock.now += 60 * site.limits.idle_minutes + 1
    sessions.sweep()
    assert first.closed
    second = sessions.open(ONE, "me")
    assert second is not first and second.follows
    # The page's connection keeps the new session, too, and frees it when it ends.
    clock.now += 1000
    sessions.sweep()
    assert sessions.find(ONE, "me") is second
    sessions.unlisten(first)
    clock.now += 61
    sessions.sweep()
    assert second.closed and not sessions.open(ONE, "me").follows


def test_a_page_may_come_back_within_the_grace():
    clock = Clock()
    site = parts(clock=clock)
    session = site.sessions.open(ONE, "")
    site.sessions.listen(session)
    clock.now += 1000
    site.sessions.unlisten(session)
    clock.now += 59
    site.sessions.sweep()
    assert site.sessions.find(ONE, "") is session


def test_a_session_that_is_left_while_it_is_answered():
    clock, gate = Clock(), HeldWords()
    site = parts(pace=gate, clock=clock)
    session = site.sessions.open(ONE, "")

    async def left():
        asking = asyncio.create_task(read(site.talk, session, AskedQuestion("a b c d e f g")))
        await asyncio.to_thread(gate.reached.wait, 20)
        clock.now += 61
        site.sessions.sweep()
        assert session.stop.is_set() and not session.closed
        gate.let()
        await asking
        site.sessions.sweep()
        assert session.closed and len(site.sessions) == 0

    asyncio.run(left())


def test_a_closed_session_is_freed():
    site, session, _ = answers(AskedQuestion("draw", draw=True), AskedQuestion("again"))
    conversation = weakref.ref(session.conversation)
    site.sessions.close(session)
    assert site.store.held_bytes == 0
    session = None
    gc.collect()
    assert conversation() is None
