"""Records what a call launches when its kernels are only compiled: the machine code, the grid and the arguments."""

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mg_fast.ops.ahead_of_time import compile_only

from .sass import Instruction, disassemble
from .trace import FIRST_ARGUMENT

# Bytes of an argument in the constant bank, by its type; pointers have 8.
_SIZES = {"i1": 1, "i8": 1, "u8": 1, "i16": 2, "u16": 2, "i32": 4, "u32": 4, "fp32": 4, "i64": 8, "u64": 8, "fp64": 8}


@dataclass(frozen=True)
class CompiledLaunch:
    """One launch of a kernel.

    Attributes:
        kernel: its name.
        grid: programs along x, y and z.
        warps: of one program.
        registers: of one thread.
        shared: bytes of shared memory of one program.
        instructions: its machine code.
        constants: the arguments that are whole numbers, as 32-bit words by their offset in the constant bank.
        bytes: of all tensors among its arguments, each counted once.
    """

    kernel: str
    grid: tuple[int, int, int]
    warps: int
    registers: int
    shared: int
    instructions: list[Instruction]
    constants: dict[int, int]
    bytes: int

    @property
    def programs(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


@contextlib.contextmanager
def recorded(architecture: int) -> Iterator[list[CompiledLaunch]]:
    """Within the block launches are compiled for an architecture, as in `compile_only`, and recorded in a list."""
    from triton.runtime.jit import JITFunction

    found: list[CompiledLaunch] = []
    with compile_only(architecture) as compiled:
        compile_one = JITFunction.run

        def run(self, *args, grid, **options):
            compile_one(self, *args, grid=grid, **options)
            named = dict(zip(self.arg_names, args)) | options
            found.append(_launch(compiled[-1], grid(named) if callable(grid) else grid, named))

        JITFunction.run = run
        try:
            yield found
        finally:
            JITFunction.run = compile_one


def _launch(kernel, grid: tuple[int, ...], arguments: dict) -> CompiledLaunch:
    values = [pair for name, type in kernel.src.signature.items() for pair in _flat(type, arguments.get(name))]
    tensors = {id(value): value for value in _tensors(tuple(arguments.values()))}
    return CompiledLaunch(
        kernel=kernel.metadata.name,
        grid=tuple([*grid, 1, 1][:3]),
        warps=kernel.metadata.num_warps,
        registers=_registers(kernel.asm["cubin"]),
        shared=kernel.metadata.shared,
        instructions=disassemble(kernel.asm["cubin"]),
        constants=_constants(values),
        bytes=sum(tensor.numel() * tensor.itemsize for tensor in tensors.values()),
    )


def _flat(type, value) -> Iterator[tuple[str, object]]:
    """The arguments that the compiled kernel takes, as pairs of type and value; tuples are taken apart."""
    if isinstance(type, (tuple, list)):
        for part, inner in zip(type, value):
            yield from _flat(part, inner)
    elif type != "constexpr":
        yield type, value


def _constants(arguments: list[tuple[str, object]]) -> dict[int, int]:
    """Whole numbers among the arguments by their offset; every argument is aligned to its size."""
    words, at = {}, FIRST_ARGUMENT
    for type, value in arguments:
        size = 8 if type.startswith("*") else _SIZES[type]
        at = -(-at // size) * size
        if isinstance(value, int) and size >= 4:
            for i in range(size // 4):
                words[at + 4 * i] = value >> 32 * i & 0xFFFFFFFF
        at += size
    return words


def _tensors(value) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def _registers(cubin: bytes) -> int:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        words = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        told = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"\bREG:(\d+)", told)[1])
