"""Attacks on the whole server with nano: files by name, large and broken uploads, scripts, and silent connections."""

import contextlib
import socket
import time

import httpx
import pytest

from mg_fast.web.gate import MOST_HELD
from tests.web.conversing import SpokenPipeline
from tests.web.serving import API, files_in, metrics, running, sent, until
from tests.web.test_web_uploads import file_of, png_of

pytestmark = pytest.mark.slow
pytest.importorskip("gradio", reason="gradio is not installed: `make test` installs it")


def raw(server, request: bytes, seconds: float = 20.0) -> bytes:
    """What the server answers to bytes that no library would send."""
    with socket.create_connection(("127.0.0.1", server.options.port), timeout=seconds) as connection:
        connection.sendall(request)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
        return b"".join(parts)


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode()


@pytest.mark.parametrize(
    "path",
    [
        f"{API}/file=/etc/passwd",
        f"{API}/file=../../../../etc/passwd",
        f"{API}/file=%2fetc%2fpasswd",
        f"{API}/file=%252fetc%252fpasswd",
        f"{API}/file=/proc/self/environ",
        f"{API}/file=http://127.0.0.1:1/",
        f"{API}/file/etc/passwd",
        "/static/../../../../../../etc/passwd",
        "/static/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/assets/..%2f..%2f..%2f..%2f..%2fetc%2fpasswd",
        "/assets//etc/passwd",
        f"{API}/proxy=http://127.0.0.1:1/",
        f"{API}/custom_component/x/client/../../../etc/passwd",
        "//etc/passwd",
        "/../../etc/passwd",
    ],
)
def test_no_file_of_the_server_is_read(server, path):
    answer = raw(server, get(path))
    status = int(answer.split(b" ", 2)[1])
    assert status in (400, 403, 404) and b"root:" not in answer and b"PATH=" not in answer


def endpoint(server, name):
    """The number of an endpoint or event of the page."""
    config = httpx.get(f"{server.address}/config").json()
    [number] = [one["id"] for one in config["dependencies"] if one["api_name"] == name]
    return number


def join(server, message):
    return httpx.post(f"{server.address}{API}/queue/join", json=message)


def test_a_question_that_names_a_file_of_the_server(server):
    ask = endpoint(server, "ask")
    for path in ("/etc/passwd", "https://127.0.0.1/a.png", f"{server.site.folder}/x/picture.png", "file:///etc/passwd"):
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        data = ["What?", [file], False, False, False, 0.0, None, None, None]
        answer = join(server, {"session_hash": "attacker1", "fn_index": ask, "data": data})
        assert answer.status_code == 400 and "add it again" in answer.json()["detail"]


def test_a_prompt_of_a_million_characters(server, client):
    with pytest.raises(Exception, match="413|may have"):
        client.predict("x" * 1_000_000, api_name="/ask")
    with pytest.raises(Exception, match="may have 8,000 characters, this one has 8,001"):
        client.predict("x" * 8001, api_name="/ask")
    assert client.predict("What is this?", api_name="/ask")["state"] == "done"


def test_an_upload_of_a_gigabyte(server):
    """Nothing of it is read where it says its length; otherwise it is read up to the limit."""
    head = f"POST {API}/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=edge\r\n"
    answer = raw(server, f"{head}Content-Length: {2**30}\r\n\r\n".encode() + b"x" * 1000)
    assert b" 413 " in answer.split(b"\r\n", 1)[0]

    def endless():
        yield b'--edge\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        for _ in range(1024):
            yield b"x" * 2**20

    before = metrics(server)["process_resident_memory_bytes"]
    headers = {"content-type": "multipart/form-data; boundary=edge"}
    try:
        status = httpx.post(f"{server.address}{API}/upload", content=endless(), headers=headers).status_code
    except httpx.TransportError:
        # The server closes the connection while the rest is still being sent.
        status = 413
    assert status == 413
    assert metrics(server)["process_resident_memory_bytes"] - before < 200 * 2**20
    assert files_in(server.site.folder) == []


@pytest.mark.parametrize("data", [png_of(12_000, 12_000), png_of(60_000, 60_000)], ids=["144 MP", "3600 MP"])
def test_a_decompression_bomb(server, data):
    before = metrics(server)
    answer = httpx.post(f"{server.address}{API}/upload", files={"files": ("a.png", data, "image/png")})
    assert answer.status_code == 400 and "may have 25 million pixels" in answer.text
    after = metrics(server)
    assert after["process_resident_memory_bytes"] - before["process_resident_memory_bytes"] < 100 * 2**20
    refused = 'mg_fast_web_pictures_total{kind="refused"}'
    assert after[refused] == before[refused] + 1


@pytest.mark.parametrize(
    "data",
    [
        b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
        b"<!doctype html><script>alert(1)</script>",
        b"%PDF-1.7",
    ],
)
@pytest.mark.parametrize("name", ["a.svg", "a.html", "a.png"])
def test_svg_and_html_are_refused(server, data, name):
    answer = httpx.post(f"{server.address}{API}/upload", files={"files": (name, data, "image/png")})
    assert answer.status_code == 400 and "is no picture" in answer.text


def test_what_is_behind_a_picture_is_not_served_as_a_page(server):
    """A file that is a picture and a page at once is served as a picture, which no browser takes for a page."""
    data = file_of("PNG") + b"<script>alert(1)</script>"
    [name] = httpx.post(f"{server.address}{API}/upload", files={"files": ("a.html", data, "text/html")}).json()
    answer = httpx.get(f"{server.address}{API}/file={name}")
    assert answer.headers["content-type"] == "image/png" and answer.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in answer.headers["content-security-policy"]


def test_script_tags_come_back_as_text(tmp_path):
    with running(SpokenPipeline()) as server:
        script = "<script>alert(1)</script>"
        config = httpx.get(f"{server.address}/config").json()
        # The page's own event: the first one of the box.
        [ask] = [one["id"] for one in config["dependencies"] if [t for t in one["targets"] if t[1] == "submit"]]
        data = [{"text": script, "files": []}, False, False, False, 0, 1, 16, ""]
        assert join(server, {"session_hash": "session1", "fn_index": ask, "data": data}).status_code == 200
        events = []
        with httpx.stream("GET", f"{server.address}{API}/queue/data?session_hash=session1", timeout=30) as stream:
            for line in stream.iter_lines():
                events.append(line)
                if "process_completed" in line:
                    break
        text = "\n".join(events)
        assert "&lt;script&gt;" in text and "<script>" not in text


def test_a_thousand_connections_that_send_nothing(server, client, monkeypatch):
    from mg_fast.web import connections

    monkeypatch.setattr(connections, "HEAD_S", 1.0)
    silent = []
    try:
        for i in range(1000):
            one = socket.create_connection(("127.0.0.1", server.options.port), timeout=10)
            # Some send a part of a request, and then a byte now and then.
            if i % 3 == 0:
                one.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ")
            silent.append(one)
        began = time.monotonic()
        assert httpx.get(f"{server.address}/healthz", timeout=10).status_code == 200
        assert client.predict("What is this?", api_name="/ask")["state"] == "done"
        assert time.monotonic() - began < 30
        until(lambda: sum(_closed(one) for one in silent) == 1000, 30)
    finally:
        for one in silent:
            one.close()


def _closed(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_one_client_s_session_is_no_other_s(server, client, scenes):
    client.predict("What does the sign say?", [sent(scenes["275"])], api_name="/ask")
    cookie = {"cookie": "mg_fast_browser=an-attacker-0123456789"}
    url = f"{server.address}{API}"
    key = client.session_hash
    assert httpx.get(f"{url}/queue/data?session_hash={key}", headers=cookie).status_code == 400
    assert httpx.get(f"{url}/heartbeat/{key}", headers=cookie).status_code == 400
    message = {"session_hash": key, "fn_index": endpoint(server, "limits"), "data": []}
    assert httpx.post(f"{url}/queue/join", headers=cookie, json=message).status_code == 403
    names = [name for name, kept in server.site.store._kept.items() if kept.owner == key]
    assert names and all(httpx.get(f"{url}/file={name}", headers=cookie).status_code == 404 for name in names)


def test_another_page_cannot_use_this_one(server):
    for headers in ({"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}):
        for path in ("/config", f"{API}/info"):
            answer = httpx.get(server.address + path, headers=headers)
            assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
    preflight = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    assert httpx.options(f"{server.address}{API}/queue/join", headers=preflight).status_code == 403


def test_a_stream_that_is_asked_for_by_two_names(server, client):
    client.predict("a secret question", api_name="/ask")
    mine, theirs = "attacker2", client.session_hash
    cookie = {"cookie": "mg_fast_browser=an-attacker-0123456789"}
    message = {"session_hash": mine, "fn_index": endpoint(server, "limits"), "data": []}
    url = f"{server.address}{API}/queue"
    assert httpx.post(f"{url}/join", json=message, headers=cookie).status_code == 200
    for first, second in ((mine, theirs), (theirs, mine)):
        answer = httpx.get(f"{url}/data?session_hash={first}&session_hash={second}", headers=cookie)
        assert answer.status_code == 400 and "expected one session_hash" in answer.json()["detail"]


def test_many_connections_of_one_session_take_nothing_from_others(server, client):
    held = []
    head = f"GET {API}/heartbeat/sameSession1 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
    try:
        for _ in range(700):
            one = socket.create_connection(("127.0.0.1", server.options.port), timeout=10)
            one.sendall(head)
            held.append(one)
        assert httpx.get(f"{server.address}/healthz", timeout=10).status_code == 200
        assert httpx.get(f"{server.address}/config", timeout=10).status_code == 200
        assert client.predict("What is this?", api_name="/ask")["state"] == "done"
        sessions = server.site.sessions
        assert sessions.listeners(sessions.find("sameSession1", "")) == MOST_HELD
    finally:
        for one in held:
            one.close()


def test_a_client_that_does_not_read_is_closed(server, monkeypatch):
    from mg_fast.web import connections

    monkeypatch.setattr(connections, "READ_S", 1.0)
    name = server.site.store.put(bytes(8 * 2**20), "image/png")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.options.port))
        connection.sendall(f"GET {API}/file={name} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        time.sleep(3)
        connection.settimeout(20)
        got = 0
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(65536):
                got += len(part)
    assert 0 < got < 8 * 2**20
    server.site.store.drop(name)
