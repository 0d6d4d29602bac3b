"""Tiles of the kernels, timed on the GPU at hand, and printed as entries of kernels/configs.py to review.

docs/benchmarks.md ("On a borrowed GPU") says how tiles are compiled, checked and timed. What can be tuned of a kernel
stands beside its cases, see `cases.operations.Tunable`. Candidates are the tiles around today's, nearest first, that
fit a program's registers and the architecture's shared memory. They are timed as the replay of a CUDA graph, since the
host takes longer to launch most of these kernels than the GPU takes to run them.
"""

import contextlib
import itertools
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from mg_fast.kernels import configs
from mg_fast.testing.environment import environment
from mg_fast.testing.tolerances import assert_accurate, ieee_float32

from . import gpu_timing
from .cases import operation_modules
from .cases.operations import Tunable
from .check import several
from .devices import check_device
from .errors import UnknownCase
from .registry import Call, Case

# The part of the time that is for compiling.
COMPILING = 0.5
# Further candidates of an entry are never reached.
MOST_CANDIDATES = 64

TUNABLE: dict[str, Tunable] = {
    name: module.tunable() for name, module in operation_modules().items() if hasattr(module, "tunable")
}


@dataclass
class Result:
    """What was found of one entry.

    Attributes:
        tiles: by tile, the geometric mean over the shapes of today's time over its own; today's is first, at 1.
        times: by tile and shape in milliseconds.
        library_ms: by shape.
        rejected: tiles that do not run or are wrong, and why.
        left: how many candidates were not reached.
        error: what went wrong beside the tiles: with the inputs, the exact result or the library's form.
        lost: the GPU can be used no more in this process.
    """

    kernel: str
    key: object
    tiles: dict[NamedTuple, float] = field(default_factory=dict)
    times: dict[NamedTuple, dict[str, float]] = field(default_factory=dict)
    library_ms: dict[str, float] = field(default_factory=dict)
    rejected: dict[NamedTuple, str] = field(default_factory=dict)
    left: int = 0
    error: str | None = None
    lost: bool = False


def table_of(kernel: str) -> dict:
    """The kernel's tiles in configs.py: by architecture (None: any), then by key."""
    return getattr(configs, kernel.upper())


def tile_of(kernel: str, architecture: int | None, key: object) -> NamedTuple:
    """Today's tile of an entry: the architecture's own, or that of any architecture.

    A global view that has no tile of its own takes that of its bucket.
    """
    table = table_of(kernel)
    tiles = table[None] | table.get(architecture, {})
    return tiles[key] if key in tiles else tiles[key[:-1]]


def candidates(kernel: str, architecture: int | None, key: object) -> list[NamedTuple]:
    """Tiles to try for an entry: today's first, then by how many doublings or halvings lead to them."""
    space, fits = TUNABLE[kernel].space, TUNABLE[kernel].fits
    shared = configs.SHARED_MEMORY_LIMITS.get(architecture, max(configs.SHARED_MEMORY_LIMITS.values()))
    today = tile_of(kernel, architecture, key)

    def distance(tile: NamedTuple) -> float:
        return sum(abs(math.log2(value / before)) for value, before in zip(tile, today))

    tiles = (today._make(values) for values in itertools.product(*(space[name] for name in today._fields)))
    others = [tile for tile in tiles if tile != today and fits(key, tile, shared)]
    return [today, *sorted(others, key=lambda tile: (distance(tile), tile))][:MOST_CANDIDATES]


def cases_of(kernel: str, key: object) -> list[Case]:
    """The cases of an entry, one for each published shape."""
    return [case for found, case in TUNABLE[kernel].problems() if found == key]


def entries(kernels: Sequence[str]) -> list[tuple[str, object]]:
    """Kernels with the keys of the entries for which there is a published shape, what most models run in first."""
    unknown = [name for name in kernels if name not in TUNABLE]
    if unknown:
        raise UnknownCase(f"no kernel is called {unknown[0]!r}: expected some of {', '.join(TUNABLE)}")
    keys = [[(kernel, key) for key, _ in TUNABLE[kernel].problems()] for kernel in kernels or TUNABLE]
    # The first entries of all kernels come first, then all second ones, so no kernel is left out if time runs out.
    rounds = itertools.zip_longest(*(dict.fromkeys(entries) for entries in keys))
    return [entry for turn in rounds for entry in turn if entry is not None]


def precompile(kernel: str, architecture: int, key: object, tile: NamedTuple) -> None:
    """Fills Triton's cache with what a tile's launches at the shapes of its entry need; it needs no GPU."""
    from mg_fast.ops.ahead_of_time import compile_only

    if prepare := TUNABLE[kernel].prepare:
        prepare()
    for case in cases_of(kernel, key):
        with compile_only(architecture), configs.replaced_tile(table_of(kernel), architecture, key, tile):
            case.providers["triton"](case.make("cuda"))()


def compile_candidates(
    chosen: Sequence[tuple[str, object]], architecture: int, seconds: float, clock: Callable[[], float] = time.monotonic
) -> dict[tuple[str, object], list[NamedTuple]]:
    """By entry, the candidates whose kernels are in Triton's cache after this time, in their order."""
    waiting = {entry: candidates(entry[0], architecture, entry[1]) for entry in chosen}
    compiled: dict[tuple[str, object], list[NamedTuple]] = {entry: [] for entry in chosen}
    deadline = clock() + seconds
    # The workers are spawned: a fork would copy torch's threads and a GPU's context. They end with the block.
    with multiprocessing.get_context("spawn").Pool(os.cpu_count() or 1) as pool:
        jobs = [
            (pool.apply_async(precompile, (kernel, architecture, key, tile)), (kernel, key), tile)
            for turn in itertools.zip_longest(*waiting.values())
            for (kernel, key), tile in zip(waiting, turn)
            if tile is not None
        ]
        for job, entry, tile in jobs:
            # A tile that does not compile, or not in time, is left out.
            with contextlib.suppress(Exception):
                job.get(timeout=max(0.0, deadline - clock()))
                compiled[entry].append(tile)
    return compiled


def tune_entry(
    kernel: str,
    key: object,
    tiles: Sequence[NamedTuple],
    architecture: int | None,
    seconds: float,
    *,
    device: str = "cuda",
    time_call: Callable[[Call, bool], float],
    cases: Sequence[Case] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Result:
    """Checks and times tiles of an entry, and then the library's form; errors stand in the result.

    It ends when its time is spent, but the first tile, today's, is timed in any case.

    Args:
        time_call: the milliseconds of a call, and whether it is timed as the replay of a graph.
        cases: one for each shape; default: the published shapes.
    """
    deadline, result = clock() + seconds, Result(kernel, key)
    calls, libraries, plain, exact = {}, {}, {}, {}
    try:
        for case in cases_of(kernel, key) if cases is None else cases:
            inputs = case.make(device)
            calls[case.name], libraries[case.name] = (case.providers[name](inputs) for name in ("triton", "torch"))
            plain[case.name], exact[case.name] = several(libraries[case.name]()), several(case.exact(inputs))
    except Exception as error:
        result.error, result.lost, result.left = _told(error), _lost(error, device), len(tiles)
        return result
    for i, tile in enumerate(tiles):
        if result.lost or (i and clock() > deadline):
            result.left = len(tiles) - i
            break
        try:
            times = {}
            with configs.replaced_tile(table_of(kernel), architecture, key, tile):
                for name, call in calls.items():
                    for out, baseline, truth in zip(several(call()), plain[name], exact[name], strict=True):
                        assert_accurate(out, baseline, truth)
                    times[name] = time_call(call, True)
        except Exception as error:
            # Whatever is wrong with a candidate, the next one may be right.
            result.rejected[tile], result.lost = _told(error), _lost(error, device)
            continue
        result.times[tile] = times
    if today := result.times.get(tiles[0]):
        result.tiles = {tile: _geometric_mean(today, times) for tile, times in result.times.items()}
    try:
        for name, call in () if result.lost else libraries.items():
            result.library_ms[name] = time_call(call, TUNABLE[kernel].library_graphed)
    except Exception as error:
        result.error, result.lost = f"the library's form: {_told(error)}", _lost(error, device)
    return result


def _geometric_mean(times: dict[str, float], others: dict[str, float]) -> float:
    """The mean over the shapes of one time over another."""
    return math.exp(statistics.fmean(math.log(times[name] / ms) for name, ms in others.items()))


def _told(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


def _lost(error: Exception, device: str) -> bool:
    """Whether the GPU can be used no more in this process after an error."""
    return isinstance(error, gpu_timing.GpuLost) or (device == "cuda" and gpu_timing.why_lost() is not None)


def report(results: Sequence[Result], architecture: int | None, best: int) -> str:
    """Python source: a table of the fastest tiles for each kernel, as in configs.py, with comments on the others."""
    lines = []
    for kernel in dict.fromkeys(result.kernel for result in results):
        lines += [f"{kernel.upper()} = {{", f"    {architecture}: {{"]
        for result in (result for result in results if result.kernel == kernel):
            lines += [f"        {line}" for line in _entry(result, best)]
        lines += ["    },", "}"]
    return "\n".join(lines)


def _entry(result: Result, best: int) -> list[str]:
    ranked = sorted(result.tiles.items(), key=lambda item: -item[1])[:best]
    lines = []
    if ranked:
        fastest, gain = ranked[0]
        today = next(iter(result.tiles))
        launches = "" if TUNABLE[result.kernel].library_graphed else " with its launches"
        gains = [f"{gain:.2f} times today's"]
        for name, ms in result.times[fastest].items():
            library = f", the library {result.library_ms[name]:.4f}{launches}" if name in result.library_ms else ""
            lines.append(f"# {name}: {ms:.4f} ms, today's {result.times[today][name]:.4f}{library}")
        if result.library_ms.keys() == result.times[fastest].keys():
            over_library = _geometric_mean(result.library_ms, result.times[fastest])
            gains.append(f"{over_library:.2f} times the library{launches}")
        lines.append(f"{result.key!r}: {_tile(fastest)},  # {', '.join(gains)}")
        lines += [f"# or {_tile(tile)}: {gain:.2f} times today's" for tile, gain in ranked[1:]]
    elif result.error is None:
        lines.append(f"# {result.key!r}: today's tile gave no result")
    if result.error is not None:
        lines.append(f"# {result.key!r}: {result.error}")
    reasons = list(result.rejected.values())
    rejected = f", {len(reasons)} rejected, the first for {reasons[0]}" if reasons else ""
    left = "not tried" if result.lost or result.error else "left for want of time"
    return [*lines, f"# {len(result.tiles)} tried{rejected}, {result.left} {left}"]


def _tile(tile: NamedTuple) -> str:
    return f"{type(tile).__name__}({', '.join(map(str, tile))})"


def tune(kernels: Sequence[str], seconds: float, *, best: int = 3, device: str = "cuda") -> str:
    """Tunes kernels on the GPU at hand, and returns the tables, to be printed.

    Before that it prints what it is measured on, and each entry as soon as it is done, as comments. So a process that
    is killed has said what it found. After an error that loses the GPU no further entry is tried.
    """
    chosen = entries(kernels)
    check_device(device)
    ieee_float32()
    began = time.monotonic()
    major, minor = torch.cuda.get_device_capability()
    architecture = 10 * major + minor
    where = environment()
    print(f"# {where['gpu']} (sm_{architecture}), {where['date']}, commit {where['commit']}")
    print(f"# torch {where['torch']}, triton {where['triton']}")
    print("# to review: an entry serves its whole bucket, and not these shapes alone", flush=True)
    results: list[Result] = []
    ended = ""
    try:
        compiled = compile_candidates(chosen, architecture, COMPILING * seconds)
        for i, (kernel, key) in enumerate(chosen):
            share = max(0.0, seconds - (time.monotonic() - began)) / (len(chosen) - i)
            told = f"{len(compiled[kernel, key])} candidates compiled, {share:.1f} s ..."
            print(f"{kernel} {key!r}: {told}", file=sys.stderr, flush=True)
            tiles = list(dict.fromkeys([tile_of(kernel, architecture, key), *compiled[kernel, key]]))
            with torch.no_grad():
                result = tune_entry(kernel, key, tiles, architecture, share, device=device, time_call=_milliseconds)
            results.append(result)
            lines = [f"# {kernel.upper()}[{architecture}]", *(f"#     {line}" for line in _entry(result, best))]
            print("\n".join(lines), flush=True)
            if result.lost:
                left = len(chosen) - len(results)
                ended = f"\n# ended at {kernel} {key!r}, which lost the GPU: {left} entries not tried"
                break
            torch.cuda.empty_cache()
    except KeyboardInterrupt:
        print("interrupted: what was found so far is printed", file=sys.stderr)
    return report(results, architecture, best) + ended


def _milliseconds(call: Call, graph: bool) -> float:
    """Milliseconds of a call with the cache flushed: as the replay of a graph, or with its launches."""
    if graph:
        return gpu_timing.time_graph(call, 0.015)
    return statistics.median(gpu_timing.time_on_gpu(call, 0.03).samples)
