"""The whole server with nano over HTTP: programs drive it by gradio_client, and attacks meet it as clients would."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from PIL import Image

import mg_fast
from mg_fast.web.limits import Limits
from tests.paths import ROOT
from tests.web.conversing import HeldWords, SaidConversation
from tests.web.serving import running, until
from tests.web.test_web_uploads import file_of, png_of

pytestmark = pytest.mark.slow
gradio_client = pytest.importorskip("gradio_client", reason="gradio is not installed: `make test` installs it")
pytest.importorskip("gradio", reason="gradio is not installed: `make test` installs it")
API = "/gradio_api"


class RedPainter:
    """Draws a red picture for every prompt, unless it is broken."""

    name, broken = "red", False

    def draw(self, prompt, *, on_step=None, **_):
        if self.broken:
            raise mg_fast.DrawingError("the red paint is empty")
        for step in range(3):
            if on_step:
                on_step(step + 1, 3)
        return [Image.new("RGB", (32, 32), "red")]


class SpokenPipeline:
    """A pipeline without a model, whose answers a test may hold back."""

    painter = None

    def __init__(self, pace=None):
        self.pace = pace

    def conversation(self):
        return SaidConversation(self.pace)


@pytest.fixture(scope="module")
def server():
    pipeline = mg_fast.load("nano")
    pipeline.painter = RedPainter()
    with running(pipeline, Limits(sessions=40), grace_s=0.5) as server:
        yield server


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Pictures with the numbers that nano reads in them."""
    from recipes.nano.scenes import draw_scene

    folder, numbers = tmp_path_factory.mktemp("scenes"), ("4083", "275", "61")
    for i, number in enumerate(numbers):
        draw_scene(5, i, split="unseen", number=number).image.save(folder / f"{number}.png")
    return {number: folder / f"{number}.png" for number in numbers}


@pytest.fixture
def client(server, tmp_path):
    client = another(server, tmp_path)
    yield client
    client.close()


def another(server, tmp_path, **options):
    options = {"verbose": False, "download_files": tmp_path, "analytics_enabled": False, **options}
    options["httpx_kwargs"] = {"timeout": 60}
    return gradio_client.Client(server.address, **options)


def picture(file):
    return gradio_client.handle_file(str(file))


def files_in(folder):
    """The files in a server's folder, without those of the tests themselves, which pytest puts there, too."""
    found = [path for path in Path(folder).rglob("*") if path.is_file()]
    return [path for path in found if not any(part.startswith("pytest-of-") for part in path.parts)]


def metrics(server):
    lines = httpx.get(f"{server.address}/metrics", timeout=60).text.splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


# ---- programs


def test_the_endpoints_have_their_documented_names(client):
    named = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(named) == {"/ask", "/clear", "/explain", "/limits"}
    parameters = [parameter["parameter_name"] for parameter in named["/ask"]["parameters"]]
    assert parameters == ["text", "pictures", "draw", "ocr", "measure", "temperature", "top_p", "tokens", "seed"]
    documented = (ROOT / "docs" / "web.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in documented for name in (*named, *parameters))


def test_a_program_asks_and_reads_the_answer_in_pieces(client, scenes):
    job = client.submit("What does the sign say?", [picture(scenes["4083"])], measure=True, api_name="/ask")
    answer = job.result(timeout=120)
    assert answer["text"] == "The number is 4083." and answer["state"] == "done" and answer["finish"] == "stop"
    assert answer["prompt_tokens"] > 36 and answer["new_tokens"] > 3 and answer["no_picture"] is None
    assert {"preprocess", "LR tower", "HR tower", "decode"} < set(answer["stages"])
    pieces = [piece["text"] for piece in job.outputs()]
    assert len(pieces) >= 2 and all(pieces[-1].startswith(piece) for piece in pieces)
    # The conversation goes on, and remembers.
    again = client.predict("How many circles are there?", api_name="/ask")
    assert again["cached_tokens"] > 36 and "circle" in again["text"]


def test_each_client_has_its_own_conversation(server, client, scenes, tmp_path):
    other = another(server, tmp_path)
    for one, number in ((client, "275"), (other, "61")):
        one.predict("What does the sign say?", [picture(scenes[number])], api_name="/ask")
    found = {}

    def ask(one, number):
        found[number] = one.predict("What does the sign say?", api_name="/ask")["text"]

    threads = [threading.Thread(target=ask, args=pair) for pair in ((client, "275"), (other, "61"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert found == {"275": "The number is 275.", "61": "The number is 61."}
    assert other.predict(api_name="/clear") is True
    assert "61" not in other.predict("What does the sign say?", api_name="/ask")["text"]
    other.close()


def test_a_program_draws(server, client, scenes, monkeypatch):
    answer = client.predict("Draw this again.", [picture(scenes["4083"])], draw=True, api_name="/ask")
    [drawn], [prompt] = answer["drawn"], answer["prompts"]
    file = drawn if isinstance(drawn, str) else drawn["path"]
    assert Image.open(file).getpixel((5, 5)) == (255, 0, 0) and prompt and answer["no_picture"] is None
    monkeypatch.setattr(server.site.pipeline.painter, "broken", True)
    none = client.predict("Draw this again.", draw=True, api_name="/ask")
    assert none["drawn"] == [] and none["no_picture"] == "drawing failed: the red paint is empty"


def test_a_program_sees_what_the_model_looked_at(client, scenes):
    client.predict("What does the sign say?", [picture(scenes["275"])], api_name="/ask")
    first = client.predict(api_name="/explain")
    client.predict("What colour is the background?", api_name="/ask")
    second = client.predict(1, api_name="/explain")
    assert first["answer"] == "The number is 275." and second["question"] == "What colour is the background?"

    def layer(found, name):
        file = found[name]
        return Image.open(file if isinstance(file, str) else file["path"]).convert("RGB")

    sizes = {layer(first, name).size for name in ("picture", "heat", "windows")}
    assert sizes == {(768, 768)}
    assert layer(first, "heat").tobytes() != layer(second, "heat").tobytes()
    assert layer(first, "heat").tobytes() != layer(first, "windows").tobytes()


def test_limits_and_refusals(server, client, scenes, tmp_path):
    limits = client.predict(api_name="/limits")
    assert limits["sessions"] == 40 and limits["tokens"] == Limits().tokens and limits["running"] == 0
    for arguments, message in (
        (("",), "expected a question"),
        (("<image> x",), "is the mark of a picture"),
        (("x", None, False, False, False, -1.0), "temperature: expected"),
        (("x", [picture(scenes["61"])] * 5), "may have 4 pictures"),
    ):
        with pytest.raises(Exception, match=message):
            client.predict(*arguments, api_name="/ask")
    with pytest.raises(Exception, match="no picture has been asked about"):
        client.predict(1, api_name="/explain")
    bad = tmp_path / "a.png"
    bad.write_bytes(b"<svg xmlns='http://www.w3.org/2000/svg'/>")
    with pytest.raises(httpx.HTTPStatusError, match="400"):
        client.predict("x", [picture(bad)], api_name="/ask")
    assert client.predict("What is this?", api_name="/ask")["state"] == "done"


def test_a_session_that_is_left_is_freed(server, scenes, tmp_path):
    client = another(server, tmp_path)
    client.predict("What does the sign say?", [picture(scenes["61"])], api_name="/ask")
    until(lambda: server.site.store.held_bytes > 0)
    key = client.session_hash
    assert server.site.sessions.find(key, "") is not None
    client.close()
    until(lambda: server.site.sessions.find(key, "") is None, 60)
    assert not any(kept.owner == key for kept in server.site.store._kept.values())


def test_nothing_is_written_to_the_disk(server, client, scenes):
    client.predict("What does the sign say?", [picture(scenes["275"])], api_name="/ask")
    client.predict(1, api_name="/explain")
    assert files_in(server.site.folder) == []


# ---- operations


def test_healthz_metrics_and_headers(server, client):
    before = metrics(server)
    client.predict("What is this?", api_name="/ask")
    after = metrics(server)
    answered = 'mg_fast_web_requests_total{kind="ask",outcome="ok"}'
    assert after[answered] == before[answered] + 1 and after["mg_fast_web_sessions"] >= 1
    assert after["process_resident_memory_bytes"] > 2**26
    answer = httpx.get(f"{server.address}/healthz")
    assert (answer.status_code, answer.text, "server" in answer.headers) == (200, "ok\n", False)
    page = httpx.get(server.address)
    assert page.status_code == 200 and "Mini-Gemini" in page.text and "httponly" in page.headers["set-cookie"].lower()


def test_a_proxy_shows_the_page_below_a_path():
    with running(SpokenPipeline(), root_path="/pictures") as server:
        page = httpx.get(server.address, headers={"host": "company.example"})
        config = json.loads(re.search(r"window.gradio_config = (.*?);</script>", page.text)[1])
        assert config["root"].endswith("/pictures") and "Path=/pictures" in page.headers["set-cookie"]


def test_names_and_passwords(tmp_path):
    from mg_fast.web.accounts import Accounts

    with running(SpokenPipeline(), accounts=Accounts({"ann": "right"})) as server:
        for path in ("/", "/config", "/metrics", f"{API}/heartbeat/session1", f"{API}/info"):
            assert httpx.get(server.address + path).status_code == 401
        assert httpx.get(f"{server.address}/healthz").status_code == 200
        client = another(server, tmp_path, headers={"Authorization": "Basic YW5uOnJpZ2h0"})
        assert client.predict("hello", api_name="/ask")["text"] == "You said hello"
        client.close()


def test_a_stop_lets_the_running_answer_end(tmp_path):
    held = HeldWords()
    with running(SpokenPipeline(held)) as server:
        client = another(server, tmp_path)
        waits = another(server, tmp_path)
        job = client.submit("a b c", api_name="/ask")
        until(held.reached.is_set)
        waiting = waits.submit("x", api_name="/ask")
        until(lambda: server.site.line.waiting == 1)
        server.stop()
        until(lambda: httpx.get(f"{server.address}/healthz").status_code == 503)
        with pytest.raises(Exception, match="about to stop"):
            waiting.result(timeout=30)
        held.let()
        assert job.result(timeout=30)["text"] == "You said a b c"
        client.close()
        waits.close()
    assert not os.path.exists(server.site.folder)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.address}/healthz")


def test_sigterm_ends_the_command(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "mg_fast", "web", "--port", "0", "--drain-seconds", "5"]
    process = subprocess.Popen(words, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    said = []
    try:
        for line in process.stderr:
            said.append(line)
            if "the page is at" in line:
                break
        address = re.search(r"http://\S+", said[-1])[0]
        assert httpx.get(f"{address}/healthz").status_code == 200
        assert [path.name for path in tmp_path.iterdir()][0].startswith("mg_fast_web_")
        assert (next(tmp_path.iterdir()).stat().st_mode & 0o777) == 0o700
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(60) == 0, rest
    finally:
        process.kill()
    assert "stopping: 0 answers are running" in rest and "Traceback" not in rest
    assert list(tmp_path.iterdir()) == []


def test_a_port_that_is_taken(server):
    from mg_fast.web.server import WebServer
    from mg_fast.web.site import WebOptions

    port = server.options.port
    with pytest.raises(mg_fast.BackendError, match=f"--port {port}: cannot listen there: Address already in use"):
        WebServer(SpokenPipeline(), WebOptions(port=port), "/tmp/nowhere")


# ---- attacks


def raw(server, request: bytes, seconds: float = 20.0) -> bytes:
    """What the server answers to bytes that no library would send."""
    with socket.create_connection(("127.0.0.1", server.options.port), timeout=seconds) as connection:
        connection.sendall(request)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
        return b"".join(parts)


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: pictures.example\r\nConnection: close\r\n\r\n".encode()


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


def join(server, message):
    return httpx.post(f"{server.address}{API}/queue/join", json=message)


def test_a_question_that_names_a_file_of_the_server(server):
    config = httpx.get(f"{server.address}/config").json()
    [ask] = [one["id"] for one in config["dependencies"] if one["api_name"] == "ask"]
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
    head = f"POST {API}/upload HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=edge\r\n"
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
    client.predict("What does the sign say?", [picture(scenes["275"])], api_name="/ask")
    cookie = {"cookie": "mg_fast_browser=an-attacker-0123456789"}
    url = f"{server.address}{API}"
    key = client.session_hash
    assert httpx.get(f"{url}/queue/data?session_hash={key}", headers=cookie).status_code == 400
    assert httpx.get(f"{url}/heartbeat/{key}", headers=cookie).status_code == 400
    assert httpx.post(f"{url}/queue/join", headers=cookie, json={"session_hash": key}).status_code == 403
    names = [name for name, kept in server.site.store._kept.items() if kept.owner == key]
    assert names and all(httpx.get(f"{url}/file={name}", headers=cookie).status_code == 404 for name in names)


def test_another_page_cannot_use_this_one(server):
    for headers in ({"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}):
        for path in ("/config", f"{API}/info"):
            answer = httpx.get(server.address + path, headers=headers)
            assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
    preflight = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    assert httpx.options(f"{server.address}{API}/queue/join", headers=preflight).status_code == 403


def test_gradio_reports_nothing(server):
    import gradio

    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False" and Path(server.site.folder).is_dir()
    assert not any(name in os.environ for name in ("GRADIO_SHARE", "GRADIO_ALLOWED_PATHS"))
    assert gradio.utils.get_upload_folder() == os.environ["GRADIO_TEMP_DIR"]
