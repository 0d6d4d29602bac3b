"""`python -m bench load`: requests from several clients at once, to vLLM's server and to `Pipeline` one after another.

Each client sends its next request when the last one is answered. It needs an environment with vLLM. What is recorded is
what one machine did in one run: first `Pipeline`, then the server, then `Pipeline` again. The clients run on the same
machine, so they take part of its time in both.
"""

import asyncio
import base64
import io
import json
import random
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from . import records
from .errors import UnknownName
from .served import Server

RECORD = records.RESULTS / "serving-load.json"
# The models, and the numbers of clients that each is asked by.
MODELS = {"nano": (1, 4, 16, 64), "0.5b": (1, 4)}
QUESTION = "What does the sign say?"
# Different pictures for every request, or the same few.
PICTURES = {"fresh": None, "repeated": 4}
NEW_TOKENS = 16
# Blocks of keys and values of this size let short prompts find what is known; vLLM's default on a CPU is 128.
OPTIONS = ("--block-size", "32", "--enforce-eager")


@dataclass(frozen=True)
class LoadRequest:
    """A question about one picture, which is a JPEG file's content."""

    picture: bytes
    question: str = QUESTION


@dataclass(frozen=True)
class Reply:
    """An answer, and the seconds from its request to its first piece of text and to its end."""

    text: str
    first_s: float
    whole_s: float


@dataclass(frozen=True)
class LoadRow:
    """What one kind of serving did under one load.

    Args:
        server: `vllm`, or `pipeline`, which answers one request after another.
        pictures: `fresh` or `repeated`.
        requests: how many were answered.
        per_second: answers in a second.
        first_ms, whole_ms: milliseconds to the first text and to the end: the median, and the 99th percentile.
        halves: of `pipeline`, the answers in a second before and after the server's turn.
    """

    server: str
    pictures: str
    clients: int
    requests: int
    per_second: float
    first_ms: tuple[float, float]
    whole_ms: tuple[float, float]
    halves: tuple[float, ...] = ()


# Answers one request: returns the text, and the time (`time.perf_counter`) of its first piece.
Ask = Callable[[LoadRequest], Awaitable[tuple[str, float]]]


def numbered_picture(number: str, side: int = 384) -> bytes:
    """A JPEG file of a picture with a number on a plate; the same number gives the same picture."""
    rng = random.Random(number)
    picture = Image.new("RGB", (side, side), rng.choice([(240, 240, 238), (224, 202, 160), (60, 160, 165)]))
    canvas, font = ImageDraw.Draw(picture), ImageFont.load_default(side * 5 / 64)
    x, y = (rng.uniform(0.08, 0.6) * side for _ in range(2))
    _, _, right, bottom = canvas.textbbox((x, y), number, font=font)
    edge = side / 48
    canvas.rectangle((x - edge, y - edge, right + edge, bottom + edge), fill=(250, 250, 250))
    canvas.text((x, y), number, fill=(15, 15, 15), font=font)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=95)
    return file.getvalue()


def make_requests(pictures: str, number: int, *, first: int = 0, side: int = 384) -> list[LoadRequest]:
    """Requests about pictures of different numbers, `number` of them.

    Args:
        pictures: one of PICTURES.
        first: where the numbers begin, so that what is fresh stays fresh in a later turn.
    """
    different = PICTURES[pictures] or number
    made = [LoadRequest(numbered_picture(str(1000 + (7919 * (first + i)) % 9000), side)) for i in range(different)]
    return [made[i % different] for i in range(number)]


async def answer_all(ask: Ask, requests: Sequence[LoadRequest], clients: int) -> tuple[list[Reply], float]:
    """Answers requests from several clients at once; returns the replies in their order, and the seconds of all."""
    waiting, replies = deque(enumerate(requests)), {}

    async def client() -> None:
        while waiting:
            place, request = waiting.popleft()
            began = time.perf_counter()
            text, first = await ask(request)
            replies[place] = Reply(text, first - began, time.perf_counter() - began)

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - began
    return [replies[place] for place in range(len(requests))], seconds


def row(server: str, pictures: str, clients: int, replies: Sequence[Reply], seconds: float) -> LoadRow:
    first, whole = (_percentiles([getattr(reply, name) for reply in replies]) for name in ("first_s", "whole_s"))
    return LoadRow(server, pictures, clients, len(replies), round(len(replies) / seconds, 3), first, whole)


def _percentiles(seconds: Sequence[float]) -> tuple[float, float]:
    """The median and the 99th percentile in milliseconds; the latter is one of the values, the slowest of few."""
    ordered = sorted(seconds)
    last = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return round(1e3 * statistics.median(ordered), 1), round(1e3 * last, 1)


def asking_server(session, url: str, model: str) -> Ask:
    """What asks a server by OpenAI's protocol and reads the answer as a stream.

    Args:
        session: of aiohttp.
    """

    async def ask(request: LoadRequest) -> tuple[str, float]:
        data = "data:image/jpeg;base64," + base64.b64encode(request.picture).decode()
        content = [{"type": "image_url", "image_url": {"url": data}}, {"type": "text", "text": request.question}]
        body = {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "stream": True,
            "temperature": 0,
            "max_tokens": NEW_TOKENS,
        }
        text, first = "", None
        async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
            if answer.status != 200:
                raise RuntimeError(f"the server answered {answer.status}: {await answer.text()}")
            async for line in answer.content:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(f"the server ended an answer with {event['error']}")
                piece = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
                if piece and first is None:
                    first = time.perf_counter()
                text += piece
        return text.strip(), first or time.perf_counter()

    return ask


def asking_pipeline(pipeline) -> Ask:
    """What asks a pipeline for one answer after another, each in a conversation of its own."""
    turn = asyncio.Lock()

    def chat(request: LoadRequest) -> tuple[str, float]:
        conversation, text, first = pipeline.conversation(), "", None
        for piece in conversation.chat(request.question, [request.picture], max_new_tokens=NEW_TOKENS, stream=True):
            first = first or time.perf_counter()
            text += piece
        conversation.close()
        return text.strip(), first or time.perf_counter()

    async def ask(request: LoadRequest) -> tuple[str, float]:
        async with turn:
            return await asyncio.to_thread(chat, request)

    return ask


async def _measure(
    ask: Ask, server: str, loads: Sequence[tuple[str, int, list[LoadRequest]]]
) -> tuple[list[LoadRow], list[list[str]]]:
    """The rows of all loads, and their texts."""
    rows, texts = [], []
    # What is done at first use belongs to no row.
    await answer_all(ask, make_requests("fresh", 3, first=8000), 2)
    for pictures, clients, requests in loads:
        replies, seconds = await answer_all(ask, requests, clients)
        rows.append(row(server, pictures, clients, replies, seconds))
        texts.append([reply.text for reply in replies])
    return rows, texts


def measure(model: str, *, requests: int, threads: int, options: Sequence[str] = OPTIONS) -> dict:
    """The document of a model: its rows, and how many answers of the server were those of the pipeline.

    Args:
        model: one of MODELS.
        requests: of each load.
        threads: of the server's engine, and of the pipeline.
        options: of vLLM.

    Raises:
        UnknownName: there is no such model.
        NoServer: the server did not start.
    """
    if model not in MODELS:
        raise UnknownName(f"no model is called {model!r}: expected one of {', '.join(MODELS)}")
    from mg_fast.testing.environment import environment

    with tempfile.TemporaryDirectory(prefix="mg_fast_load_") as folder:
        path, side = _checkpoint(model, Path(folder)), 384 if model == "nano" else 1024
        loads, first = [], 0
        for pictures in PICTURES:
            for clients in MODELS[model]:
                number = max(requests, 2 * clients)
                loads.append((pictures, clients, make_requests(pictures, number, first=first, side=side)))
                first += number
        before, expected = _one_at_a_time(path, loads, threads)
        with Server(path, options, threads=threads) as server:
            rows, texts = asyncio.run(_through_server(server, loads))
        after, _ = _one_at_a_time(path, loads, threads)
    same = sum(mine == theirs for load in zip(texts, expected) for mine, theirs in zip(*load))
    return {
        **environment(),
        "vllm": _vllm_version(),
        "model": model,
        "threads": threads,
        "options": list(options),
        "answers": sum(map(len, texts)),
        "same_answers": same,
        "rows": [asdict(each) for each in [*map(joined, before, after), *rows]],
    }


def joined(before: LoadRow, after: LoadRow) -> LoadRow:
    """Two turns of the pipeline under one load as one row."""
    seconds = before.requests / before.per_second + after.requests / after.per_second
    first, whole = (
        tuple(round(statistics.mean(pair), 1) for pair in zip(getattr(before, name), getattr(after, name)))
        for name in ("first_ms", "whole_ms")
    )
    both, halves = before.requests + after.requests, (before.per_second, after.per_second)
    return LoadRow(before.server, before.pictures, before.clients, both, round(both / seconds, 3), first, whole, halves)


def _one_at_a_time(path: str, loads: Sequence, threads: int) -> tuple[list[LoadRow], list[list[str]]]:
    import torch

    import mg_fast

    torch.set_num_threads(threads)
    # Each turn loads the model again, so that no picture is known from the turn before.
    return asyncio.run(_measure(asking_pipeline(mg_fast.load(path, dtype="float32")), "pipeline", loads))


async def _through_server(server: Server, loads: Sequence) -> tuple[list[LoadRow], list[list[str]]]:
    import aiohttp

    # A client that waits for its turn holds its connection.
    connector, limit = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=limit, read_bufsize=2**20) as session:
        async with session.get(f"{server.url}/v1/models") as answer:
            name = (await answer.json())["data"][0]["id"]
        return await _measure(asking_server(session, server.url, name), "vllm", loads)


def _checkpoint(model: str, folder: Path) -> str:
    """The name or the folder of a model; one of random weights is made."""
    if model == "nano":
        return model
    from mg_fast.testing.random_checkpoints import build

    return str(build(folder / model, size=model))


def _vllm_version() -> str:
    from mg_fast.integrations.vllm_command import ServingEnvironment

    return ServingEnvironment.found().vllm
