"""Reads the machine code (SASS) of a compiled kernel, with the control words of Volta and later GPUs.

The upper half of every 128-bit instruction has a control word: how many cycles its warp waits before its next
instruction, and which of six barriers it sets when its result is there, sets when its operands were read, and waits
for. The bits are those that public disassemblers document ("Dissecting the NVIDIA Volta GPU Architecture via
Microbenchmarking", arXiv 1804.06826); they are the same up to sm_90.
"""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

_INSTRUCTION = re.compile(
    r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);\s+/\* 0x([0-9a-f]{16}) \*/\s*\n"
    r"\s+/\* 0x([0-9a-f]{16}) \*/"
)
# The architectures whose control words are read as described above.
KNOWN_CONTROL_WORDS = (80, 86, 89, 90)
# A barrier number that stands for none.
NO_BARRIER = 7


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        address: in bytes from the beginning of the kernel.
        guard: the predicate that it runs under, such as `!P0`; empty for none.
        name: its opcode with all modifiers, such as `LDG.E.128`.
        operands: what stands after the opcode, the destinations first.
        stall: cycles until its warp can issue the next instruction.
        sets: the barrier that is set when its result is there, or NO_BARRIER.
        sets_when_read: the barrier that is set when its operands were read, or NO_BARRIER.
        waits: the barriers that it waits for.
    """

    address: int
    guard: str
    name: str
    operands: tuple[str, ...]
    stall: int = 1
    sets: int = NO_BARRIER
    sets_when_read: int = NO_BARRIER
    waits: tuple[int, ...] = ()

    @property
    def opcode(self) -> str:
        """The opcode without modifiers."""
        return self.name.split(".")[0]

    @property
    def modifiers(self) -> list[str]:
        return self.name.split(".")[1:]

    @property
    def target(self) -> int | None:
        """The address that a branch leads to; None for other instructions."""
        if self.opcode not in ("BRA", "CALL"):
            return None
        found = re.search(r"0x([0-9a-f]+)", " ".join(self.operands))
        return int(found[1], 16) if found else None


def parse(text: str) -> list[Instruction]:
    """The instructions in what `cuobjdump -sass` prints of one kernel."""
    found = []
    for address, guard, name, operands, _, high in _INSTRUCTION.findall(text):
        control = int(high, 16) >> 41
        found.append(
            Instruction(
                address=int(address, 16),
                guard=guard.strip().removeprefix("@"),
                name=name,
                operands=tuple(part.strip() for part in operands.split(",") if part.strip()),
                stall=control & 0xF,
                sets=control >> 5 & 7,
                sets_when_read=control >> 8 & 7,
                waits=tuple(barrier for barrier in range(6) if control >> (11 + barrier) & 1),
            )
        )
    return found


def disassemble(cubin: bytes) -> list[Instruction]:
    """The instructions of a compiled kernel, by the disassembler that Triton brings along."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        words = [triton.knobs.nvidia.cuobjdump.path, "-sass", file.name]
        return parse(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


# The pipes of a multiprocessor, by opcode. Every opcode that starts with U and is not listed runs on the uniform pipe,
# all others on the integer pipe (ALU).
_PIPES = {
    "FMA": "FFMA FADD FMUL FSWZADD HFMA2 HADD2 HMUL2",
    "IMAD": "IMAD",
    "special": "MUFU",
    "load": "LDG LDGSTS",
    "store": "STG ATOMG RED",
    "shared load": "LDS LDSM",
    "shared store": "STS STSM",
    "shuffle": "SHFL",
    "tensor": "HMMA HGMMA",
    "convert": "F2F F2I I2F I2FP F2FP F2IP FRND",
    "control": "BAR DEPBAR LDGDEPBAR WARPSYNC BSSY BSYNC BRA EXIT NOP WARPGROUP SYNCS ERRBAR MEMBAR CALL RET FENCE "
    "UBLKCP BMOV NANOSLEEP",
}
_PIPE_OF = {opcode: pipe for pipe, opcodes in _PIPES.items() for opcode in opcodes.split()}


def pipe_of(instruction: Instruction) -> str:
    """The pipe that an instruction runs on."""
    opcode = instruction.opcode
    return _PIPE_OF.get(opcode) or ("uniform" if opcode.startswith("U") else "ALU")


def registers_of_a_load(instruction: Instruction) -> int:
    """How many 32-bit registers each thread of a load or store moves."""
    return 4 if "128" in instruction.modifiers else 2 if "64" in instruction.modifiers else 1


def is_backward(instruction: Instruction) -> bool:
    """Whether an instruction is the end of a loop: a branch back by more than itself."""
    return instruction.target is not None and instruction.target < instruction.address


def by_address(instructions: Sequence[Instruction]) -> dict[int, int]:
    return {instruction.address: place for place, instruction in enumerate(instructions)}
