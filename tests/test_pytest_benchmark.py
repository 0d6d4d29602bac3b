"""The benchmark's cases under pytest-benchmark."""

import json
import os
import subprocess
import sys

import pytest

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
    assert list(timed) == [f"test_case[dwconv_norm/768-stage3-b1-float32-{provider}]" for provider in ("reference", "torch")]
    for result in timed.values():
        assert result["group"] == "dwconv_norm/768-stage3-b1-float32" and result["stats"]["median"] > 0
        assert result["extra_info"]["ok"] is True and result["extra_info"]["relative_error"] < 1e-5


def test_unknown_case():
    done = bench("--cases", "no/such")
    assert done.returncode != 0 and "no case is called 'no/such'" in done.stderr + done.stdout


def test_default_is_what_is_quick():
    done = bench("--collect-only")
    names = [line for line in done.stdout.splitlines() if "::" in line]
    assert names == [f"bench/test_cases.py::test_case[mining/768-b1-float32-{name}]" for name in ("reference", "torch", "triton")]
