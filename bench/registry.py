"""What a case of the benchmark is, and how the names on a command line choose some.

A case is one operation at one size in one dtype; its providers are the ways to compute it, all over the same inputs.
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

# what a provider returns: a tensor or several, compared by the tests' accuracy rule
Outputs = torch.Tensor | Sequence[torch.Tensor]
# of a clocked case: Callable[[], tuple[Outputs, list[float]]]
Call = Callable[[], Outputs]

DTYPES = ("float32", "bfloat16", "float16")
# providers that are our own forms; the others are the original's steps, opponents and variants, and one that fails is a
# finding
OURS = ("torch", "auto", "triton", "packed", "23 layers")
# of a quick run: compiling takes longer than everything else together
QUICK_PROVIDERS = ("reference", "torch", "triton")


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
        return Cost(
            self.flop + other.flop, self.bytes_read + other.bytes_read, self.bytes_written + other.bytes_written
        )

    def __mul__(self, times: int) -> Cost:
        return Cost(self.flop * times, self.bytes_read * times, self.bytes_written * times)


@dataclass(frozen=True)
class Case:
    """One operation at one size.

    Args:
        name: `group/setting`, unique.
        make: builds inputs and weights on a device of this type ("cpu", "cuda"); what it returns every provider is
            given.
        providers: by name, from the inputs to a call without arguments. Building may convert or pack weights, and
            raises NotHere with the reason where the provider cannot run.
        exact: the outputs in a wider dtype, from the inputs; what accuracy is measured against. None: nothing to
            compare.
        baseline: the provider that the others are compared with.
        least: FLOP and bytes that no form can do without: the floor.
        work: FLOP and bytes of a provider's own steps, where they were accounted.
        devices: types of devices on which the case is run where no case is named: what would take minutes on a CPU is
            left out.
        quick: one of those that `--quick` runs.
        stages: per provider, from the inputs to its stages, each a mapping of name, ms and peak_mib, where it has some.
        capturable: on a GPU the providers can be captured in a CUDA graph, timed too. One that cannot ends the
            process's use of it.
        own_graphs: providers that replay CUDA graphs of their own: not captured, and their memory is not seen.
        memory: of those, builds that do the same without a graph, for their memory.
        clocked: calls return their outputs and a list of the milliseconds that count, taken by themselves and with the
            device synchronised:
            for what is a part of a call, or many requests in one.
        tokens: that a sample's time gives, where it is a step of decoding.
        profiled: of some providers, builds of the call whose kernels are worth a table, see `kernel_table`.
        release: called after the last of the cases in a row that share it: frees what `make` keeps from one to the
            next.
    """

    name: str
    make: Callable[[str], Any]
    providers: Mapping[str, Callable[[Any], Call]]
    exact: Callable[[Any], Outputs] | None
    baseline: str = "reference"
    least: Cost = Cost()
    work: Mapping[str, Cost] | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    quick: bool = False
    stages: Mapping[str, Callable[[Any], list[dict]]] | None = None
    capturable: bool = False
    own_graphs: frozenset[str] = frozenset()
    memory: Mapping[str, Callable[[Any], Call]] | None = None
    clocked: bool = False
    tokens: int | None = None
    profiled: Mapping[str, Callable[[Any], Call]] | None = None
    release: Callable[[], None] | None = None

    @property
    def group(self) -> str:
        return self.name.split("/")[0]

    @property
    def dtype(self) -> str:
        return next((dtype for dtype in DTYPES if self.name.endswith(dtype)), "float32")

    def only(self, patterns: Sequence[str]) -> Case:
        """The same with its baseline and the providers that shell patterns name."""
        kept = {
            n: p
            for n, p in self.providers.items()
            if n == self.baseline or any(fnmatch.fnmatch(n, pattern) for pattern in patterns)
        }
        return dataclasses.replace(self, providers=kept)

    def restricted(self, providers: Sequence[str]) -> Case:
        """The same with these providers, in its own order; the baseline only if it is one of them."""
        return dataclasses.replace(
            self, providers={name: build for name, build in self.providers.items() if name in providers}
        )


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches: GB/s of a copy (bytes read and written), TFLOP/s of a large matrix product by dtype."""

    copy_gbps: float
    matmul_tflops: Mapping[str, float]

    def floor_ms(self, least: Cost, dtype: str) -> float | None:
        """The time that the least work takes at least; None where nothing is known of it."""
        seconds = max(
            least.flop / (self.matmul_tflops.get(dtype, math.inf) * 1e12), least.bytes / (self.copy_gbps * 1e9)
        )
        return 1e3 * seconds or None


def choose(cases: Mapping[str, Case], patterns: Sequence[str], device: str, *, quick: bool = False) -> list[Case]:
    """The cases that patterns name, in the registry's order; without patterns those made for the device.

    Args:
        patterns: names, shell patterns, or groups: `patch_mining/768-b1-float32`, `patch_mining/*`, `patch_mining`.

    Raises:
        UnknownCase: a pattern names none.
    """
    if not patterns:
        return [case for case in cases.values() if device in case.devices and (case.quick or not quick)]
    chosen = set(choose_names(list(cases), patterns))
    return [case for name, case in cases.items() if name in chosen]


def choose_providers(cases: Sequence[Case], patterns: Sequence[str]) -> list[Case]:
    """The cases with their baselines and the providers that patterns name; without patterns with all.

    Raises:
        UnknownCase: a pattern names none.
    """
    names = list(dict.fromkeys(name for case in cases for name in case.providers))
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise UnknownCase(f"no provider is called {pattern!r}: these cases have {'; '.join(names)}")
    return [case.only(patterns) for case in cases] if patterns else list(cases)


def choose_names(names: Sequence[str], patterns: Sequence[str], command: str = "list") -> list[str]:
    """The names that patterns choose, in order; without patterns all. Raises UnknownCase where a pattern chooses none.

    Args:
        command: of `python -m bench`, that prints the names.
    """
    chosen = set() if patterns else set(names)
    for pattern in patterns:
        found = [name for name in names if fnmatch.fnmatch(name, pattern) or name.split("/")[0] == pattern]
        if not found:
            groups = ", ".join(dict.fromkeys(name.split("/")[0] for name in names))
            raise UnknownCase(
                f"no case is called {pattern!r}: `python -m bench {command}` prints them all; groups are {groups}"
            )
        chosen.update(found)
    return [name for name in names if name in chosen]
