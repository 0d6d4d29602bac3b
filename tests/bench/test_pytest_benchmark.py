"""The benchmark's cases under pytest-benchmark."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from bench import test_cases as under_pytest
from bench.cases.forced_answer import ANSWER
from tests.paths import ROOT

pytest.importorskip("pytest_benchmark")

pytestmark = pytest.mark.slow


def bench(*words):
    # The plug-in times nothing in a process that shares the tests with other processes, and this may be one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment |= {"TRITON_INTERPRET": "0"}
    words = [sys.executable, "-m", "pytest", "bench", "-p", "no:cacheprovider", "--bench-device", "cpu", *words]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The output of a run of two cases, the records in the plug-in's own file, and the seconds that the run took."""
    path, began = tmp_path_factory.mktemp("benchmark") / "kept.json", time.perf_counter()
    words = ["--cases", "dwconv_norm/768-stage3-b1-float32", "end-to-end/tiny-decode-b1-float32", "-k"]
    words += ["dwconv_norm and not compiled or tiny and reference"]
    done = bench(*words, "--benchmark-max-time=0.01", f"--benchmark-json={path}")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(path.read_text())["benchmarks"], time.perf_counter() - began


def test_right_providers_are_timed_and_kept(kept):
    """A provider that cannot run here is skipped with its reason, and the plug-in writes its own file."""
    printed, results, _ = kept
    assert "3 passed" in printed and "1 skipped" in printed and "not here" in printed
    timed = [result for result in results if result["group"] == "dwconv_norm/768-stage3-b1-float32"]
    names = [f"test_case[dwconv_norm/768-stage3-b1-float32-{provider}]" for provider in ("reference", "torch")]
    assert [result["name"] for result in timed] == names
    for result in timed:
        assert result["stats"]["median"] > 0
        assert result["extra_info"]["ok"] is True and result["extra_info"]["relative_error"] < 1e-5


def test_a_case_that_takes_its_time_itself_is_timed_by_that(kept):
    """One more token is a small part of the call, which gives a whole answer."""
    _, results, spent = kept
    [result] = [result for result in results if result["group"] == "end-to-end/tiny-decode-b1-float32"]
    assert result["stats"]["rounds"] == under_pytest.ROUNDS and 0 < result["stats"]["median"] < spent / (
        under_pytest.ROUNDS * (ANSWER - 1)
    )


def test_the_clock_goes_on_by_what_calls_say():
    clock = under_pytest.OwnClock()
    clock.advance(lambda: (None, [7.0]))
    clock.advance(lambda: (None, [1.0, 500.0, 3.0]))
    assert clock() == pytest.approx(0.010)


def chosen(patterns):
    """The ids of the tests that are collected on a CPU."""
    found, options = [], {"--cases": patterns, "--bench-device": "cpu"}
    config = SimpleNamespace(getoption=options.get)
    metafunc = SimpleNamespace(config=config, parametrize=lambda names, params: found.extend(params))
    under_pytest.pytest_generate_tests(metafunc)
    return [param.id for param in found]


def test_unknown_case():
    with pytest.raises(pytest.UsageError, match="no case is called 'no/such'"):
        chosen(["no/such"])


def test_default_is_what_is_quick():
    assert chosen([]) == [f"patch_mining/768-b1-float32-{name}" for name in ("reference", "torch", "triton")]
