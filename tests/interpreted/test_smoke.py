"""The smoke test of a GPU run: it launches every kernel that there is, and says what is wrong, breaks or was found by a tool."""

import re
from pathlib import Path

import pytest
import torch

from bench.gpu import smoke
from tests.interpreted.conftest import INTERPRETED

KERNELS = Path(__file__).parents[2] / "kernels"


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the command itself is run")
def test_every_kernel_is_launched_and_right(monkeypatch, capsys):
    from triton.runtime import interpreter

    launched, launch = set(), interpreter.GridExecutor.__call__

    def counted(self, *args, **kwargs):
        launched.add(self.fn.__name__)
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    assert smoke.smoke("cpu") == 0, capsys.readouterr().out
    out = capsys.readouterr().out
    assert out.count(": right (") == len(smoke.LAUNCHES) == len(out.splitlines())
    defined = {name for path in KERNELS.glob("*.py") for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)}
    assert launched == defined and len(defined) == 7


def test_what_is_wrong_is_said_and_the_others_go_on(monkeypatch, capsys):
    def wrong(dtype, backend):
        return [torch.ones(3, dtype=dtype) * (2 if backend == "triton" else 1)]

    def broken(dtype, backend):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(smoke, "LAUNCHES", {"wrong": wrong, "broken": broken, "fine": lambda dtype, backend: [torch.ones(3, dtype=dtype)]})
    assert not smoke.launch_all("cpu")
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("wrong, float32: WRONG: AssertionError: relative to the largest value")
    assert second.startswith("broken, float32: WRONG: RuntimeError: an illegal memory access") and third.startswith("fine, float32: right")


TOOL = """#!/bin/sh
echo "$@" $PYTORCH_NO_CUDA_MEMORY_CACHING
case "$*" in
    *memcheck*) echo "Invalid __global__ write of size 4 bytes"; exit 99 ;;
    *) SLEEP exit 0 ;;
esac
"""


@pytest.mark.parametrize("slow", [False, True], ids=["quick", "slow"])
def test_tools_run_beside_each_other_and_are_quoted(slow, tmp_path, monkeypatch, capsys):
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text(TOOL.replace("SLEEP", "exec sleep 60;" if slow else ""))
    sanitizer.chmod(0o755)
    monkeypatch.setattr(smoke, "launch_all", lambda device: True)
    monkeypatch.setattr(smoke.shutil, "which", lambda name: str(sanitizer))
    assert smoke.smoke("cuda", seconds=1.0 if slow else 30.0) == 1
    out = capsys.readouterr().out
    assert "=== memcheck: FOUND what follows" in out and "Invalid __global__ write" in out
    assert "--tool memcheck --error-exitcode 99" in out and "bench smoke --device cuda --once 1" in out
    assert ("=== racecheck: no end within 1 s" if slow else "=== racecheck: nothing found") in out


def test_without_the_sanitizer(monkeypatch, capsys):
    monkeypatch.setattr(smoke, "launch_all", lambda device: True)
    monkeypatch.setattr(smoke.shutil, "which", lambda name: None)
    assert smoke.smoke("cuda") == 0
    assert "compute-sanitizer is not here" in capsys.readouterr().out
