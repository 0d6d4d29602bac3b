"""What a case of the benchmark is, and how the names on a command line choose cases.

A case is one operation at one size in one dtype. Its providers are the ways to compute it, all over the same inputs.
Names are `group/setting-batch-dtype`, as in `patch_mining/768-b1-float32`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .errors import UnknownCase

# What a provider returns: one tensor or several, which are compared by the tests' accuracy rule.
Outputs = torch.Tensor | Sequence[torch.Tensor]
# The calls of a clocked case return tuple[Outputs, list[float]].
Call = Callable[[], Outputs]

DTYPES = ("float32", "bfloat16", "float16")
# The providers that are this project's own forms. The others are the original's steps, opponents and variants; one of
# those that fails is a finding and no error.
OURS = ("torch", "auto", "triton", "packed", "painter", "23 layers")
# Groups of cases of a whole stage or more; the other groups are single kernels and stress shapes.
STAGE_GROUPS = (
    "patch_mining",
    "tower",
    "clip",
    "dual_resize",
    "projector",
    "picture",
    "interleaved",
    "end-to-end",
)
# The providers of a quick run: compiling takes longer than everything else together.
QUICK_PROVIDERS = ("reference", "torch", "triton")


def group_of(name: str) -> str:
    """The group of a case, by its name."""
    return name.split("/")[0]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class NotHere(Exception):
    """A provider cannot run on this machine; the message says why."""


@dataclass(frozen=True)
class Cost:
    """FLOP of matrix products, and bytes."""

    flop: int = 0
    bytes_read: int = 0
    bytes_written: int = 0

    @property
    def bytes(self) -> int:
        return self.bytes_read + self.bytes_written

    def __add__(self, other: Cost) -> Cost:
        read, written = self.bytes_read + other.bytes_read, self.bytes_written + other.bytes_written
        return Cost(self.flop + other.flop, read, written)

    def __mul__(self, times: int) -> Cost:
        return Cost(self.flop * times, self.bytes_read * times, self.bytes_written * times)


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    Args:
        build: from the inputs to a call without arguments. Building may convert or pack weights, and raises NotHere
            with the reason where the provider cannot run.
        work: FLOP and bytes of the provider's own steps, where they were counted.
        stages: from the inputs to the stages of a call, each a mapping of name, ms and peak_mib.
        profiled: builds the call whose kernels are worth a table, see `kernel_table`.
        own_graphs: on a GPU the call replays CUDA graphs of its own. It is then not captured in another graph, and its
            memory cannot be seen, since a replay allocates nothing.
        without_graphs: for such a provider, builds a call that does the same without a graph, to measure its memory.
        capturable: whether the call can be captured where its case can. One that copies from the host or waits for the
            GPU cannot, and to try it would end the process.
    """

    build: Callable[[Any], Call]
    work: Cost | None = None
    stages: Callable[[Any], list[dict]] | None = None
    profiled: Callable[[Any], Call] | None = None
    own_graphs: bool = False
    without_graphs: Callable[[Any], Call] | None = None
    capturable: bool = True

    def __call__(self, inputs: Any) -> Call:
        return self.build(inputs)


@dataclass(frozen=True)
class Case:
    """One operation at one size.

    Args:
        name: `group/setting`, unique.
        make: builds inputs and weights on a device of this type ("cpu", "cuda"). Every provider is given what it
            returns.
        providers: by name; a plain function stands for Provider(function).
        exact: from the inputs to the outputs in a wider dtype, which accuracy is measured against. None: there is
            nothing to compare with.
        baseline: the provider that the others are compared with.
        least: the floor: FLOP and bytes that no form can do without.
        devices: types of devices on which the case is run where no case is named. What would take minutes on a CPU is
            left out there.
        quick: one of the cases of `--quick`.
        capturable: on a GPU the providers can be captured in a CUDA graph, which is then timed too. After a capture
            that fails the process cannot use the GPU any more.
        clocked: a call returns its outputs and a list of the milliseconds that count, which it measures itself with the
            device synchronised: for what is a part of a call, or many requests in one.
        tokens: where the case is a step of decoding, the tokens that it gives.
        stage: the name of the only stage of a call that does not name its stages itself.
        release: called after the last of the cases in a row that share it; frees what `make` keeps from one case to
            the next.
    """

    name: str
    make: Callable[[str], Any]
    providers: Mapping[str, Provider | Callable[[Any], Call]]
    exact: Callable[[Any], Outputs] | None
    baseline: str = "reference"
    least: Cost = Cost()
    devices: tuple[str, ...] = ("cpu", "cuda")
    quick: bool = False
    capturable: bool = False
    clocked: bool = False
    tokens: int | None = None
    stage: str | None = None
    release: Callable[[], None] | None = None

    def __post_init__(self):
        made = {name: p if isinstance(p, Provider) else Provider(p) for name, p in self.providers.items()}
        object.__setattr__(self, "providers", made)

    @property
    def group(self) -> str:
        return group_of(self.name)

    @property
    def dtype(self) -> str:
        return next((dtype for dtype in DTYPES if self.name.endswith(dtype)), "float32")

    def only(self, patterns: Sequence[str]) -> Case:
        """The same case with its baseline and the providers that shell patterns name."""
        named = [name for pattern in patterns for name in fnmatch.filter(self.providers, pattern)]
        return self.restricted([self.baseline, *named])

    def restricted(self, names: Sequence[str]) -> Case:
        """The same case with these providers, in its own order; with the baseline only where it is one of them."""
        providers = {name: provider for name, provider in self.providers.items() if name in names}
        return dataclasses.replace(self, providers=providers)


@dataclass(frozen=True)
class Ceilings:
    """What a machine reaches: GB/s of a copy (bytes read and written), TFLOP/s of a large matrix product by dtype."""

    copy_gbps: float
    matmul_tflops: Mapping[str, float]

    def floor_ms(self, least: Cost, dtype: str) -> float | None:
        """The least time in which this machine could do the least work; None if that work is not known."""
        computing = least.flop / (self.matmul_tflops.get(dtype, math.inf) * 1e12)
        return 1e3 * max(computing, least.bytes / (self.copy_gbps * 1e9)) or None


def choose(cases: Mapping[str, Case], patterns: Sequence[str], device: str, *, quick: bool = False) -> list[Case]:
    """The cases that patterns name, in the registry's order; without patterns the cases made for the device.

    Args:
        patterns: names, shell patterns, or groups: `patch_mining/768-b1-float32`, `patch_mining/*`, `patch_mining`.

    Raises:
        UnknownCase: a pattern names no case.
    """
    if not patterns:
        return [case for case in cases.values() if device in case.devices and (case.quick or not quick)]
    return [cases[name] for name in choose_names(list(cases), patterns)]


def choose_providers(cases: Sequence[Case], patterns: Sequence[str]) -> list[Case]:
    """The cases with their baselines and the providers that patterns name; without patterns with all providers."""
    names = list(dict.fromkeys(name for case in cases for name in case.providers))
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise UnknownCase(f"no provider is called {pattern!r}: these cases have {'; '.join(names)}")
    return [case.only(patterns) for case in cases] if patterns else list(cases)


def choose_names(names: Sequence[str], patterns: Sequence[str], command: str = "list") -> list[str]:
    """The names that patterns choose (see `choose`), in order; `command` of `python -m bench` prints all names."""
    chosen = set() if patterns else set(names)
    for pattern in patterns:
        found = [name for name in names if fnmatch.fnmatch(name, pattern) or group_of(name) == pattern]
        if not found:
            groups = ", ".join(dict.fromkeys(map(group_of, names)))
            raise UnknownCase(
                f"no case is called {pattern!r}: `python -m bench {command}` prints them all; groups are {groups}"
            )
        chosen.update(found)
    return [name for name in names if name in chosen]
