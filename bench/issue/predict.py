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
        tensor_tflops: what a large product in 16 bits reaches, in TFLOP/s.
    """

    name: str
    architecture: int
    multiprocessors: int
    gigahertz: float
    l2_gbps: float
    memory_gbps: float
    tensor_tflops: float


# The clock is an assumption about an H200 under load. The rate of its second-level cache is that which
# microbenchmarks of the H100 reach (arXiv 2402.13499), as both have the same chip.
_H200 = find_gpu("h200").ceilings
DEVICES = {
    "h200": Device("NVIDIA H200", 90, 132, 1.755, 5500, _H200.copy_gbps, _H200.matmul_tflops["bfloat16"]),
}
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


# The programs of a launch that are followed, spread over the grid: most launches have programs that do the same.
FOLLOWED = 5


def _traces(launch: CompiledLaunch, followed: int) -> list[list[int]]:
    """What a warp of some programs of a launch issues; none for a launch of no program."""
    if launch.programs == 0:
        return []
    # Programs at the borders of a map, where less is loaded, are left out.
    places = {(2 * i + 1) * launch.grid[0] // (2 * followed) for i in range(followed)}
    middle = launch.grid[1] // 2, launch.grid[2] // 2
    try:
        return [trace(launch.instructions, launch.constants, program=(place, *middle)) for place in sorted(places)]
    except UnknownLoop as error:
        raise UnknownLoop(f"{launch.kernel}: {error}") from None


def predict(
    launch: CompiledLaunch, device: Device, l2_share: float = L2_SHARE, followed: int = FOLLOWED
) -> TimePrediction:
    """Predicts the time of a launch on a device; see `multiprocessor.ERROR` for how far it may be off.

    Args:
        l2_share: the share of loads that the first-level cache does not hold.
        followed: how many programs of the launch are followed.
    """
    resident, limit = blocks_per_multiprocessor(device.architecture, launch.registers, launch.shared, launch.warps)
    full, rest = divmod(launch.programs, device.multiprocessors * resident)
    last = -(-rest // device.multiprocessors)
    traces = _traces(launch, followed)
    share = 1 / max(len(traces), 1)
    counted: collections.Counter = collections.Counter()
    cycles = slots = loaded = 0.0
    # Programs that do the same are modelled once.
    for steps, times in collections.Counter(map(tuple, traces)).items():
        found = {
            blocks: issue(launch.instructions, steps, launch.warps, blocks, l2_share)
            for blocks in ([resident] * (full > 0)) + ([last] * (last > 0))
        }
        cycles += times * share * ((full * found[resident].cycles if full else 0) + (found[last].cycles if last else 0))
        slots += times * share * found[resident if full else last].slots_used
        for step in steps:
            instruction = launch.instructions[max(step, ~step)]
            pipe = pipe_of(instruction) if step >= 0 else "turned off"
            counted[pipe] += times * share
            loaded += times * share * 128 * registers_of_a_load(instruction) * (pipe == "load")
    return TimePrediction(
        kernel=launch.kernel,
        programs=launch.programs,
        warps=launch.warps,
        registers=launch.registers,
        shared=launch.shared,
        resident=resident,
        limit=limit,
        waves=round(launch.programs / (device.multiprocessors * resident), 3),
        instructions=round(sum(counted.values())),
        by_pipe={pipe: round(number) for pipe, number in counted.most_common()},
        slots_used=round(slots, 3),
        issue_us=round(cycles / device.gigahertz / 1e3, 2),
        l2_us=round(loaded * launch.warps * launch.programs * l2_share / device.l2_gbps / 1e3, 2),
        memory_us=round(launch.bytes / device.memory_gbps / 1e3, 2),
    )
