"""The smoke test of a GPU run launches every kernel, and says what is wrong, what breaks and what a tool found."""

import contextlib
import re
import time
from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.gpu import smoke
from tests.interpreting import INTERPRETED

KERNELS = Path(__file__).parents[2] / "kernels"


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the command itself is run")
def test_every_kernel_is_launched_and_right(monkeypatch, capsys):
    from triton.runtime import interpreter

    launched, launch = set(), interpreter.GridExecutor.__call__

    def counted(self, *args, **kwargs):
        launched.add(self.fn.__name__)
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    assert main(["smoke", "--device", "cpu"]) == 0, capsys.readouterr().out
    out = capsys.readouterr().out
    assert out.count(": right (") == len(smoke.LAUNCHES) == len(out.splitlines())
    sources = "\n".join(path.read_text() for path in KERNELS.glob("*.py"))
    defined = set(re.findall(r"^def (\w+_kernel)\(", sources, re.MULTILINE))
    assert launched == defined and len(defined) >= 7


def same(dtype):
    return torch.ones(3, dtype=dtype)


def test_what_is_wrong_is_said_and_the_others_go_on(monkeypatch, capsys):
    def broken(x, backend):
        raise RuntimeError("no kernel image is available")

    launches = {
        "wrong": smoke.Launch(same, lambda x, backend: [x * 2 if backend == "triton" else x]),
        "broken": smoke.Launch(same, broken),
        "fine": smoke.Launch(same, lambda x, backend: [x]),
    }
    monkeypatch.setattr(smoke, "LAUNCHES", launches)
    assert not smoke.launch_all("cpu")
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("wrong, float32: WRONG: AssertionError: relative to the largest value")
    assert second.startswith("broken, float32: WRONG: RuntimeError: no kernel image")
    assert third.startswith("fine, float32: right")


def test_what_a_broken_context_takes_with_it_is_not_called_wrong(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    # On this device, which has two dtypes to go through, nothing works any more.
    launches = {"first": smoke.Launch(broken, broken), "second": smoke.Launch(same, lambda x, backend: [x])}
    monkeypatch.setattr(smoke, "LAUNCHES", launches)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    monkeypatch.setattr(torch, "device", lambda device: contextlib.nullcontext())
    assert not smoke.launch_all("cuda")
    first, lost = capsys.readouterr().out.splitlines()
    assert first.startswith("first, bfloat16: WRONG: RuntimeError: CUDA error")
    assert lost.endswith("not launched: first in float32, second in bfloat16, second in float32")
    assert "context is lost" in lost


def test_inputs_are_the_same_numbers_in_float64():
    mining, queries, pyramid = inputs = smoke.LAUNCHES["patch_mining"].make(torch.bfloat16)
    wide = smoke._widened(inputs)
    assert torch.equal(wide[1], queries.double()) and wide[1].dtype == torch.float64
    assert all(torch.equal(a, b.double()) for a, b in zip(wide[2], pyramid))
    weight = mining.vlm_uni_query_projector[1].weight
    assert weight.dtype == torch.bfloat16 and torch.equal(wide[0].vlm_uni_query_projector[1].weight, weight.double())


TOOL = """#!/bin/sh
echo "$@" $PYTORCH_NO_CUDA_MEMORY_CACHING
case "$*" in
    *memcheck*) echo "Invalid __global__ write of size 4 bytes at MEMCHECK+0x10"; exit 99 ;;
    *) RACECHECK ;;
esac
"""


@pytest.mark.parametrize(
    ("memcheck", "racecheck", "status", "told"),
    [
        (
            "dwconv_norm_fwd_kernel",
            "exit 0",
            1,
            ("memcheck: FOUND something in dwconv_norm_fwd_kernel", "racecheck: nothing found"),
        ),
        (
            "gemm_of_a_library",
            "exit 3",
            0,
            ("memcheck: found something, but not in our kernels", "racecheck: not checked, exit status 3"),
        ),
        (
            "gemm_of_a_library",
            "exec sleep 60",
            0,
            ("memcheck: found something", "racecheck: not checked to the end, no time was left"),
        ),
    ],
)
def test_tools_run_beside_each_other_and_are_quoted(memcheck, racecheck, status, told, tmp_path, monkeypatch, capsys):
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text(TOOL.replace("MEMCHECK", memcheck).replace("RACECHECK", racecheck))
    sanitizer.chmod(0o755)
    monkeypatch.setattr(smoke, "launch_all", lambda device: True)
    monkeypatch.setattr(smoke.shutil, "which", lambda name, path: str(sanitizer))
    assert smoke.smoke("cuda", seconds=3.0 if "sleep" in racecheck else 30.0) == status
    out = capsys.readouterr().out
    assert all(f"=== {line}" in out for line in told)
    assert "Invalid __global__ write" in out and "--tool memcheck --report-api-errors no --error-exitcode 99" in out
    assert "bench smoke --device cuda --once 1" in out


def test_what_tools_have_written_is_kept_where_the_step_is_cut_off(tmp_path, monkeypatch, capsys):
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text("#!/bin/sh\necho so far so good\nexec sleep 60\n")
    sanitizer.chmod(0o755)

    def cut_off(device):
        time.sleep(0.5)
        raise KeyboardInterrupt

    monkeypatch.setattr(smoke, "launch_all", cut_off)
    monkeypatch.setattr(smoke.shutil, "which", lambda name, path: str(sanitizer))
    with pytest.raises(KeyboardInterrupt):
        smoke.smoke("cuda")
    assert capsys.readouterr().out.count("so far:\nso far so good") == 2


def test_without_the_sanitizer(monkeypatch, capsys):
    monkeypatch.setattr(smoke, "launch_all", lambda device: True)
    monkeypatch.setattr(smoke.shutil, "which", lambda name, path: None)
    assert smoke.smoke("cuda") == 0
    assert "since compute-sanitizer is not here" in capsys.readouterr().out
