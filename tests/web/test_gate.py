"""The gate by itself, in front of an application that only says what reached it."""

import asyncio
import base64
import io
import json
import time

import pytest
from PIL import Image

from mg_fast.web import gate as gates
from mg_fast.web import visits
from mg_fast.web.accounts import Accounts
from mg_fast.web.gate import API
from mg_fast.web.limits import Limits
from mg_fast.web.visits import COOKIE
from tests.web.test_web_uploads import file_of
from tests.web.visiting import ME, SESSION, YOU, Site

pytest.importorskip("starlette", reason="starlette comes with gradio, which is not installed: `make test` installs it")


@pytest.fixture
def site():
    return Site()


# ---- what passes


@pytest.mark.parametrize(
    "path", ["/", "/config", "/theme.css", "/assets/index-Dp_4.js", "/static/fonts/a.woff2", f"{API}/info"]
)
def test_what_a_page_reads_passes(site, path):
    answer = site.ask("GET", path, browser=ME)
    assert (answer.status, answer.body) == (200, b"reached") and len(answer.reached) == 1
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "frame-ancestors 'self'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize(
    "method, path",
    [
        *(("GET", f"{API}/{name}") for name in ("proxy=http://10.0.0.1/", "runs", "run-history/buckets", "vibe-code")),
        *(("GET", f"{API}/{name}") for name in ("dev/reload", "token", "stream/a/b/1/playlist.m3u8", "deep_link")),
        *(("GET", f"{API}/{name}") for name in ("custom_component/a/client/b/c.js", "openapi.json", "file/etc/passwd")),
        *(("POST", f"{API}/{name}") for name in ("run/ask", "api/ask", "call/ask", "component_server", "stream/x")),
        *(("POST", f"{API}/{name}") for name in ("process_recording", "vibe-edit", "run-history/connect")),
        *(("GET", path) for path in ("/monitoring", "/monitoring/summary", "/svelte/x.js", "/login", "/logout")),
        *(("GET", f"/assets/{path}") for path in ("../../../etc/passwd", "a/../../x", "%2e%2e/x", "", "a\\b")),
        *(("POST", "/"), ("PUT", f"{API}/upload"), ("DELETE", "/"), ("OPTIONS", f"{API}/queue/join")),
        ("POST", "/login"),
    ],
)
def test_everything_else_does_not(site, method, path):
    answer = site.ask(method, path, b"{}", browser=ME)
    assert (answer.status, answer.reached) == (404, [])


@pytest.mark.parametrize(
    "name",
    [
        *("/etc/passwd", "../../../etc/passwd", "http://127.0.0.1/", "https://pictures.example/a.png", ""),
        *("/tmp/mg_fast_web_test", "/tmp/mg_fast_web_test/../x", "\0", "file:///etc/passwd", "/proc/self/environ"),
    ],
)
def test_no_file_is_read_by_its_name(site, name):
    answer = site.ask("GET", f"{API}/file={name}", browser=ME)
    assert (answer.status, answer.reached) == (404, []) and b"root" not in answer.body


def test_pictures_are_shown_to_their_browser_alone(site):
    name = site.parts.store.put(b"a picture", "image/png", browser=ME)
    answer = site.ask("GET", f"{API}/file={name}", browser=ME)
    assert (answer.status, answer.body, answer.headers["content-type"]) == (200, b"a picture", "image/png")
    assert answer.headers["content-security-policy"] == "default-src 'none'; sandbox" and not answer.reached
    assert site.ask("HEAD", f"{API}/file={name}", browser=ME).body == b""
    for browser in (YOU, ""):
        assert site.ask("GET", f"{API}/file={name}", browser=browser).status == 404


def test_a_new_browser_gets_a_secret():
    site = Site(root_path="/pictures")
    cookie = site.ask("GET", "/").headers["set-cookie"]
    assert cookie.startswith(f"{COOKIE}=") and cookie.endswith("; Path=/pictures; HttpOnly; SameSite=Lax")
    assert cookie != site.ask("GET", "/").headers["set-cookie"]
    assert "set-cookie" not in site.ask("GET", "/", browser=ME).headers
    # A secret of another form is none.
    assert "set-cookie" in site.ask("GET", "/", browser="x").headers
    # What is no secret of this server counts as none.
    for value in ("short", "\xe9" * 24, "a" * 65, "a" * 20 + "/x"):
        assert visits.browser_of(f"{COOKIE}={value}") == ""
    assert visits.browser_of(f"x=1; {COOKIE}={ME}; y=2") == ME


# ---- messages


def test_a_question_passes_with_its_own_pictures_only(site):
    mine, yours = (site.parts.store.put(b"x", "image/png", browser=browser) for browser in (ME, YOU))
    message = {"session_hash": SESSION, "fn_index": 1, "data": [{"text": "hi", "files": [{"path": mine}]}]}
    answer = site.join(message)
    assert answer.status == 200 and json.loads(answer.reached[0][1]) == message
    for name in (
        yours,
        "/etc/passwd",
        "https://pictures.example/a.png",
        "",
        7,
        mine + "/..",
        "/tmp/mg_fast_web_test/x",
    ):
        for data in (
            [{"path": name}],
            [{"text": "", "files": [{"path": mine}, {"path": name}]}],
            {"a": [[{"path": name}]]},
        ):
            refused = site.join({**message, "data": data})
            assert (refused.status, refused.reached) == (400, []), (name, data)
    # Names are looked for in the whole message, not only among the values.
    assert site.join({**message, "event_data": {"path": "/etc/passwd"}}).status == 400


def test_sessions_are_their_browsers(site):
    assert site.join({"session_hash": SESSION}).status == 200
    for browser in (YOU, ""):
        assert site.join({"session_hash": SESSION}, browser).status == 403
        assert site.ask("GET", f"{API}/queue/data", browser=browser, query=f"session_hash={SESSION}").status == 400
        assert site.ask("GET", f"{API}/heartbeat/{SESSION}", browser=browser).status == 400
        body = json.dumps({"session_hash": SESSION, "fn_index": 1, "event_id": "x"}).encode()
        assert site.ask("POST", f"{API}/cancel", body, browser=browser).status == 400
    assert site.ask("GET", f"{API}/queue/data", browser=ME, query=f"session_hash={SESSION}").status == 200
    assert site.ask("GET", f"{API}/queue/data", browser=ME, query="session_hash=unknown1").status == 404
    for key in (None, 7, "../..", "x"):
        assert site.join({"session_hash": key}).status == 403


def test_an_event_is_told_after_the_end_of_the_last_stream_was_read(site):
    """gradio's page would wait for it on the stream that has ended."""
    passed = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        ends = b'data: {"msg":"close_stream","event_id":null}\n\n'
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "POST" else ends})

    async def both():
        for path in ("queue/data", "queue/join", "queue/join"):
            began = time.monotonic()
            body = json.dumps({"session_hash": SESSION}).encode()
            await site.visit("POST" if "join" in path else "GET", f"{API}/{path}", body, browser=ME, query=query)
            passed.append(time.monotonic() - began)

    query = f"session_hash={SESSION}"
    site.parts.sessions.open(SESSION, ME)
    site.gate.app = app
    asyncio.run(both())
    assert passed[0] < 0.2 <= passed[1] and passed[2] < 0.2


def test_all_places_are_taken():
    site = Site(Limits(sessions=2))
    assert [site.join({"session_hash": f"session-{i}"}).status for i in range(3)] == [200, 200, 429]
    answer = site.join({"session_hash": "session-3"})
    assert "all 2 places of this server are taken" in json.loads(answer.body)["detail"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"[" * 200_000, b"\xff\xfe", b"NaN"])
def test_messages_that_are_none(body):
    answer = Site(Limits(characters=100_000)).ask("POST", f"{API}/queue/join", body, browser=ME)
    assert (answer.status, answer.reached) == (400, [])


def test_a_prompt_of_a_million_characters(site):
    most = site.parts.limits.message_bytes
    answer = site.join({"session_hash": SESSION, "data": ["x" * 1_000_000]})
    assert (answer.status, answer.reached, answer.headers["connection"]) == (413, [], "close")
    # Neither what a request says of its length nor silence about it helps.
    for headers in ({"content-length": str(most + 1)}, {"content-length": "-1"}, {"content-length": "many"}):
        assert site.ask("POST", f"{API}/queue/join", b"{}", headers=headers).status == 413
    endless = site.ask("POST", f"{API}/queue/join", pieces=[b" " * 65536] * 40)
    assert (endless.status, endless.reached) == (413, [])
    # The longest question that is allowed passes, whatever its characters.
    longest = {"session_hash": SESSION, "data": ["\U0001f600" * site.parts.limits.characters]}
    assert site.join(longest).status == 200


def test_a_slow_sender_is_not_waited_for(site, monkeypatch):
    monkeypatch.setattr(visits, "PART_S", 0.05)
    begun = b'--edge\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
    for path, piece in (("queue/join", b"{"), ("cancel", b"{"), ("upload", begun)):
        headers = {"content-type": "multipart/form-data; boundary=edge"}
        assert site.ask("POST", f"{API}/{path}", pieces=[piece], headers=headers).status == 408
    monkeypatch.setattr(visits, "PART_S", 5)
    monkeypatch.setattr(visits, "WHOLE_S", 0.05)
    assert site.ask("POST", f"{API}/queue/join", pieces=[b" ", b" "]).status == 408


# ---- uploads


def form(*files, name="files"):
    parts = b"".join(
        b'--edge\r\nContent-Disposition: form-data; name="%s"; filename="%s"\r\nContent-Type: %s\r\n\r\n%s\r\n'
        % (name.encode(), file_name, kind, data)
        for file_name, kind, data in files
    )
    return parts + b"--edge--\r\n", {"content-type": "multipart/form-data; boundary=edge"}


def test_uploads_are_kept_in_memory_under_new_names(site, tmp_path):
    picture = file_of("PNG")
    body, headers = form((b"../../etc/passwd", b"text/html", picture), (b"b.svg", b"image/svg+xml", picture))
    answer = site.ask("POST", f"{API}/upload", body, headers=headers, browser=ME, query="upload_id=x")
    names = json.loads(answer.body)
    assert answer.status == 200 and len(set(names)) == 2 and all("passwd" not in name for name in names)
    files = [site.parts.store.get(name, ME).data for name in names]
    assert all(Image.open(io.BytesIO(file)).getpixel((3, 3)) == (200, 30, 40) for file in files)
    assert answer.reached == [] and site.parts.metrics.counted == [("upload", True)] * 2


@pytest.mark.parametrize(
    "files, status",
    [
        ([(b"a.svg", b"image/svg+xml", b"<svg xmlns='http://www.w3.org/2000/svg'/>")], 400),
        ([(b"a.png", b"image/png", b"<html><script>alert(1)</script></html>")], 400),
        ([(b"a.png", b"image/png", b"")], 400),
        ([], 400),
        ([(b"a.png", b"image/png", file_of("PNG"))] * 5, 400),
        ([(b"a.png", b"image/png", b"\x89PNG\r\n\x1a\n" + b"\0" * (10 * 2**20))], 400),
        ([(b"a.png", b"image/png", b"\0" * (41 * 2**20))], 413),
    ],
    ids=["svg", "html", "empty", "none", "five", "too large", "far too large"],
)
def test_uploads_that_are_refused(site, files, status):
    body, headers = form(*files)
    answer = site.ask("POST", f"{API}/upload", body, headers=headers, browser=ME)
    assert (answer.status, answer.reached, len(site.parts.store)) == (status, [], 0)
    assert not answer.body.startswith(b"{")


def test_an_upload_of_a_gigabyte_is_not_read(site):
    headers = {"content-type": "multipart/form-data; boundary=edge", "content-length": str(2**30)}

    class Unread(list):
        def pop(self, *_):
            raise AssertionError("the body was read")

    answer = site.ask("POST", f"{API}/upload", pieces=Unread([b"x"]), headers=headers)
    assert (answer.status, answer.headers["connection"]) == (413, "close")
    # One that does not tell its length is read up to the limit.
    head = b'--edge\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
    pieces, headers = [head, *[b"x" * 2**20] * 1024], {"content-type": "multipart/form-data; boundary=edge"}
    assert site.ask("POST", f"{API}/upload", pieces=pieces, headers=headers).status == 413
    assert len(pieces) > 900 and len(site.parts.store) == 0


def test_something_else_than_a_form(site):
    assert site.ask("POST", f"{API}/upload", b"x", headers={"content-type": "image/png"}).status == 400
    assert site.ask("POST", f"{API}/upload", b"x", headers={"content-type": "multipart/form-data"}).status == 400


# ---- who asks


def test_other_origins_are_refused(site):
    message = {"session_hash": SESSION}
    for headers in (
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "https://pictures.example.evil.example"},
        {"origin": "http://pictures.example:8443"},
        {"sec-fetch-site": "cross-site"},
    ):
        assert site.join(message, headers=headers).status == 403
        assert site.ask("GET", f"{API}/info", headers=headers).status == 403
    for headers in (
        {"origin": "https://pictures.example"},
        {"host": "pictures.example:8443", "origin": "https://pictures.example:8443"},
    ):
        answer = site.join(message, headers=headers)
        # The library behind would answer to any origin that it sees.
        assert answer.status == 200 and b"origin" not in dict(answer.reached[0][0]["headers"])
    assert site.join(message, headers={"host": "a:1", "origin": "http://a:2"}).status == 403
    named = Site(origins=("https://pictures.company.example",))
    assert named.join(message, headers={"origin": "https://pictures.company.example"}).status == 200
    # A link on another page leads here.
    assert site.ask("GET", "/", headers={"sec-fetch-site": "cross-site"}).status == 200


def test_names_and_passwords(monkeypatch):
    monkeypatch.setattr(gates, "WRONG_S", 0.01)
    site = Site(accounts=Accounts({"ann": "right"}))

    def known(password):
        return {"authorization": "Basic " + base64.b64encode(f"ann:{password}".encode()).decode()}

    assert site.ask("GET", "/healthz").status == 200
    for path in ("/", "/metrics", f"{API}/info", f"{API}/heartbeat/{SESSION}", f"{API}/file=x", "/assets/a.js"):
        answer = site.ask("GET", path)
        assert (answer.status, answer.reached) == (401, []) and answer.headers["www-authenticate"].startswith("Basic")
        assert site.ask("GET", path, headers=known("wrong")).status == 401
        assert site.ask("GET", path, headers=known("right")).status in (200, 404)
    assert site.join({"session_hash": "session2"}).status == 401
    assert site.join({"session_hash": "session2"}, headers=known("right")).status == 200


def test_wrong_passwords_are_slow_and_few_at_once(monkeypatch):
    monkeypatch.setattr(gates, "WRONG_S", 0.2)
    monkeypatch.setattr(gates, "MOST_WRONG", 3)
    site = Site(accounts=Accounts({"ann": "right"}))
    right = {"authorization": "Basic " + base64.b64encode(b"ann:right").decode()}

    async def many():
        wrong = [site.visit("GET", "/", headers={"authorization": "Basic eDp5"}) for _ in range(5)]
        waiting = asyncio.gather(*wrong)
        await asyncio.sleep(0.05)
        return (await site.visit("GET", "/", headers=right)).status, [answer.status for answer in await waiting]

    assert asyncio.run(many()) == (200, [401, 401, 401, 429, 429])


# ---- operations


def test_healthz_and_metrics(site):
    assert (site.ask("GET", "/healthz").status, site.ask("GET", "/healthz").body) == (200, b"ok\n")
    assert site.ask("GET", "/metrics").body == b"# nothing\n"
    site.gate.draining = True
    assert site.ask("GET", "/healthz").status == 503
    # Of 503 the page would say that the application is busy.
    assert site.join({"session_hash": SESSION}).status == 429
    body, headers = form((b"a.png", b"image/png", file_of("PNG")))
    assert site.ask("POST", f"{API}/upload", body, headers=headers).status == 503


def test_the_log_has_an_id_and_no_content(site, caplog):
    caplog.set_level("INFO", "mg_fast.web")
    name = site.parts.store.put(b"x", "image/png", browser=ME)
    site.join({"session_hash": SESSION, "data": ["a secret question"]}, headers={"x-request-id": "from-proxy-1"})
    site.ask("GET", f"{API}/file={name}", browser=ME)
    site.ask("GET", f"{API}/heartbeat/{SESSION}", browser=ME)
    site.ask("GET", "/a/secret/path")
    site.ask("GET", "/assets/a.js")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 4 and lines[0].startswith("request=from-proxy-1 POST /gradio_api/queue/join status=200 ms=")
    assert "secret" not in caplog.text and name not in caplog.text and SESSION not in caplog.text
    answer = site.ask("GET", "/", headers={"x-request-id": "x\r\ny"})
    assert len(answer.headers["x-request-id"]) == 16
    # What is behind the gate knows the request by the same id.
    assert dict(answer.reached[0][0]["headers"])[b"x-request-id"].decode() == answer.headers["x-request-id"]


def test_websockets_are_closed(site):
    sent = []

    async def send(event):
        sent.append(event)

    asyncio.run(site.gate({"type": "websocket", "path": "/"}, None, send))
    assert sent == [{"type": "websocket.close", "code": 1000}] and site.reached == []


def test_a_heartbeat_keeps_its_session(site):
    async def beating():
        held = asyncio.Event()

        async def app(scope, receive, send):
            await held.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})

        site.gate.app = app
        task = asyncio.create_task(site.visit("GET", f"{API}/heartbeat/{SESSION}", browser=ME))
        await asyncio.sleep(0.05)
        session = site.parts.sessions.find(SESSION, ME)
        assert site.parts.sessions.listeners(session) == 1
        held.set()
        await task
        assert site.parts.sessions.listeners(session) == 0

    asyncio.run(beating())
