"""A server of the web page in a thread of the test's process, and what programs do with it."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import httpx

from mg_fast.web.limits import Limits

API = "/gradio_api"
STARTS_WITHIN_S = 120.0


@contextlib.contextmanager
def running(pipeline, limits: Limits | None = None, **options) -> Iterator:
    """A `WebServer` that takes requests; it is stopped at the end of the block."""
    from mg_fast.web.server import WebServer, private_folder
    from mg_fast.web.site import WebOptions

    # A client of gradio notices that it was closed, or that its server was, when the next sign of life comes.
    often = mock.patch("gradio.utils.get_heartbeat_rate", return_value=0.25)
    with often, private_folder() as folder:
        server = WebServer(pipeline, WebOptions(port=0, limits=limits or Limits(), **options), folder)
        ready, failed = threading.Event(), []

        def run() -> None:
            try:
                server.run(ready.set)
            except BaseException as error:
                failed.append(error)
                ready.set()

        thread = threading.Thread(target=run, name="web-server", daemon=True)
        thread.start()
        assert ready.wait(STARTS_WITHIN_S), "the server did not start"
        if failed:
            raise failed[0]
        try:
            yield server
        finally:
            server.stop()
            thread.join(90)
            assert not thread.is_alive(), "the server does not end"
            if failed:
                raise failed[0]


def until(found, seconds: float = 20.0) -> None:
    """Waits until a condition holds."""
    ends = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < ends, "what was waited for did not come"
        time.sleep(0.02)


def another_client(server, folder, **options):
    """A program that drives a server; what it downloads goes into a folder."""
    import gradio_client

    options = {"verbose": False, "download_files": folder, "analytics_enabled": False, **options}
    return gradio_client.Client(server.address, httpx_kwargs={"timeout": 60}, **options)


def sent(file) -> dict:
    """A file as an argument of `Client.predict`, which sends it."""
    import gradio_client

    return gradio_client.handle_file(str(file))


def metrics(server) -> dict[str, float]:
    """The metrics of a server by name and labels."""
    lines = httpx.get(f"{server.address}/metrics", timeout=60).text.splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


def files_in(folder) -> list[Path]:
    """The files in a server's folder, without those of the tests themselves, which pytest puts there, too."""
    found = [path for path in Path(folder).rglob("*") if path.is_file()]
    return [path for path in found if not any(part.startswith("pytest-of-") for part in path.parts)]
