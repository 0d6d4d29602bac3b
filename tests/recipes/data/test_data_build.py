"""The whole recipe against a misbehaving server: what is asked, what becomes of it, and how a killed run goes on."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from mg_fast.drawing.prompts import find_prompts
from recipes.data import build
from recipes.data.__main__ import main
from recipes.data.checks import check_dialogue
from recipes.data.journal import Journal
from recipes.data.sources import read_captions
from tests.paths import ROOT
from tests.recipes.data import stub_endpoint as stub

NUMBERS = 12


@pytest.fixture
def server():
    with stub.StubEndpoint() as running:
        yield running


@pytest.fixture
def captions(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text("".join(f"A detailed caption about item-{i} and its surroundings.\n" for i in range(NUMBERS)))
    return path


@pytest.fixture
def dialogues(tmp_path):
    path = tmp_path / "dialogues.jsonl"
    rows = [
        {"conversations": ["Tell me about item-talk.", "It is large and green."]},
        {"conversations": ["What is in the image above, item-blind?", "A cat."]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def no_tokenizer(monkeypatch):
    """Counts words in the place of CLIP's tokens, because the tokenizer's package takes long to import."""
    monkeypatch.setattr(build, "clip_tokens", lambda text: len(text.split()) + 2)


def command(tmp_path, server, *more) -> list[str]:
    words = ["--out", str(tmp_path / "out"), "--captions", str(tmp_path / "captions.txt"), "--endpoint", server.address]
    return [*words, "--model", "stub", *map(str, more)]


def call(words) -> int:
    with pytest.raises(SystemExit) as ended:
        main(words)
    return ended.value.code


def results(tmp_path) -> dict[str, dict]:
    """The dialogues by the item that they are about."""
    found = json.loads((tmp_path / "out" / build.DIALOGUES).read_text())
    return {find_prompts(one["conversations"][-1]["value"])[0].split()[0]: one for one in found}


def check_sums(report: str, totals: tuple[int, int]) -> None:
    """The rows of the report's first table are the whole of what the files hold."""
    rows = [line for line in report.partition("|---|---|---|")[2].partition("\n\n")[0].splitlines() if line]
    figures = [[int(cell) for cell in row.split("|")[2:4]] for row in rows]
    assert "the sum" in rows[-1] and tuple(figures[-1]) == totals
    assert tuple(map(sum, zip(*figures[:-1]))) == totals


@pytest.mark.slow
def test_a_server_that_misbehaves(tmp_path, server, captions, dialogues):
    server.manners = {
        "item-0": [stub.BUSY, stub.BUSY_DATE],
        "item-1": [stub.BROKEN, stub.BROKEN],
        "item-2": [stub.GARBAGE],
        "item-3": [stub.SILENT],
        "item-4": [stub.DROPPED],
        "item-5": [stub.BAD_JSON],
        "item-6": [stub.REFUSAL, stub.REFUSAL_FIELD],
        "item-7": [stub.CUT, stub.FENCED],
        "item-8": [stub.BAD_JSON, stub.CUT],
        "item-9": [stub.NESTED],
        "item-10": [stub.FILTERED] * 2,
        "item-11": [stub.TRICKLE],
    }
    more = ["--dialogues", dialogues, "--timeout", 3, "--at-once", 4]
    assert call(command(tmp_path, server, *more)) == 0
    expected = {f"item-{i}" for i in range(NUMBERS)} - {"item-6", "item-8", "item-10"} | {"item-talk"}
    made = results(tmp_path)
    assert set(made) == expected
    for one in made.values():
        check_dialogue(one)
    assert [turn["value"] for turn in made["item-7"]["conversations"]][0] == "I would like to see item-7. <GEN>"
    assert made["item-talk"]["conversations"][1]["value"].startswith("It is large and green.\n<h>item-talk on a hill")
    asked = {"item-0": 3, "item-1": 3, "item-2": 2, "item-3": 2, "item-4": 2, "item-5": 2, "item-6": 2, "item-7": 2}
    asked |= {"item-8": 2, "item-9": 2, "item-10": 1, "item-11": 2}
    assert server.asked == {**dict.fromkeys(expected, 1), **asked}
    # A repeated request has the same key, and another try another one.
    assert len(set(server.keys["item-1"])) == 1 and len(set(server.keys["item-7"])) == 2
    [journal] = {key.partition("-")[0] for keys in server.keys.values() for key in keys}
    assert json.loads((tmp_path / "out" / build.JOURNAL).read_text().partition("\n")[0])["run"] == journal
    reasons = [json.loads(line) for line in (tmp_path / "out" / build.REJECTED).read_text().splitlines()]
    assert {row["reason"] for row in reasons} == {"picture talk", "refusal", "cut", "refused by the endpoint"}
    report = (tmp_path / "out" / build.REPORT).read_text()
    for line in (
        "| HTTP 429 | 2 |",
        "| HTTP 503 | 2 |",
        "| no answer in time | 2 |",
        "| an answer that is no chat completion | 2 |",
        "| bad JSON | 2 | 0 |",
        "| cut | 2 | 0 |",
        "| picture talk | 0 | 1 |",
        "| HTTP 400: filtered: item-10 | 1 | 0 |",
        "| **dialogues** | 9 | 1 |",
    ):
        assert line in report, line
    check_sums(report, (NUMBERS, 2))
    page = (tmp_path / "out" / build.SAMPLES).read_text()
    assert page.count("<article>") == 10 + 4 and "&lt;h&gt;item-talk" in page and "<h>" not in page
    # The same command asks nothing more, and writes the same dialogues.
    before, count = (tmp_path / "out" / build.DIALOGUES).read_bytes(), sum(server.asked.values())
    assert call(command(tmp_path, server, *more)) == 0
    assert sum(server.asked.values()) == count and (tmp_path / "out" / build.DIALOGUES).read_bytes() == before


def test_a_killed_run_asks_nothing_twice_that_was_answered(tmp_path, server, captions):
    server.hang_after = 5
    words = command(tmp_path, server, "--at-once", 3)
    process = subprocess.Popen([sys.executable, "-m", "recipes.data", *words], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        journal = tmp_path / "out" / build.JOURNAL
        # The first line has the settings.
        stub.wait_until(
            lambda: journal.is_file() and journal.read_bytes().count(b"\n") == 1 + 5 and len(server.hanging) == 3
        )
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    answered, hung = set(server.replied), set(server.hanging)
    assert len(answered) == 5 and not (tmp_path / "out" / build.DIALOGUES).exists()
    server.release()
    assert call(words) == 0
    assert len(results(tmp_path)) == NUMBERS
    assert all(server.asked[item] == 1 for item in answered)
    # What was on its way is asked again, with the key that the server may know.
    assert all(server.asked[item] == 2 and len(set(server.keys[item])) == 1 for item in hung)
    assert sum(server.asked.values()) == NUMBERS + len(hung)


def test_files_are_written_anew_without_asking(tmp_path, server, captions, capsys):
    without = ["--out", str(tmp_path / "out"), "--captions", str(captions)]
    assert call(without) == 1 and "no journal.jsonl yet" in capsys.readouterr().err
    assert call(command(tmp_path, server, "--most", 4)) == 0
    count = sum(server.asked.values())
    assert count == 4
    assert call(without) == 0
    assert sum(server.asked.values()) == count and len(results(tmp_path)) == 4
    report = (tmp_path / "out" / build.REPORT).read_text()
    assert "| no good answer yet, asked about by the next run | 8 | 0 |" in report
    check_sums(report, (NUMBERS, 0))
    assert "8 sources have no good answer yet: --endpoint or --local asks about them" in capsys.readouterr().out


def test_the_page_tells_what_became_of_the_recorded_replies(tmp_path):
    """The figures in the recipe's page are those that today's checks give for the replies of a small real model."""
    example, out = ROOT / "recipes" / "data" / "example", tmp_path / "out"
    out.mkdir()
    shutil.copy(example / build.JOURNAL, out)
    sources = ["--captions", example / "captions.txt", "--dialogues", example / "conversations.jsonl"]
    assert call(["--out", *map(str, [out, *sources])]) == 0
    report = (out / build.REPORT).read_text()
    replies = (out / build.JOURNAL).read_text().count("\n") - 1
    assert "| **dialogues** | 0 | 2 |" in report and "| not asked about, because of what it says | 0 | 1 |" in report
    check_sums(report, (10, 4))
    bad = report.partition("## Bad answers")[2]
    found = {row.split("|")[1].strip(): sum(map(int, row.split("|")[2:4])) for row in bad.splitlines()[4:]}
    assert found == {"cut": 13, "speech in the prompt": 5, "bad JSON": 3, "short prompt": 1, "picture talk": 1}
    page = " ".join((example.parent / "README.md").read_text(encoding="utf-8").split())
    assert f"Of {replies} replies, 2 passed the checks: 13 were cut at 400 tokens" in page
    assert "5 had speech in the place of a prompt, 3 were no JSON, 1 prompt was too short and 1 talked about p" in page


def test_repeated_sources_and_answers_are_left_out(tmp_path, server, captions):
    captions.write_text("A caption about item-1.\nA caption  about item-1.\nAnother caption of item-1, no less.\n")
    assert call(command(tmp_path, server)) == 0
    assert server.asked == {"item-1": 2} and len(results(tmp_path)) == 1
    report = (tmp_path / "out" / build.REPORT).read_text()
    assert "| says the same as an earlier one | 1 | 0 |" in report
    assert "| dialogue nearly the same as an earlier one | 1 | 0 |" in report
    check_sums(report, (3, 0))


def test_what_is_more_than_wanted_is_counted(tmp_path, server, captions):
    assert call(command(tmp_path, server, "--most", 2)) == 0
    report = (tmp_path / "out" / build.REPORT).read_text()
    assert f"| more than --most | {NUMBERS - 2} | 0 |" in report
    check_sums(report, (NUMBERS, 0))


def test_dialogues_of_earlier_files_are_not_dropped_silently(tmp_path, server, captions, dialogues, capsys):
    assert call(command(tmp_path, server, "--dialogues", dialogues)) == 0
    before = (tmp_path / "out" / build.DIALOGUES).read_bytes()
    without = ["--out", str(tmp_path / "out"), "--captions", str(captions)]
    for words in (without, command(tmp_path, server, "--most", 3)):
        assert call(words) == 1
        assert "answered before are not among" in capsys.readouterr().err
    assert (tmp_path / "out" / build.DIALOGUES).read_bytes() == before
    assert call([*without, "--fewer"]) == 0
    assert "not given this time: 1 sources" in (tmp_path / "out" / build.REPORT).read_text()
    assert "item-talk" not in results(tmp_path) and len(results(tmp_path)) == NUMBERS


def test_long_prompts_are_marked(tmp_path, server, captions):
    assert call(command(tmp_path, server, "--most", 2)) == 0
    planned = build.plan([read_captions(captions)])
    with Journal(tmp_path / "out" / build.JOURNAL) as journal:
        counts = build.write(tmp_path / "out", planned, journal, count_tokens=lambda prompt: 77 + ("item-1" in prompt))
    assert {item: (one["clip_tokens"], one["long"]) for item, one in results(tmp_path).items()} == {
        "item-0": (77, False),
        "item-1": (78, True),
    }
    assert counts.long == {"recaption": 1}


@pytest.mark.parametrize(
    "status, words",
    [
        (401, "HTTP 401: no such thing here"),
        (404, "HTTP 404"),
        (307, "HTTP 307, a redirection to http://elsewhere/v2"),
        (429, "HTTP 429: no such thing here"),
    ],
)
def test_a_wrong_key_or_model_ends_the_run_at_once(tmp_path, server, captions, capsys, status, words):
    # Without this name, the last one would be a server that is busy.
    server.status, server.code = status, "insufficient_quota"
    assert call(command(tmp_path, server, "--at-once", 2)) == 1
    assert words in capsys.readouterr().err and sum(server.asked.values()) <= 2


def test_a_request_that_the_server_will_not_take(tmp_path, server, captions, capsys):
    server.status = 400
    assert call(command(tmp_path, server, "--at-once", 1)) == 1
    error = capsys.readouterr().err
    assert f"{server.address}/chat/completions, model stub has answered nothing yet, and refused 5" in error
    assert "no such thing here" in error and sum(server.asked.values()) == 5
    assert "5 requests, 0 replies" in (tmp_path / "out" / build.REPORT).read_text()


def test_nobody_listens(tmp_path, captions, capsys, caplog):
    words = ["--out", str(tmp_path / "out"), "--captions", str(captions), "--endpoint", "http://127.0.0.1:9/v1"]
    assert call([*words, "--model", "m", "--attempts", "1"]) == 1
    error = capsys.readouterr().err
    assert (
        "http://127.0.0.1:9/v1/chat/completions, model m: 5 questions in a row" in error and "no replies yet" in error
    )
    assert "no connection (ConnectError)" in caplog.text
    report = (tmp_path / "out" / build.REPORT).read_text()
    assert "requests, 0 replies" in report and "| no connection (ConnectError) |" in report


def test_what_was_refused_is_asked_again_only_on_demand(tmp_path, server, captions):
    server.manners = {"item-5": [stub.FILTERED]}
    words = command(tmp_path, server, "--at-once", 1)
    assert call(words) == 0 and server.asked["item-5"] == 1
    report = (tmp_path / "out" / build.REPORT).read_text()
    assert "| HTTP 400: filtered: item-5 | 1 | 0 |" in report
    check_sums(report, (NUMBERS, 0))
    assert call(words) == 0 and server.asked["item-5"] == 1
    assert call([*words, "--refused-again"]) == 0 and server.asked["item-5"] == 2
    assert len(results(tmp_path)) == NUMBERS and len(set(server.keys["item-5"])) == 2


@pytest.mark.parametrize("name, what", [("httpx", "--endpoint"), ("tqdm", "the display of the progress")])
def test_a_package_that_is_missing(tmp_path, server, captions, capsys, monkeypatch, name, what):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "recipes.data.endpoint", raising=False)
    assert call(command(tmp_path, server)) == 1
    assert f"{what} needs the package {name}: pip install 'mg_fast[data]'" in capsys.readouterr().err


def test_a_key_that_cannot_be_sent(tmp_path, server, captions, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "schlüssel")
    assert call(command(tmp_path, server)) == 1
    error = capsys.readouterr().err
    assert "expected printable ASCII" in error and "schl" not in error and not server.asked


def test_a_second_interrupt_ends_the_run_with_its_report(tmp_path, server, captions, capsys):
    if threading.current_thread() is not threading.main_thread() or os.name != "posix":
        pytest.skip("loops take signals only in the main thread, and not on Windows")
    server.hang_after = 5

    def interrupt():
        stub.wait_until(lambda: len(server.hanging) == 3)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert call(command(tmp_path, server, "--at-once", 3)) == 130
    thread.join()
    assert len(results(tmp_path)) == 5
    assert "It was stopped before its end. 8 requests, 5 replies" in (tmp_path / "out" / build.REPORT).read_text()


def test_a_local_model_at_work_does_not_hold_up_the_end(tmp_path, captions, monkeypatch):
    """The process ends without waiting for its threads, once the journal and the other files are written."""

    class Deaf:
        where = "a model that takes long"

        async def __aenter__(self):
            return self

        async def __aexit__(self, *_):
            pass

        async def ask(self, messages, name):
            for seconds in (0.02, 0.05):
                asyncio.get_running_loop().call_later(seconds, os.kill, os.getpid(), signal.SIGINT)
            await asyncio.sleep(60)

    if threading.current_thread() is not threading.main_thread() or os.name != "posix":
        pytest.skip("loops take signals only in the main thread, and not on Windows")
    monkeypatch.setattr("recipes.data.__main__._asker", lambda args: Deaf())
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    words = ["--out", str(tmp_path / "out"), "--captions", str(captions), "--local", "m", "--at-once", "1"]
    assert call(words) == 130 and ended == [130]
    assert (tmp_path / "out" / build.REPORT).is_file()
    # The journal is closed, so another process can have it.
    with Journal(tmp_path / "out" / build.JOURNAL) as journal:
        assert not journal.replies


def test_what_is_sent(tmp_path, server, captions, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret")
    more = ["--most", 1, "--key-variable", "SOME_KEY", "--parameter", "max_tokens=null", "--parameter", 'stop=["#"]']
    assert call(command(tmp_path, server, *more)) == 0
    [body], [headers] = server.bodies, server.headers
    assert {name: body[name] for name in body if name != "messages"} == {
        "model": "stub",
        "temperature": 0.7,
        "stop": ["#"],
    }
    assert headers["Authorization"] == "Bearer secret"
    assert all(b"secret" not in path.read_bytes() for path in (tmp_path / "out").iterdir())


def test_another_model_needs_another_folder(tmp_path, server, captions, capsys):
    assert call(command(tmp_path, server, "--most", 1)) == 0
    assert call([*command(tmp_path, server), "--temperature", "0.1"]) == 1
    assert "another --out" in capsys.readouterr().err and sum(server.asked.values()) == 1
