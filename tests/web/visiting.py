"""The gate by itself, in front of an application that only says what reached it, and who visits it."""

import asyncio
import json

from mg_fast.web.gate import API, Gate
from mg_fast.web.hosts import KnownHosts
from mg_fast.web.limits import Limits
from mg_fast.web.uploading import UploadDesk
from mg_fast.web.visits import COOKIE
from tests.web.conversing import parts

ME, YOU = "browser-me-0123456789", "browser-you-0123456789"
SESSION = "session1"


class Answered:
    """What a request was answered with, and whether it reached the application."""

    def __init__(self, events, reached):
        self.status = events[0]["status"]
        self.headers = {name.decode(): value.decode() for name, value in events[0]["headers"]}
        self.body = b"".join(event.get("body", b"") for event in events[1:])
        self.reached = reached


class Site:
    """A gate with its parts, and an application that keeps what reached it."""

    def __init__(self, limits=None, **options):
        self.parts = parts(limits or Limits())
        self.reached = []
        desk = UploadDesk(self.parts.limits, self.parts.store, self.parts.metrics)
        options = {"hosts": KnownHosts(("pictures.example", "a")), **options}
        self.gate = Gate(self.app, self.parts.sessions, desk, self.parts.metrics, **options)

    async def app(self, scope, receive, send):
        body = b""
        while scope["method"] == "POST":
            event = await receive()
            body += event.get("body", b"")
            if not event.get("more_body"):
                break
        self.reached.append((scope, body))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/html")]})
        await send({"type": "http.response.body", "body": b"reached"})

    async def visit(
        self, method, path, body=b"", *, browser="", headers=(), more=(), query="", pieces=None, address=None
    ):
        given = {"host": "pictures.example", **dict(headers)}
        if browser:
            given["cookie"] = f"other=1; {COOKIE}={browser}"
        given = [*given.items(), *more]
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": query.encode(),
            "root_path": "",
            "scheme": "http",
            "client": None if address is None else (address, 1),
            "headers": [(name.encode(), value.encode()) for name, value in given],
        }
        waiting = [body] if pieces is None else pieces

        async def receive():
            if not waiting:
                await asyncio.sleep(3600)
            part = waiting.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(waiting) or pieces is not None}

        events, before = [], len(self.reached)

        async def send(event):
            events.append(event)

        await self.gate(scope, receive, send)
        return Answered(events, self.reached[before:])

    def ask(self, method, path, body=b"", **more):
        return asyncio.run(self.visit(method, path, body, **more))

    def join(self, message, browser=ME, **more):
        return self.ask("POST", f"{API}/queue/join", json.dumps(message).encode(), browser=browser, **more)
