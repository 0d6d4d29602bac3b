"""The whole server with nano over HTTP: programs drive it by gradio_client, and operators look at it."""

import json
import os
import re
import signal
import subprocess
import sys
import threading

import httpx
import pytest
from PIL import Image

import mg_fast
from mg_fast.web.examples import EXAMPLES
from mg_fast.web.limits import Limits
from tests.paths import ROOT
from tests.web.conversing import HeldWords, SpokenPipeline
from tests.web.serving import API, another_client, files_in, metrics, running, sent, until

pytestmark = pytest.mark.slow
pytest.importorskip("gradio", reason="gradio is not installed: `make test` installs it")

# ---- programs


def test_the_endpoints_have_their_documented_names(client):
    named = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(named) == {"/ask", "/clear", "/explain", "/limits"}
    parameters = [parameter["parameter_name"] for parameter in named["/ask"]["parameters"]]
    assert parameters == ["text", "pictures", "draw", "ocr", "measure", "temperature", "top_p", "tokens", "seed"]
    documented = (ROOT / "docs" / "web.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in documented for name in (*named, *parameters))


def test_a_program_asks_and_reads_the_answer_in_pieces(client, scenes):
    job = client.submit("What does the sign say?", [sent(scenes["4083"])], measure=True, api_name="/ask")
    answer = job.result(timeout=120)
    assert answer["text"] == "The number is 4083." and answer["state"] == "done" and answer["finish"] == "stop"
    assert answer["prompt_tokens"] > 36 and answer["new_tokens"] > 3 and answer["no_picture"] is None
    assert {"preprocess", "LR tower", "HR tower", "decode"} < set(answer["stages"])
    pieces = [piece["text"] for piece in job.outputs()]
    assert len(pieces) >= 2 and all(pieces[-1].startswith(piece) for piece in pieces)
    # The conversation goes on, and remembers.
    again = client.predict("How many circles are there?", api_name="/ask")
    assert again["cached_tokens"] > 36 and "circle" in again["text"]


def test_nothing_of_a_session_is_found_by_others_or_after_its_end(server, scenes, tmp_path):
    pipeline, store = server.site.pipeline, server.site.pipeline.decoder.prefixes
    clients = [another_client(server, tmp_path) for _ in range(2)]
    for client in clients:
        # The same question about the same picture: nothing was known before.
        answer = client.predict("What does the sign say?", [sent(scenes["61"])], measure=True, api_name="/ask")
        assert answer["cached_tokens"] == 0 and answer["stages"]["HR tower"] > 0
    held, seen = store.held_bytes, pipeline.vision.cache.held_bytes
    clients[0].predict(api_name="/clear")
    assert store.held_bytes < held and pipeline.vision.cache.held_bytes < seen
    held, seen = store.held_bytes, pipeline.vision.cache.held_bytes
    clients[1].close()
    until(lambda: store.held_bytes < held and pipeline.vision.cache.held_bytes < seen)
    clients[0].close()


@pytest.mark.parametrize(
    "example, right",
    zip(
        EXAMPLES,
        (
            "The number is 4083.",
            "The blue circle is at the bottom right.",
            "A red circle on a white background, with a number.",
            "<h>a blue circle, a red star on a white background, simple shapes, flat colours</h>",
        ),
        strict=True,
    ),
)
def test_the_examples_are_answered_rightly(server, example, right):
    conversation = server.site.pipeline.conversation()
    scene = [] if example.scene is None else [example.scene.file()[0]]
    answer = conversation.chat(example.text, scene, draw={"steps": 1} if example.draw else None)
    assert answer.text == right and len(answer.images) == example.draw


def test_each_client_has_its_own_conversation(server, client, scenes, tmp_path):
    other = another_client(server, tmp_path)
    for one, number in ((client, "275"), (other, "61")):
        one.predict("What does the sign say?", [sent(scenes[number])], api_name="/ask")
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


def test_a_program_draws(client, scenes, broken_painter):
    answer = client.predict("Draw a red star on a white background.", draw=True, seed=1, api_name="/ask")
    [drawn], [prompt] = answer["drawn"], answer["prompts"]
    picture = Image.open(drawn if isinstance(drawn, str) else drawn["path"]).convert("RGB")
    assert picture.size == (128, 128) and prompt.startswith("a red star on a white background")
    red = sum(r > 150 and g < 90 and b < 90 for r, g, b in picture.getdata())
    white = sum(min(pixel) > 200 for pixel in picture.getdata())
    assert 100 < red < 4000 and white > 10_000 and answer["no_picture"] is None
    broken_painter()
    none = client.predict("Draw this again.", draw=True, api_name="/ask")
    assert none["drawn"] == [] and none["no_picture"] == "drawing failed: the paint is empty"


def test_a_program_sees_what_the_model_looked_at(client, scenes):
    client.predict("What does the sign say?", [sent(scenes["275"])], api_name="/ask")
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
        (("x", [sent(scenes["61"])] * 5), "may have 4 pictures"),
    ):
        with pytest.raises(Exception, match=message):
            client.predict(*arguments, api_name="/ask")
    with pytest.raises(Exception, match="no picture has been asked about"):
        client.predict(1, api_name="/explain")
    bad = tmp_path / "a.png"
    bad.write_bytes(b"<svg xmlns='http://www.w3.org/2000/svg'/>")
    with pytest.raises(httpx.HTTPStatusError, match="400"):
        client.predict("x", [sent(bad)], api_name="/ask")
    assert client.predict("What is this?", api_name="/ask")["state"] == "done"


def test_a_session_that_is_left_is_freed(server, scenes, tmp_path):
    client = another_client(server, tmp_path)
    client.predict("What does the sign say?", [sent(scenes["61"])], api_name="/ask")
    until(lambda: server.site.store.held_bytes > 0)
    key, browser = client.session_hash, client.cookies["mg_fast_browser"]
    assert server.site.sessions.find(key, browser) is not None
    client.close()
    until(lambda: server.site.sessions.find(key, browser) is None)
    until(lambda: not any(kept.owner == key for kept in server.site.store._kept.values()))


def test_nothing_is_written_to_the_disk(scenes, tmp_path):
    held = HeldWords()
    with running(SpokenPipeline(held)) as server:
        client = another_client(server, tmp_path)
        job = client.submit("What does the sign say?", [sent(scenes["275"])], api_name="/ask")
        until(held.reached.is_set)
        # The picture and the question are there, and the answer is being made.
        assert server.site.store.held_bytes > 0 and files_in(server.site.folder) == []
        held.let()
        job.result(timeout=60)
        assert files_in(server.site.folder) == []
        client.close()


def test_pictures_and_numbers_of_another_form_are_refused(client, scenes):
    for pictures in (["photo.jpg"], "http://x/y.png", [1], [{"url": "http://x/y.png"}]):
        with pytest.raises(Exception, match="pictures: expected a list of files"):
            client.predict("What is this?", pictures, api_name="/ask")
    client.predict("What does the sign say?", [sent(scenes["275"])], api_name="/ask")
    for number in ("a", None, [1], 1.5, True):
        with pytest.raises(Exception, match="picture: expected a whole number from 1 on"):
            client.predict(number, api_name="/explain")


def test_an_ended_conversation_is_told_once(tmp_path):
    with running(SpokenPipeline()) as server:
        client = another_client(server, tmp_path)
        client.predict("hello", api_name="/ask")
        sessions = server.site.sessions
        session = sessions.find(client.session_hash, client.cookies["mg_fast_browser"])
        until(lambda: sessions.listeners(session) > 0)
        sessions.limits = Limits(idle_minutes=1)
        session.seen -= 61
        until(lambda: session.closed)
        with pytest.raises(Exception, match="this conversation has ended"):
            client.predict("And?", api_name="/ask")
        assert client.predict("And?", api_name="/ask")["text"] == "You said And?"
        client.close()


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
    with running(SpokenPipeline(), root_path="/pictures", hosts=("company.example",)) as server:
        assert httpx.get(server.address, headers={"host": "evil.example"}).status_code == 403
        page = httpx.get(server.address, headers={"host": "company.example"})
        config = json.loads(re.search(r"window.gradio_config = (.*?);</script>", page.text)[1])
        assert config["root"].endswith("/pictures") and "Path=/pictures" in page.headers["set-cookie"]


def test_names_and_passwords(tmp_path):
    from mg_fast.web.accounts import Accounts

    with running(SpokenPipeline(), accounts=Accounts({"ann": "right"})) as server:
        for path in ("/", "/config", "/metrics", f"{API}/heartbeat/session1", f"{API}/info"):
            assert httpx.get(server.address + path).status_code == 401
        assert httpx.get(f"{server.address}/healthz").status_code == 200
        client = another_client(server, tmp_path, headers={"Authorization": "Basic YW5uOnJpZ2h0"})
        assert client.predict("hello", api_name="/ask")["text"] == "You said hello"
        client.close()


def test_a_stop_lets_the_running_answer_end(tmp_path):
    held = HeldWords()
    with running(SpokenPipeline(held)) as server:
        client = another_client(server, tmp_path)
        waits = another_client(server, tmp_path)
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


# What users write here must not be found in what the command prints.
SECRET, SECRET_NUMBER = "a question that nobody may read", 73519264


def ask_wrongly(address):
    """Sends questions that do not fit the page, and some that fail within the page's library; returns the statuses."""
    config = httpx.get(f"{address}/config").json()
    [ask] = [one["id"] for one in config["dependencies"] if one["api_name"] == "ask"]
    [look] = [one["id"] for one in config["dependencies"] if one["api_name"] == "look"]
    [box] = [one["id"] for one in config["dependencies"] if one["api_name"] == "ask_1"]
    statuses = []
    for number, data in (
        (ask, [SECRET, None]),
        (ask, [SECRET] * 10),
        (box, [{"text": [SECRET]}, False, False, False, 0, 1, 16, ""]),
        (box, [SECRET, False, False, False, SECRET, 1, 16, ""]),
        (look, [SECRET, 0.5, True]),
        (look, [1, SECRET_NUMBER, True]),
        (999, [SECRET]),
        (SECRET, []),
        # Pictures are numbered from 1 on, and there are none. Only the library knows that.
        (look, [SECRET_NUMBER, 0.5, True]),
    ):
        key = f"wrong-{len(statuses)}"
        message = {"session_hash": key, "fn_index": number, "data": data}
        statuses.append(httpx.post(f"{address}{API}/queue/join", json=message).status_code)
        if statuses[-1] == 200:
            with httpx.stream("GET", f"{address}{API}/queue/data?session_hash={key}", timeout=30) as stream:
                assert any('"success":false' in line for line in stream.iter_lines())
    return statuses


def test_the_command_ends_at_sigterm_and_prints_nothing_that_users_wrote(tmp_path):
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
        assert ask_wrongly(address) == [400] * 8 + [200]
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(60) == 0, rest
    finally:
        process.kill()
    assert "stopping: 0 answers are running" in rest and "Traceback" not in rest
    assert "a fault in the page's library: Error at" in rest
    assert SECRET not in rest and str(SECRET_NUMBER) not in rest
    assert list(tmp_path.iterdir()) == []


def test_a_port_that_is_taken(server):
    from mg_fast.web.server import WebServer
    from mg_fast.web.site import WebOptions

    port = server.options.port
    with pytest.raises(mg_fast.BackendError, match=f"--port {port}: cannot listen there: Address already in use"):
        WebServer(SpokenPipeline(), WebOptions(port=port), "/tmp/nowhere")
