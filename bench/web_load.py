"""`python -m bench web`: many sessions of the web page at once, each of which asks about its own number.

The page runs as a process of its own, with nano. It is looked for errors, for answers that are not those of the same
picture alone, for answers with another session's number, and for memory that grows.
"""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from . import records
from .errors import NoServer
from .figures import Records, wrapped
from .served import STARTS_WITHIN_S, STOPS_WITHIN_S
from .serving_load import QUESTION, numbered_picture
from .web_visitors import VisitLog, different_numbers, visit_all

RECORD = records.RESULTS / "web-load.json"
# Seconds between two looks at the memory.
LOOK_S = 2.0


class PageProcess:
    """A running `mg-fast web` with nano; a context that stops it.

    Attributes:
        url: its address.
        process: its process.

    Raises:
        NoServer: it ended or was not ready in time.
    """

    def __init__(self, sessions: int, threads: int):
        # Sessions that have been left stay for a minute, so there are more of them than visitors.
        # All of them come from one address.
        limits = [f"sessions={8 * sessions}", f"address_sessions={8 * sessions}", f"queue={2 * sessions}"]
        words = [sys.executable, "-m", "mg_fast", "web", "--port", "0"]
        words += [word for limit in limits for word in ("--share-limit", limit)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
        self._folder = tempfile.TemporaryDirectory(prefix="mg_fast_page_")
        self.log = Path(self._folder.name) / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        began = time.monotonic()
        while (found := re.search(r"the page is at (http://\S+)", self.log.read_text("utf-8", "replace"))) is None:
            if self.process.poll() is not None or time.monotonic() - began > STARTS_WITHIN_S:
                self.stop()
                last = "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-20:])
                raise NoServer(f"{' '.join(words[1:])} did not start; the end of its log:\n{last}")
            time.sleep(0.2)
        self.url = found[1]

    def memory(self) -> float:
        """The MiB that the process holds in memory, as its metrics say."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        return float(re.search(r"^process_resident_memory_bytes (\S+)", text, re.MULTILINE)[1]) / 2**20

    def stop(self) -> int:
        """Ends it by SIGTERM, and returns its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOPS_WITHIN_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def __enter__(self) -> "PageProcess":
        return self

    def __exit__(self, *_) -> None:
        self.stop()
        self._folder.cleanup()


def main(*, sessions: int, seconds: float, threads: int, keep: bool) -> str:
    """Measures, records if `keep` is set, and returns what was found in words.

    Raises:
        NoServer: the page did not start.
    """
    document = measure(sessions, seconds, threads)
    if keep:
        records.write(RECORD, document)
    return told(document)


def measure(sessions: int, seconds: float, threads: int) -> dict:
    """The document of one run."""
    from mg_fast.testing.environment import environment

    numbers = different_numbers(sessions)
    alone = _answers_alone(numbers)
    held: list[float] = []
    with PageProcess(sessions, threads) as page:
        # What is done at first use belongs to the start.
        asyncio.run(visit_all(page.url, numbers[:2], 3))
        over = threading.Event()

        def look() -> None:
            while not over.wait(LOOK_S):
                held.append(page.memory())

        looking = threading.Thread(target=look, daemon=True)
        looking.start()
        began = time.monotonic()
        log = asyncio.run(visit_all(page.url, numbers, seconds))
        took = time.monotonic() - began
        over.set()
        looking.join()
        status = page.stop()
    figures = {"sessions": sessions, "threads_of_the_page": threads, "seconds": round(took, 1), "exit_status": status}
    return {**environment(), **figures, **summary(log, alone, took), "memory_mib": [round(each, 1) for each in held]}


def summary(log: VisitLog, alone: Mapping[str, str], seconds: float) -> dict:
    """What the visitors met, in numbers.

    Args:
        alone: by number, the answer about its picture where nobody else asks.
    """
    others = [r for r in log.replies if any(n != r.number and n in r.text for n in alone)]
    return {
        "visits": log.visits,
        "answers": len(log.replies),
        "answers_per_second": round(len(log.replies) / seconds, 2),
        "errors": len(log.errors),
        "first_errors": log.errors[:5],
        # A misread number may be another visitor's by chance; such an answer is the same where nobody else asks.
        "mixed": sum(r.text != alone[r.number] for r in others),
        "same_as_alone": sum(r.text == alone[r.number] for r in log.replies),
        "first_s": _spread([r.first_s for r in log.replies]),
        "whole_s": _spread([r.whole_s for r in log.replies]),
        "wait_s": _spread([r.wait_s for r in log.replies]),
    }


def told(document: Mapping) -> str:
    """A document in words."""
    held = document["memory_mib"] or [0.0]
    half = held[len(held) // 2 :]
    first, whole = document["first_s"], document["whole_s"]
    return wrapped(
        f"{document['sessions']} sessions at once for {document['seconds']:.0f} s, {document['visits']} visits: "
        f"{document['answers']} answers ({document['answers_per_second']:.1f} a second), {document['errors']} errors, "
        f"{document['mixed']} mixed; {document['same_as_alone']} answers were those of the same picture alone. From "
        f"the question to its first text {first[0]:.2f} s (99%: {first[1]:.2f} s), to its end {whole[0]:.2f} s "
        f"({whole[1]:.2f} s). Memory: {held[0]:.0f} MiB at first, at most {max(held):.0f} MiB, in the second half "
        f"{min(half):.0f} to {max(half):.0f} MiB. Exit status {document['exit_status']}. Measured on "
        f"{document['cpu']}, {document['threads_of_the_page']} thread(s), torch {document['torch']}, "
        f"{document['date']}, commit {document['commit']}, load {document['load']}."
    )


def load_of_page(found: Records) -> str:
    """The paragraph in docs/web.md, from what is recorded."""
    if not RECORD.exists():
        return wrapped("Not measured yet: `python -m bench web --save` measures it.")
    return told(json.loads(RECORD.read_text(encoding="utf-8")))


def _answers_alone(numbers: list[str]) -> dict[str, str]:
    import mg_fast

    pipeline, found = mg_fast.load("nano"), {}
    for number in numbers:
        conversation = pipeline.conversation()
        found[number] = conversation.chat(QUESTION, [numbered_picture(number)], max_new_tokens=16).text
        conversation.close()
    return found


def _spread(seconds: list[float]) -> tuple[float, float]:
    """The median and the 99th percentile, or the slowest of few."""
    ordered = sorted(seconds) or [0.0]
    last = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return round(ordered[len(ordered) // 2], 3), round(last, 3)
