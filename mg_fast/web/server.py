"""Runs the web page: its private folder, its start, and a stop that lets running answers end."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from ..errors import BackendError
from .requirements import why_not
from .site import Site, WebOptions

logger = logging.getLogger("mg_fast.web")

_FOLDER = "mg_fast_web_"
# Seconds for connections to close after the last answer.
CLOSE_S = 5
# How often sessions that were left are looked for, in seconds.
SWEEP_S = 2.0
# What gradio shall not do. It reads these when it is imported.
_ENVIRONMENT = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_MCP_SERVER": "False",
    "GRADIO_SSR_MODE": "False",
    "GRADIO_RUN_HISTORY": "False",
    # It would sum up all events with pandas after each of them.
    "GRADIO_ANALYTICS_CACHE_FREQUENCY": "1000000000000",
    "GRADIO_ANALYTICS_MAX_EVENTS": "100",
}


@contextlib.contextmanager
def private_folder() -> Iterator[str]:
    """A folder that only this user may enter, for everything temporary of this process; it is removed at the end.

    Within the block of one such folder, another one lies in it, and gradio goes on using the outer one.
    """
    outer, named = tempfile.tempdir, os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix=_FOLDER) as folder:
        if outer is None or not Path(outer).name.startswith(_FOLDER):
            os.environ["GRADIO_TEMP_DIR"] = folder
        tempfile.tempdir = folder
        try:
            yield folder
        finally:
            tempfile.tempdir = outer
            os.environ.pop("GRADIO_TEMP_DIR", None)
            if named is not None:
                os.environ["GRADIO_TEMP_DIR"] = named


class WebServer:
    """A server of the page.

    Args:
        pipeline: of Mini-Gemini.
        options: of the server.
        folder: its `private_folder`.

    Attributes:
        site: the parts of the server.
        address: its URL.
    """

    def __init__(self, pipeline, options: WebOptions, folder: str):
        if (reason := why_not()) is not None:
            raise BackendError(reason)
        os.environ.update(_ENVIRONMENT)
        self.socket = _listening(options.host, options.port)
        port = self.socket.getsockname()[1]
        self.options = replace(options, port=port)
        host = f"[{options.host}]" if ":" in options.host else options.host
        self.address = f"http://{host}:{port}"
        self.site = Site(pipeline, self.options, folder)
        self._gate = self._server = None

    def run(self, ready: Callable[[], None] | None = None) -> None:
        """Serves until SIGTERM, SIGINT or `stop`.

        Args:
            ready: called when the server takes requests.
        """
        with _ended_by_sigterm():
            asyncio.run(self.serve(ready))

    def stop(self) -> None:
        """Asks the server to end; another thread may call this."""
        if self._server is not None:
            self._server.should_exit = True

    async def serve(self, ready: Callable[[], None] | None = None) -> None:
        """Serves in this event loop; see `run`."""
        import gradio
        import uvicorn
        from fastapi import FastAPI

        from . import connections
        from .calls import Calls
        from .faults import only_kinds_of_errors
        from .gate import Gate
        from .hosts import KnownHosts, own_names
        from .page import build_page
        from .style import style

        site, options = self.site, self.options
        page = build_page(site)
        parent = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        gradio.mount_gradio_app(
            parent,
            page,
            path="/",
            root_path=options.root_path or None,
            max_file_size=options.limits.picture_bytes,
            footer_links=[],
            run_history=False,
            show_error=False,
            ssr_mode=False,
            mcp_server=False,
            # Of this font, gradio 6.31 has only a few letters in the weight that its theme takes for titles.
            theme=gradio.themes.Default(
                font=[gradio.themes.LocalFont("Source Sans Pro", weights=(400, 700)), "sans-serif"]
            ),
            css=style(),
        )
        [mounted] = [route.app for route in parent.routes if isinstance(getattr(route, "app", None), gradio.routes.App)]
        # The queue was started with the server. Once more would lose the events that are running.
        mounted.startup_events_triggered = True
        site.forget = _forgetting(page, mounted)
        root = urlsplit(options.root_path)
        self._gate = Gate(
            parent,
            site.sessions,
            site.desk,
            site.metrics,
            accounts=options.accounts,
            root_path=root.path.rstrip("/"),
            origins=(f"{root.scheme}://{root.netloc}",) if root.netloc else (),
            hosts=KnownHosts(own_names(options.host, options.root_path, options.hosts)),
            check=Calls(page.get_config_file(), page.get_api_info()).check,
            # Each page has a few connections: it keeps one open, and reads from another one while it is answered.
            most_requests=options.limits.connections + 8 * options.limits.sessions + 64,
            behind_proxy=bool(options.root_path),
        )
        kind = type("ServerProtocol", (connections.ImpatientProtocol,), {"most_waiting": options.limits.connections})
        config = uvicorn.Config(
            self._gate,
            http=kind,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            h11_max_incomplete_event_size=connections.HEAD_BYTES,
            timeout_graceful_shutdown=CLOSE_S,
        )
        outer = self

        class PageServer(uvicorn.Server):
            async def startup(self, sockets=None) -> None:
                await super().startup(sockets)
                if self.started and ready is not None:
                    ready()

            async def on_tick(self, counter: int) -> bool:
                if counter % 10 == 0:
                    now = asyncio.get_running_loop().time()
                    connections.close_waiting(self.server_state.connections, now, connections.HEAD_S)
                    connections.close_unread(self.server_state.connections, now, connections.READ_S)
                if counter % int(10 * SWEEP_S) == 0:
                    site.sessions.sweep()
                return await super().on_tick(counter)

            async def shutdown(self, sockets=None) -> None:
                await outer.drain(lambda: self.force_exit)
                page.close(verbose=False)
                mounted.stop_event.set()
                await super().shutdown(sockets)

        self._server = PageServer(config)
        printing = [gradio.queueing, gradio.routes, gradio.route_utils, gradio.utils]
        try:
            with only_kinds_of_errors(printing):
                await self._server.serve(sockets=[self.socket])
        finally:
            site.sessions.close_all()
            site.talk.close()

    async def drain(self, forced: Callable[[], bool] = lambda: False) -> None:
        """Refuses what is new, and waits for the running answers to end; after `drain_s` they are stopped."""
        site = self.site
        self._gate.draining = site.talk.draining = True
        logger.info("stopping: %d answers are running, %d questions wait", site.line.running, site.line.waiting)
        for _ in range(max(1, int(self.options.drain_s / 0.25))):
            if forced() or await site.talk.wait(0.25):
                break
        if not await site.talk.wait(0):
            logger.info("stopping: the answers that still run are stopped")
            site.sessions.stop_all()
            await site.talk.wait(CLOSE_S)
        # The last pieces are on their way to the pages.
        await asyncio.sleep(0.3)


def serve(pipeline, options: WebOptions) -> None:
    """Runs the page until SIGTERM or SIGINT, and says on stderr where it is.

    Raises:
        BackendError: a package is missing, or the address cannot be used.
    """
    _log_to_stderr()
    _allow_many_files()
    with private_folder() as folder:
        server = WebServer(pipeline, options, folder)

        def ready() -> None:
            print(f"mg-fast: the page is at {server.address}{urlsplit(options.root_path).path}", file=sys.stderr)
            if options.accounts is None and options.host not in ("127.0.0.1", "::1", "localhost"):
                print("mg-fast: whoever reaches this address can use it; --auth FILE asks for names", file=sys.stderr)
            sys.stderr.flush()

        server.run(ready)


def _forgetting(page, mounted) -> Callable[[str, list[str]], None]:
    """What drops all that gradio keeps of a session, which it would keep until ten thousand others have come."""
    queue = page._queue

    def forget(key: str, names: list[str]) -> None:
        mounted.state_holder.session_data.pop(key, None)
        mounted.state_holder.time_last_used.pop(key, None)
        queue.pending_event_ids_session.pop(key, None)
        with contextlib.suppress(KeyError):
            del queue.pending_messages_per_session[key]
        for files in page.temp_file_sets:
            files.difference_update(names)

    return forget


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BackendError(f"--host {host} --port {port}: cannot listen there: {reason}") from None


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Within the block SIGTERM is taken by the server; when the server hands it on at its end, nothing happens."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _log_to_stderr() -> None:
    """Lines of the server's log go to stderr with their times, whatever other loggers show."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s mg-fast web: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _allow_many_files() -> None:
    """Raises the number of files that this process may open, of which each connection is one."""
    if not Path("/proc/self").exists():
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 8192 if hard == resource.RLIM_INFINITY else min(8192, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
