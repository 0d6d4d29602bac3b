"""A server of the web page in a thread of the test's process."""

import contextlib
import threading
import time
from collections.abc import Iterator

from mg_fast.web.limits import Limits

STARTS_WITHIN_S = 120.0


@contextlib.contextmanager
def running(pipeline, limits: Limits | None = None, **options) -> Iterator:
    """A `WebServer` that takes requests; it is stopped at the end of the block."""
    from mg_fast.web.server import WebServer, private_folder
    from mg_fast.web.site import WebOptions

    with private_folder() as folder:
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
