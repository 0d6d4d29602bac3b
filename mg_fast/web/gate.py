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
from urllib.parse import urlsplit

from .accounts import REALM, Accounts
from .hosts import KnownHosts
from .limits import RequestRefused
from .sessions import BrowserSessions, NoPlace
from .shares import Shares, ShareTaken, client_of
from .store import names_in
from .uploading import UploadDesk
from .visits import MessageTooLarge, Receive, Send, SlowSender, Visit, replayed

logger = logging.getLogger("mg_fast.web")

# ASGI: an application.
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
UPLOAD = f"{API}/upload"
# What a page or a program reads first. With it, a browser gets its secret.
FIRST = ("/", "/config", "/config/")
# What a message may say. The library behind takes more, such as whole batches.
SAYS = ("data", "event_data", "event_id", "fn_index", "session_hash", "trigger_id")
# How the last message of a stream of events begins, and the seconds that a page has to read it.
LAST_EVENT, LAST_READ_S = b'data: {"msg":"close_stream"', 0.25
# Connections that keep one session alive, and streams of its events; a page has one of each.
MOST_HELD = 4
# Of all requests that are being answered, one address may have every fourth.
ADDRESS_PART = 4
# The page shows a reason with any of these. Of 503 it would say that the application is busy, and nothing more.
_STATUS = {MessageTooLarge: 413, SlowSender: 408, ShareTaken: 429, NoPlace: 429}
# Seconds before a wrong password is answered, and how many such answers may be due at once.
WRONG_S, MOST_WRONG = 1.0, 20
_REQUEST_ID = re.compile(r"[0-9A-Za-z-]{8,64}")


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
        hosts: names of the server.
        check: raises RequestRefused where a question to the queue does not fit the page.
        most_requests: requests that are being answered at the same time.
        behind_proxy: do not count the requests of an address that may be a proxy's, because the proxy names no client.
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
        hosts: KnownHosts | None = None,
        check: Callable[[dict], None] = lambda message: None,
        most_requests: int = 1024,
        behind_proxy: bool = False,
    ):
        self.app, self.sessions, self.desk, self.metrics = app, sessions, desk, metrics
        self.accounts, self.root_path, self.origins = accounts, root_path, origins
        self.hosts, self.check, self.behind_proxy = hosts or KnownHosts(), check, behind_proxy
        self.draining = False
        self._wrong = 0
        self._requests = Shares(
            most_requests, max(1, most_requests // ADDRESS_PART), "too many requests at once: try again in a moment"
        )
        self._streams = Shares(most_requests, MOST_HELD, "this session has too many connections: reload the page")

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
                plain = visit.path.startswith(UPLOAD)
                await visit.refuse(_STATUS.get(type(refusal), 400), str(refusal), plain=plain)
        finally:
            if not visit.path.startswith(("/assets/", "/static/")):
                milliseconds = 1e3 * (time.monotonic() - began)
                logger.info(
                    "request=%s %s %s status=%s ms=%.0f",
                    visit.request_id,
                    visit.method if visit.method.isalpha() else "?",
                    _route(visit.path),
                    visit.status,
                    milliseconds,
                )

    async def _serve(self, visit: Visit) -> None:
        # However many others there are, who looks after the server is told how it is.
        if visit.path == "/healthz" and visit.method in ("GET", "HEAD"):
            await visit.answer(503 if self.draining else 200, b"stopping\n" if self.draining else b"ok\n")
            return
        visit.check_headers()
        if self.behind_proxy and not visit.header("x-forwarded-for"):
            visit.address = ""
        visit.address = client_of(visit.address)
        with self._requests.hold(visit.address):
            await self._pass(visit)

    async def _pass(self, visit: Visit) -> None:
        path, method = visit.path, visit.method
        reading = method in ("GET", "HEAD")
        if visit.header("host") not in self.hosts:
            await visit.refuse(403, "this server is not known by this name: see --hosts of mg-fast web")
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
            if path in FIRST and not visit.browser:
                visit.set_cookie(secrets.token_urlsafe(24), self.root_path or "/")
            await self.app(visit.scope, visit.receive, visit.send)
        elif method == "POST" and path.rstrip("/") == UPLOAD:
            await self._upload(visit)
        elif method == "POST" and SAID.fullmatch(path):
            await self._message(visit)
        else:
            await visit.refuse(404, "there is nothing here")

    async def _is_known(self, visit: Visit) -> bool:
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

    def _same_origin(self, visit: Visit) -> bool:
        """Whether a request comes from this page, as far as a browser says where it comes from."""
        if visit.header("sec-fetch-site") == "cross-site" and visit.path != "/":
            return False
        origin = visit.header("origin")
        if not origin or origin in self.origins:
            return True
        return urlsplit(origin).netloc == visit.header("host")

    async def _picture(self, visit: Visit, name: str) -> None:
        kept = self.sessions.store.get(name, visit.browser)
        if kept is None:
            await visit.refuse(404, "there is no such picture")
            return
        headers = [("cache-control", "private, max-age=3600"), ("content-disposition", "inline")]
        headers.append(("content-security-policy", "default-src 'none'; sandbox"))
        await visit.answer(200, kept.data, kept.media_type, headers=headers)

    async def _heartbeat(self, visit: Visit, key: str) -> None:
        session = self.sessions.open(key, visit.browser, visit.address)
        if self.sessions.listeners(session) >= MOST_HELD:
            raise ShareTaken(self._streams.told)
        self.sessions.listen(session)
        try:
            await self.app(visit.scope, visit.receive, visit.send)
        finally:
            self.sessions.unlisten(session)

    async def _events(self, visit: Visit, key: str) -> None:
        session = self.sessions.find(key, visit.browser)
        if session is None:
            await visit.refuse(404, "there is no such session")
            return

        async def send(event: dict) -> None:
            if event.get("body", b"").startswith(LAST_EVENT):
                session.stream_ended = time.monotonic()
            await visit.send(event)

        with self._streams.hold(key):
            await self.app(visit.scope, visit.receive, send)

    async def _upload(self, visit: Visit) -> None:
        if self.draining:
            await visit.refuse(503, "this server is about to stop", plain=True)
            return
        most = self.desk.limits.upload_bytes
        visit.check_length(most)
        names = await self.desk.take(visit.scope, visit.limited(most), visit.browser, visit.address)
        await visit.answer(200, json.dumps(names).encode(), "application/json")

    async def _message(self, visit: Visit) -> None:
        """Passes a message on if its session is this browser's, and if it names no file but this browser's pictures."""
        most, send = self.desk.limits.message_bytes, visit.send
        visit.check_length(most)
        body = await visit.body(most)
        try:
            message = json.loads(body, parse_constant=_no_number)
            if not isinstance(message, dict):
                raise ValueError
            # Passed on is what was looked at, even where the library behind would read the body otherwise.
            message = {name: message[name] for name in SAYS if name in message}
            body = json.dumps(message, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            raise RequestRefused("expected a JSON object, with text in Unicode") from None
        if visit.path == f"{API}/queue/join":
            if self.draining:
                await visit.refuse(429, "this server is about to stop: ask again in a minute")
                return
            self.check(message)
            try:
                session = self.sessions.open(message.get("session_hash"), visit.browser, visit.address)
            except NoPlace:
                raise
            except RequestRefused as refusal:
                await visit.refuse(403, str(refusal))
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
        await self.app(visit.with_length(len(body)), replayed(body, visit.receive), send)


def _route(path: str) -> str:
    """The path as a log may show it: without names of pictures or sessions."""
    for known in (FILE, HEARTBEAT):
        if path.startswith(known):
            return known
    known = READ.fullmatch(path) or SAID.fullmatch(path)
    return path if known or path in (EVENTS, UPLOAD, "/healthz", "/metrics") else "other"


def _no_number(text: str) -> None:
    raise ValueError(text)
