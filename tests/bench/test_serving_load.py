"""The load of a server: clients, streams, percentiles and the table. The server itself runs in tests/serve."""

import asyncio
import contextlib
import dataclasses
import json
import time

import pytest
from PIL import Image

import mg_fast
from bench import load_table, serving_load
from bench.__main__ import main
from bench.errors import UnknownName
from bench.serving_load import LoadRow, answer_all, asking_pipeline, asking_server, make_requests, row


def test_requests():
    fresh, repeated = make_requests("fresh", 9, first=5), make_requests("repeated", 9)
    assert len({request.picture for request in fresh}) == 9 and len({request.picture for request in repeated}) == 4
    # A later turn goes on where the earlier one ended.
    assert make_requests("fresh", 4, first=10) == fresh[5:]
    assert [request.picture for request in repeated[:4]] == [request.picture for request in repeated[4:8]]


def test_as_many_clients_as_asked_for_wait_at_once():
    """Each client sends its next request when the last one is answered, and replies keep the order of requests."""
    asked, most = 0, 0

    async def ask(request):
        nonlocal asked, most
        asked += 1
        most = max(most, asked)
        await asyncio.sleep(0.001 * (7 - int(request)))
        asked -= 1
        return request, time.perf_counter()

    for clients in (1, 3, 16):
        most = 0
        replies, seconds = asyncio.run(answer_all(ask, [str(i) for i in range(7)], clients))
        assert most == min(clients, 7) and [reply.text for reply in replies] == [str(i) for i in range(7)]
        assert all(0.001 * (7 - i) <= reply.first_s <= reply.whole_s <= seconds for i, reply in enumerate(replies))


def test_percentiles():
    replies = [serving_load.Reply("", i / 1000, i / 100) for i in range(1, 101)]
    found = row("vllm", "fresh", 4, replies, 20.0)
    assert (found.per_second, found.first_ms, found.whole_ms) == (5.0, (50.5, 100.0), (505.0, 1000.0))
    assert row("vllm", "fresh", 4, replies[:3], 1.0).first_ms == (2.0, 3.0)


# ---- what asks


class FakeAnswer:
    def __init__(self, status, lines):
        self.status, self.lines = status, lines

    @property
    def content(self):
        return one_after_another(self.lines)

    async def text(self):
        return "no picture"


async def one_after_another(lines):
    for line in lines:
        await asyncio.sleep(0.01)
        yield line


class FakeSession:
    """A session of aiohttp that answers every request with the same lines, and keeps what was asked."""

    def __init__(self, lines, status=200):
        self.answer, self.asked = FakeAnswer(status, lines), []

    @contextlib.asynccontextmanager
    async def post(self, url, json):
        self.asked.append((url, json))
        yield self.answer


def event(text):
    return f"data: {json.dumps({'choices': [{'delta': {'content': text}}]})}\n".encode()


def test_a_stream_is_read():
    first, last = {"choices": [{"delta": {"role": "assistant", "content": ""}}]}, b"data: [DONE]\n"
    lines = [f"data: {json.dumps(first)}\n".encode(), b"\n", event(" The"), event(" number."), event(""), last]
    session = FakeSession(lines)
    [request] = make_requests("fresh", 1)
    began = time.perf_counter()
    text, came = asyncio.run(asking_server(session, "http://here", "nano")(request))
    # The first text comes with the third line of six.
    assert text == "The number." and 0.03 <= came - began <= time.perf_counter() - began - 0.02
    [(url, body)] = session.asked
    assert url == "http://here/v1/chat/completions" and body["stream"] and body["model"] == "nano"
    assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/jpeg;base64,")


@pytest.mark.parametrize(
    "session, message",
    [
        (FakeSession([], status=400), "the server answered 400: no picture"),
        (FakeSession([b'data: {"error": {"message": "gone"}}\n']), "the server ended an answer with .*gone"),
    ],
)
def test_a_refusal_ends_the_measurement(session, message):
    with pytest.raises(RuntimeError, match=message):
        asyncio.run(asking_server(session, "http://here", "nano")(make_requests("fresh", 1)[0]))


@pytest.mark.slow
def test_a_pipeline_answers_one_after_another(one_thread, tmp_path):
    pipeline = mg_fast.load("nano")
    requests = make_requests("fresh", 4)
    replies, seconds = asyncio.run(answer_all(asking_pipeline(pipeline), requests, 4))
    for i, (request, reply) in enumerate(zip(requests, replies)):
        (tmp_path / f"{i}.jpg").write_bytes(request.picture)
        answer = pipeline.conversation().chat(request.question, [tmp_path / f"{i}.jpg"], max_new_tokens=16)
        assert reply.text == answer.text
        assert Image.open(tmp_path / f"{i}.jpg").size == (384, 384)
    # Each waits for the ones before it: the last one began its answer when the others were done.
    assert max(reply.first_s for reply in replies) > 0.5 * seconds


def test_there_is_no_such_model(capsys):
    with pytest.raises(UnknownName, match="no model is called '7b': expected one of nano, 0.5b"):
        serving_load.measure("7b", requests=1, threads=1)
    assert main(["load", "7b"]) == 2 and "bench: no model is called '7b'" in capsys.readouterr().err


# ---- the table


def made(server, per_second, halves=()):
    row = LoadRow(server, "fresh", 4, 200, per_second, (50.0, 1234.5), (60.0, 2000.0), halves)
    return dataclasses.asdict(row)


@pytest.fixture
def document():
    conditions = {"cpu": "a CPU", "vllm": "0.32.0", "torch": "2.13.0", "date": "2026-01-01", "commit": "abc", "load": 1}
    conditions |= {"model": "nano", "threads": 1, "options": ["--enforce-eager"], "answers": 200, "same_answers": 199}
    return conditions | {"rows": [made("pipeline", 4.0, (3.9, 4.1)), made("vllm", 10.0)]}


def test_table(document):
    lines = load_table.table({"nano": document}).splitlines()
    assert lines[2] == "| nano, fresh, 4 | 4.00 | 50 / 1,234 ms | 10.00 (2.5 times) | 50 / 1,234 ms |"
    assert "199 of 200 answers of vLLM were those of `Pipeline`" in " ".join(" ".join(lines).split())
    document["rows"][0]["halves"] = (3.0, 5.0)
    assert "unsteady: the two turns differ by 40%" in load_table.table({"nano": document})


def test_two_turns_become_one_row():
    before, after = (LoadRow("pipeline", "fresh", 1, 10, rate, (rate, 8.0), (8.0, 9.0)) for rate in (2.0, 6.0))
    # Ten answers took 5 s, and the next ten took 10/6 s.
    expected = LoadRow("pipeline", "fresh", 1, 20, 3.0, (4.0, 8.0), (8.0, 9.0), (2.0, 6.0))
    assert serving_load.joined(before, after) == expected


def test_recorded(document, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(serving_load, "RECORD", tmp_path / "load.json")
    assert load_table.load_of_serving({}) == "Not measured yet: `python -m bench load --save` measures it."
    asked = []
    monkeypatch.setattr(
        serving_load, "measure", lambda model, **options: asked.append((model, options)) or {**document, "model": model}
    )
    assert main(["load", "nano"]) == 0 and not serving_load.RECORD.exists()
    assert main(["load", "nano", "--save"]) == 0 and main(["load", "0.5b", "--save", "--requests", "3"]) == 0
    # What is recorded of another model stays.
    assert load_table.recorded().keys() == {"nano", "0.5b"}
    assert asked[1:] == [("nano", {"requests": 200, "threads": 1}), ("0.5b", {"requests": 3, "threads": 2})]
