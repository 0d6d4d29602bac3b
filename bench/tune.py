"""Tiles of the kernels, timed on the GPU at hand, and printed as entries of kernels/configs.py to review. Nothing is
written.

Candidates are the tiles around today's, nearest first, that fit a program's registers and the architecture's shared
memory. All are compiled first, side by side and without the GPU, as far as half of the time allows; then each has its
result held against the float64 result by the tests' accuracy rule, and is timed, at every published shape of its
bucket: as the replay of a CUDA graph, since the host takes longer to launch most of these kernels than the GPU to run
them. The backward pass of mining takes the forward pass's tiles and has none of its own.
"""

import contextlib
import itertools
import math
import multiprocessing
import os
import statistics
import sys
import time
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from mg_fast import ops
from mg_fast.kernels import configs
from mg_fast.ops.patch_mining import pool_windows
from mg_fast.ops.torch import dual_resize as torch_dual_resize
from mg_fast.ops.torch import patch_mining as torch_patch_mining
from mg_fast.testing.environment import environment
from mg_fast.testing.tolerances import assert_accurate, ieee_float32

from . import measure
from .accounting import Sizes
from .cases.settings import DIMS, LR, PICTURE, SETTINGS
from .errors import UnknownCase
from .run import check_device

# of the accumulators and rows that a thread holds in registers, 32 bits each
MOST_REGISTERS = 128
# of the time, for compiling
COMPILING = 0.5
# candidates of an entry: further ones are never come to
MOST_CANDIDATES = 64


class Task(NamedTuple):
    """A kernel on inputs: what is timed, what the library has in its place, and the result in float64; none of it is
    run yet.
    """

    kernel: Callable[[], torch.Tensor]
    library: Callable[[], torch.Tensor]
    exact: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Problem:
    """A kernel at a published shape.

    Args:
        name: of the shape.
        key: of the entry in the kernel's table that its tile is taken from.
        make: from the type of a device to the task.
    """

    name: str
    key: object
    make: Callable[[str], Task]


@dataclass(frozen=True)
class Kernel:
    """What can be tuned of a kernel.

    Args:
        table: its table's name in configs.py.
        space: by field of its tile, the values that may be tried.
        fits: whether a tile can run, by its key and the bytes of shared memory of a block.
        problems: at the published shapes, what most run in first.
        library_graphed: whether the library's form can be captured in a CUDA graph; else its time has the host's
            launches in it.
    """

    table: str
    space: dict[str, tuple[int, ...]]
    fits: Callable[[object, NamedTuple, int], bool]
    problems: Callable[[], list[Problem]]
    library_graphed: bool = True


@dataclass
class Result:
    """What was found of one entry.

    Attributes:
        tiles: by tile, the geometric mean over the shapes of today's time over its own; today's is first, at 1.
        times: by tile and shape in milliseconds.
        library_ms: by shape.
        rejected: tiles that do not run or are wrong, and why.
        left: candidates that were not come to.
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


def _mining_problems() -> list[Problem]:
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        for name, sizes in (("768", Sizes.standard(dtype)), ("1536-hd", Sizes.hd(dtype))):
            bucket = configs.patch_mining_bucket(dtype.itemsize, sizes.window, [c for _, c in sizes.levels])
            # the global view of HD is a launch of its own, with a tile of its own where it has one
            keys = [bucket, (*bucket, "reduced")] if sizes.grid > 1 else [bucket]
            found += [
                Problem(f"{name}-b1-{_name(dtype)}", key, lambda device, sizes=sizes: _mining(sizes, device))
                for key in keys
            ]
    return found


def _mining(sizes: Sizes, device: str) -> Task:
    torch.manual_seed(0)
    like = {"dtype": sizes.dtype, "device": device}
    # as large as the scores of trained weights: the softmax is neither flat nor a single pixel
    queries = torch.randn(sizes.batch, sizes.views, sizes.side**2, sizes.channels, **like) * sizes.channels**-0.5
    pyramid = [torch.randn(sizes.batch, n, n, c, **like) for n, c in sizes.levels]

    def library() -> torch.Tensor:
        return torch_patch_mining.pool_windows(queries, pyramid, sizes.grid).to(sizes.dtype)

    def exact() -> torch.Tensor:
        return torch_patch_mining.pool_windows(queries.double(), [level.double() for level in pyramid], sizes.grid)

    return Task(lambda: pool_windows(queries, pyramid, sizes.grid)[0], library, exact)


def _mining_fits(key: tuple, tile: configs.Tile, shared: int) -> bool:
    # a chunk of pixels in float32, of a window's pixels or of the coarse ones under it
    registers = key[1] * tile.channels // (32 * tile.warps)
    return 1 <= registers <= MOST_REGISTERS and key[1] * tile.channels * key[0] * tile.stages <= shared


def _pointwise_problems() -> list[Problem]:
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        for setting in SETTINGS:
            for stage, c in enumerate(DIMS):
                pixels = (setting.side // 4 >> stage) ** 2
                for operation, n, k in ((ops.linear_gelu, 4 * c, c), (ops.linear_residual, c, 4 * c)):
                    name = f"{operation.__name__}/{setting.side}-stage{stage}-b1-{_name(dtype)}"
                    key = configs.pointwise_bucket(dtype.itemsize, pixels, n, [k, n])
                    shapes = [(pixels, k), (n, k), (n,), (pixels, n)][: 3 + (operation is ops.linear_residual)]
                    found.append(Problem(name, key, _operation(operation, shapes, dtype)))
    return found


def _pointwise_fits(key: tuple, tile: configs.ProductTile, shared: int) -> bool:
    accumulators = tile.rows * tile.columns // (32 * tile.warps)
    return (
        8 <= accumulators <= MOST_REGISTERS and (tile.rows + tile.columns) * tile.depth * key[0] * tile.stages <= shared
    )


def _convolution_problems() -> list[Problem]:
    found = []
    for setting in SETTINGS:
        for stage, c in enumerate(DIMS):
            side = setting.side // 4 >> stage
            key = configs.dwconv_norm_bucket(c, (side * side * c, side * c, c))
            shapes = [(1, side, side, c), (49, c), (c,), (c,), (c,)]
            name = f"{setting.side}-stage{stage}-b1-bfloat16"
            found.append(Problem(name, key, _operation(ops.dwconv_norm, shapes, torch.bfloat16)))
    return found


def _convolution_fits(key: tuple, tile: configs.ConvolutionTile, shared: int) -> bool:
    chunks = -(-key[0] // tile.channels)
    loaded = tile.columns * tile.channels // (32 * tile.warps)
    # every chunk of every row is held, and all of it is unrolled
    return loaded >= 1 and chunks <= 4 and loaded * tile.rows * chunks <= MOST_REGISTERS


def _resize_problems() -> list[Problem]:
    return [
        Problem(
            f"{setting.name}-{PICTURE[0]}x{PICTURE[1]}", key, lambda device, setting=setting: _resize(setting, device)
        )
        for setting in SETTINGS
        for key in ("columns", "rows")
    ]


def _resize(setting, device: str) -> Task:
    torch.manual_seed(0)
    picture = torch.randint(0, 256, (*PICTURE[::-1], 3), dtype=torch.uint8, device=device)
    sizes = {
        "hr_size": setting.side,
        "lr_size": LR,
        "grid": setting.grid,
        "global_view": setting.views > setting.grid**2,
    }

    def by(backend: str) -> torch.Tensor:
        hr, views = ops.dual_resize(picture, **sizes, backend=backend)
        return torch.cat([hr.flatten(), views.flatten()])

    return Task(lambda: by("triton"), lambda: by("torch"), lambda: by("reference").double())


def _resize_fits(key: str, tile: configs.ResizeTile, shared: int) -> bool:
    return 1 <= tile.rows * tile.columns // (32 * tile.warps) <= 32


def _operation(operation: Callable, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> Callable[[str], Task]:
    def make(device: str) -> Task:
        torch.manual_seed(0)
        # weights as small as trained ones: results keep the size of what goes in
        scales = [1.0 if i in (0, 3) else shape[-1] ** -0.5 for i, shape in enumerate(shapes)]
        tensors = [(torch.randn(shape, device=device) * scale).to(dtype) for shape, scale in zip(shapes, scales)]

        def exact() -> torch.Tensor:
            return operation(*(tensor.double() for tensor in tensors), backend="reference")

        return Task(lambda: operation(*tensors, backend="triton"), lambda: operation(*tensors, backend="torch"), exact)

    return make


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


POWERS = tuple(2**i for i in range(11))
KERNELS = {
    "patch_mining": Kernel(
        "PATCH_MINING",
        {"channels": POWERS[3:8], "warps": POWERS[1:5], "stages": (1, 2, 3, 4)},
        _mining_fits,
        _mining_problems,
    ),
    "dwconv_norm": Kernel(
        "DWCONV_NORM",
        {"rows": (2, 3, 4, 6, 8, 12), "columns": POWERS[:5], "channels": POWERS[5:], "warps": POWERS[1:5]},
        _convolution_fits,
        _convolution_problems,
    ),
    "pointwise": Kernel(
        "POINTWISE",
        {
            "rows": POWERS[5:9],
            "columns": POWERS[5:9],
            "depth": POWERS[4:8],
            "group": (4, 8, 16),
            "warps": (4, 8),
            "stages": (2, 3, 4, 5),
        },
        _pointwise_fits,
        _pointwise_problems,
    ),
    "dual_resize": Kernel(
        "DUAL_RESIZE",
        {"rows": POWERS[:5], "columns": POWERS[5:10], "warps": POWERS[:4]},
        _resize_fits,
        _resize_problems,
        # it brings its tables to the GPU in every call
        library_graphed=False,
    ),
}


def tile_of(kernel: str, architecture: int | None, key: object) -> NamedTuple:
    """Today's tile of an entry: the architecture's own, or that of any; a global view's is that of its bucket, where it
    has none.
    """
    table = getattr(configs, KERNELS[kernel].table)
    entries = table[None] | table.get(architecture, {})
    return entries[key] if key in entries else entries[key[:-1]]


@contextlib.contextmanager
def tile_in_force(kernel: str, architecture: int | None, key: object, tile: NamedTuple) -> Iterator[None]:
    """Within the block launches of a kernel on an architecture (None: interpreted) take this tile for this entry."""
    table = getattr(configs, KERNELS[kernel].table)
    with unittest.mock.patch.dict(table, {architecture: table.get(architecture, {}) | {key: tile}}):
        yield


def candidates(kernel: str, architecture: int | None, key: object) -> list[NamedTuple]:
    """Tiles to try for an entry, today's first, then by how many times a number must be doubled or halved to come to
    them.
    """
    space, fits = KERNELS[kernel].space, KERNELS[kernel].fits
    shared = configs.SHARED_MEMORY_LIMITS.get(architecture, max(configs.SHARED_MEMORY_LIMITS.values()))
    today = tile_of(kernel, architecture, key)

    def far(tile: NamedTuple) -> float:
        return sum(abs(math.log2(value / before)) for value, before in zip(tile, today))

    # the fields of a tile in its own order
    tiles = (today._make(values) for values in itertools.product(*(space[name] for name in today._fields)))
    others = sorted(
        (tile for tile in tiles if tile != today and fits(key, tile, shared)), key=lambda tile: (far(tile), tile)
    )
    return [today, *others][:MOST_CANDIDATES]


def precompile(kernel: str, architecture: int, key: object, tile: NamedTuple) -> None:
    """Fills Triton's cache with what a tile's launches at the shapes of its entry need; without a GPU."""
    from mg_fast.ops.ahead_of_time import compile_only

    if kernel == "dual_resize":
        # tables are asked of this CPU, and kept: among fake tensors it would not answer
        for setting in SETTINGS:
            torch_dual_resize.view_taps(setting.side, LR, setting.grid, setting.views > setting.grid**2)
    for problem in problems_of(kernel, key):
        with compile_only(architecture), tile_in_force(kernel, architecture, key, tile):
            problem.make("cuda").kernel()


def problems_of(kernel: str, key: object) -> list[Problem]:
    """The published shapes of an entry."""
    return [problem for problem in KERNELS[kernel].problems() if problem.key == key]


def entries(kernels: Sequence[str]) -> list[tuple[str, object]]:
    """Kernels with the keys of their entries, at which there is a published shape; what most models run in first.

    Raises:
        UnknownCase: no such kernel.
    """
    unknown = [name for name in kernels if name not in KERNELS]
    if unknown:
        raise UnknownCase(f"no kernel is called {unknown[0]!r}: expected some of {', '.join(KERNELS)}")
    keys = {kernel: list(dict.fromkeys(p.key for p in KERNELS[kernel].problems())) for kernel in kernels or KERNELS}
    # each kernel's first, then each one's second: where time runs out, none has been left out
    rounds = itertools.zip_longest(*([(kernel, key) for key in found] for kernel, found in keys.items()))
    return [entry for turn in rounds for entry in turn if entry is not None]


def compile_candidates(
    chosen: Sequence[tuple[str, object]], architecture: int, seconds: float, clock: Callable[[], float] = time.monotonic
) -> dict[tuple[str, object], list[NamedTuple]]:
    """By entry, the candidates whose kernels are in Triton's cache after this time, in their order."""
    waiting = {entry: candidates(entry[0], architecture, entry[1]) for entry in chosen}
    deadline = clock() + seconds
    compiled: dict[tuple[str, object], list[NamedTuple]] = {entry: [] for entry in chosen}
    # spawned: a fork would copy torch's threads and a GPU's context
    pool = ProcessPoolExecutor(os.cpu_count() or 1, mp_context=multiprocessing.get_context("spawn"))
    jobs: list[tuple[Future, tuple[str, object], NamedTuple]] = []
    for turn in itertools.zip_longest(*waiting.values()):
        for (kernel, key), tile in zip(waiting, turn):
            if tile is not None:
                jobs.append((pool.submit(precompile, kernel, architecture, key, tile), (kernel, key), tile))
    try:
        for job, entry, tile in jobs:
            # one that does not compile is not among those that have
            with contextlib.suppress(Exception):
                job.result(timeout=max(0.0, deadline - clock()))
                compiled[entry].append(tile)
    finally:
        workers = list(pool._processes.values())
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.terminate()
    return compiled


def tune_entry(
    kernel: str,
    key: object,
    tiles: Sequence[NamedTuple],
    architecture: int | None,
    seconds: float,
    *,
    device: str = "cuda",
    time_call: Callable[[Callable, bool], float],
    problems: Sequence[Problem] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Result:
    """Checks and times tiles of an entry until its time is spent, but today's, the first, in any case; then the
    library's form.

    Errors are told in what is returned, with what was found before them.

    Args:
        time_call: milliseconds of a call, and whether as the replay of a graph.
        problems: the shapes; default: those published.
    """
    deadline, result = clock() + seconds, Result(kernel, key)
    tasks, library, exact = {}, {}, {}
    try:
        for problem in problems_of(kernel, key) if problems is None else problems:
            task = problem.make(device)
            tasks[problem.name], library[problem.name], exact[problem.name] = task, task.library(), task.exact()
    except Exception as error:
        result.error, result.lost, result.left = _told(error), _lost(error, device), len(tiles)
        return result
    for i, tile in enumerate(tiles):
        if result.lost or (i and clock() > deadline):
            result.left = len(tiles) - i
            break
        try:
            times = {}
            with tile_in_force(kernel, architecture, key, tile):
                for name, task in tasks.items():
                    assert_accurate(task.kernel(), library[name], exact[name])
                    times[name] = time_call(task.kernel, True)
        except Exception as error:
            # whatever is wrong with a candidate, the next one may be right
            result.rejected[tile], result.lost = _told(error), _lost(error, device)
            continue
        result.times[tile] = times
    today = result.times.get(tiles[0])
    for tile, times in result.times.items():
        if today is not None:
            result.tiles[tile] = math.exp(statistics.fmean(math.log(today[name] / ms) for name, ms in times.items()))
    try:
        for name, task in () if result.lost else tasks.items():
            result.library_ms[name] = time_call(task.library, KERNELS[kernel].library_graphed)
    except Exception as error:
        result.error, result.lost = f"the library's form: {_told(error)}", _lost(error, device)
    return result


def _told(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


def _lost(error: Exception, device: str) -> bool:
    """Whether the GPU can be used no more in this process after an error."""
    return isinstance(error, measure.GpuLost) or (device == "cuda" and measure.why_lost() is not None)


def report(results: Sequence[Result], architecture: int | None, best: int) -> str:
    """Python: by kernel a table as in configs.py, of the fastest tile of each entry; the next ones and the times as
    comments.
    """
    lines = []
    for kernel in dict.fromkeys(result.kernel for result in results):
        lines += [f"{KERNELS[kernel].table} = {{", f"    {architecture}: {{"]
        for result in (result for result in results if result.kernel == kernel):
            lines += [f"        {line}" for line in _entry(result, best)]
        lines += ["    },", "}"]
    return "\n".join(lines)


def _entry(result: Result, best: int) -> list[str]:
    ranked = sorted(result.tiles.items(), key=lambda item: -item[1])[:best]
    lines = []
    if ranked:
        fastest, gain = ranked[0]
        today, launches = (
            next(iter(result.tiles)),
            "" if KERNELS[result.kernel].library_graphed else " with its launches",
        )
        gains = [f"{gain:.2f} times today's"]
        for name, ms in result.times[fastest].items():
            library = f", the library {result.library_ms[name]:.4f}{launches}" if name in result.library_ms else ""
            lines.append(f"# {name}: {ms:.4f} ms, today's {result.times[today][name]:.4f}{library}")
        if result.library_ms.keys() == result.times[fastest].keys():
            ratios = [math.log(result.library_ms[name] / ms) for name, ms in result.times[fastest].items()]
            gains.append(f"{math.exp(statistics.fmean(ratios)):.2f} times the library{launches}")
        lines.append(f"{result.key!r}: {_tile(fastest)},  # {', '.join(gains)}")
        lines += [f"# or {_tile(tile)}: {gain:.2f} times today's" for tile, gain in ranked[1:]]
    elif result.error is None:
        lines.append(f"# {result.key!r}: today's tile gave no result")
    if result.error is not None:
        lines.append(f"# {result.key!r}: {result.error}")
    wrong = (
        f", {len(result.rejected)} rejected, the first for {next(iter(result.rejected.values()))}"
        if result.rejected
        else ""
    )
    left = "not tried" if result.lost or result.error else "left for want of time"
    lines.append(f"# {len(result.tiles)} tried{wrong}, {result.left} {left}")
    return lines


def _tile(tile: NamedTuple) -> str:
    return f"{type(tile).__name__}({', '.join(map(str, tile))})"


def tune(kernels: Sequence[str], seconds: float, *, best: int = 3, device: str = "cuda") -> str:
    """Tunes kernels on the GPU at hand; the tables, to be printed.

    Before that, on stdout: what it is measured on, and each entry as soon as it is done, as comments. So a process that
    is killed has said what it found. After an error that loses the GPU no further entry is tried.

    Raises:
        NoDevice: there is no GPU.
        UnknownCase: no such kernel.
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
    print("# to review: an entry serves its whole bucket, not these shapes alone", flush=True)
    results: list[Result] = []
    ended = ""
    try:
        compiled = compile_candidates(chosen, architecture, COMPILING * seconds)
        for i, (kernel, key) in enumerate(chosen):
            share = max(0.0, seconds - (time.monotonic() - began)) / (len(chosen) - i)
            print(
                f"{kernel} {key!r}: {len(compiled[kernel, key])} candidates compiled, {share:.1f} s ...",
                file=sys.stderr,
                flush=True,
            )
            tiles = list(dict.fromkeys([tile_of(kernel, architecture, key), *compiled[kernel, key]]))
            with torch.no_grad():
                result = tune_entry(kernel, key, tiles, architecture, share, device=device, time_call=_milliseconds)
            results.append(result)
            lines = [f"# {KERNELS[kernel].table}[{architecture}]", *(f"#     {line}" for line in _entry(result, best))]
            print("\n".join(lines), flush=True)
            if result.lost:
                ended = (
                    f"\n# ended at {kernel} {key!r}, which lost the GPU: {len(chosen) - len(results)} entries not tried"
                )
                break
            torch.cuda.empty_cache()
    except KeyboardInterrupt:
        print("interrupted: what was found so far is printed", file=sys.stderr)
    return report(results, architecture, best) + ended


def _milliseconds(call: Callable, graph: bool) -> float:
    """Of a call, the second-level cache flushed, in some hundredths of a second: as the replay of a graph, or with its
    launches.
    """
    if graph:
        return measure.time_graph(call, 0.015)
    return statistics.median(measure.time_on_gpu(call, 0.03).samples)
