"""The ahead-of-time gate: kernels compile for every architecture with no GPU, without spills, within its shared memory, as they should.

The real launchers run, on fake tensors, in a few processes of their own. What they compile is held against the limits of its
architecture, and its resources against the table in tests/aot_resources.json, so that a change of them shows as a diff. After a change
that is meant: `python -m tests.test_aot --write`.

A process of its own: what is compiled here must not have been imported under TRITON_INTERPRET.
"""

# ruff: noqa: E402  (the skips below come before the imports they guard)

import collections
import concurrent.futures
import contextlib
import functools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

triton = pytest.importorskip("triton", reason="triton is published for Linux only")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiling ahead of time needs a process without TRITON_INTERPRET", allow_module_level=True)

import torch

from mg_fast.kernels import patch_mining
from mg_fast.kernels.configs import PATCH_MINING, SHARED_MEMORY_LIMITS, Tile, patch_mining_bucket
from mg_fast.warmup import compile_only

TABLE = Path(__file__).with_name("aot_resources.json")
REWRITE = "python -m tests.test_aot --write"
LEVELS = 4
# most loads of a program's vectors by one thread: queries and statistics, not pixels
NARROW = 40
# what multiplies matrices, in the machine's own instructions
TENSOR_CORES = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Shape(NamedTuple):
    """What patch mining is launched on: a grid of cells, queries along a view's side, pixels along a window's, widths of the maps."""

    grid: int
    queries: int
    side: int
    dims: tuple[int, ...]


SHAPES = {
    # the published models: one view of 768 pixels; four cells and a global view of 1536
    "768": Shape(1, 24, 8, (192, 384, 768, 1536)),
    "HD": Shape(2, 24, 8, (192, 384, 768, 1536)),
    # every other bucket of configs.py
    **{f"side{side}": Shape(1, 4, side, (64, 96, 160)) for side in (4, 11, 16)},
    # with widths that no block divides and no wide load fits
    **{f"odd{side}": Shape(1, 4, side, (24, 37, 131)) for side in (4, 8, 11, 16)},
}


class Case(NamedTuple):
    """A launcher's run: all kernels that it compiles are measured."""

    launcher: str
    architecture: int
    dtype: str
    shape: str

    def names(self) -> list[str]:
        """`kernel-architecture-configuration` of every kernel: of one, or of the cells' and the global view's."""
        name = f"{self.launcher}-sm_{self.architecture}-{self.dtype}_{self.shape}"
        return [f"{name}_cells", f"{name}_global"] if SHAPES[self.shape].grid > 1 else [name]


def cases() -> list[Case]:
    def add(launchers, architectures, dtypes, shapes):
        found.extend(Case(*c) for a in architectures for c in ((x, a, d, s) for d in dtypes for s in shapes for x in launchers))

    found: list[Case] = []
    both, every = ("pool_windows_fwd", "pool_windows_bwd"), tuple(SHARED_MEMORY_LIMITS)
    add(both, every, ["bf16"], ["768", "HD"])
    add(both, every, ["fp32"], ["768"])
    add(both[:1], every, ["fp32"], ["HD"])
    add(both[:1], (80, 90), ["fp16"], ["768"])
    buckets = [name for name in SHAPES if name not in ("768", "HD")]
    add(both, every, ["bf16"], buckets)
    # the rest is left to the forward pass, which as a rule needs more
    add(both[:1], every, ["fp32"], buckets)
    return found


def compile_case(case: Case, tile: Tile | None = None) -> dict[str, dict]:
    """Resources of the kernels of a case, by name; with a tile of one's own in place of configs.py's."""
    shape, dtype = SHAPES[case.shape], DTYPES[case.dtype]
    views, tokens, fine = shape.grid**2 + (shape.grid > 1), shape.queries**2, shape.grid * shape.queries * shape.side
    original = patch_mining.patch_mining_tile
    if tile is not None:
        patch_mining.patch_mining_tile = lambda *_, **__: tile
    try:
        with compile_only(case.architecture) as compiled:
            # a model in float16 has its queries in float32
            queries = torch.empty(2, views, tokens, sum(shape.dims), device="cuda", dtype=torch.float32 if case.dtype == "fp16" else dtype)
            pyramid = [torch.empty(2, fine >> s, fine >> s, dim, device="cuda", dtype=dtype) for s, dim in enumerate(shape.dims)]
            if case.launcher == "pool_windows_fwd":
                patch_mining.pool_windows_fwd(queries, pyramid, shape.grid)
            else:
                statistics = torch.empty(2, views, tokens, 3, shape.side**2, device="cuda")
                patch_mining.pool_windows_bwd(queries.to(dtype), queries, pyramid, statistics, shape.grid)
    finally:
        patch_mining.patch_mining_tile = original
    return {name: resources(kernel) for name, kernel in zip(case.names(), compiled, strict=True)}


def resources(kernel) -> dict[str, int]:
    """What a program needs, and counts of instructions, from the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        cuobjdump = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
        tool = triton.knobs.nvidia.cuobjdump.path
        used = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", cuobjdump([tool, "--dump-resource-usage", file.name]).stdout))
        code = cuobjdump([tool, "-sass", file.name]).stdout
    counts = collections.Counter()
    for instruction in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code):
        name, *rest = instruction.split(".")
        counts["instructions"] += 1
        if name in ("LDG", "LDGSTS"):
            counts["global loads"] += 1
            counts["of 128 bits"] += "128" in rest
        counts["local"] += name in ("LDL", "STL")
        counts["tensor core"] += name in TENSOR_CORES.values()
    return {
        "threads": 32 * kernel.metadata.num_warps,
        "registers": int(used["REG"]),
        "shared": kernel.metadata.shared,
        "stack": int(used["STACK"]) + int(used["LOCAL"]),
        **{key: counts[key] for key in ("instructions", "global loads", "of 128 bits", "tensor core", "local")},
    }


def faults(name: str, found: dict[str, int]) -> list[str]:
    """What is wrong with a kernel's resources: the gate."""
    _, architecture, configuration = name.split("-")
    dtype, shape = configuration.split("_")[:2]
    limit = SHARED_MEMORY_LIMITS[int(architecture.removeprefix("sm_"))]
    real = shape in ("768", "HD")
    wrong = []
    if found["stack"] or found["local"]:
        wrong.append(f"spills: {found['stack']} bytes of stack, {found['local']} loads and stores of local memory")
    if found["shared"] > limit:
        wrong.append(f"{found['shared']} bytes of shared memory, {architecture} has {limit}")
    if real and not all_wide(found):
        wrong.append(f"narrow loads: {found['of 128 bits']} of {found['global loads']} are of 128 bits")
    if real and (dtype == "fp32") != (found["tensor core"] == 0):
        wrong.append(f"{found['tensor core']} instructions on tensor cores for {dtype}")
    return wrong


def all_wide(found: dict[str, int]) -> bool:
    """Whether pixels are loaded 16 bytes at once: at least once a pass and level; the rest are few, for vectors and not for tiles."""
    return found["of 128 bits"] >= 2 * LEVELS and found["global loads"] - found["of 128 bits"] <= NARROW


# ---- compiling, in processes of their own


@contextlib.contextmanager
def compiling(workers: int = os.cpu_count() or 1):
    """Gives `compile_case`, put off: it returns a future. Spawned, since a fork would copy the compiler's locks as they are just held."""
    pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    before = os.environ.get("TRITON_CACHE_DIR")
    with tempfile.TemporaryDirectory(prefix="mg_fast_aot_") as folder:
        # for the processes, which start with the first job
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            yield functools.partial(pool.submit, compile_case)
        finally:
            pool.shutdown(cancel_futures=True)
            del os.environ["TRITON_CACHE_DIR"]
            if before is not None:
                os.environ["TRITON_CACHE_DIR"] = before


def write_table(kernels: dict[str, dict]) -> None:
    """One line a kernel, so that a change shows as one."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(kernels[name])}" for name in kernels)
    TABLE.write_text(f'{{\n "triton": "{triton.__version__}",\n "kernels": {{\n{lines}\n }}\n}}\n', encoding="utf-8")


@pytest.fixture(scope="module")
def put_off():
    with compiling() as put_off:
        yield put_off


@pytest.fixture(scope="module")
def jobs(request, put_off):
    """The cases of the tests that were selected, all under way at once: futures by case."""
    parametrised = (getattr(item, "callspec", None) for item in request.session.items)
    return {case: put_off(case) for case in dict.fromkeys(c.params["kernel"][0] for c in parametrised if c and "kernel" in c.params)}


# ---- the gate

KERNELS = [pytest.param((case, name), id=name) for case in cases() for name in case.names()]


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel(jobs, kernel):
    case, name = kernel
    assert not faults(name, jobs[case].result()[name])


def test_resources_are_those_recorded(jobs):
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    if table["triton"] != triton.__version__:
        pytest.skip(f"recorded with triton {table['triton']}, this is {triton.__version__}: other compilers need other resources")
    found = {name: used for case in jobs for name, used in jobs[case].result().items()}
    assert found, "run it with the kernels' tests, whose resources it compares"
    recorded = table["kernels"]
    if len(jobs) == len(cases()):
        # or kernels that are gone would stay in the table
        assert list(recorded) == list(found), f"other kernels than recorded; if that is meant: {REWRITE}"
    changed = [f"{name}\n  recorded {recorded.get(name)}\n  found    {used}" for name, used in found.items() if recorded.get(name) != used]
    assert not changed, "\n".join(["resources changed", *changed, f"if that is meant: {REWRITE}"])


def test_every_configuration_is_compiled():
    """For the architecture it is keyed by, the defaults for all."""
    compiled = set()
    for case in cases():
        shape, size = SHAPES[case.shape], DTYPES[case.dtype].itemsize
        bucket = patch_mining_bucket(size, shape.side, shape.dims)
        compiled |= {(case.architecture, bucket), *([(case.architecture, (*bucket, "reduced"))] if shape.grid > 1 else [])}
    for architecture, table in PATCH_MINING.items():
        assert {(a, bucket) for bucket in table for a in ([architecture] if architecture else SHARED_MEMORY_LIMITS)} <= compiled


# ---- that it can fail


@pytest.mark.parametrize(
    "case, tile, fault",
    [
        # a tile of twice the default's channels, and stages that an H100 has room for and this card has not
        pytest.param(Case("pool_windows_fwd", 120, "bf16", "768"), Tile(128, 4, 2), "spills", id="spills"),
        pytest.param(Case("pool_windows_fwd", 86, "bf16", "768"), Tile(64, 8, 14), "bytes of shared memory, sm_86 has 101376", id="shared"),
    ],
)
def test_the_gate_can_fail(put_off, case, tile, fault):
    [[name, found]] = put_off(case, tile).result().items()
    assert any(fault in found for found in faults(name, found)), found


def test_the_gate_sees_narrow_loads_and_missing_products(put_off):
    """Of widths that no wide load fits; and of float32, whose products would not be exact in TF32, taken for bfloat16's."""
    odd = put_off(Case("pool_windows_fwd", 90, "bf16", "odd8")).result()["pool_windows_fwd-sm_90-bf16_odd8"]
    assert any("narrow loads" in fault for fault in faults("pool_windows_fwd-sm_90-bf16_768", odd))
    exact = put_off(Case("pool_windows_fwd", 90, "fp32", "768")).result()["pool_windows_fwd-sm_90-fp32_768"]
    assert faults("pool_windows_fwd-sm_90-fp32_768", exact) == []
    assert any("0 instructions on tensor cores" in fault for fault in faults("pool_windows_fwd-sm_90-bf16_768", exact))


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(f"usage: {REWRITE}")
    with compiling() as put_off:
        jobs = {case: put_off(case) for case in cases()}
        kernels = {name: found for job in jobs.values() for name, found in job.result().items()}
    write_table(kernels)
    wrong = [f"{name}: {fault}" for name, found in kernels.items() for fault in faults(name, found)]
    sys.exit("\n".join(wrong) or None)
