"""The gate in front of the page: which requests pass, how large they may be, and what is answered before they do.

The page's library offers many more routes than this page needs. Some of them read files by their names, fetch URLs, or
write what users send to the disk. So only the routes that are named here are passed on, uploads and pictures are
answered from memory, and a message that names any other file is refused.
"""

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from urllib.parse import parse_qs, urlsplit

from .accounts import REALM, Accounts
from .limits import RequestRefused
from .sessions import BrowserSessions
from .store import names_in
from .uploading import UploadDesk

logger = logging.getLogger("mg_fast.web")

# ASGI: an application, what it receives with, and what it sends with.
Receive = Callable[[], Awaitable[dict]]
Send = Callable[[dict], Awaitable[None]]
App = Callable[[dict, Receive, Send], Awaitable[None]]

API = "/gradio_api"
FILE = f"{API}/file="
# What a page reads: itself, its scripts and fonts, and the description of its endpoints.
READ = re.compile(
    r"/|/config/?|/theme\.css|/robots\.txt|/favicon\.ico|/manifest\.json|/(?:assets|static)/[\w./@+-]+"
    rf"|{API}/(?:info/?|theme\.css|app_id/?)"
)
# Messages that are passed on after their session and the files that they name were looked at.
SAID = re.compile(rf"{API}/(?:queue/join|cancel|reset/?)")
HEARTBEAT = f"{API}/heartbeat/"
EVENTS = f"{API}/queue/data"
COOKIE = "mg_fast_browser"
# How the last message of a stream of events begins, and the seconds that a page has to read it.
LAST_EVENT, LAST_READ_S = b'data: {"msg":"close_stream"', 0.25
# Seconds for the next part of a request to come, and for the whole of it.
PART_S, WHOLE_S = 20.0, 120.0
# Seconds before a wrong password is answered, and how many such answers may be due at once.
WRONG_S, MOST_WRONG = 1.0, 20
_REQUEST_ID = re.compile(r"[0-9A-Za-z-]{8,64}")
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
    (b"x-frame-options", b"SAMEORIGIN"),
    # The page's library writes scripts and styles into its page, and makes functions of its components' templates, so
    # neither can be forbidden.
    (
        b"content-security-policy",
        b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
        b"img-src 'self' data: blob:; media-src 'self' blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
        b"worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'",
    ),
)


class MessageTooLarge(RequestRefused):
    """A request with more bytes than its route takes."""


class SlowSender(RequestRefused):
    """A request whose next part did not come in time."""


class Gate:
    """An ASGI application that passes some requests on to another one.

    Args:
        app: the application behind it.
        sessions: of the server.
        desk: takes uploads.
        metrics: of the server.
        accounts: who may come in; None lets everyone in.
        root_path: the path below which a proxy shows the page; empty where it has its own host.
        origins: further origins that the page may have, such as `https://pictures.example`.
    """

    def __init__(
        self,
        app: App,
        sessions: BrowserSessions,
        desk: UploadDesk,
        metrics,
        *,
        accounts: Accounts | None = None,
        root_path: str = "",
        origins: tuple[str, ...] = (),
    ):
        self.app, self.sessions, self.desk, self.metrics = app, sessions, desk, metrics
        self.accounts, self.root_path, self.origins = accounts, root_path, origins
        self.draining = False
        self._wrong = 0

    async def __call__(self, scope: dict, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            # Nothing here speaks WebSocket.
            await send({"type": "websocket.close", "code": 1000})
            return
        visit = Visit(scope, receive, send)
        began = time.monotonic()
        try:
            await self._serve(visit)
        except RequestRefused as refusal:
            if visit.status is None:
                status = {MessageTooLarge: 413, SlowSender: 408}.get(type(refusal), 400)
                await visit.refuse(status, str(refusal))
        finally:
            if not visit.path.startswith(("/assets/", "/static/")):
                milliseconds = 1e3 * (time.monotonic() - began)
                logger.info(
                    "request=%s %s %s status=%s ms=%.0f",
                    visit.request_id,
                    visit.method if visit.method.isalpha() else "?",
                    visit.route,
                    visit.status,
                    milliseconds,
                )

    async def _serve(self, visit: "Visit") -> None:
        path, method = visit.path, visit.method
        reading = method in ("GET", "HEAD")
        if path == "/healthz" and reading:
            await visit.answer(503 if self.draining else 200, b"stopping\n" if self.draining else b"ok\n")
            return
        if self.accounts is not None and not await self._is_known(visit):
            return
        if not self._same_origin(visit):
            await visit.refuse(403, "this page takes requests from itself only")
        elif path == "/metrics" and reading:
            await visit.answer(200, self.metrics.text(), self.metrics.content_type)
        elif reading and path.startswith(FILE):
            await self._picture(visit, path[len(FILE) :])
        elif reading and path.startswith(HEARTBEAT):
            await self._heartbeat(visit, path[len(HEARTBEAT) :].rstrip("/"))
        elif reading and path == EVENTS:
            await self._events(visit, visit.query("session_hash"))
        elif reading and READ.fullmatch(path) and ".." not in path:
            if path == "/" and not visit.browser:
                visit.set_cookie(secrets.token_urlsafe(24), self.root_path or "/")
            await self.app(visit.scope, visit.receive, visit.send)
        elif method == "POST" and path.rstrip("/") == f"{API}/upload":
            await self._upload(visit)
        elif method == "POST" and SAID.fullmatch(path):
            await self._message(visit)
        else:
            await visit.refuse(404, "there is nothing here")

    async def _is_known(self, visit: "Visit") -> bool:
        given = visit.header("authorization")
        if given and self.accounts.name_of(given) is not None:
            return True
        if given:
            if self._wrong >= MOST_WRONG:
                await visit.refuse(429, "too many wrong passwords: try again in a moment")
                return False
            self._wrong += 1
            try:
                await asyncio.sleep(WRONG_S)
            finally:
                self._wrong -= 1
        await visit.answer(401, b"a name and a password are needed\n", headers=[("www-authenticate", REALM)])
        return False

    def _same_origin(self, visit: "Visit") -> bool:
        """Whether a request comes from this page, as far as a browser says where it comes from."""
        if visit.header("sec-fetch-site") == "cross-site" and visit.path != "/":
            return False
        origin = visit.header("origin")
        if not origin or origin in self.origins:
            return True
        asked, host = urlsplit(origin).netloc, visit.header("host")
        # A proxy may leave the port out of the name of the host.
        return asked == host or (":" not in host and asked.rpartition(":")[0] == host)

    async def _picture(self, visit: "Visit", name: str) -> None:
        kept = self.sessions.store.get(name, visit.browser)
        if kept is None:
            await visit.refuse(404, "there is no such picture")
            return
        headers = [("cache-control", "private, max-age=3600"), ("content-disposition", "inline")]
        headers.append(("content-security-policy", "default-src 'none'; sandbox"))
        await visit.answer(200, kept.data, kept.media_type, headers=headers)

    async def _heartbeat(self, visit: "Visit", key: str) -> None:
        session = self.sessions.open(key, visit.browser)
        self.sessions.listen(session)
        try:
            await self.app(visit.scope, visit.receive, visit.send)
        finally:
            self.sessions.unlisten(session)

    async def _events(self, visit: "Visit", key: str) -> None:
        session = self.sessions.find(key, visit.browser)
        if session is None:
            await visit.refuse(404, "there is no such session")
            return

        async def send(event: dict) -> None:
            if event.get("body", b"").startswith(LAST_EVENT):
                session.stream_ended = time.monotonic()
            await visit.send(event)

        await self.app(visit.scope, visit.receive, send)

    async def _upload(self, visit: "Visit") -> None:
        if self.draining:
            await visit.refuse(503, "this server is about to stop")
            return
        visit.check_length(self.desk.limits.upload_bytes)
        names = await self.desk.take(visit.scope, visit.limited(self.desk.limits.upload_bytes), visit.browser)
        await visit.answer(200, json.dumps(names).encode(), "application/json")

    async def _message(self, visit: "Visit") -> None:
        """Passes a message on if its session is this browser's, and if it names no file but this browser's pictures."""
        most, send = self.desk.limits.message_bytes, visit.send
        visit.check_length(most)
        body = await visit.body(most)
        try:
            message = json.loads(body)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise RequestRefused("expected a JSON object")
        if visit.path == f"{API}/queue/join":
            if self.draining:
                await visit.refuse(503, "this server is about to stop: ask again in a minute")
                return
            try:
                session = self.sessions.open(message.get("session_hash"), visit.browser)
            except RequestRefused as refusal:
                await visit.refuse(503 if "places" in str(refusal) else 403, str(refusal))
                return
            if any(self.sessions.store.get(name, visit.browser) is None for name in names_in(message)):
                raise RequestRefused("a picture of this question is not here any more: add it again")

            async def send(event: dict) -> None:
                # Where one event closely follows another, the page may be told of its event before it has read that its
                # stream has ended. Then it would wait for the event on that stream for ever.
                await asyncio.sleep(max(0.0, session.stream_ended + LAST_READ_S - time.monotonic()))
                await visit.send(event)

        elif "session_hash" in message and self.sessions.find(str(message["session_hash"]), visit.browser) is None:
            raise RequestRefused("there is no such session")
        await self.app(visit.scope, replayed(body, visit.receive), send)


class Visit:
    """One HTTP request, and its answer.

    Attributes:
        scope: of ASGI, without headers that nobody behind the gate shall act upon, and with the request's id.
        receive, send: of ASGI; `send` adds the headers of the gate.
        path: of the request, decoded.
        browser: the browser's secret; empty where it has none.
        request_id: from a proxy, or new.
        status: of the answer; None before.
    """

    def __init__(self, scope: dict, receive: Receive, send: Send):
        self._given = {name.lower(): value for name, value in scope["headers"]}
        # The library behind allows other origins where it sees this header.
        headers = [
            (name, value) for name, value in scope["headers"] if name.lower() not in (b"origin", b"x-request-id")
        ]
        given = self.header("x-request-id")
        self.request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        self.scope = {**scope, "headers": [*headers, (b"x-request-id", self.request_id.encode())]}
        self.receive, self._send = receive, send
        root = scope.get("root_path", "")
        self.path, self.method = scope["path"].removeprefix(root) or "/", scope["method"]
        self.browser = browser_of(self.header("cookie"))
        self.status: int | None = None
        self._cookie: str | None = None

    @property
    def route(self) -> str:
        """The path as a log may show it: without names of pictures or sessions."""
        for known in (FILE, HEARTBEAT):
            if self.path.startswith(known):
                return known
        known = READ.fullmatch(self.path) or SAID.fullmatch(self.path)
        return self.path if known or self.path in (EVENTS, f"{API}/upload", "/healthz", "/metrics") else "other"

    def header(self, name: str) -> str:
        """A header of the request; empty where it has none of this name."""
        return self._given.get(name.encode(), b"").decode("latin-1")

    def query(self, name: str) -> str:
        """A value of the request's query; empty where it has none of this name."""
        return parse_qs(self.scope["query_string"].decode("latin-1")).get(name, [""])[0]

    def set_cookie(self, value: str, path: str) -> None:
        """Sends the browser its secret with the answer, for use below a path."""
        secure = "; Secure" if self.scope.get("scheme") == "https" else ""
        self._cookie = f"{COOKIE}={value}; Path={path}; HttpOnly; SameSite=Lax{secure}"

    async def send(self, event: dict) -> None:
        if event["type"] == "http.response.start":
            self.status = event["status"]
            own = {name.lower() for name, _ in event.get("headers", ())}
            headers = [*event.get("headers", ()), *(pair for pair in _HEADERS if pair[0] not in own)]
            headers.append((b"x-request-id", self.request_id.encode()))
            if self._cookie is not None:
                headers.append((b"set-cookie", self._cookie.encode()))
            event = {**event, "headers": headers}
        await self._send(event)

    async def answer(self, status: int, data: bytes, kind: str = "text/plain; charset=utf-8", headers=()) -> None:
        """Answers the request here."""
        told = [("content-type", kind), ("content-length", str(len(data))), *headers]
        encoded = [(name.encode(), value.encode()) for name, value in told]
        await self.send({"type": "http.response.start", "status": status, "headers": encoded})
        await self.send({"type": "http.response.body", "body": b"" if self.method == "HEAD" else data})

    async def refuse(self, status: int, reason: str) -> None:
        """Answers with an error, in the form that the page and its clients show to their users."""
        # What the client goes on sending is not read.
        headers = [("connection", "close")] if self.method == "POST" else []
        if self.path.startswith(f"{API}/upload"):
            # The page shows what it gets to an upload word by word.
            await self.answer(status, reason.encode(), headers=headers)
            return
        body = json.dumps({"detail": reason, "error": reason}).encode()
        await self.answer(status, body, "application/json", headers=headers)

    def check_length(self, most: int) -> None:
        """Raises MessageTooLarge where the request states more bytes than it may have."""
        stated = self.header("content-length")
        if stated and (not stated.isdigit() or int(stated) > most):
            raise MessageTooLarge(f"a request of this kind may have {most:,} bytes")

    def limited(self, most: int) -> Receive:
        """What receives the request's body, and raises where it is too large or comes too slowly."""
        came, ends = 0, time.monotonic() + WHOLE_S

        async def receive() -> dict:
            nonlocal came
            try:
                event = await asyncio.wait_for(self.receive(), min(PART_S, max(0.0, ends - time.monotonic())))
            except asyncio.TimeoutError:
                raise SlowSender("the request came too slowly") from None
            came += len(event.get("body", b""))
            if came > most:
                raise MessageTooLarge(f"a request of this kind may have {most:,} bytes")
            return event

        return receive

    async def body(self, most: int) -> bytes:
        """The whole body of the request."""
        receive, parts = self.limited(most), []
        while True:
            event = await receive()
            if event["type"] == "http.disconnect":
                raise RequestRefused("the connection was closed")
            parts.append(event.get("body", b""))
            if not event.get("more_body", False):
                return b"".join(parts)


def replayed(body: bytes, receive: Receive) -> Receive:
    """What receives a body that has been read already, and after it what comes from the connection."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> dict:
        return waiting.pop() if waiting else await receive()

    return again


def browser_of(header: str) -> str:
    """The browser's secret in a `Cookie` header; empty where there is none, or none of the right form."""
    for part in header.split(";"):
        name, _, value = part.strip().partition("=")
        if name == COOKIE and re.fullmatch(r"[0-9A-Za-z_-]{16,64}", value):
            return value
    return ""
