"""From a launch to a predicted time: how its warps issue, how many programs run at once, and what it moves."""

import collections
from collections.abc import Mapping
from dataclasses import dataclass

from ..costs.gpus import find_gpu
from .launches import CompiledLaunch
from .multiprocessor import issue
from .occupancy import blocks_per_multiprocessor
from .sass import pipe_of, registers_of_a_load
from .trace import UnknownLoop, trace


@dataclass(frozen=True)
class Device:
    """What the model needs to know of a GPU.

    Attributes:
        multiprocessors: how many it has.
        gigahertz: its clock under load.
        l2_gbps: what its second-level cache delivers to all multiprocessors, in GB/s.
        memory_gbps: what a copy reaches, in GB/s.
    """

    name: str
    architecture: int
    multiprocessors: int
    gigahertz: float
    l2_gbps: float
    memory_gbps: float


# The clock is what an H200 holds under load. The rate of its second-level cache is that which microbenchmarks of the
# H100 reach (arXiv 2402.13499), as both have the same chip.
DEVICES = {"h200": Device("NVIDIA H200", 90, 132, 1.755, 5500, find_gpu("h200").ceilings.copy_gbps)}
# The share of loads that the first-level cache does not hold, where nothing better is known.
L2_SHARE = 0.55


@dataclass(frozen=True)
class TimePrediction:
    """What the model says of one launch. It holds plain numbers and texts, so that it can be written as JSON.

    Attributes:
        programs, warps, registers, shared: of the launch, see `launches.CompiledLaunch`.
        resident: programs on one multiprocessor at once, and `limit`, what limits them.
        waves: rounds of programs over all multiprocessors.
        instructions: that one warp issues; `by_pipe` says on which pipes.
        slots_used: the share of the issue slots that are used.
        issue_us: the time to issue all instructions of all programs, in microseconds.
        l2_us: the time for what the second-level cache delivers.
        memory_us: the time to move every tensor among the arguments once.
    """

    kernel: str
    programs: int
    warps: int
    registers: int
    shared: int
    resident: int
    limit: str
    waves: float
    instructions: int
    by_pipe: Mapping[str, int]
    slots_used: float
    issue_us: float
    l2_us: float
    memory_us: float

    @property
    def times(self) -> dict[str, float]:
        return {"issue": self.issue_us, "L2": self.l2_us, "memory": self.memory_us}

    @property
    def us(self) -> float:
        """The predicted time in microseconds: the largest of the three."""
        return max(self.times.values())

    @property
    def binds(self) -> str:
        """Which of the times is the largest."""
        return max(self.times, key=self.times.get)


def predict(launch: CompiledLaunch, device: Device, l2_share: float = L2_SHARE) -> TimePrediction:
    """Predicts the time of a launch on a device; see `multiprocessor.ERROR` for how far it may be off."""
    # A program in the middle of the grid is far from the borders, where less is loaded.
    program = tuple(number // 2 for number in launch.grid)
    try:
        steps = trace(launch.instructions, launch.constants, program=program)
    except UnknownLoop as error:
        raise UnknownLoop(f"{launch.kernel}: {error}") from None
    resident, limit = blocks_per_multiprocessor(device.architecture, launch.registers, launch.shared, launch.warps)
    full, rest = divmod(launch.programs, device.multiprocessors * resident)
    last = -(-rest // device.multiprocessors)
    found = (
        {
            blocks: issue(launch.instructions, steps, launch.warps, blocks, l2_share)
            for blocks in ([resident] * (full > 0)) + ([last] * (last > 0))
        }
        if launch.programs
        else {}
    )
    cycles = full * found[resident].cycles if full else 0
    cycles += found[last].cycles if last else 0
    done = [launch.instructions[step] for step in steps if step >= 0]
    counted = collections.Counter(map(pipe_of, done))
    counted["turned off"] = len(steps) - len(done)
    loaded = sum(128 * registers_of_a_load(instruction) for instruction in done if pipe_of(instruction) == "load")
    used = found[resident if full else last].slots_used if found else 0.0
    return TimePrediction(
        kernel=launch.kernel,
        programs=launch.programs,
        warps=launch.warps,
        registers=launch.registers,
        shared=launch.shared,
        resident=resident,
        limit=limit,
        waves=round(launch.programs / (device.multiprocessors * resident), 3),
        instructions=len(steps),
        by_pipe=dict(counted.most_common()),
        slots_used=round(used, 3),
        issue_us=round(cycles / device.gigahertz / 1e3, 2),
        l2_us=round(loaded * launch.warps * launch.programs * l2_share / device.l2_gbps / 1e3, 2),
        memory_us=round(launch.bytes / device.memory_gbps / 1e3, 2),
    )
