"""Predicted times of the library's operators, by a roofline of each launch. Everything that is assumed stands here.

These times are lower bounds for operators that fill the GPU: a product reaches the rate of a large one, as far as
its programs do, and everything else the rate of a copy. No GPU has measured them within a model.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..costs.gpus import find_gpu
from ..counting import CountedCall
from .predict import Device

# Microseconds between two launches of a CUDA graph. Together with SHORTEST_US it is about what 1,300 launches of a
# decode step would have to take for the 175 tokens per second that are expected of it.
GAP_US = 1.0
# The time of the shortest kernel, in microseconds.
SHORTEST_US = 1.0
# Rows and columns of the result that one program of a product may make. The best is taken.
TILES = ((128, 256), (128, 128), (64, 128))
# FLOP of attention in 16 bits: FlashAttention-2 reaches 35 percent of an H100's rate (arXiv 2407.08608).
ATTENTION_TFLOPS = 0.35 * find_gpu("h200").sheet.matmul_tflops["bfloat16"]
# The share of a copy's rate at which cuDNN's depthwise convolution moves its bytes: public measurements of 7x7 and 5x5
# filters, on several GPUs, lie between 10 and 30 percent.
DEPTHWISE_SHARE = 0.2

# The operators of matrix products, with the place of the first factor among their tensors.
PRODUCTS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::baddbmm": 1}
CONVOLUTION, ATTENTION = "aten::convolution", "aten::scaled_dot_product_attention"


@dataclass(frozen=True)
class LaunchTime:
    """The time of a launch in microseconds, without the gap before it.

    Attributes:
        binds: what takes it: "products", "attention" or "convolution" for FLOP, "memory" for bytes, or "short kernels"
            where there is too little of either.
    """

    us: float
    binds: str


def product_us(rows: int, terms: int, columns: int, device: Device, batch: int = 1) -> float:
    """The time of the FLOP of [rows, terms] x [terms, columns], without bytes.

    Programs run in whole rounds over all multiprocessors, and take as long at the edge of a matrix as elsewhere. Where
    there are too few programs for one round, several share the terms of one tile.
    """
    flop_per_us = device.tensor_tflops * 1e6 / device.multiprocessors

    def time(height: int, width: int) -> float:
        programs = batch * math.ceil(rows / height) * math.ceil(columns / width)
        parts = max(1, min(device.multiprocessors // programs, terms))
        rounds = math.ceil(programs * parts / device.multiprocessors)
        return rounds * 2 * height * width * math.ceil(terms / parts) / flop_per_us

    return min(time(*tile) for tile in TILES)


def _computing(call: CountedCall, device: Device) -> LaunchTime:
    """The time of a call's FLOP."""
    if call.name in PRODUCTS:
        (*batch, rows, terms), (*_, columns) = call.inputs[PRODUCTS[call.name] :][:2]
        return LaunchTime(product_us(rows, terms, columns, device, math.prod(batch)), "products")
    if call.name == CONVOLUTION and not is_depthwise(call):
        (_, channels, *_), (outputs, *window) = call.inputs[:2]
        rows = math.prod(call.outputs[0]) // outputs
        return LaunchTime(product_us(rows, math.prod(window), outputs, device), "products")
    if call.name == ATTENTION:
        return LaunchTime(call.cost.flop / ATTENTION_TFLOPS / 1e6, "attention")
    return LaunchTime(0.0, "memory")


def is_depthwise(call: CountedCall) -> bool:
    """Whether a convolution has filters of one channel each."""
    return call.name == CONVOLUTION and call.inputs[1][1] == 1 < call.inputs[0][1]


def is_product(call: CountedCall) -> bool:
    """Whether a call is one that torch.compile hands to a library."""
    return call.name in (*PRODUCTS, CONVOLUTION, ATTENTION)


def launch_time(call: CountedCall, device: Device) -> LaunchTime:
    """The time of a call of the library, the largest of its FLOP, its bytes, and the shortest kernel."""
    gbps = device.memory_gbps * (DEPTHWISE_SHARE if is_depthwise(call) else 1)
    times = [
        _computing(call, device),
        LaunchTime(call.cost.bytes / gbps / 1e3, "convolution" if is_depthwise(call) else "memory"),
        LaunchTime(SHORTEST_US, "short kernels"),
    ]
    return max(times, key=lambda time: time.us)


def compiled(calls: Iterable[CountedCall]) -> list[CountedCall]:
    """The calls as torch.compile would launch them: what lies between two products is one launch.

    It moves as many bytes as the largest of the launches that it takes the place of. This is the best that a compiler
    can do; sums over a row often end a kernel.
    """
    found: list[CountedCall] = []
    for call in calls:
        if not found or is_product(call) or is_product(found[-1]):
            found.append(call)
        elif call.cost.bytes > found[-1].cost.bytes:
            found[-1] = call
    return found


def total_us(calls: Sequence[CountedCall], device: Device) -> float:
    """The time of calls of the library one after the other, with a gap between two launches."""
    times = [launch_time(call, device).us for call in calls]
    return sum(times) + GAP_US * (len(times) - 1)


def assumptions() -> dict[str, object]:
    """The numbers that predictions of this file depend on, to be recorded beside them."""
    return {
        "gap_us": GAP_US,
        "shortest_us": SHORTEST_US,
        "tiles": TILES,
        "attention_tflops": ATTENTION_TFLOPS,
        "depthwise_share": DEPTHWISE_SHARE,
    }
