"""Two data-parallel engines behind one server share its requests and answer as `Pipeline` does."""

import asyncio
import re
import time
import urllib.request

import pytest

import mg_fast
from bench.served import Server
from bench.serving_load import NEW_TOKENS, answer_all, asking_server, make_requests
from tests.serve.engine import needs_vllm

# The engines have a process each, so no other test of several processes runs beside this one.
pytestmark = [needs_vllm, pytest.mark.xdist_group("ranks")]

ENGINES = 2
OPTIONS = ("--data-parallel-size", str(ENGINES), "--enforce-eager", "--max-num-seqs", "8")
REQUESTS, CLIENTS = 16, 8


def answered_by_engine(url: str) -> dict[int, int]:
    """How many requests each of a server's engines has answered."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        text = answer.read().decode()
    found: dict[int, int] = {}
    for engine, count in re.findall(r'^vllm:request_success_total\{engine="(\d+)".*\} (\S+)$', text, re.MULTILINE):
        found[int(engine)] = found.get(int(engine), 0) + int(float(count))
    return found


def test_two_engines(one_thread):
    requests = make_requests("fresh", REQUESTS)
    questions = [{"text": request.question, "images": [request.picture]} for request in requests]
    nano = mg_fast.load("nano", dtype="float32")
    expected = [answer.text for answer in nano.chat_batch(questions, max_new_tokens=NEW_TOKENS)]

    async def ask(url: str) -> list[str]:
        import aiohttp

        async with aiohttp.ClientSession() as session:
            replies, _ = await answer_all(asking_server(session, url, "nano"), requests, CLIENTS)
        return [reply.text for reply in replies]

    with Server("nano", OPTIONS) as server:
        assert asyncio.run(ask(server.url)) == expected
        answered, deadline = answered_by_engine(server.url), time.monotonic() + 30
        # The server may give an answer away just before it counts it.
        while sum(answered.values()) < REQUESTS and time.monotonic() < deadline:
            time.sleep(0.2)
            answered = answered_by_engine(server.url)
    assert sorted(answered) == list(range(ENGINES)) and sum(answered.values()) == REQUESTS
    assert all(count > 0 for count in answered.values()), answered
