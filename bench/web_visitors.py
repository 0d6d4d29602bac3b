"""Visitors of the web page: each has a session of its own, sends its own picture, and asks about it again and again.

They speak the protocol of the page's endpoints directly, because a client library would take a thread for each of them.
"""

import asyncio
import json
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from .serving_load import QUESTION, numbered_picture

API = "/gradio_api"
# Questions after which a visitor leaves and another one comes in its place.
STAYS_FOR = 6
# Seconds that an answer may take in a line of fifty on a small machine.
PATIENCE_S = 120.0


@dataclass(frozen=True)
class WebReply:
    """An answer that a visitor got.

    Attributes:
        number: the number in the visitor's picture.
        text: the answer.
        first_s, whole_s: seconds from the question to the first text and to the end.
        wait_s: seconds in the line, as the server says.
    """

    number: str
    text: str
    first_s: float
    whole_s: float
    wait_s: float


@dataclass
class VisitLog:
    """What all visitors together met.

    Attributes:
        replies: all answers.
        errors: what went wrong, in words.
        visits: sessions that were begun.
    """

    replies: list[WebReply] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    visits: int = 0


def different_numbers(count: int) -> list[str]:
    """Numbers of four digits, each another one and none of them a part of another."""
    return [str(number) for number in random.Random(50).sample(range(1000, 10_000), count)]


async def visit_all(url: str, numbers: list[str], seconds: float) -> VisitLog:
    """Lets as many visitors as there are numbers ask for some time, all at once.

    Args:
        url: of the page.
        numbers: each visitor's own number.
        seconds: after this time no further question is asked.
    """
    import httpx

    log, ends = VisitLog(), time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, limits=limits) as client:
        config = (await client.get("/config")).json()
        ask = next(one["id"] for one in config["dependencies"] if one["api_name"] == "ask")

        async def visitor(number: str) -> None:
            while time.monotonic() < ends:
                try:
                    await _visit(client, ask, number, ends, log)
                except Exception as error:  # Whatever goes wrong is counted, and the other visitors go on.
                    log.errors.append(f"{type(error).__name__}: {error}"[:200])
                    await asyncio.sleep(1)

        await asyncio.gather(*map(visitor, numbers))
    return log


async def _visit(client, ask: int, number: str, ends: float, log: VisitLog) -> None:
    """One session: a picture, some questions about it, and a leave-taking."""
    key = f"visitor{random.getrandbits(64):016x}"
    log.visits += 1
    heart = asyncio.create_task(_beat(client, key))
    try:
        files = {"files": (f"{number}.jpg", numbered_picture(number), "image/jpeg")}
        [name] = _checked(await client.post(f"{API}/upload", files=files)).json()
        pictures = [{"path": name, "meta": {"_type": "gradio.FileData"}}]
        for _ in range(STAYS_FOR):
            if time.monotonic() > ends:
                return
            log.replies.append(await _ask(client, ask, key, number, pictures))
            pictures = []
    finally:
        heart.cancel()


async def _beat(client, key: str) -> None:
    """The connection by which the server knows that a visitor is there."""
    async with client.stream("GET", f"{API}/heartbeat/{key}", timeout=None) as stream:
        async for _ in stream.aiter_bytes():
            pass


async def _ask(client, ask: int, key: str, number: str, pictures: list) -> WebReply:
    began, first = time.perf_counter(), None
    data = [QUESTION, pictures, False, False, False, 0.0, None, 16, None]
    joined = await client.post(f"{API}/queue/join", json={"session_hash": key, "fn_index": ask, "data": data})
    event = _checked(joined).json()["event_id"]
    answer: dict = {}
    async with client.stream("GET", f"{API}/queue/data", params={"session_hash": key}) as stream:
        async for line in stream.aiter_lines():
            message = json.loads(line[6:]) if line.startswith("data: ") else {}
            if message.get("event_id") not in (None, event):
                raise RuntimeError("a message for another question came")
            output = message.get("output") or {}
            if message.get("msg") == "process_generating":
                first = first or _first(output)
            elif message.get("msg") == "process_completed":
                if not message.get("success"):
                    raise RuntimeError(f"refused: {output.get('error')}")
                answer = output["data"][0]
                break
    took = time.perf_counter() - began
    return WebReply(number, answer["text"], (first or time.perf_counter()) - began, took, answer["wait_s"])


def _first(output: Mapping) -> float | None:
    """The time now, if the answer has begun. The first piece is whole, and each later one says what has changed."""
    return time.perf_counter() if '"answering"' in json.dumps(output.get("data", "")) else None


def _checked(answer):
    if answer.status_code != 200:
        raise RuntimeError(f"the server answered {answer.status_code}: {answer.text[:120]}")
    return answer
