"""One thread's registers and predicates, as far as they are known, and what instructions do to them.

Only what decides branches is computed: whole numbers and predicates that follow from the launch's arguments, the
thread's and the program's numbers, with the few steps in floats by which a whole number is divided. Everything else is
unknown.
"""

import math
import re
import struct
from collections.abc import Callable, Mapping

from .sass import Instruction

MASK = 0xFFFFFFFF


class Thread:
    """Registers and predicates of one thread, as far as they are known."""

    def __init__(self, constants: Mapping[int, int], program: tuple[int, int, int], thread: int):
        self.constants, self.registers, self.predicates = constants, {}, {}
        self.special = {"SR_TID.X": thread, "SR_LANEID": thread % 32, "SRZ": 0, "SR_TID.Y": 0, "SR_TID.Z": 0}
        self.special |= {f"SR_CTAID.{axis}": number for axis, number in zip("XYZ", program)}

    def holds(self, guard: str) -> bool | None:
        return self.predicate(guard) if guard else True

    def predicate(self, text: str) -> bool | None:
        negated, name = text.startswith("!"), text.lstrip("!")
        value = True if name in ("PT", "UPT") else self.predicates.get(name)
        return value if value is None else value != negated

    def word(self, text: str, more: int = 0) -> int | None:
        """The value of an operand; `more` is added to a register's number for the upper half of a pair."""
        text = text.replace(".reuse", "").replace(".H0_H0", "")
        if text.startswith(("-", "~")) and not re.fullmatch(r"-(0x)?[0-9a-f]+", text):
            value = self.word(text[1:], more)
            # Hardware adds the complement and one, which matters for the carry out of -0.
            return value if value is None else (~value & MASK) + (text[0] == "-")
        if re.fullmatch(r"U?RZ|SRZ", text):
            return 0
        if found := re.fullmatch(r"(U?R)(\d+)", text):
            return self.registers.get((found[1], int(found[2]) + more))
        if found := re.fullmatch(r"c\[0x0\]\[0x([0-9a-f]+)\]", text):
            return self.constants.get(int(found[1], 16) + 4 * more)
        if re.fullmatch(r"-?0x[0-9a-f]+|-?\d+", text):
            value = int(text, 0)
            return (value if not more else value >> 32) & MASK
        return None

    def pair(self, text: str) -> int | None:
        low, high = self.word(text), self.word(text, 1)
        return None if low is None or high is None else low | high << 32

    def write(self, text: str, value: int | None, more: int = 0) -> None:
        if found := re.fullmatch(r"(U?R)(\d+)", text):
            name = (found[1], int(found[2]) + more)
            if value is None:
                self.registers.pop(name, None)
            else:
                self.registers[name] = value & MASK
        elif re.fullmatch(r"U?P\d", text):
            if value is None:
                self.predicates.pop(text, None)
            else:
                self.predicates[text] = bool(value)

    def run(self, instruction: Instruction, holds: bool | None) -> None:
        """Does what an instruction does to registers and predicates."""
        if holds is False or instruction.opcode in ("STG", "STS", "BAR", "RED"):
            return
        step = (
            None
            if holds is None
            else _STEPS.get(instruction.opcode.removeprefix("U")) or _STEPS.get(instruction.opcode)
        )
        if step is None or not step(self, instruction):
            self._forget(instruction)

    def _forget(self, instruction: Instruction) -> None:
        """Makes the destinations unknown: a register, and the predicates before it and right behind it."""
        modifiers, found = set(instruction.modifiers), False
        wide = 8 if instruction.opcode == "HGMMA" else 4 if "128" in modifiers else 2
        wide = wide if modifiers & {"64", "128", "WIDE"} or wide == 8 else 1
        if instruction.opcode == "LDSM":
            # The last modifier is the number of matrices, each a register wide.
            wide = int(instruction.modifiers[-1]) if instruction.modifiers[-1].isdigit() else 1
        for operand in instruction.operands:
            if re.fullmatch(r"U?P(T|\d)", operand):
                self.write(operand, None)
            elif found:
                break
            else:
                found = True
                for more in range(wide):
                    self.write(operand, None, more)


def _move(thread: Thread, instruction: Instruction) -> bool:
    value = thread.word(instruction.operands[-1])
    thread.write(instruction.operands[0], value)
    return True


def _special(thread: Thread, instruction: Instruction) -> bool:
    value = thread.special.get(instruction.operands[1])
    thread.write(instruction.operands[0], value)
    if instruction.opcode == "CS2R" and "32" not in instruction.modifiers:
        thread.write(instruction.operands[0], value, 1)
    return True


def _constant(thread: Thread, instruction: Instruction) -> bool:
    for more in range(2 if "64" in instruction.modifiers else 1):
        thread.write(instruction.operands[0], thread.word(instruction.operands[1], more), more)
    return True


def _add(thread: Thread, instruction: Instruction) -> bool:
    if "64" in instruction.modifiers:
        return False
    target, *rest = instruction.operands
    carries_out = []
    while rest and re.fullmatch(r"U?PT|U?P\d", rest[0]):
        carries_out.append(rest.pop(0))
    is_predicate = [bool(re.fullmatch(r"!?U?P(T|\d)", operand)) for operand in rest]
    values = [thread.word(operand) for operand, other in zip(rest, is_predicate) if not other]
    if "X" in instruction.modifiers:
        values += [thread.predicate(operand) for operand, other in zip(rest, is_predicate) if other]
    total = None if None in values else sum(map(int, values))
    thread.write(target, total)
    for carry in carries_out:
        thread.write(carry, None if total is None else total >> 32)
    return True


def _multiply(thread: Thread, instruction: Instruction) -> bool:
    modifiers = set(instruction.modifiers)
    if "MOV" in modifiers:
        return _move(thread, instruction)
    target, *rest = instruction.operands
    sources = [operand for operand in rest if not re.fullmatch(r"!?U?P(T|\d)", operand)]
    if len(sources) != 3:
        return False
    a, b = thread.word(sources[0]), thread.word(sources[1])
    if 0 in (a, b):
        product = 0
    elif a is None or b is None:
        product = None
    else:
        product = (a & MASK) * (b & MASK) if "U32" in modifiers else _signed(a) * _signed(b)
    if "WIDE" in modifiers:
        c = thread.pair(sources[2])
        total = None if None in (product, c) else product + c
        thread.write(target, total)
        thread.write(target, None if total is None else total >> 32, 1)
    elif "HI" in modifiers:
        c = thread.pair(sources[2])
        thread.write(target, None if None in (product, c) else product + c >> 32)
    else:
        carry = [thread.predicate(operand) for operand in rest if operand not in sources] if "X" in modifiers else []
        values = [product, thread.word(sources[2]), *carry]
        thread.write(target, None if None in values else sum(map(int, values)))
    return True


def _shift(thread: Thread, instruction: Instruction) -> bool:
    target, *sources = instruction.operands
    low, count, high = (thread.word(operand) for operand in sources[:3])
    modifiers = instruction.modifiers
    if count is None:
        return False
    if "L" in modifiers:
        if "HI" in modifiers:
            thread.write(target, None if None in (low, high) else (high << 32 | low) << count >> 32)
        else:
            thread.write(target, None if low is None else low << count)
    elif "HI" in modifiers:
        signed = "S32" in modifiers
        thread.write(target, None if high is None else (_signed(high) if signed else high & MASK) >> count)
    else:
        thread.write(target, None if None in (low, high) else (high << 32 | low) >> count)
    return True


def _shifted_add(thread: Thread, instruction: Instruction) -> bool:
    if "X" in instruction.modifiers or "SX32" in instruction.modifiers:
        return False
    target, *rest = instruction.operands
    carries = [rest.pop(0)] if re.fullmatch(r"U?P(T|\d)", rest[0]) else []
    a, b, *others = (thread.word(operand) for operand in rest)
    if None in (a, b, *others):
        return False
    # The last operand is the count. The upper half of a pair stands before it where the upper half is wanted.
    wide = (others[0] << 32 | a if "HI" in instruction.modifiers else a) << others[-1]
    total = (wide >> 32 if "HI" in instruction.modifiers else wide & MASK) + b
    thread.write(target, total)
    for carry in carries:
        thread.write(carry, total >> 32)
    return True


def _logic(thread: Thread, instruction: Instruction) -> bool:
    operands = list(instruction.operands)
    result = operands.pop(0) if re.fullmatch(r"U?P\d", operands[0]) else None
    target, *sources = operands
    a, b, c = (thread.word(operand) for operand in sources[:3])
    table = int(sources[3], 0)
    if None in (a, b, c):
        # The conjunction of two numbers is zero if one of them is.
        value = 0 if table == 0xC0 and 0 in (a, b) else None
    else:
        terms = ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c) for i in range(8) if table >> i & 1)
        value = 0
        for term in terms:
            value |= term & MASK
    thread.write(target, value)
    if result:
        thread.write(result, value)
    return True


def _select(thread: Thread, instruction: Instruction) -> bool:
    target, a, b, condition = instruction.operands
    holds = thread.predicate(condition)
    thread.write(target, None if holds is None else thread.word(a if holds else b))
    return True


_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}
_COMBINE: dict[str, Callable[[bool, bool], bool]] = {
    "AND": lambda a, b: a and b,
    "OR": lambda a, b: a or b,
    "XOR": lambda a, b: a != b,
}


def _compare(thread: Thread, instruction: Instruction) -> bool:
    first, second, left, right, with_, *lower = instruction.operands
    comparison = next(m for m in instruction.modifiers if m in _COMPARE)
    combination = next((m for m in instruction.modifiers if m in _COMBINE), "AND")
    a, b, other = thread.word(left), thread.word(right), thread.predicate(with_)
    holds = None
    if a is not None and b is not None:
        a, b = (a & MASK, b & MASK) if "U32" in instruction.modifiers else (_signed(a), _signed(b))
        holds = _COMPARE[comparison](a, b)
        if "EX" in instruction.modifiers:
            # The upper halves of 64-bit numbers; the last predicate compared the lower halves.
            below = thread.predicate(lower[0])
            if a == b:
                holds = below
            elif comparison in ("LE", "GE"):
                holds = _COMPARE[comparison[0] + "T"](a, b)
    for target, value in ((first, holds), (second, None if holds is None else not holds)):
        if combination == "AND" and other is False:
            result = False
        elif combination == "OR" and other is True:
            result = True
        else:
            result = None if None in (value, other) else _COMBINE[combination](value, other)
        thread.write(target, result)
    return True


def _predicate_logic(thread: Thread, instruction: Instruction) -> bool:
    first, second, *rest = instruction.operands
    sources = [thread.predicate(operand) for operand in rest[:3]]
    if None in sources:
        return False
    place = sum(4 >> i for i, value in enumerate(sources) if value)
    for target, table in zip((first, second), rest[3:5]):
        thread.write(target, int(table, 0) >> place & 1)
    return True


def _half_constant(thread: Thread, instruction: Instruction) -> bool:
    """Two 16-bit constants added to a product of zeros, by which compilers write a constant into a register."""
    target, a, b, *halves = instruction.operands
    if a.lstrip("-") != "RZ" or b.lstrip("-") != "RZ" or len(halves) != 2:
        return False
    high, low = (struct.unpack("<H", struct.pack("<e", float(half)))[0] for half in halves)
    thread.write(target, high << 16 | low)
    return True


def _absolute(thread: Thread, instruction: Instruction) -> bool:
    value = thread.word(instruction.operands[1])
    thread.write(instruction.operands[0], None if value is None else abs(_signed(value)))
    return True


def _to_float(thread: Thread, instruction: Instruction) -> bool:
    value = thread.word(instruction.operands[1])
    if value is None:
        return False
    value = float(value & MASK if "U32" in instruction.modifiers else _signed(value))
    thread.write(instruction.operands[0], _bits(value))
    return True


def _reciprocal(thread: Thread, instruction: Instruction) -> bool:
    value = thread.word(instruction.operands[1])
    number = 0.0 if value is None else _float(value)
    if "RCP" not in instruction.modifiers or not number:
        return False
    thread.write(instruction.operands[0], _bits(1 / number))
    return True


def _from_float(thread: Thread, instruction: Instruction) -> bool:
    value = thread.word(instruction.operands[1])
    if value is None or not math.isfinite(_float(value)):
        return False
    thread.write(instruction.operands[0], min(int(_float(value)), MASK))
    return True


def _bits(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


def _float(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits & MASK))[0]


def _signed(value: int) -> int:
    value &= MASK
    return value - (1 << 32) if value >> 31 else value


_STEPS: dict[str, Callable[[Thread, Instruction], bool]] = {
    "MOV": _move,
    "UMOV": _move,
    "R2UR": _move,
    "S2R": _special,
    "S2UR": _special,
    "CS2R": _special,
    "LDC": _constant,
    "ULDC": _constant,
    "IADD3": _add,
    "IADD": _add,
    "VIADD": _add,
    "IMAD": _multiply,
    "SHF": _shift,
    "LEA": _shifted_add,
    "LOP3": _logic,
    "SEL": _select,
    "ISETP": _compare,
    "PLOP3": _predicate_logic,
    "HFMA2": _half_constant,
    "IABS": _absolute,
    "I2F": _to_float,
    "I2FP": _to_float,
    "MUFU": _reciprocal,
    "F2I": _from_float,
}
