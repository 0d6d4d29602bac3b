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

from .. import measure
from ..cases import operation_modules
from ..cases.operations import Launch

ROOT = Path(__file__).parents[2]
TOOLS = ("memcheck", "racecheck")
# for all of it
SECONDS = 50.0
# exit status of a process in which a tool found something
FOUND = 99
DTYPES = (torch.bfloat16, torch.float32)


# by the name that is printed: those of every operation, beside its cases
LAUNCHES: dict[str, Launch] = {
    name: launch for module in operation_modules() for name, launch in module.launches().items()
}


def launch_all(device: str, *, checked: bool = True) -> bool:
    """Launches every kernel, prints a line for each, and returns whether all are right.

    Args:
        checked: hold the results against float64's, and call again to see the same bits; without, nothing but the
            kernels runs.
    """
    ieee_float32()
    right = True
    # interpreted, one dtype takes long enough; and what runs in one thread has nothing to race with
    dtypes = DTYPES[-1:] if device == "cpu" else DTYPES
    left = [(name, dtype) for name in LAUNCHES for dtype in dtypes]
    while left:
        (name, dtype), began = left.pop(0), time.perf_counter()
        try:
            with torch.device(device):
                told = _check(LAUNCHES[name], dtype, device) if checked else _launch(LAUNCHES[name], dtype)
        except Exception as error:
            # one that breaks must not hide the others
            right, told = (
                False,
                f"WRONG: {type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}",
            )
        print(f"{name}, {_name(dtype)}: {told} ({time.perf_counter() - began:.1f} s)", flush=True)
        if not right and device == "cuda" and (lost := measure.why_lost()):
            print(
                f"{lost}; not launched: {', '.join(f'{name} in {_name(dtype)}' for name, dtype in left) or 'none'}",
                flush=True,
            )
            break
    return right


def _launch(launch: Launch, dtype: torch.dtype) -> str:
    torch.manual_seed(0)
    launch.run(launch.make(dtype), "triton")
    return "launched"


def _check(launch: Launch, dtype: torch.dtype, device: str) -> str:
    torch.manual_seed(0)
    inputs = launch.make(dtype)
    ours, plain = launch.run(inputs, "triton"), launch.run(inputs, "reference")
    for found, theirs, truth in zip(ours, plain, launch.run(_widened(inputs), "reference"), strict=True):
        assert found.isfinite().all(), "it is not finite"
        assert_accurate(found, theirs, truth)
    if device != "cpu":
        assert measure.same_bits(lambda: launch.run(inputs, "triton"), ours), "other bits when it was called again"
    return "right"


def _widened(inputs: Any) -> Any:
    """The very same numbers in float64; whole numbers stay as they are."""
    if isinstance(inputs, torch.Tensor):
        return inputs.double() if inputs.is_floating_point() else inputs
    if isinstance(inputs, (list, tuple)):
        return [_widened(part) for part in inputs]
    return copy.deepcopy(inputs).double()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def smoke(device: str, *, once: bool = False, seconds: float = SECONDS) -> int:
    """Launches every kernel here and under each tool; the exit status is 0 where all is right and no tool found
    anything in our kernels.

    A tool that is not here, cannot run here or does not end in time leaves something unchecked; that is said, and is no
    failure.

    Args:
        once: launch in this process alone, and check nothing.
        seconds: for all of it.
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
    # torch would otherwise take large blocks and cut them up, within which an access beyond a tensor's end goes unseen
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with output.open("wb") as to:
        # a group of its own, as the tool starts another process
        return subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=to, stderr=subprocess.STDOUT, preexec_fn=os.setpgrp
        )


def _ended(process: subprocess.Popen, left: float, output: Path) -> tuple[str, bool]:
    """What a tool came to, in words, and whether it found nothing in our kernels."""
    try:
        status = process.wait(max(0.0, left))
    except subprocess.TimeoutExpired:
        return "not checked to the end, no time was left", True
    if status == FOUND:
        ours = sorted(set(re.findall(r"\b\w+_(?:fwd|bwd)_kernel\b", output.read_text(errors="replace"))))
        return (
            (f"FOUND something in {', '.join(ours)}", False)
            if ours
            else ("found something, but not in our kernels", True)
        )
    return ("nothing found", True) if status == 0 else (f"not checked, exit status {status}", True)
