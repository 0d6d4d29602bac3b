"""A model of how one multiprocessor of a Hopper GPU issues the warps that reside on it.

Four schedulers issue one instruction a cycle each, first from the warp that they issued from last, then from the
oldest. An instruction waits for the barriers in its control word, for its pipe, and for the cycles that the instruction
before it asks for. Widths and latencies are assumptions about Hopper, after microbenchmarks of it (arXiv 2402.13499)
and of its predecessors (arXiv 1804.06826); none was measured here. The instruction cache, bank conflicts and the
memory's bandwidth are left out, so the model is optimistic, see `ERROR`.
"""

import collections
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .sass import NO_BARRIER, Instruction, pipe_of, registers_of_a_load

# An estimate of the share by which a predicted time may be wrong. No GPU has calibrated the model.
ERROR = 0.25
SCHEDULERS = 4
# Cycles until a result is there, and until another instruction may enter the pipe.
LATENCY = {"special": 30, "convert": 14, "uniform": 12}
INTERVAL = {"FMA": 1, "IMAD": 2, "ALU": 2, "convert": 2, "special": 8, "uniform": 2, "tensor": 1, "control": 1}
ARITHMETIC_LATENCY = 4
LOAD_LATENCY_L1, LOAD_LATENCY_L2 = 38, 280
SHARED_LATENCY = {"shared load": 28, "shared store": 20, "store": 20, "shuffle": 24}
TENSOR_LATENCY = 70
BARRIER_LATENCY = 22
# Multiply-adds of 16-bit numbers that a multiprocessor's tensor cores do in a cycle; half as many in TF32, and half as
# many where a warp issues them alone (HMMA).
TENSOR_RATE = 2048
# The queue of the memory pipe takes instructions this many cycles ahead.
MEMORY_QUEUE = 24


@dataclass(frozen=True)
class Issued:
    """What the model found: cycles until the last warp has ended, and the instructions that were issued."""

    cycles: int
    instructions: int

    @property
    def slots_used(self) -> float:
        """The share of the issue slots that were used."""
        return self.instructions / (SCHEDULERS * self.cycles)


class _Warp:
    __slots__ = ("at", "block", "done", "pending", "ready", "tensor", "waiting")

    def __init__(self, block: int):
        self.at, self.ready, self.block = 0, 0, block
        self.done = self.waiting = False
        self.tensor = 0.0
        self.pending: list[list[float]] = [[] for _ in range(6)]


def issue(
    instructions: Sequence[Instruction], steps: Sequence[int], warps: int, blocks: int, l2_share: float
) -> Issued:
    """Lets the warps of some programs issue their steps.

    Args:
        steps: places of the instructions that a warp issues, in order; those that are turned off as in `trace.trace`.
        warps: of one program.
        blocks: programs that reside on the multiprocessor at once.
        l2_share: the share of the loads from global memory that the first-level cache does not hold.
    """
    chance = random.Random(0)
    pipes = [pipe_of(instruction) for instruction in instructions]
    widths = [registers_of_a_load(i) if pipe != "shuffle" else 1 for i, pipe in zip(instructions, pipes)]
    residents = [_Warp(i // warps) for i in range(warps * blocks)]
    schedulers = [residents[s::SCHEDULERS] for s in range(SCHEDULERS)]
    last: list[_Warp | None] = [None] * SCHEDULERS
    free = [collections.Counter() for _ in range(SCHEDULERS)]
    arrived: collections.Counter = collections.Counter()
    memory_free = tensor_free = 0.0
    cycle = issued = done = 0
    while done < len(residents):
        soonest, any_issued = float("inf"), False
        for s, scheduled in enumerate(schedulers):
            previous = last[s]
            for warp in ([previous] if previous else []) + [w for w in scheduled if w is not previous]:
                if warp.done or warp.waiting:
                    continue
                if warp.ready > cycle:
                    soonest = min(soonest, warp.ready)
                    continue
                place, off = steps[warp.at], steps[warp.at] < 0
                place = ~place if off else place
                instruction, pipe = instructions[place], "control" if off else pipes[place]
                until = 0.0
                for barrier in instruction.waits:
                    if warp.pending[barrier]:
                        warp.pending[barrier] = [time for time in warp.pending[barrier] if time > cycle]
                        until = max([until, *warp.pending[barrier]])
                if instruction.name.startswith("WARPGROUP.DEPBAR"):
                    until = max(until, warp.tensor)
                if until > cycle:
                    soonest = min(soonest, until)
                    continue
                in_memory_pipe = pipe in SHARED_LATENCY or pipe == "load"
                if in_memory_pipe and memory_free > cycle + MEMORY_QUEUE:
                    soonest = min(soonest, memory_free - MEMORY_QUEUE)
                    continue
                key = "memory" if in_memory_pipe else "FMA heavy" if pipe == "IMAD" else pipe
                if free[s][key] > cycle:
                    soonest = min(soonest, free[s][key])
                    continue
                any_issued, last[s] = True, warp
                issued += 1
                if in_memory_pipe:
                    free[s][key] = cycle + 2
                    begin = max(cycle, memory_free)
                    memory_free = begin + widths[place]
                    if pipe == "load":
                        latency = LOAD_LATENCY_L2 if chance.random() < l2_share else LOAD_LATENCY_L1
                    else:
                        latency = SHARED_LATENCY[pipe]
                    finished, read = begin + widths[place] + latency, begin + widths[place] + 8
                else:
                    free[s][key] = cycle + INTERVAL[pipe]
                    finished, read = cycle + LATENCY.get(pipe, ARITHMETIC_LATENCY), cycle + 8
                    if pipe == "tensor":
                        begin = max(cycle, tensor_free)
                        tensor_free = begin + _tensor_cycles(instruction)
                        finished = warp.tensor = tensor_free + TENSOR_LATENCY
                if instruction.sets != NO_BARRIER and instruction.sets < 6:
                    warp.pending[instruction.sets].append(finished)
                if instruction.sets_when_read != NO_BARRIER and instruction.sets_when_read < 6:
                    warp.pending[instruction.sets_when_read].append(read)
                warp.ready = cycle + max(instruction.stall, 1)
                warp.at += 1
                if instruction.name.startswith("BAR.SYNC"):
                    warp.waiting = True
                    arrived[warp.block] += 1
                    if arrived[warp.block] == warps:
                        arrived[warp.block] = 0
                        for other in residents:
                            if other.block == warp.block and other.waiting:
                                other.waiting, other.ready = False, max(other.ready, cycle + BARRIER_LATENCY)
                if warp.at == len(steps):
                    warp.done = True
                    done += 1
                break
        cycle = cycle + 1 if any_issued or soonest == float("inf") else max(cycle + 1, int(soonest))
    return Issued(cycle, issued)


def _tensor_cycles(instruction: Instruction) -> float:
    """Cycles for which one warp's matrix instruction keeps the tensor cores busy."""
    if found := re.search(r"(\d+)x(\d+)x(\d+)", instruction.name):
        # All four warps of a group issue the instruction, and each does a quarter of it. A depth of 8 is TF32's.
        m, n, k = map(int, found.groups())
        return m * n * k / 4 / (TENSOR_RATE / 2 if k == 8 else TENSOR_RATE)
    depth = 16 if "16816" in instruction.name else 8
    return 16 * 8 * depth / (TENSOR_RATE / 2)
