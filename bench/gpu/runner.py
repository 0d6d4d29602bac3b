"""Runs the steps of a plan, each in a process of its own, and keeps what they find as it comes."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from .. import records, watch
from ..cases import all_cases
from ..errors import BadRecord
from ..registry import OURS
from ..rows import empty_row
from . import plan as plans
from .plan import Step
from .summary import Outcome, conclude, text_of

# Only the end of a longer text is kept, so that all texts together stay below the size that one file may have.
MOST_CHARACTERS = 2**20


@dataclass(frozen=True)
class Settings:
    """How a plan is run.

    Args:
        program: the module that runs the commands of the benchmark itself: `bench`, or a test's stand-in.
        poll: seconds between two looks at a step.
        grace: seconds that an interrupted step has to write what it has.
        restart: with fewer seconds left no process is started for what another one left: it would not get past its
            imports.
    """

    plan: str
    device: str
    program: str = "bench"
    poll: float = 1.0
    grace: float = 5.0
    hangs_after: float = plans.HANGS_AFTER
    compiling_hangs_after: float = plans.COMPILING_HANGS_AFTER
    restart: float = 12.0


def run_plan(
    steps: Sequence[Step], out: Path, seconds: float, settings: Settings, earlier: Sequence[Outcome] = ()
) -> list[Outcome]:
    """Runs steps one after another within the given time.

    An interrupt ends the running step and the plan; what was found is kept.

    Args:
        out: a folder; it may hold what an earlier run of the plan found, which is added to.
        earlier: how that run's steps ended. What they finished is not run again.
    """
    deadline = time.monotonic() + seconds
    # The steps' processes run in another folder than their caller.
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    before = {outcome.name: outcome for outcome in earlier}
    # The first call imports what all models need, which takes seconds. It is made while the first step runs, and not
    # between two steps.
    threading.Thread(target=all_cases, daemon=True).start()
    outcomes: list[Outcome] = []
    for step in steps:
        left = deadline - plans.RESERVE - time.monotonic()
        limit = left if step.seconds is None else min(step.seconds, left)
        outcomes.append(outcome := Outcome(step.name))
        if is_finished(step, before.get(step.name), out, settings.device):
            outcomes[-1] = replace(before[step.name], earlier=True)
            continue
        skipped = limit < min(step.least, step.seconds or step.least)
        outcome.state = "skipped" if skipped else outcome.state
        conclude(out, outcomes, earlier)
        if skipped:
            continue
        print(f"{step.name}, {limit:.0f} s at most ...", file=sys.stderr, flush=True)
        began = time.monotonic()
        try:
            outcome.state, outcome.status = _run_step(step, out, began + limit, settings)
        except KeyboardInterrupt:
            outcome.state = "interrupted"
            raise
        finally:
            outcome.seconds = round(time.monotonic() - began, 1)
            conclude(out, outcomes, earlier)
        print(f"  {outcome.told()}", file=sys.stderr, flush=True)
    conclude(out, outcomes, earlier)
    return outcomes


def is_finished(step: Step, outcome: Outcome | None, out: Path, device: str) -> bool:
    """Whether an earlier run left nothing of a step to do."""
    if outcome is None:
        return False
    if step.parts:
        return not plans.remaining(plans.cases_of(step, all_cases(), device), _rows(out / step.into))
    # Tests that failed would fail again. What was cut off or crashed is run again.
    return outcome.state in ("done", "failed") and outcome.status in (0, 1)


def _rows(path: Path) -> list[dict]:
    try:
        return records.read(path)["cases"]
    except BadRecord:
        return []


def _run_step(step: Step, out: Path, end: float, settings: Settings) -> tuple[str, int]:
    """How a step ended, and its last process' exit status.

    A process of cases that crashes, hangs or loses the GPU is followed by another for the cases that are left, as long
    as there is time.
    """
    while True:
        known = len(_rows(out / step.into))
        status, stopped, doing = _run_process(step, out, end - time.monotonic(), settings)
        if not step.parts:
            return ("stopped" if stopped else "done" if status == 0 else "failed"), status
        if stopped:
            return "stopped", status
        if doing is not None:
            _blame(doing, status, out / step.into)
        every = plans.cases_of(step, all_cases(), settings.device)
        rows = [row for row in _rows(out / step.into) if any(row["name"] == case.name for case in every)]
        if not plans.remaining(every, rows):
            return _verdict(rows), status
        if len(_rows(out / step.into)) == known:
            # Another process would end as this one did.
            return "failed", status
        if end - time.monotonic() < settings.restart:
            return "stopped", status


def _verdict(rows: Sequence[Mapping]) -> str:
    failed = {row["provider"] for row in rows if row["ok"] is False}
    if failed.intersection((*OURS, "reference")):
        return "failed"
    return "done, with failures" if failed else "done"


def _blame(doing: watch.Doing, status: int, path: Path) -> None:
    """Adds a row for what a process was doing when it ended. It says so, and the provider is not tried again."""
    case = all_cases().get(doing.case)
    if case is None:
        return
    limit = "" if doing.limit_s is None else f" of {doing.limit_s:.0f} s"
    # The interpreter's own thread ends a process with 1. So does an error of Python's, which removes the file first.
    how = f"the process ended with exit status {status}"
    how = f"it did not come back within its limit{limit}" if status == 1 else how
    document = records.read(path)
    have = {(row["name"], row["provider"]) for row in document["cases"]}
    for provider in doing.providers:
        if (doing.case, provider) not in have:
            # A compiler that is slower than the limit has not shown that its provider is wrong.
            unknown = status == 1 and watch.compiles(provider)
            row = empty_row(case, provider) | {"ok": None if unknown else False, "why": f"{doing.what}: {how}"}
            document["cases"].append(row)
    records.write(path, document)


def _run_process(step: Step, out: Path, limit: float, settings: Settings) -> tuple[int, bool, watch.Doing | None]:
    """Runs a process of a step for this time at most.

    Returns:
        Its exit status; whether its limit ended it; and what it was doing where it ended by itself in the middle of
        something.
    """
    with tempfile.TemporaryDirectory(prefix="mg_fast_gpu_") as temporary:
        folder = Path(temporary)
        part, doing, output, errors = (folder / name for name in ("part.json", "doing.json", "output", "errors"))
        keep = _keeper(step, out, part, output, errors, settings)
        words = _words(step, out, part, doing, settings)
        # This is a copy, since the file itself grows while the tests run.
        passed = folder / "passed_before.txt"
        passed.write_text(text_of(out / plans.CORRECTNESS), encoding="utf-8")
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "MG_FAST_PASSED_BEFORE": str(passed), **step.environment}
        supervised = [sys.executable, "-m", "bench.gpu.supervise", str(os.getpid()), sys.executable, "-m", *words]
        with output.open("wb") as to, errors.open("wb") as errors_to:
            # It has a process group of its own, so that what it has started ends with it.
            process = subprocess.Popen(
                supervised, cwd=plans.ROOT, env=environment, stdout=to, stderr=errors_to, start_new_session=True
            )
            try:
                # The time that an interrupted process needs to write its results is part of its limit.
                end, stopped = time.monotonic() + max(limit - settings.grace, limit / 2), False
                while (status := _wait(process, settings.poll)) is None:
                    keep()
                    if time.monotonic() > end and not stopped:
                        stopped = True
                        _signal(process, signal.SIGINT)
                        end = time.monotonic() + settings.grace
                    elif time.monotonic() > end:
                        _signal(process, signal.SIGKILL)
            finally:
                # This ends all processes that it has started and left running.
                _signal(process, signal.SIGKILL)
                process.wait()
                keep()
        return status, stopped, None if stopped else watch.read(doing)


def _words(step: Step, out: Path, part: Path, doing: Path, settings: Settings) -> list[str]:
    """The command of a process after `python -m`, which writes its document and what it is doing into two files."""
    words = list(plans.command(step, settings.plan, settings.device))
    if step.into.endswith(".json"):
        words += ["--out", str(part)]
    if step.parts:
        words += ["--watch", str(doing), "--hangs-after", str(settings.hangs_after)]
        words += ["--compiling-hangs-after", str(settings.compiling_hangs_after)]
        for option, file in (("--ceilings", plans.ENVIRONMENT), ("--done", step.into)):
            if (out / file).exists():
                words += [option, str(out / file)]
    return [settings.program if words[0] == "bench" else words[0], *words[1:]]


def _wait(process: subprocess.Popen, seconds: float) -> int | None:
    with suppress(subprocess.TimeoutExpired):
        return process.wait(seconds)
    return None


def _signal(process: subprocess.Popen, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _keeper(step: Step, out: Path, part: Path, output: Path, errors: Path, settings: Settings) -> Callable[[], None]:
    """A call that brings the files of `out` up to date with what a step has written so far."""
    log, into, is_document = out / plans.LOG, out / step.into, step.into.endswith(".json")
    title = f"=== {step.name}: {plans.shown(step, settings.plan, settings.device)}\n"
    log_before, text_before = text_of(log), "" if is_document else text_of(into)
    document_before = records.read(into) if is_document and into.exists() else None
    written = None

    def keep() -> None:
        nonlocal written
        log.write_text(_end(log_before + title + text_of(errors)), encoding="utf-8")
        if not is_document:
            into.write_text(_end(text_before + title + text_of(output)), encoding="utf-8")
        elif part.exists() and (stamp := part.stat().st_mtime_ns) != written:
            with suppress(BadRecord):
                records.write(into, joined(document_before, records.read(part)))
                written = stamp

    return keep


def joined(before: dict | None, document: dict) -> dict:
    """Two documents as one, with the conditions of the first.

    Of a provider of a case that is in both, the first row that has a time is kept.
    """
    first = before or document
    rows = {}
    # A baseline is measured once for every part of a step that has its case.
    for row in [*(before["cases"] if before else ()), *document["cases"]]:
        key = row["name"], row["provider"]
        if key not in rows or rows[key]["median_ms"] is None:
            rows[key] = row
    return first | {"complete": first["complete"] and document["complete"], "cases": list(rows.values())}


def _end(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else "[...]\n" + text[-MOST_CHARACTERS:]
