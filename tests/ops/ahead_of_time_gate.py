"""The ahead-of-time gate: limits on what a kernel needs, read from machine code that is compiled without a GPU.

Compiling a kernel takes seconds, and what comes out depends only on what goes in. So the digest of everything that goes
into the compiler (`ingredients`) is recorded beside the resources, and a kernel whose digest is the recorded one need
not be compiled again.
"""

import ast
import collections
import concurrent.futures
import contextlib
import fnmatch
import functools
import hashlib
import importlib
import inspect
import json
import multiprocessing
import os
import tempfile
import unittest.mock
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import triton
import triton.compiler

from bench.issue.launches import CompiledLaunch, recorded
from bench.issue.occupancy import blocks_per_multiprocessor
from bench.issue.predict import DEVICES, predict
from bench.issue.trace import UnknownLoop
from mg_fast.kernels.configs import SHARED_MEMORY_LIMITS
from mg_fast.ops.ahead_of_time import compile_only

# The machine's fastest instructions for matrix products. Products that are too small for them use HMMA on the newer
# architectures too, and then count as none.
TENSOR_CORES = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
ARCHITECTURES = tuple(SHARED_MEMORY_LIMITS)
# sm_89 has the tiles of sm_86, and most kernels need the same resources on both, down to the instruction. A test of
# such kernels compares the cases that are compiled for both; their other cases are compiled for sm_86 only. Deformable
# attention takes other registers on sm_89, so all of its cases are compiled for each.
TWINS = {89: 86}
H200 = DEVICES["h200"]
DISTINCT = tuple(a for a in ARCHITECTURES if a not in TWINS)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Case:
    """One run of a launcher.

    The cases of a kernel are tuples of what they depend on, so that they can be sent to another process.

    Attributes:
        architecture: compute capability, 90 for sm_90.
        alone: patterns of the names of kernels of which only one program resides on a multiprocessor, so that nothing
            hides its latency, and why that is accepted.
    """

    architecture: int
    alone: Mapping[str, str] = {}

    def names(self) -> list[str]:
        """The name `kernel-architecture-configuration` of every kernel that the case launches, in order."""
        raise NotImplementedError

    def launch(self, tile=None) -> None:
        """Runs the launcher on CUDA tensors, with `tile` in place of the tile in configs.py if one is given."""
        raise NotImplementedError

    def buckets(self) -> list:
        """The keys of the kernel's table in configs.py that the case takes tiles from."""
        raise NotImplementedError

    def faults(self, name: str, found: dict[str, int]) -> list[str]:
        """What is wrong with the resources of one of the case's kernels, in addition to the faults of any kernel."""
        return []


def compile_case(case: Case, tile=None) -> dict[str, dict]:
    """Compiles the kernels of a case and returns their resources by name, each with the digest of its ingredients."""
    digests = []

    def compile(compiler: Callable, source: triton.compiler.ASTSource, **options):
        digests.append(ingredients(source, **options))
        return compiler()

    with _compiler(compile), recorded(case.architecture) as launches:
        case.launch(tile)
    return {
        name: {"ingredients": digest, **resources(launch, case.architecture)}
        for name, digest, launch in zip(case.names(), digests, launches, strict=True)
    }


def digest_case(case: Case, tile=None) -> dict[str, str]:
    """Returns the digests of the ingredients of a case's kernels by name, and compiles nothing."""
    with digested(case.architecture) as found:
        case.launch(tile)
    return dict(zip(case.names(), [digest for _, digest in found], strict=True))


@contextlib.contextmanager
def digested(architecture: int, *, training: bool = False) -> Iterator[list[tuple[str, str]]]:
    """Within the block launches are as in `compile_only`, but nothing is compiled.

    Yields:
        The name of every kernel that was launched, and the digest of its ingredients.
    """
    found = []

    def digest(compiler: Callable, source: triton.compiler.ASTSource, **options) -> None:
        found.append((source.name, ingredients(source, **options)))

    with _compiler(digest), compile_only(architecture, training=training):
        yield found


@contextlib.contextmanager
def _compiler(replacement: Callable):
    """Within the block Triton calls `replacement(compiler, source, target=, options=)` in place of its compiler."""
    original = triton.compiler.compile

    def compile(source, target, options, **rest):
        return replacement(
            lambda: original(source, target=target, options=options, **rest), source, target=target, options=options
        )

    # Triton looks the compiler up when a kernel first meets a device, and compile_only's device is always a new one.
    with unittest.mock.patch.object(triton.compiler, "compile", compile):
        yield


def ingredients(source: triton.compiler.ASTSource, *, target, options: dict) -> str:
    """A digest of all that goes into the compiler: the code, what it is specialised for, the options, the compilers."""
    backend = triton.compiler.make_backend(target)
    # Triton finds the global variables that the kernel uses when it computes its own key, which also depends on
    # comments and on the line that the kernel begins on, and therefore is of no use here.
    assert source.fn.cache_key
    settings = dict(backend.parse_options(dict(options)).__dict__)
    # A library that is linked counts by its content, because its path is another one in every environment.
    settings["extern_libs"] = [(name, _content(path)) for name, path in settings["extern_libs"]]
    parts = [
        triton.__version__,
        backend.hash(),  # the architecture and the version of ptxas
        sorted(settings.items()),
        sorted(source.signature.items()),
        sorted((path, getattr(value, "cache_key", value)) for path, value in source.constants.items()),
        sorted(source.attrs.items()),
        sorted((name, value) for (name, _), (value, _) in source.fn.used_global_vals.items()),
        source.name,
        code_of(source.fn.module),
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


@functools.cache
def _content(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@functools.cache
def code_of(module: str) -> str:
    """The code of a kernel's file and of the kernels' files that it imports, without comments and docstrings."""
    found, names = [], [module]
    for name in names:
        loaded = importlib.import_module(name)
        tree = ast.parse(inspect.getsource(loaded))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and ast.get_docstring(node) is not None:
                del node.body[0]
            # configs.py is left out: its tiles reach a kernel as constants, which the digest holds anyway.
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module != "configs":
                imported = f"{loaded.__package__}.{node.module}"
                names.extend([imported] if imported not in names else [])
        # Unlike a dump of the tree, source that is made of it is the same in all releases of Python from 3.11 on.
        found.append(ast.unparse(tree))
    return "\n".join(found)


def resources(launch: CompiledLaunch, architecture: int) -> dict[str, int | float]:
    """The resources that a program of the kernel needs, counts of its instructions, and what they predict.

    `resident` is how many programs a multiprocessor holds at once. On sm_90, for which there is a model of how warps
    issue, `issued` is how many instructions a warp issues in this launch, and `us` the predicted time on an H200.
    """
    counts = collections.Counter()
    for instruction in launch.instructions:
        counts["instructions"] += 1
        if instruction.opcode in ("LDG", "LDGSTS"):
            counts["global loads"] += 1
            counts["of 128 bits"] += "128" in instruction.modifiers
        counts["local"] += instruction.opcode in ("LDL", "STL")
        counts["tensor core"] += instruction.opcode == TENSOR_CORES[architecture]
    used = {
        "threads": 32 * launch.warps,
        "registers": launch.registers,
        "shared": launch.shared,
        "stack": launch.stack,
        **{key: counts[key] for key in ("instructions", "global loads", "of 128 bits", "tensor core", "local")},
        "resident": resident(architecture, launch.registers, launch.shared, 32 * launch.warps),
    }
    if architecture == H200.architecture:
        with contextlib.suppress(UnknownLoop):
            # One program is enough to see a change of the code.
            predicted = predict(launch, H200, followed=1)
            used |= {"issued": predicted.instructions, "us": predicted.us}
    return used


def resident(architecture: int, registers: int, shared: int, threads: int) -> int:
    """How many programs of these resources a multiprocessor of the architecture holds at once."""
    return blocks_per_multiprocessor(architecture, registers, shared, threads // 32)[0]


def faults(case: Case, name: str, found: dict[str, int]) -> list[str]:
    """What is wrong with a kernel's resources, as sentences."""
    limit = SHARED_MEMORY_LIMITS[case.architecture]
    wrong = []
    if found["stack"] or found["local"]:
        wrong.append(f"spills: {found['stack']} bytes of stack, {found['local']} loads and stores of local memory")
    if found["shared"] > limit:
        wrong.append(f"{found['shared']} bytes of shared memory, sm_{case.architecture} has {limit}")
    if found["resident"] < 2 and not any(fnmatch.fnmatch(name, pattern) for pattern in case.alone):
        wrong.append("only one program resides on a multiprocessor: `alone` of the kernel's cases must say why")
    return wrong + case.faults(name, found)


@contextlib.contextmanager
def compiling(workers: int = os.cpu_count() or 1):
    """Gives a function that runs `compile_case` in another process and returns a future.

    The processes are spawned, because a fork would copy the compiler's locks in whatever state they are.
    """
    pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    before = os.environ.get("TRITON_CACHE_DIR")
    with tempfile.TemporaryDirectory(prefix="mg_fast_aot_") as folder:
        # The processes, which start with the first job, read this variable.
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            yield functools.partial(pool.submit, compile_case)
        finally:
            pool.shutdown(cancel_futures=True)
            del os.environ["TRITON_CACHE_DIR"]
            if before is not None:
                os.environ["TRITON_CACHE_DIR"] = before


def table(family: str) -> Path:
    """The path of the recorded resources of one file of kernels, as the installed release of Triton compiles them."""
    return Path(__file__).parent / family / f"resources-{triton.__version__}.json"


def read_table(family: str) -> dict[str, dict]:
    """The recorded resources by kernel; empty for a release of Triton with which nothing was recorded."""
    path = table(family)
    return json.loads(path.read_text(encoding="utf-8"))["kernels"] if path.exists() else {}


def write_table(family: str, kernels: dict[str, dict]) -> None:
    """Writes the table with one line for each kernel, so that a changed kernel is one changed line."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(kernels[name])}" for name in kernels)
    table(family).write_text(
        f'{{\n "triton": "{triton.__version__}",\n "kernels": {{\n{lines}\n }}\n}}\n', encoding="utf-8"
    )
