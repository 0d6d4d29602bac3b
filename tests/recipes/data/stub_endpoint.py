"""A server on this machine that speaks OpenAI's protocol for chats, and misbehaves where a test asks for it."""

import json
import re
import threading
import time
from collections import Counter, defaultdict
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

GOOD, CUT, REFUSAL, REFUSAL_FIELD, BAD_JSON, FENCED = "good", "cut", "refusal", "refusal field", "bad json", "fenced"
BUSY, BUSY_DATE, BROKEN, GARBAGE, SILENT, DROPPED, HANGING, TRICKLE, FILTERED, NESTED = (
    "429",
    "429 with a date",
    "503",
    "garbage",
    "silent",
    "dropped",
    "hanging",
    "trickle",
    "400",
    "nested",
)
# How long a server that never answers keeps its connections at most.
PATIENCE = 20.0


def wait_until(condition, seconds: float = 120.0) -> None:
    """Waits until the condition holds, and fails after some seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition never held"
        time.sleep(0.02)


class StubEndpoint:
    """The server. Sources are told apart by a word `item-N` in their text.

    Attributes:
        manners: for an item, what its requests meet one after the other; `good` from then on.
        asked: the number of requests for each item.
        keys: the idempotency keys of the requests for each item.
        headers, bodies: of every request, in order.
        status: if set, every request gets this status; 307 leads to another address.
        code: the name of the error that goes with the status.
        hang_after: if set, every request after so many good replies hangs until `release`.
    """

    def __init__(self):
        self.manners: dict[str, list[str]] = {}
        self.asked: Counter = Counter()
        self.keys: dict[str, list[str]] = defaultdict(list)
        self.headers, self.bodies, self.times = [], [], []
        self.status: int | None = None
        self.code: str | None = None
        self.hang_after: int | None = None
        self.hanging: set[str] = set()
        self.replied: list[str] = []
        self._released = threading.Event()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def release(self) -> None:
        """Lets the hanging requests end, and no later one hang."""
        self.hang_after = None
        self._released.set()

    def __enter__(self) -> "StubEndpoint":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._released.set()
        self._server.shutdown()
        self._server.server_close()

    def take(self, headers, body: dict) -> tuple[str, str]:
        """Counts a request, and returns its item with what it is to meet."""
        with self._lock:
            item = re.search(r"item-\w+", body["messages"][-1]["content"]).group()
            self.times.append(time.monotonic())
            self.headers.append(dict(headers))
            self.bodies.append(body)
            self.keys[item].append(headers.get("Idempotency-Key"))
            self.asked[item] += 1
            planned = self.manners.get(item)
            manner = planned.pop(0) if planned else GOOD
            if self.hang_after is not None and len(self.replied) >= self.hang_after:
                manner = HANGING
                self.hanging.add(item)
            elif manner == GOOD:
                self.replied.append(item)
            return item, manner

    @property
    def released(self) -> bool:
        return self._released.is_set()

    def wait(self, seconds: float = PATIENCE) -> None:
        """Waits until `release`."""
        self._released.wait(seconds)

    def _handler(stub):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                item, manner = stub.take(self.headers, body)
                if self.path != "/v1/chat/completions" or stub.status is not None:
                    status = stub.status if self.path == "/v1/chat/completions" else 404
                    error = {"message": "no such thing here", "code": stub.code}
                    return self.answer(status, {"error": error}, {"Location": "http://elsewhere/v2"})
                if manner in (BUSY, BUSY_DATE):
                    after = "0.2" if manner == BUSY else formatdate(time.time() + 1, usegmt=True)
                    return self.answer(429, {"error": {"message": "too fast"}}, {"Retry-After": after})
                if manner == BROKEN:
                    return self.answer(503, {"error": "overloaded"})
                if manner == FILTERED:
                    return self.answer(400, {"error": {"message": f"filtered: {item}"}})
                if manner == TRICKLE:
                    return self.trickle()
                if manner == NESTED:
                    return self.write(200, b"[" * 200_000, {})
                if manner == GARBAGE:
                    return self.write(200, b"<html>oops</html>", {})
                if manner == DROPPED:
                    self.close_connection = True
                    return self.connection.close()
                if manner in (SILENT, HANGING):
                    stub.wait()
                return self.answer(200, completion(item, manner))

            def trickle(self) -> None:
                """A byte now and then, until `release` or until nobody reads."""
                self.send_response(200)
                self.send_header("Content-Length", "1000000")
                self.end_headers()
                end = time.monotonic() + PATIENCE
                try:
                    while not stub.released and time.monotonic() < end:
                        self.wfile.write(b" ")
                        stub.wait(0.02)
                except OSError:
                    self.close_connection = True

            def answer(self, status: int, content: dict, headers: dict | None = None) -> None:
                self.write(status, json.dumps(content).encode(), headers or {})

            def write(self, status: int, content: bytes, headers: dict) -> None:
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:
                    # Who had asked is gone.
                    self.close_connection = True

            def log_message(self, *_):
                pass

        return Handler


def completion(item: str, manner: str) -> dict:
    """A chat completion about an item, good or bad."""
    fields = {
        "wish": f"I would like to see {item}.",
        "prompt": f"{item} on a hill, {item[::-1]}, tall grass around {item}, {item} under a pale sky, soft light",
    }
    good = json.dumps(fields)
    text = {
        CUT: good[:40],
        REFUSAL: "I'm sorry, but I cannot help with that.",
        REFUSAL_FIELD: None,
        BAD_JSON: '{"wish": "a boat", "prompt": ',
        FENCED: f"Here you are:\n```json\n{good}\n```\nDoes that help?",
    }.get(manner, good)
    message = {"role": "assistant", "content": text}
    if manner == REFUSAL_FIELD:
        message["refusal"] = "I can't help with that."
    finish = "length" if manner == CUT else "stop"
    usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
    return {
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": usage,
    }
