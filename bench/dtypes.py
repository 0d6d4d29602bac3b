"""`python -m bench dtypes`: the time of a CPU's products in 16 bits against float32, in the models' shapes.

`mg_fast.runtime.cpu_dtype` names factors from the file that this command writes.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from mg_fast.testing.environment import environment

from . import records
from .registry import dtype_name

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TURNS = 7

# Rows, inputs and outputs of linear layers of Gemma-2B, and of both towers of every published model.
PRODUCTS = {
    "language model, a prompt": (640, 2048, 2048),
    "language model, one token": (1, 2048, 16384),
    "low-resolution tower": (577, 1024, 4096),
    "high-resolution tower": (2304, 768, 3072),
}
CONVOLUTION = "high-resolution tower, depthwise convolution"


def measure(out: Path) -> None:
    """Measures all products on one thread, prints them, and writes the document."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    document = {**environment(), "capability": torch.backends.cpu.get_cpu_capability(), "turns": TURNS}
    document["products"] = []
    for name in (*PRODUCTS, CONVOLUTION):
        document["products"].append(row := _measure(name))
        print(*(f"{key}: {value}" for key, value in row.items()), sep="  ", flush=True)
    # If something else kept the machine busy meanwhile, it shows in the load at the end.
    document["load_after"] = environment()["load"]
    records.write(out, document)


def _measure(name: str) -> dict:
    """Medians by dtype, in milliseconds and as ratios to float32 within the turns; the dtypes take turns."""
    works = {dtype: _work(name, dtype) for dtype in DTYPES}
    milliseconds = {dtype: [] for dtype in DTYPES}
    for turn in range(TURNS + 1):
        for dtype, run in works.items():
            began = time.perf_counter()
            run()
            # The first turn only warms up.
            if turn:
                milliseconds[dtype].append(1000 * (time.perf_counter() - began))
    row = {"name": name, "shape": PRODUCTS.get(name)}
    for dtype, times in milliseconds.items():
        ratios = [own / single for own, single in zip(times, milliseconds[torch.float32])]
        ms, ratio = round(statistics.median(times), 3), round(statistics.median(ratios), 2)
        row[dtype_name(dtype)] = {"median_ms": ms, "times_float32": ratio}
    return row


def _work(name: str, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """A function that computes one of the products."""
    if name == CONVOLUTION:
        x = torch.randn(1, 768, 48, 48).to(dtype).contiguous(memory_format=torch.channels_last)
        weight, bias = torch.randn(768, 1, 7, 7).to(dtype), torch.randn(768).to(dtype)
        return lambda: F.conv2d(x, weight, bias, padding=3, groups=768)
    rows, inputs, outputs = PRODUCTS[name]
    x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    return lambda: F.linear(x, weight)
