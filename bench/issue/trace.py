"""Follows one thread through a kernel's machine code, to know how often each instruction is issued.

A forward branch whose predicate is unknown (see `thread`) is not taken, so that its body counts. A loop whose end is
unknown is refused.
"""

from collections.abc import Mapping, Sequence

from ..errors import BenchError
from .sass import Instruction, by_address, is_backward
from .thread import Thread

# No kernel of this project issues as many instructions in one warp.
MOST_STEPS = 3_000_000
# The place of the first argument in the constant bank of sm_90 and earlier; later architectures begin at 0x380.
FIRST_ARGUMENT = 0x210


class UnknownLoop(BenchError):
    """A loop whose number of rounds depends on something that is not known before the kernel runs."""


def trace(
    instructions: Sequence[Instruction],
    constants: Mapping[int, int],
    *,
    program: tuple[int, int, int] = (0, 0, 0),
    thread: int = 0,
) -> list[int]:
    """The places of all instructions that the warp of a thread issues, in order.

    An instruction that its predicate turns off takes a slot and does nothing: it stands as ~place, a negative number.

    Args:
        constants: 32-bit words of the constant bank by their offset, as far as they are known.
        program: the program's number along each axis of the grid.
        thread: the thread's number in its program.

    Raises:
        UnknownLoop: a loop's end depends on what is not known here.
    """
    machine = Thread(constants, program, thread)
    places, steps, at, returns = by_address(instructions), [], 0, []
    while at < len(instructions):
        instruction = instructions[at]
        if len(steps) > MOST_STEPS:
            raise UnknownLoop(f"more than {MOST_STEPS:,} instructions: the loop at {instruction.address:#x} has no end")
        opcode, holds = instruction.opcode, machine.holds(instruction.guard)
        steps.append(~at if holds is False else at)
        if opcode == "EXIT" and holds:
            break
        if opcode == "RET" and returns:
            at = returns.pop()
        elif opcode == "CALL" and instruction.target is not None:
            returns.append(at + 1)
            at = places[instruction.target]
        elif opcode == "BRA":
            at = _after_branch(instruction, machine, holds, at, places)
            if at is None:
                break
        else:
            machine.run(instruction, holds)
            at += 1
    return steps


def _after_branch(instruction, machine: "Thread", holds: bool | None, at: int, places) -> int | None:
    """The place of the instruction that comes after a branch; None after a branch to itself, which ends a kernel."""
    if "DIV" in instruction.modifiers:
        # This leads to code for warps whose threads have parted.
        return at + 1
    for operand in instruction.operands[:-1]:
        # A branch of the uniform datapath has its predicate among its operands.
        condition = machine.predicate(operand)
        holds = False if holds is False or condition is False else None if None in (holds, condition) else True
    if holds is None and is_backward(instruction):
        raise UnknownLoop(f"the loop that ends at {instruction.address:#x} has an unknown number of rounds")
    if not holds:
        return at + 1
    return None if instruction.target == instruction.address else places[instruction.target]
