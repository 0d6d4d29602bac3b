"""Pictures of sessions without a model: who may use them by their names, and when they are dropped."""

import pytest

from mg_fast.web.limits import RequestRefused
from mg_fast.web.sessions import AskedQuestion
from mg_fast.web.store import UNUSED_S, names_in
from tests.web.conversing import FOLDER, parts
from tests.web.test_web_sessions import ONE, OTHER, Clock, answers


def test_pictures_by_their_names():
    clock = Clock()
    site = parts(clock=clock)
    store = site.store
    name = store.put(b"mine", "image/jpeg", browser="me")
    assert name.startswith(FOLDER) and name.endswith("/picture.jpg") and len(name) > len(FOLDER) + 40
    assert store.get(name, "me").data == b"mine" and store.get(name, "you") is None and store.get(name, "") is None
    assert store.get(name.replace("picture", "Picture"), "me") is None
    store.claim(name, "me", ONE)
    with pytest.raises(RequestRefused, match="not here any more"):
        store.claim(name, "me", OTHER)
    unused = store.put(b"unused", "image/png")
    clock.now += UNUSED_S + 1
    assert store.drop_unused() == [unused] and store.held_bytes == 4
    with pytest.raises(RequestRefused, match="as many pictures as it can"):
        store.put(b"x" * 2**20, "image/png")
    store.drop(name)
    store.drop(name)
    assert len(store) == store.held_bytes == 0


def test_pictures_that_no_turn_names_are_dropped():
    site = parts()
    session = site.sessions.open(ONE, "")
    names = [site.store.put(letter, "image/png") for letter in (b"a", b"b")]
    answers(AskedQuestion("one", (names[0],)), site=site, session=session)
    answers(AskedQuestion("two", (names[1],)), site=site, session=session, replacing=True)
    assert session.conversation.pictures_seen == [[b"b"]] and session.pictures() == [names[1]]
    assert site.store.get(names[0], "") is None and site.store.held_bytes == 1


def test_names_in_a_message():
    message = {
        "data": [{"text": "x", "files": [{"path": "a"}, {"path": "b", "more": [{"path": None}]}]}, [{"path": 7}]]
    }
    assert list(names_in(message)) == ["a", "b", ""]
    deep = {"path": "end"}
    for _ in range(100_000):
        deep = [deep]
    assert list(names_in(deep)) == ["end"]
