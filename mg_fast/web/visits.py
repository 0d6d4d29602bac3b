"""One request to the gate: what it says, how much of it is read, and how it is answered."""

import asyncio
import json
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from urllib.parse import parse_qsl, urlencode

from .limits import RequestRefused

# ASGI: what an application receives with, and what it sends with.
Receive = Callable[[], Awaitable[dict]]
Send = Callable[[dict], Awaitable[None]]

COOKIE = "mg_fast_browser"
# Seconds for the next part of a request to come, and for the whole of it.
PART_S, WHOLE_S = 20.0, 120.0
# After so many seconds a request has to have come with so many bytes a second, from its beginning on.
BEGIN_S, LEAST_BYTES_PER_S = 10.0, 8192
# Bytes of an answer that are handed on at once; the next ones follow when the client has read most of them.
PIECE = 64 * 1024
# Two readers of a request may take different ones of several headers of one name.
_ONCE = (
    *("host", "origin", "cookie", "authorization", "content-length", "content-type", "transfer-encoding"),
    *("sec-fetch-site", "x-request-id"),
)
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


class Visit:
    """One HTTP request, and its answer.

    Attributes:
        scope: of ASGI, without a query and without headers that nobody behind the gate shall act upon, and with the
            request's id.
        receive, send: of ASGI; `send` adds the headers of the gate.
        path: of the request, decoded.
        browser: the browser's secret; empty where it has none.
        address: the client's; empty where it is not known.
        request_id: from a proxy, or new.
        status: of the answer; None before.
    """

    def __init__(self, scope: dict, receive: Receive, send: Send):
        self._given = {name.lower(): value for name, value in scope["headers"]}
        self._names = [name.lower() for name, _ in scope["headers"]]
        # The library behind allows other origins where it sees `Origin`.
        headers = [
            (name, value) for name, value in scope["headers"] if name.lower() not in (b"origin", b"x-request-id")
        ]
        given = self.header("x-request-id")
        self.request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        self.scope = {
            **scope,
            "headers": [*headers, (b"x-request-id", self.request_id.encode())],
            # What has not been looked at is not passed on: the library behind might read it otherwise.
            "query_string": b"",
        }
        self._query = scope["query_string"].decode("latin-1")
        self.receive, self._send = receive, send
        root = scope.get("root_path", "")
        self.path, self.method = scope["path"].removeprefix(root) or "/", scope["method"]
        self.browser = browser_of(self.header("cookie"))
        self.address = (scope.get("client") or ("",))[0]
        self.status: int | None = None
        self._cookie: str | None = None

    def header(self, name: str) -> str:
        """A header of the request; empty where it has none of this name."""
        return self._given.get(name.encode(), b"").decode("latin-1")

    def check_headers(self) -> None:
        """Raises RequestRefused where a header that decides something stands there more than once."""
        for name in _ONCE:
            if self._names.count(name.encode()) > 1:
                raise RequestRefused(f"expected one header {name}, got several")

    def query(self, name: str) -> str:
        """The one value of this name in the request's query, which is passed on with the request.

        Raises:
            RequestRefused: the query has none of this name, or several.
        """
        values = [value for key, value in parse_qsl(self._query, keep_blank_values=True) if key == name]
        if len(values) != 1:
            raise RequestRefused(f"expected one {name} in the query, got {len(values)}")
        self.scope["query_string"] = urlencode({name: values[0]}).encode()
        return values[0]

    def with_length(self, length: int) -> dict:
        """The scope with another length of the body, which has been read."""
        headers = [
            pair for pair in self.scope["headers"] if pair[0].lower() not in (b"content-length", b"transfer-encoding")
        ]
        return {**self.scope, "headers": [*headers, (b"content-length", str(length).encode())]}

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
        for start in range(0, 0 if self.method == "HEAD" else len(data), PIECE):
            await self.send({"type": "http.response.body", "body": data[start : start + PIECE], "more_body": True})
        await self.send({"type": "http.response.body", "body": b""})

    async def refuse(self, status: int, reason: str, *, plain: bool = False) -> None:
        """Answers with an error, in the form that the page and its clients show to their users.

        Args:
            status: of HTTP. In the place of the reason of 503, the page shows a sentence of its own.
            reason: what is told.
            plain: tell nothing but the reason, as to an upload, whose answer the page shows word by word.
        """
        # What the client goes on sending is not read.
        headers = [("connection", "close")] if self.method == "POST" else []
        if plain:
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
        """What receives the request's body, and raises where it is too large or comes too slowly.

        The time begins with the first call.
        """
        came, began = 0, None

        async def receive() -> dict:
            nonlocal came, began
            began = time.monotonic() if began is None else began
            try:
                left = max(0.0, began + WHOLE_S - time.monotonic())
                event = await asyncio.wait_for(self.receive(), min(PART_S, left))
            except asyncio.TimeoutError:
                raise SlowSender("the request came too slowly") from None
            came += len(event.get("body", b""))
            took = time.monotonic() - began
            if event.get("more_body", False) and took > BEGIN_S and came < took * LEAST_BYTES_PER_S:
                raise SlowSender("the request came too slowly")
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
