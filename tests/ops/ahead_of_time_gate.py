"""The ahead-of-time gate: limits on what a kernel needs, read from machine code that is compiled without a GPU.

Compiling a kernel takes seconds, and what comes out depends only on what goes in. So the digest of everything that goes
into the compiler (`ingredients`) is recorded beside the resources, and a kernel whose digest is the recorded one need
not be compiled again.
"""

import ast
import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import importlib
import inspect
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
import unittest.mock
from collections.abc import Callable
from pathlib import Path

import torch
import triton
import triton.compiler

from mg_fast.kernels.configs import SHARED_MEMORY_LIMITS
from mg_fast.ops.ahead_of_time import compile_only

# The machine's fastest instructions for matrix products. Products that are too small for them use HMMA on the newer
# architectures too, and then count as none.
TENSOR_CORES = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
ARCHITECTURES = tuple(SHARED_MEMORY_LIMITS)
# sm_89 has the tiles of sm_86 and needs the same resources, down to the instruction. A test compares the cases that are
# compiled for both; the other cases are compiled for sm_86 only.
TWINS = {89: 86}
DISTINCT = tuple(a for a in ARCHITECTURES if a not in TWINS)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Case:
    """One run of a launcher.

    The cases of a kernel are tuples of what they depend on, so that they can be sent to another process.

    Attributes:
        architecture: compute capability, 90 for sm_90.
    """

    architecture: int

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

    with _compiler(compile), compile_only(case.architecture) as compiled:
        case.launch(tile)
    return {
        name: {"ingredients": digest, **resources(kernel)}
        for name, digest, kernel in zip(case.names(), digests, compiled, strict=True)
    }


def digest_case(case: Case, tile=None) -> dict[str, str]:
    """Returns the digests of the ingredients of a case's kernels by name, and compiles nothing."""
    digests = []

    def digest(compiler: Callable, source: triton.compiler.ASTSource, **options) -> None:
        digests.append(ingredients(source, **options))

    with _compiler(digest), compile_only(case.architecture):
        case.launch(tile)
    return dict(zip(case.names(), digests, strict=True))


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


def resources(kernel) -> dict[str, int]:
    """The resources that a program of the kernel needs, and counts of its instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        cuobjdump = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
        tool = triton.knobs.nvidia.cuobjdump.path
        used = dict(
            re.findall(r"\b(REG|STACK|LOCAL):(\d+)", cuobjdump([tool, "--dump-resource-usage", file.name]).stdout)
        )
        code = cuobjdump([tool, "-sass", file.name]).stdout
    counts = collections.Counter()
    for instruction in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code):
        name, *rest = instruction.split(".")
        counts["instructions"] += 1
        if name in ("LDG", "LDGSTS"):
            counts["global loads"] += 1
            counts["of 128 bits"] += "128" in rest
        counts["local"] += name in ("LDL", "STL")
        counts["tensor core"] += name == TENSOR_CORES[kernel.metadata.target.arch]
    return {
        "threads": 32 * kernel.metadata.num_warps,
        "registers": int(used["REG"]),
        "shared": kernel.metadata.shared,
        "stack": int(used["STACK"]) + int(used["LOCAL"]),
        **{key: counts[key] for key in ("instructions", "global loads", "of 128 bits", "tensor core", "local")},
    }


def faults(case: Case, name: str, found: dict[str, int]) -> list[str]:
    """What is wrong with a kernel's resources, as sentences."""
    limit = SHARED_MEMORY_LIMITS[case.architecture]
    wrong = []
    if found["stack"] or found["local"]:
        wrong.append(f"spills: {found['stack']} bytes of stack, {found['local']} loads and stores of local memory")
    if found["shared"] > limit:
        wrong.append(f"{found['shared']} bytes of shared memory, sm_{case.architecture} has {limit}")
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
