"""What one client may hold of what all share: requests, streams, sessions, unused pictures, places for uploads."""

import asyncio
import contextlib
from types import SimpleNamespace

import pytest

from mg_fast.web import connections, uploading, visits
from mg_fast.web.gate import API, MOST_HELD
from mg_fast.web.limits import MIB, Limits, RequestRefused
from mg_fast.web.sessions import NoPlace
from mg_fast.web.shares import Shares, ShareTaken, TurnsOfEach, client_of
from mg_fast.web.store import BROWSERS_OF_ADDRESS, PictureStore
from tests.web.conversing import FOLDER, parts
from tests.web.test_web_uploads import file_of
from tests.web.visiting import ME, SESSION, Site

pytest.importorskip("starlette", reason="starlette comes with gradio, which is not installed: `make test` installs it")
HEARTBEAT, EVENTS = f"{API}/heartbeat/{SESSION}", f"{API}/queue/data"


def test_shares():
    shares = Shares(3, 2, "enough")
    with contextlib.ExitStack() as held:
        for client in ("a", "a", "b"):
            held.enter_context(shares.hold(client))
        for client in ("a", "b", ""):
            with pytest.raises(ShareTaken, match="enough"), shares.hold(client):
                pass
    with shares.hold("a"), shares.hold(""), shares.hold(""):
        pass
    with pytest.raises(ShareTaken), shares.hold("a"), shares.hold("a"), shares.hold("a"):
        pass


def test_who_is_one_client():
    assert client_of("10.0.0.1") == client_of("::ffff:10.0.0.1") == "10.0.0.1" and client_of("") == ""
    assert client_of("2001:db8::1") == client_of("2001:db8::ffff:1") != client_of("2001:db8:0:1::1")


def test_turns_of_each():
    async def all_turns():
        turns, order = TurnsOfEach(1), []
        ends = asyncio.Event()

        async def take(client, name):
            async with turns.turn(client):
                order.append(name)
                await ends.wait()

        tasks = [asyncio.create_task(take(*pair)) for pair in (("a", 1), ("a", 2), ("b", 3), ("", 4), ("", 5))]
        await asyncio.sleep(0.01)
        assert sorted(order) == [1, 3, 4, 5]
        ends.set()
        await asyncio.gather(*tasks)
        assert sorted(order) == [1, 2, 3, 4, 5] and turns._turns == {}

    asyncio.run(all_turns())


def test_requests_of_one_address_leave_room_for_others(monkeypatch):
    """However many are held, the server says that it lives, and other addresses are served."""
    for options, more, others in (
        ({}, (), 200),
        # A proxy that names its clients.
        ({"behind_proxy": True}, [("x-forwarded-for", "10.0.0.1")], 200),
        # One that does not: all clients have its address, so they are counted together only.
        ({"behind_proxy": True}, (), 429),
    ):
        site = Site(most_requests=8, **options)

        async def held(site=site, more=more):
            ends = asyncio.Event()

            async def app(scope, receive, send):
                await ends.wait()
                await send({"type": "http.response.start", "status": 200, "headers": []})

            site.gate.app = app
            asked = [
                asyncio.create_task(site.visit("GET", "/config", browser=ME, address="10.0.0.1", more=more))
                for _ in range(10)
            ]
            await asyncio.sleep(0.02)
            health = (await site.visit("GET", "/healthz", address="10.0.0.1")).status
            named = more and [("x-forwarded-for", "10.0.0.2")]
            other = asyncio.create_task(site.visit("GET", "/config", browser=ME, address="10.0.0.2", more=named))
            await asyncio.sleep(0.02)
            ends.set()
            return health, (await other).status, [answer.status for answer in await asyncio.gather(*asked)]

        health, other, statuses = asyncio.run(held())
        assert health == 200 and other == others
        assert statuses.count(200) == (2 if others == 200 else 8) and set(statuses) == {200, 429}


@pytest.mark.parametrize("path, query", [(HEARTBEAT, ""), (EVENTS, f"session_hash={SESSION}")])
def test_connections_of_one_session(path, query):
    site = Site()

    async def many():
        ends = asyncio.Event()

        async def app(scope, receive, send):
            await ends.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})

        site.gate.app = app
        site.parts.sessions.open(SESSION, ME)
        asked = [asyncio.create_task(site.visit("GET", path, browser=ME, query=query)) for _ in range(MOST_HELD + 3)]
        await asyncio.sleep(0.02)
        ends.set()
        statuses = [answer.status for answer in await asyncio.gather(*asked)]
        again = await site.visit("GET", path, browser=ME, query=query)
        return statuses, again.status

    assert asyncio.run(many()) == ([200] * MOST_HELD + [429] * 3, 200)


def test_sessions_of_one_address():
    site = Site(Limits(sessions=4, address_sessions=2))

    def join(i, address):
        return site.join({"session_hash": f"session-{i}"}, address=address)

    assert [join(i, "10.0.0.1").status for i in range(3)] == [200, 200, 429]
    assert b"2 sessions of this address are open" in join(3, "10.0.0.1").body
    # A heartbeat begins a session, too. Sessions that are open go on.
    assert site.ask("GET", f"{API}/heartbeat/session-3", browser=ME, address="10.0.0.1").status == 429
    assert [join(i, "10.0.0.1").status for i in (0, 1)] == [200, 200]
    assert [join(i, "10.0.0.2").status for i in (5, 6)] == [200, 200]
    with pytest.raises(NoPlace, match="all 4 places"):
        site.parts.sessions.open("session-9", ME, "10.0.0.3")


def test_sessions_that_were_left_make_room_for_their_address():
    now = [0.0]
    site = parts(Limits(sessions=4, address_sessions=1), clock=lambda: now[0])
    site.sessions.open("session-1", "", "10.0.0.1")
    now[0] += 61
    assert site.sessions.open("session-2", "", "10.0.0.1").key == "session-2" and len(site.sessions) == 1


def test_unused_pictures_of_one_client():
    store = PictureStore(FOLDER, 100 * MIB, MIB)
    picture = bytes(MIB // 2)
    used = [store.put(picture, "image/png", browser="me", address="here") for _ in range(2)]
    with pytest.raises(RequestRefused, match="1 MiB of pictures have been sent that no question has used"):
        store.put(b"x", "image/png", browser="me", address="here")
    store.put(picture, "image/png", browser="you", address="there")
    # What was drawn or asked about does not count here.
    store.put(picture, "image/png", browser="me", owner=SESSION)
    for name in used:
        store.claim(name, "me", SESSION)
    store.put(picture, "image/png", browser="me", address="here")
    # Secrets can be made up, and addresses cannot.
    for i in range(2 * BROWSERS_OF_ADDRESS - 1):
        store.put(picture, "image/png", browser=f"browser-{i}", address="here")
    with pytest.raises(RequestRefused, match="4 MiB of pictures"):
        store.put(b"x", "image/png", browser="another", address="here")
    # Without secret and address nothing is known, and only the whole counts.
    for _ in range(20):
        store.put(picture, "image/png")


def test_slow_uploads_of_one_address_do_not_stop_others(monkeypatch):
    site = Site()
    head = b'--edge\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    whole = head + file_of("PNG") + b"\r\n--edge--\r\n"
    headers = {"content-type": "multipart/form-data; boundary=edge"}

    def upload(browser, address, **more):
        return site.visit("POST", f"{API}/upload", headers=headers, browser=browser, address=address, **more)

    async def all_uploads():
        slow = [
            asyncio.create_task(upload(f"browser-{i}-0123456789", "10.0.0.1", pieces=[head]))
            for i in range(uploading.MOST_READ)
        ]
        await asyncio.sleep(0.02)
        other = await asyncio.wait_for(upload(ME, "10.0.0.2", body=whole), 10)
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
        return other.status

    assert asyncio.run(all_uploads()) == 200


def test_the_time_of_an_upload_begins_when_it_is_read(monkeypatch):
    async def received():
        monkeypatch.setattr(visits, "WHOLE_S", 0.2)
        scope = {"method": "POST", "path": "/", "query_string": b"", "headers": []}

        async def receive():
            return {"type": "http.request", "body": b"x", "more_body": False}

        limited = visits.Visit(scope, receive, None).limited(10)
        await asyncio.sleep(0.3)
        return (await limited())["body"]

    assert asyncio.run(received()) == b"x"


def test_an_upload_has_a_least_rate(monkeypatch):
    monkeypatch.setattr(visits, "BEGIN_S", 0.05)

    async def received(part):
        scope = {"method": "POST", "path": "/", "query_string": b"", "headers": []}

        async def receive():
            await asyncio.sleep(0.03)
            return {"type": "http.request", "body": part, "more_body": True}

        limited = visits.Visit(scope, receive, None).limited(MIB)
        for _ in range(4):
            await limited()

    asyncio.run(received(bytes(4096)))
    with pytest.raises(visits.SlowSender):
        asyncio.run(received(b"x"))


def test_clients_that_do_not_read_are_closed():
    class Transport:
        def __init__(self, closing, held):
            self.closing, self.held, self.aborted = closing, held, False

        def is_closing(self):
            return self.closing

        def get_write_buffer_size(self):
            return self.held

        def abort(self):
            self.aborted = True

    def connection(closing, held, since=None):
        one = object.__new__(connections.ImpatientProtocol)
        one.transport, one.unread_since = Transport(closing, held), since
        return one

    reads, stuck, fresh, ending, ended = all_of = [
        connection(False, 10),
        connection(False, 10**6, 0.0),
        connection(False, 10**6, 5.0),
        connection(True, 10),
        connection(True, 0),
    ]
    for now in (10.0, 15.0):
        connections.close_unread(all_of, now, 9.0)
    assert [one.transport.aborted for one in all_of] == [False, True, True, False, False]
    connections.close_unread([reads, ending, ended, SimpleNamespace()], 19.5, 9.0)
    assert ending.transport.aborted and not reads.transport.aborted and not ended.transport.aborted
