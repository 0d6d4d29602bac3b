"""Runs of `bench gpu` around toy cases: a hang, a crash or a cut-off leaves valid files, and `--resume` goes on.

Every step is run by the same code. The tests therefore take one or two of these kinds: `smoke` and `tests` print text,
`kernels` has a baseline of its own, `decode` has cases that are in several parts and a document of its own.
"""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import records
from bench.cases import all_cases
from bench.gpu import plan as plans
from bench.gpu import runner
from bench.gpu.plan import ROOT
from bench.gpu.runner import Settings, run_plan
from bench.gpu.summary import earlier_outcomes
from bench.registry import OURS, Case
from mg_fast.testing.environment import environment
from tests.bench.gpu_stand_ins import stand_ins

pytestmark = pytest.mark.slow

CASES = {name: list(case.providers) for name, case in all_cases().items()}
# Seconds of a step that is not cut off: its process imports torch, on a machine that may be busy with other tests.
ROOM = 60.0
# Seconds of a step that is to be cut off: enough to begin where the machine is quiet; a step of text imports nothing.
CUT, CUT_TEXT = 8.0, 2.0
# A stand-in that takes longer is taken for one that hangs.
PATIENCE = 4.0
EVERY_KIND = ("smoke", "kernels", "decode", "tests")
# A step of text, and one with cases: being cut off and resumed is the same for the others.
TEXT_AND_CASES = ("smoke", "decode")


def measured(step: plans.Step, registry: dict[str, Case]) -> list[tuple[str, str]]:
    return [(case.name, provider) for case in plans.cases_of(step, registry, "cpu") for provider in case.providers]


@pytest.fixture
def registry(monkeypatch):
    """Stand-ins for all cases, in this process. Its children read of them in a file."""
    cases = stand_ins(CASES, [])
    monkeypatch.setattr(runner, "all_cases", lambda: cases)
    return cases


@pytest.fixture
def run(tmp_path, monkeypatch, registry):
    """Runs some steps of the full plan with faults by step, see `gpu_stand_ins`."""
    told = tmp_path / "stand-ins.json"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STAND_INS", str(told))
    records.write(tmp_path / "out" / plans.ENVIRONMENT, ceilings_document())

    def run(faults, names, earlier=(), minutes=30.0):
        steps = plans.choose_steps(plans.full_plan("cpu"), names)
        # A stand-in prints the text of the steps whose output is text.
        steps = [dataclasses.replace(step, words=("bench", "text", step.name) if step.words else ()) for step in steps]
        faults = {step.name: faults(step) for step in steps}
        endless = {
            step.name for step in steps if any(fault[0] == "slow" or fault == ["hang"] for fault in faults[step.name])
        }
        steps = [
            dataclasses.replace(step, seconds=(CUT_TEXT if step.words else CUT) if step.name in endless else ROOM)
            for step in steps
        ]
        told.write_text(json.dumps({"cases": CASES, "faults": faults}))
        # A slow call must be cut off by its step's limit, and must not be given up as if it hung.
        patience = 600.0 if any(fault[0] == "slow" for found in faults.values() for fault in found) else PATIENCE
        limits = {"hangs_after": patience, "compiling_hangs_after": patience}
        settings = Settings("full", "cpu", "tests.bench.gpu_stand_ins", poll=0.1, grace=2.0, restart=0.0, **limits)
        # The folder is relative to the caller's.
        return steps, run_plan(steps, Path("out"), 60 * minutes, settings, earlier)

    run.out = tmp_path / "out"
    return run


def none(step: plans.Step) -> list:
    return []


def ceilings_document() -> dict:
    return {
        **environment(),
        "device": "cpu",
        "complete": True,
        "cases": [],
        "ceilings": {"copy_gbps": 9.0, "matmul_tflops": {"float32": 0.1}},
    }


def rows_of(out: Path) -> dict[tuple[str, str], dict]:
    """All rows that are kept; every file is checked to be valid on the way."""
    files = list(out.iterdir())
    assert len(files) <= 8 and all(path.is_file() for path in files)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", path.name) and path.stat().st_size < 2**24 for path in files)
    assert {path.name for path in files} <= set(plans.FILES)
    documents = [records.read(out / name) for name in (plans.CASES, plans.END_TO_END) if (out / name).exists()]
    # Ceilings are measured once and handed on.
    assert all(document["ceilings"]["copy_gbps"] == 9.0 for document in documents)
    return {(row["name"], row["provider"]): row for document in documents for row in document["cases"]}


def test_a_hang_and_a_crash_cost_one_provider_each(run, registry):
    """The process that hung or crashed is followed by another. A resumed run runs what is left and nothing else."""

    def faults(step):
        if step.words:
            return [["hang"]] if step.name == "smoke" else [["crash"]]
        pairs = measured(step, registry)
        return [["hang", *pairs[1]], ["crash", *pairs[-1]]]

    steps, outcomes = run(faults, EVERY_KIND)
    rows = rows_of(run.out)
    whys = (
        f"its first call: it did not come back within its limit of {PATIENCE:.0f} s",
        "its first call: the process ended with exit status -11",
    )
    for step, outcome in zip(steps, outcomes):
        if step.words:
            assert outcome.state == ("stopped" if step.name == "smoke" else "failed"), step.name
            assert f"the beginning of {step.name}" in (run.out / step.into).read_text()
            continue
        pairs = measured(step, registry)
        bad = pairs[1], pairs[-1]
        for pair, why in zip(bad, whys):
            assert rows[pair]["ok"] is False and rows[pair]["why"] == why, step.name
            assert f"- {pair[0]}, {pair[1]}: {why}" in (run.out / plans.SUMMARY).read_text()
        good = [pair for pair in pairs if pair not in bad]
        assert len(good) == len(pairs) - pairs.count(bad[0]) - pairs.count(bad[1]) > 0
        assert all(rows[pair]["ok"] and rows[pair]["median_ms"] == 1.0 for pair in good), step.name
        failed = any(provider in OURS for _, provider in bad)
        assert outcome.state == ("failed" if failed else "done, with failures"), step.name
    # The log tells where it hung.
    log = (run.out / plans.LOG).read_text()
    assert f"Timeout (0:00:{PATIENCE:02.0f})!" in log and "in fail" in log
    again, later = run(none, EVERY_KIND, earlier=earlier_outcomes(run.out))
    assert [outcome.earlier for outcome in later] == [not step.words for step in again]
    assert all(outcome.state == "done" for outcome in later if not outcome.earlier)
    assert all(f"the end of {step.name}" in (run.out / step.into).read_text() for step in again if step.words)
    assert rows_of(run.out) == rows


def test_a_cut_off_is_resumed(run, registry):
    def faults(step):
        return [["slow"]] if step.words else [["slow", *measured(step, registry)[-1]]]

    steps, outcomes = run(faults, TEXT_AND_CASES)
    assert [outcome.state for outcome in outcomes] == ["stopped"] * len(steps)
    before = {key: row for key, row in rows_of(run.out).items() if row["median_ms"] is not None}
    assert earlier_outcomes(run.out) == outcomes
    again, later = run(none, TEXT_AND_CASES, earlier=outcomes)
    assert [outcome.state for outcome in later] == ["done"] * len(again)
    rows = rows_of(run.out)
    assert set(rows) == {pair for step in again for pair in measured(step, registry)}
    assert all(row["ok"] and row["median_ms"] == 1.0 for row in rows.values())
    # What was measured is not measured again.
    assert all(rows[key] == row for key, row in before.items())


def test_tests_read_what_passed_before_from_a_file_that_does_not_grow(run):
    """Workers that begin late must leave out the same tests as the others."""
    run(none, ("tests",))
    [path] = re.findall(r"passed before: (.*)", (run.out / plans.CORRECTNESS).read_text())
    assert not Path(path).is_relative_to(run.out.resolve())


def test_what_no_time_is_left_for_comes_in_the_next_call(run):
    _, outcomes = run(none, ("smoke", "tests"), minutes=(plans.RESERVE + 3) / 60)
    assert [outcome.state for outcome in outcomes] == ["skipped", "skipped"]
    assert "| smoke | skipped, no time was left" in (run.out / plans.SUMMARY).read_text()
    _, outcomes = run(none, ("smoke", "tests"), earlier=outcomes)
    assert [outcome.state for outcome in outcomes] == ["done", "done"]


def test_a_step_that_ends_at_once_is_not_started_for_ever(run, monkeypatch):
    monkeypatch.setenv("STAND_INS", "/nowhere")
    steps = plans.choose_steps(plans.full_plan("cpu"), ["patch_mining"])
    settings = Settings("full", "cpu", "tests.bench.gpu_stand_ins", poll=0.1, restart=0.0)
    [outcome] = run_plan(steps, run.out, 300, settings)
    assert (outcome.state, outcome.status) == ("failed", 1)
    assert "FileNotFoundError" in (run.out / plans.LOG).read_text()


def test_an_interrupt_keeps_what_there_is(run, monkeypatch):
    wait = runner._wait

    def interrupted(process, seconds):
        if (run.out / plans.CASES).exists():
            raise KeyboardInterrupt
        return wait(process, seconds)

    monkeypatch.setattr(runner, "_wait", interrupted)
    # The step's limit is not what ends it.
    monkeypatch.setattr(sys.modules[__name__], "CUT", ROOM)
    with pytest.raises(KeyboardInterrupt):
        run(lambda step: [["slow", *measured(step, all_cases())[-1]]], ("patch_mining", "towers"))
    records.read(run.out / plans.CASES)
    assert [outcome.state for outcome in earlier_outcomes(run.out)] == ["interrupted"]


def test_a_text_is_kept_by_its_end(run, monkeypatch):
    monkeypatch.setattr(runner, "MOST_CHARACTERS", 60)
    run(none, ("smoke", "tests"))
    text = (run.out / plans.CORRECTNESS).read_text()
    assert text.startswith("[...]\n") and text.endswith("the end of tests\n") and len(text) == 66


PARENT = """
import sys
from pathlib import Path
from bench.gpu.plan import Step
from bench.gpu.runner import Settings, run_plan
step = Step("hangs", "", 600, "tuning.txt", ("tests.bench.sleeper",))
run_plan([step], Path(sys.argv[1]), 900, Settings("full", "cpu", poll=0.1))
"""


def test_no_step_outlives_its_parent(tmp_path):
    """However the parent ends, the process that it started ends with it, and so does this one's own child."""
    out = tmp_path / "out"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(out)], cwd=ROOT, stderr=subprocess.PIPE)
    try:
        told = r"sleeps as (\d+), child (\d+)"
        pids = wait_for(lambda: [int(word) for word in re.findall(told, (out / plans.TUNING).read_text())[0]])
        assert all(is_alive(pid) for pid in pids)
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        wait_for(lambda: not any(is_alive(pid) for pid in pids) or None)
    finally:
        parent.kill()
        parent.stderr.close()


def wait_for(look, seconds: float = 120):
    """What `look` returns, as soon as it returns something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError, IndexError):
            if (found := look()) is not None:
                return found
        time.sleep(0.05)
    raise AssertionError(f"nothing within {seconds:.0f} s")


def is_alive(pid: int) -> bool:
    try:
        # A process that was killed and not waited for is still listed.
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_the_tiny_plan_on_a_cpu(tmp_path):
    """Every kind of step really runs, as in `python -m bench gpu --plan tiny --device cpu`.

    The kinds are a document without cases, a document with cases, and text. The step `kernels` is of the same kind as
    `decode`, and what `smoke` does has tests of its own.
    """
    out = tmp_path / "out"
    steps = plans.choose_steps(plans.tiny_plan("cpu"), ["environment", "decode", "tests"])
    steps = [dataclasses.replace(step, seconds=6 * step.seconds) for step in steps]
    outcomes = run_plan(steps, out, 1200, Settings("tiny", "cpu", poll=0.2))
    assert [outcome.state for outcome in outcomes] == ["done"] * 3, (out / plans.LOG).read_text()[-3000:]
    ceilings = records.read(out / plans.ENVIRONMENT)["ceilings"]
    assert ceilings["copy_gbps"] > 0 and records.read(out / plans.END_TO_END)["ceilings"] == ceilings
    assert "1 passed" in (out / plans.CORRECTNESS).read_text()
    rows = records.read(out / plans.END_TO_END)["cases"]
    assert len(rows) == 2 and all(row["ok"] and row["median_ms"] > 0 for row in rows)
    [decode] = [row for row in rows if row["provider"] == "auto" and "decode" in row["name"]]
    assert decode["kernels"]["wall_us"] > 0 and any("mm" in kernel["name"] for kernel in decode["kernels"]["kernels"])
    assert "### Kernels of end-to-end/tiny-decode-b1-float32, auto" in (out / plans.SUMMARY).read_text()
