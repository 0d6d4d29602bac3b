"""Every kernel launched once on a small input: is it right, does it stay within its memory, do its threads race?

The launches are held against the float64 result here, and repeated under compute-sanitizer's memcheck and racecheck in processes of their
own, side by side. It imports no model, so that it is done in seconds.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mg_fast import ops
from mg_fast.modules import PatchInfoMining
from tests.tolerances import assert_accurate, ieee_float32

from .. import measure

ROOT = Path(__file__).parents[2]
TOOLS = ("memcheck", "racecheck")
# of a process under a tool: about ten times what it takes by itself
TOOL_SECONDS = 40.0
# exit status of a process in which a tool found something
FOUND = 99
DTYPES = (torch.bfloat16, torch.float32)

# from a dtype and a backend to tensors
Launch = Callable[[torch.dtype, str], list[torch.Tensor]]


def _mining(grid: int) -> Launch:
    """The pooling kernel, forward and backward; with a grid of 2 its global view, too."""

    def launch(dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        mining = PatchInfoMining(32, (16, 32)).to(dtype)
        # windows of 4 x 4 pixels of the first map
        views = 1 if grid == 1 else 5
        queries = torch.randn(1, views, 1, 32).to(dtype).requires_grad_()
        pyramid = [torch.randn(1, n * grid, n * grid, c).to(dtype).requires_grad_() for n, c in ((4, 16), (2, 32))]
        mined = mining(queries, pyramid, grid=grid, backend=backend)
        mined.backward(torch.ones_like(mined))
        return [mined.detach(), queries.grad, *(level.grad for level in pyramid)]

    return launch


def _convolution(dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    tensors = [torch.randn(shape).to(dtype) for shape in ((1, 5, 6, 64), (49, 64), (64,), (64,), (64,))]
    return [ops.dwconv_norm(*tensors, backend=backend)]


def _expansion(dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    tensors = [(torch.randn(shape) / 8).to(dtype) for shape in ((20, 64), (128, 64), (128,))]
    return [ops.linear_gelu(*tensors, backend=backend)]


def _contraction(dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    tensors = [(torch.randn(shape) / 8).to(dtype) for shape in ((20, 128), (64, 128), (64,), (20, 64))]
    return [ops.linear_residual(*tensors, backend=backend)]


def _resize(dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
    """Both launches of a resize; its numbers are whole, whatever the dtype."""
    torch.manual_seed(0)
    picture = torch.randint(0, 256, (37, 53, 3), dtype=torch.uint8)
    return list(ops.dual_resize(picture, 48, 16, grid=2, global_view=True, backend=backend))


LAUNCHES: dict[str, Launch] = {
    "patch_mining": _mining(1),
    "patch_mining in HD": _mining(2),
    "dwconv_norm": _convolution,
    "linear_gelu": _expansion,
    "linear_residual": _contraction,
    "dual_resize": _resize,
}


def launch_all(device: str) -> bool:
    """Launches every kernel, prints a line for each, and returns whether all are right."""
    ieee_float32()
    right = True
    # interpreted, one dtype takes long enough; and what runs in one thread has nothing to race with
    interpreted = device == "cpu"
    for name, launch in LAUNCHES.items():
        for dtype in DTYPES[-1:] if interpreted else DTYPES:
            began = time.perf_counter()
            try:
                with torch.device(device):
                    ours, plain, exact = (launch(*form) for form in ((dtype, "triton"), (dtype, "reference"), (torch.float64, "reference")))
                    for found, theirs, truth in zip(ours, plain, exact, strict=True):
                        assert found.isfinite().all(), "it is not finite"
                        assert_accurate(found, theirs, truth)
                    again = interpreted or measure.same_bits(lambda launch=launch, dtype=dtype: launch(dtype, "triton"), ours, 2)
                    assert again, "other bits when it was called again"
                told = "right"
            except Exception as error:
                # one that breaks must not hide the others
                right, told = False, f"WRONG: {type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
            print(f"{name}, {str(dtype).removeprefix('torch.')}: {told} ({time.perf_counter() - began:.1f} s)", flush=True)
    return right


def smoke(device: str, *, once: bool = False, seconds: float = TOOL_SECONDS) -> int:
    """Launches every kernel here, then under each tool; the exit status is 0 where all is right and no tool found anything."""
    right = launch_all(device)
    if once or device != "cuda":
        return int(not right)
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer is not here: memory accesses and races were not checked", flush=True)
        return int(not right)
    with tempfile.TemporaryDirectory(prefix="mg_fast_smoke_") as folder:
        began = time.monotonic()
        running = {tool: _start(sanitizer, tool, Path(folder) / tool) for tool in TOOLS}
        for tool, process in running.items():
            told = _ended(process, began + seconds - time.monotonic(), seconds)
            print(f"=== {tool}: {told}\n{(Path(folder) / tool).read_text(errors='replace')}", flush=True)
            right &= process.returncode == 0
    return int(not right)


def _start(sanitizer: str, tool: str, output: Path) -> subprocess.Popen:
    words = [
        sanitizer,
        "--tool",
        tool,
        "--error-exitcode",
        str(FOUND),
        sys.executable,
        "-m",
        "bench",
        "smoke",
        "--device",
        "cuda",
        "--once",
    ]
    # torch would otherwise take large blocks and cut them up, within which an access beyond a tensor's end goes unseen
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with output.open("wb") as to:
        return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=to, stderr=subprocess.STDOUT)


def _ended(process: subprocess.Popen, left: float, limit: float) -> str:
    try:
        status = process.wait(max(0.0, left))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return f"no end within {limit:.0f} s"
    return {0: "nothing found", FOUND: "FOUND what follows"}.get(status, f"exit status {status}")
