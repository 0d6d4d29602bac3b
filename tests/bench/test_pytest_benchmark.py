"""The benchmark's cases under pytest-benchmark."""

import json
import os
import subprocess
import sys
import time

import pytest

from bench.cases.end_to_end import ANSWER
from bench.test_cases import ROUNDS, OwnClock
from tests.paths import ROOT

pytest.importorskip("pytest_benchmark")


def bench(*words):
    # the plug-in times nothing in a process that shares the tests with others, as this one may
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment |= {"TRITON_INTERPRET": "0"}
    words = [sys.executable, "-m", "pytest", "bench", "-p", "no:cacheprovider", "--bench-device", "cpu", *words]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_right_providers_are_timed_and_kept(tmp_path):
    """One that cannot run here is skipped with its reason, and the plug-in writes its own file."""
    kept = tmp_path / "kept.json"
    words = ["--cases", "dwconv_norm/768-stage3-b1-float32", "-k", "not compiled"]
    done = bench(*words, "--benchmark-max-time=0.01", f"--benchmark-json={kept}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout and "1 skipped" in done.stdout and "not here" in done.stdout
    timed = {result["name"]: result for result in json.loads(kept.read_text())["benchmarks"]}
    assert list(timed) == [
        f"test_case[dwconv_norm/768-stage3-b1-float32-{provider}]" for provider in ("reference", "torch")
    ]
    for result in timed.values():
        assert result["group"] == "dwconv_norm/768-stage3-b1-float32" and result["stats"]["median"] > 0
        assert result["extra_info"]["ok"] is True and result["extra_info"]["relative_error"] < 1e-5


def test_a_case_that_takes_its_time_itself_is_timed_by_that(tmp_path):
    """One more token is a small part of the call, which answers whole."""
    kept = tmp_path / "kept.json"
    began = time.perf_counter()
    done = bench("--cases", "end-to-end/tiny-decode-b1-float32", "-k", "reference", f"--benchmark-json={kept}")
    spent = time.perf_counter() - began
    assert done.returncode == 0, done.stdout + done.stderr
    [result] = json.loads(kept.read_text())["benchmarks"]
    assert result["stats"]["rounds"] == ROUNDS and 0 < result["stats"]["median"] < spent / (ROUNDS * (ANSWER - 1))


def test_the_clock_goes_on_by_what_calls_say():
    clock = OwnClock()
    clock.advance(lambda: (None, [7.0]))
    clock.advance(lambda: (None, [1.0, 500.0, 3.0]))
    assert clock() == pytest.approx(0.010)


def test_unknown_case():
    done = bench("--cases", "no/such")
    assert done.returncode != 0 and "no case is called 'no/such'" in done.stderr + done.stdout


def test_default_is_what_is_quick():
    done = bench("--collect-only")
    names = [line for line in done.stdout.splitlines() if "::" in line]
    assert names == [
        f"bench/test_cases.py::test_case[patch_mining/768-b1-float32-{name}]"
        for name in ("reference", "torch", "triton")
    ]
