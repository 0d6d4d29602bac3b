"""A server of `mg-fast serve` as a process: started with its options, waited for, and stopped."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from .errors import NoServer

# vLLM's processes import it one after the other and load the model, which takes minutes on a busy machine.
STARTS_WITHIN_S = 600
STOPS_WITHIN_S = 60


class Server:
    """A running `mg-fast serve`, ready for requests; a context that stops it.

    Args:
        model: as for `mg-fast serve`.
        options: further options of vLLM.
        threads: threads of the engine on a CPU.
        cache_gib: memory for keys and values on a CPU.

    Attributes:
        url: its address, without a path.
        process: it has a process group of its own, which holds vLLM's further processes.
        log: the file that it writes to.

    Raises:
        NoServer: it ended or was not ready in time. The message has the last lines of its log.
    """

    def __init__(self, model: str, options: Sequence[str] = (), *, threads: int = 1, cache_gib: int = 1):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._folder = tempfile.TemporaryDirectory(prefix="mg_fast_server_")
        self.log = Path(self._folder.name) / "log"
        self.command = ["mg-fast", "serve", "--model", model, *options]
        words = [sys.executable, "-m", "mg_fast", *self.command[1:], "--host", "127.0.0.1", "--port", str(self.port)]
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "DO_NOT_TRACK": "1",
            "OMP_NUM_THREADS": str(threads),
            # vLLM would bind its threads to all cores but one, whatever their number.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": str(cache_gib),
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                words, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def _wait(self) -> None:
        began = time.monotonic()
        while not self.is_ready():
            code = self.process.poll()
            if code is not None or time.monotonic() - began > STARTS_WITHIN_S:
                ended = f"ended with exit status {code}" if code is not None else f"not ready in {STARTS_WITHIN_S} s"
                raise NoServer(f"{' '.join(self.command)}: {ended}; the end of its log:\n{self.last_lines()}")
            time.sleep(0.5)

    def is_ready(self) -> bool:
        """Whether its engine is alive and takes requests."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except (OSError, urllib.error.HTTPError):
            return False

    def last_lines(self, number: int = 30) -> str:
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-number:])

    def stop(self) -> int:
        """Asks it to end, as SIGTERM does, and returns its exit status; a group that does not end is killed."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(STOPS_WITHIN_S)
        except subprocess.TimeoutExpired:
            code = None
        if is_alive(self.process.pid):
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait() if code is None else code

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_) -> None:
        self.stop()
        self._folder.cleanup()


def is_alive(group: int) -> bool:
    """Whether a process group has a process."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
