"""Every kernel launched once on a small input: is it right, does it stay within its memory, do its threads race?

The launches are held against the float64 result here. At the same time they run under compute-sanitizer's memcheck and
racecheck, each in a process of its own that does no more than launch the kernels. No model is imported, so that it is
done in seconds.
"""

import copy
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mg_fast.testing.tolerances import assert_accurate, ieee_float32

from .. import gpu_timing
from ..cases import operation_modules
from ..cases.operations import Launch
from ..registry import dtype_name

ROOT = Path(__file__).parents[2]
TOOLS = ("memcheck", "racecheck")
# The exit status of a process in which a tool found something.
FOUND = 99

# The launches of every operation, which stand beside its cases, by the name that is printed.
LAUNCHES: dict[str, Launch] = {
    name: launch for module in operation_modules().values() for name, launch in module.launches().items()
}


def launch_all(device: str, *, checked: bool = True) -> bool:
    """Launches every kernel, prints a line for each, and returns whether all are right.

    Where it is not `checked`, nothing but the kernels runs; otherwise results are held against those in float64, and
    must have the same bits again if the launch is repeatable.
    """
    ieee_float32()
    right = True
    # Interpreted, one dtype takes long enough, and everything runs in one thread, which has nothing to race with.
    some = slice(-1, None) if device == "cpu" else slice(None)
    left = [(name, dtype) for name, launch in LAUNCHES.items() for dtype in launch.dtypes[some]]
    while left:
        (name, dtype), began = left.pop(0), time.perf_counter()
        try:
            with torch.device(device):
                told = _check(LAUNCHES[name], dtype, device) if checked else _launch(LAUNCHES[name], dtype)
        except Exception as error:
            # A kernel that breaks must not hide the others.
            first_line = str(error).splitlines()[0][:300] if str(error) else ""
            right, told = False, f"WRONG: {type(error).__name__}: {first_line}"
        print(f"{name}, {dtype_name(dtype)}: {told} ({time.perf_counter() - began:.1f} s)", flush=True)
        if not right and device == "cuda" and (lost := gpu_timing.why_lost()):
            never = ", ".join(f"{name} in {dtype_name(dtype)}" for name, dtype in left)
            print(f"{lost}; not launched: {never or 'none'}", flush=True)
            break
    return right


def _launch(launch: Launch, dtype: torch.dtype) -> str:
    torch.manual_seed(0)
    launch.run(launch.make(dtype), "triton")
    return "launched"


def _check(launch: Launch, dtype: torch.dtype, device: str) -> str:
    torch.manual_seed(0)
    inputs = launch.make(dtype)
    outputs, plain = launch.run(inputs, "triton"), launch.run(inputs, "reference")
    for out, baseline, truth in zip(outputs, plain, launch.run(_widened(inputs), "reference"), strict=True):
        assert out.isfinite().all(), "it is not finite"
        assert_accurate(out, baseline, truth)
    if device != "cpu" and launch.repeatable:
        same = gpu_timing.same_bits(lambda: launch.run(inputs, "triton"), outputs)
        assert same, "other bits when it was called again"
    return "right"


def _widened(inputs: Any) -> Any:
    """The very same numbers in float64; whole numbers stay as they are."""
    if isinstance(inputs, torch.Tensor):
        return inputs.double() if inputs.is_floating_point() else inputs
    if isinstance(inputs, (list, tuple)):
        return [_widened(part) for part in inputs]
    return copy.deepcopy(inputs).double()


def smoke(device: str, *, once: bool = False, seconds: float = 50.0) -> int:
    """Launches every kernel here and under each tool.

    If a tool is not installed, cannot run or does not end in time, the output says what was not checked. That is not a
    failure.

    Returns:
        The exit status: 0 where all is right and no tool found anything in our kernels.
    """
    if once:
        return int(not launch_all(device, checked=False))
    began = time.monotonic()
    with _tools(device) as running:
        right = launch_all(device)
        for tool, (process, output) in running.items():
            told, clean = _ended(process, began + seconds - time.monotonic(), output)
            right &= clean
            print(f"=== {tool}: {told}\n{output.read_text(errors='replace')}", flush=True)
    return int(not right)


@contextmanager
def _tools(device: str) -> Iterator[dict[str, tuple[subprocess.Popen, Path]]]:
    """Starts the tools, and prints what they have written so far where the block is left early."""
    places = [os.environ.get("PATH", ""), *map(str, sorted(Path("/usr/local").glob("cuda*/bin"), reverse=True))]
    sanitizer = shutil.which("compute-sanitizer", path=os.pathsep.join(places)) if device == "cuda" else None
    if sanitizer is None:
        if device == "cuda":
            print("not checked: memory accesses and races, since compute-sanitizer is not here", flush=True)
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="mg_fast_smoke_") as folder:
        running = {tool: (_start(sanitizer, tool, Path(folder) / tool), Path(folder) / tool) for tool in TOOLS}
        try:
            yield running
        except BaseException:
            for tool, (_, output) in running.items():
                print(f"=== {tool}, so far:\n{output.read_text(errors='replace')}", flush=True)
            raise
        finally:
            for process, _ in running.values():
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


def _start(sanitizer: str, tool: str, output: Path) -> subprocess.Popen:
    words = [sanitizer, "--tool", tool, "--report-api-errors", "no", "--error-exitcode", str(FOUND)]
    words += [sys.executable, "-m", "bench", "smoke", "--device", "cuda", "--once"]
    # Otherwise torch would take large blocks and cut them up, and an access beyond a tensor's end would go unseen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with output.open("wb") as to:
        # It has a process group of its own, as the tool starts another process.
        return subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=to, stderr=subprocess.STDOUT, preexec_fn=os.setpgrp
        )


def _ended(process: subprocess.Popen, left: float, output: Path) -> tuple[str, bool]:
    """How a tool ended, in words, and whether it found nothing in our kernels."""
    try:
        status = process.wait(max(0.0, left))
    except subprocess.TimeoutExpired:
        return "not checked to the end, no time was left", True
    if status != FOUND:
        return "nothing found" if status == 0 else f"not checked, exit status {status}", True
    kernels = sorted(set(re.findall(r"\b\w+_(?:fwd|bwd)_kernel\b", output.read_text(errors="replace"))))
    if not kernels:
        return "found something, but not in our kernels", True
    return f"FOUND something in {', '.join(kernels)}", False
