"""Everything that a borrowed GPU should tell, in a given time, safest first.

Steps are processes of their own, each with a limit within what is left: one that crashes or hangs loses nothing of the others. What is
measured is kept as it comes, in at most eight files of one folder, so that a run that is cut off still counts.
"""

import fnmatch
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from . import records
from .cases import all_cases
from .registry import choose
from .run import check_device

ROOT = Path(__file__).parents[1]
SUMMARY, STEPS, LOG = "summary.md", "steps.json", "log.txt"
ENVIRONMENT, CASES, END_TO_END = "environment.json", "cases.json", "end-to-end.json"
CORRECTNESS, TUNING = "correctness.txt", "tuning.txt"
FILES = (SUMMARY, STEPS, LOG, ENVIRONMENT, CASES, END_TO_END, CORRECTNESS, TUNING)
# of a text, its end: all of them together stay below what one file may have
MOST_CHARACTERS = 2**20
# seconds that are kept for what is written at the end
RESERVE = 5.0
# seconds that an interrupted step has to write what it has
GRACE = 5.0
# with less left than this part of its limit, a step is not begun
LEAST = 0.2

# providers: what needs no compiling, and what does
PLAIN = ("reference, [!c]*", "reference, channels last", "torch", "auto", "triton", "packed", "23 layers")
COMPILED = ("*, compiled", "*, compiled reduce-overhead")
# the others are opponents: one that fails is a finding
OURS = ("torch", "auto", "triton", "packed", "23 layers")


@dataclass(frozen=True)
class Step:
    """One process.

    Args:
        name: what is found out.
        words: the command after `python -m`.
        seconds: its limit.
        into: the file that it adds to: a document (.json) is asked for by `--out`, a text is the standard output.
        environment: variables of its own.
    """

    name: str
    words: tuple[str, ...]
    seconds: float
    into: str
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """What became of a step.

    Attributes:
        state: `done`; `done, with failures` (of opponents, each a row that says so); `failed` (it crashed, or one of our own providers or a
            test failed); `stopped` (by its limit); `interrupted`; `skipped` (no time was left) or `running`.
    """

    name: str
    command: str
    limit_s: float
    state: str = "running"
    status: int | None = None
    seconds: float = 0.0


def full_plan(device: str = "cuda") -> list[Step]:
    """The steps on a GPU, by importance; limits add up to more than nine minutes, as most steps need less."""
    tests = ("pytest", "tests/interpreted", "--ignore-glob=*fuzz*", "-p", "no:cacheprovider", "--tb=short")
    if importlib.util.find_spec("xdist"):
        tests += ("-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal")

    every = all_cases()

    def cases(name: str, seconds: float, patterns: Sequence[str], providers: Sequence[str] = PLAIN, into: str = CASES) -> Step:
        names = {provider for case in choose(every, patterns, device) for provider in case.providers}
        # one that names none of a step's would be an error
        only = _only([pattern for pattern in providers if fnmatch.filter(names, pattern)])
        return Step(name, ("bench", "run", *patterns, "--device", device, "--seconds", "4", *only), seconds, into)

    def end_to_end(name: str, seconds: float, size: str, measures: Sequence[str]) -> Step:
        return cases(name, seconds, [f"end-to-end/{size}-{measure}-*" for measure in measures], ("reference", "auto"), END_TO_END)

    def one_by_one(name: str, seconds: float, groups: Sequence[str], providers: Sequence[str]) -> list[Step]:
        """A process for each case: rows are kept by case, and one that takes too long costs none of the others."""
        return [cases(f"{group}, {name}", seconds, [f"{group}/768{published}"], providers) for group in groups]

    published = "*-b1-bfloat16"
    return [
        Step("environment and ceilings", ("bench", "ceilings", "--device", device), 45, ENVIRONMENT),
        Step("kernels are right", tests, 110, CORRECTNESS),
        cases("mining, one picture", 70, ["mining/*-b1-*"]),
        cases("towers and projector, one picture", 60, [f"tower/{published}", f"clip/{published}", f"projector/{published}"]),
        cases("picture to tokens", 45, ["preprocess", f"picture/{published}"]),
        cases("kernels, one picture", 45, [f"{kernel}/{published}" for kernel in ("dwconv_norm", "linear_gelu", "linear_residual")]),
        cases("eight pictures", 45, [f"{group}/*-b8-bfloat16" for group in ("mining", "tower", "clip")]),
        cases("stress", 25, ["stress"]),
        end_to_end("end to end, 7B", 60, "7b", ["first-token", "decode", "second-turn", "arrivals80"]),
        end_to_end("end to end, 2B", 40, "2b", ["first-token", "decode", "second-turn", "arrivals80"]),
        Step("tuning", ("bench", "tune", "--seconds", "60"), 90, TUNING),
        *one_by_one("compiled", 40, ("mining", "tower", "clip"), COMPILED),
        cases("decoding, transformers' static cache", 60, ["end-to-end/7b-decode-b1-*"], ("*static*",), END_TO_END),
        cases("decoding, compiled", 60, ["end-to-end/7b-decode-b1-*"], ("auto, compiled",), END_TO_END),
        *one_by_one("autotuned", 60, ("mining", "tower"), ("*max-autotune",)),
        end_to_end("end to end, 7B in HD", 40, "7b-hd", ["first-token"]),
        end_to_end("end to end, 34B", 60, "34b", ["first-token", "decode-b1"]),
        end_to_end("loading, 2B", 60, "2b", ["load", "ready"]),
    ]


def _only(providers: Sequence[str]) -> tuple[str, ...]:
    return tuple(word for provider in providers for word in ("--provider", provider))


def tiny_plan(device: str = "cpu") -> list[Step]:
    """The same kinds of steps in half a minute on a CPU: what a test runs."""
    quick = ("--device", device, "--seconds", "0.1", "--no-memory", "--provider")
    return [
        Step("environment and ceilings", ("bench", "ceilings", "--device", device), 60, ENVIRONMENT),
        Step(
            "kernels are right",
            ("pytest", "tests/interpreted/test_tune.py", "-p", "no:cacheprovider"),
            60,
            CORRECTNESS,
            {"TRITON_INTERPRET": "1"},
        ),
        Step("kernels, one picture", ("bench", "run", "dwconv_norm/768-stage3-b1-float32", *quick, "torch"), 60, CASES),
        Step("end to end", ("bench", "run", "end-to-end/tiny-first-token-b1-float32", *quick, "auto"), 60, END_TO_END),
    ]


PLANS = {"full": full_plan, "tiny": tiny_plan}


def describe(steps: Sequence[Step], seconds: float) -> str:
    """The plan, each step with its limit and command, and what is reached if all take their limits."""
    lines, begin = [], 0.0
    for step in steps:
        reached = f"from {begin:.0f} s" if begin + LEAST * step.seconds <= seconds - RESERVE else "if time is left"
        lines.append(f"{step.name:<38} {step.seconds:>5.0f} s at most, {reached:<16} {_command(step)}")
        begin += step.seconds
    return "\n".join([*lines, f"{seconds:.0f} s in all, in at most {len(FILES)} files: {', '.join(FILES)}"])


def run_plan(
    steps: Sequence[Step],
    out: Path,
    seconds: float,
    *,
    poll: float = 1.0,
    grace: float = GRACE,
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Runs steps one after another within so many seconds, and keeps what they find in `out` as it comes.

    An interrupt ends the running step and the plan; what was found is kept.

    Args:
        out: a folder without any of `FILES`, made where there is none.
    """
    deadline = time.monotonic() + seconds
    out.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for step in steps:
        limit = min(step.seconds, deadline - RESERVE - time.monotonic())
        outcome = Outcome(step.name, _command(step), round(max(0.0, limit), 1))
        outcomes.append(outcome)
        if limit < LEAST * step.seconds:
            outcome.state = "skipped"
            _conclude(out, outcomes)
            continue
        _conclude(out, outcomes)
        print(f"{step.name}, {limit:.0f} s at most ...", file=sys.stderr, flush=True)
        began = time.monotonic()
        try:
            outcome.state, outcome.status = _run_step(step, out, limit, poll, grace)
        except KeyboardInterrupt:
            outcome.state = "interrupted"
            raise
        finally:
            outcome.seconds = round(time.monotonic() - began, 1)
            _conclude(out, outcomes)
        print(f"  {_state(outcome)}", file=sys.stderr, flush=True)
    return outcomes


def _run_step(step: Step, out: Path, limit: float, poll: float, grace: float) -> tuple[str, int]:
    """How a step ended, and its exit status."""
    with tempfile.TemporaryDirectory(prefix="mg_fast_gpu_") as temporary:
        part, output, errors = (Path(temporary) / name for name in ("part.json", "output", "errors"))
        keep = _keeper(step, out, part, output, errors)
        words = [*step.words, "--out", str(part)] if step.into.endswith(".json") else step.words
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **step.environment}
        with output.open("wb") as to, errors.open("wb") as errors_to:
            process = subprocess.Popen(
                # a group of its own, so that what it has started goes with it
                [sys.executable, "-m", *words],
                cwd=ROOT,
                env=environment,
                stdout=to,
                stderr=errors_to,
                start_new_session=True,
            )
            try:
                end, stopped = time.monotonic() + limit, False
                while (status := _wait(process, poll)) is None:
                    keep()
                    if time.monotonic() > end and not stopped:
                        stopped = True
                        _signal(process, signal.SIGINT)
                        end = time.monotonic() + grace
                    elif time.monotonic() > end:
                        _signal(process, signal.SIGKILL)
            finally:
                # whatever is left of it
                _signal(process, signal.SIGKILL)
                process.wait()
                keep()
        if stopped:
            return "stopped", status
        if status == 1 and _only_opponents_failed(part):
            return "done, with failures", status
    return ("done" if status == 0 else "failed"), status


def _only_opponents_failed(part: Path) -> bool:
    """Whether failed rows of a step that came to its end, none of which is ours, are what its exit status tells of."""
    try:
        document = records.read(part)
    except records.BadRecord:
        return False
    failed = [row["provider"] for row in document["cases"] if row["ok"] is False]
    return bool(document.get("complete") and failed) and not any(provider in OURS for provider in failed)


def _wait(process: subprocess.Popen, seconds: float) -> int | None:
    with suppress(subprocess.TimeoutExpired):
        return process.wait(seconds)
    return None


def _signal(process: subprocess.Popen, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _keeper(step: Step, out: Path, part: Path, output: Path, errors: Path) -> Callable[[], None]:
    """A call that brings the files of `out` up to date with what a step has written so far."""
    log, into = out / LOG, out / step.into
    title = f"=== {step.name}: {_command(step)}\n"
    before_log, before_text, before = _text(log), "", None
    if step.into.endswith(".json"):
        before = records.read(into) if into.exists() else None
    else:
        before_text = _text(into)
    written = None

    def keep() -> None:
        nonlocal written
        log.write_text(_end(before_log + title + _text(errors)), encoding="utf-8")
        if not step.into.endswith(".json"):
            into.write_text(_end(before_text + title + _text(output)), encoding="utf-8")
        elif part.exists() and (stamp := part.stat().st_mtime_ns) != written:
            with suppress(records.BadRecord):
                records.write(into, _joined(before, records.read(part)))
                written = stamp

    return keep


def _joined(before: dict | None, document: dict) -> dict:
    """Two documents as one: conditions of the first; of a provider of a case that is in both, the first row that has a time."""
    if before is None:
        return document
    rows = {(row["name"], row["provider"]): row for row in before["cases"]}
    for row in document["cases"]:
        key = row["name"], row["provider"]
        if key not in rows or rows[key]["median_ms"] is None:
            rows[key] = row
    return before | {"complete": before["complete"] and document["complete"], "cases": list(rows.values())}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _end(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else "[...]\n" + text[-MOST_CHARACTERS:]


def _command(step: Step) -> str:
    variables = [f"{name}={value}" for name, value in step.environment.items()]
    words = (f"'{word}'" if set(word) & set("*?[ ,'") else word for word in step.words)
    return " ".join([*variables, "python -m", *words])


def _state(outcome: Outcome) -> str:
    said = {"failed": f"failed, exit status {outcome.status}", "stopped": "stopped by its limit", "skipped": "skipped, no time was left"}
    return f"{said.get(outcome.state, outcome.state)} ({outcome.seconds:.0f} s)"


def _conclude(out: Path, outcomes: Sequence[Outcome]) -> None:
    """Brings the list of steps and the summary up to date."""
    (out / STEPS).write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n", encoding="utf-8")
    (out / SUMMARY).write_text(summarise(out, outcomes), encoding="utf-8")


def summarise(out: Path, outcomes: Sequence[Outcome]) -> str:
    """What was found, in Markdown."""
    documents = {name: records.read(out / name) for name in (ENVIRONMENT, CASES, END_TO_END) if (out / name).exists()}
    lines = ["# One run on a GPU", ""]
    if ENVIRONMENT in documents:
        where = documents[ENVIRONMENT]
        keys = ("date", "gpu", "driver", "clocks", "cpu", "torch", "triton", "transformers", "commit")
        lines += [f"- {key}: {where[key]}" for key in keys if where[key] is not None]
        ceilings = where["ceilings"]
        products = ", ".join(f"{dtype} {tflops:.4g}" for dtype, tflops in ceilings["matmul_tflops"].items())
        lines += [f"- a copy reaches {ceilings['copy_gbps']:.4g} GB/s; matrix products reach, in TFLOP/s: {products}", ""]
    lines += ["| step | outcome |", "|---|---|", *(f"| {outcome.name} | {_state(outcome)} |" for outcome in outcomes), ""]
    if tests := _text(out / CORRECTNESS).strip().splitlines():
        lines += ["## Kernels", "", "```", *tests[-20:], "```", ""]
    for title, name in (("Cases", CASES), ("End to end", END_TO_END)):
        if name in documents:
            lines += [f"## {title}", "", *_table(documents[name]["cases"]), ""]
    if tuning := _text(out / TUNING).strip():
        lines += ["## Tuning", "", "```python", tuning[-20000:], "```", ""]
    return "\n".join(lines)


COLUMNS = (
    ("median ms", "median_ms"),
    ("p20", "p20_ms"),
    ("p80", "p80_ms"),
    ("p99", "p99_ms"),
    ("warm", "warm_ms"),
    ("graph", "graphed_ms"),
    ("speedup, graphs", "speedup_graphed"),
    ("first call", "first_call_ms"),
    ("peak MiB", "peak_mib"),
    ("GB/s", "gbps"),
    ("TFLOP/s", "tflops"),
    ("of floor", "of_floor"),
    ("tokens/s", "tokens_per_s"),
)


def _table(rows: Sequence[dict]) -> list[str]:
    """Rows of cases, what was not measured left out."""
    columns = [(title, key) for title, key in COLUMNS if any(row.get(key) is not None for row in rows)]
    lines = ["| " + " | ".join(["case", "provider", "speedup", *(title for title, _ in columns)]) + " |", "|---" * (3 + len(columns)) + "|"]
    for row in sorted(rows, key=lambda row: list(dict.fromkeys(r["name"] for r in rows)).index(row["name"])):
        speedup = "FAIL" if row["ok"] is False else f"{row['speedup']:.2f}" if row.get("speedup") else "-"
        values = (f"{row[key]:.4g}" if row.get(key) is not None else "" for _, key in columns)
        lines.append("| " + " | ".join([row["name"], row["provider"], speedup, *values]) + " |")
    why = [f"- {row['name']}, {row['provider']}: {row['why']}" for row in rows if row["why"]]
    return [*lines, *([""] if why else []), *why]


def gpu(out: Path | None, minutes: float, *, device: str = "cuda", plan: str = "full", dry: bool = False) -> int:
    """`python -m bench gpu`: the exit status, 1 where a step failed or the kernels were not found right, 2 where `out` cannot be used.

    Raises:
        NoDevice: the device is not here.
    """
    steps = PLANS[plan](device)
    if dry:
        print(describe(steps, 60 * minutes))
        return 0
    check_device(device)
    if reason := _unusable(out):
        print(f"bench: {reason}", file=sys.stderr)
        return 2
    # a caller's time limit ends it as an interrupt does
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    outcomes = run_plan(steps, out, 60 * minutes)
    print(f"kept in {out}: {', '.join(name for name in FILES if (out / name).exists())}")
    unproven = any(outcome.state != "done" for step, outcome in zip(steps, outcomes) if step.into == CORRECTNESS)
    return int(unproven or any(outcome.state == "failed" for outcome in outcomes))


def _unusable(out: Path) -> str | None:
    """Why nothing can be kept in a folder, which may not be there yet; None where it can."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        earlier = sorted({path.name for path in out.iterdir()}.intersection(FILES))
    except OSError as error:
        return f"{out} cannot be used: {error.strerror}: expected a folder to write to"
    return f"{out} holds {', '.join(earlier)} of an earlier run: expected a new folder, nothing is replaced" if earlier else None
