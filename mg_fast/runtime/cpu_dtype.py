"""Chooses the dtype in which `dtype="auto"` loads a checkpoint on a CPU, and says what another one costs.

A CPU without arithmetic for 16-bit numbers first converts every operand of a product. Weights in bfloat16 or float16
then take half the memory of float32, but products take several times as long.
"""

import logging
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

# The CPU features, as Linux and torch name them, that provide arithmetic in a dtype.
_ARITHMETIC = {
    torch.bfloat16: {"avx512_bf16", "amx_bf16", "bf16", "svebf16"},
    torch.float16: {"avx512_fp16", "amx_fp16", "asimdhp", "fp16_arith", "neon_fp16_arith"},
}
# How many times as long as in float32 a matrix product of many rows takes on a CPU without arithmetic in the dtype: the
# least and the most over the shapes in bench/results/cpu-dtypes.json. A test compares the numbers with the file.
SLOWER = {torch.bfloat16: (7, 9), torch.float16: (6, 7)}
# Memory needed relative to the weights: packed copies of the towers, activations, keys and values come on top of them.
_MEMORY_FACTOR = 1.25


def features() -> frozenset[str]:
    """The names of this CPU's features, as far as Linux or torch report them; empty if neither does."""
    found = {name for name, there in torch.cpu.get_capabilities().items() if there is True}
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, names = line.partition(":")
        if key.strip() in ("flags", "Features"):
            found.update(names.split())
            break
    return frozenset(found)


def available_bytes() -> int:
    """The bytes of memory that can be taken without swapping, within the limit of a container."""
    import psutil

    available = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        # Files that were read count as used until the memory is needed.
        cached = next(
            int(line.split()[1])
            for line in (group / "memory.stat").read_text().splitlines()
            if line.startswith("inactive_file ")
        )
    except (OSError, ValueError, StopIteration):
        # The file does not exist, or it says `max` because there is no limit.
        return available
    return min(available, max(0, limit - used + cached))


def fast_dtypes() -> list[torch.dtype]:
    """The 16-bit dtypes in which this CPU computes."""
    found = features()
    return [dtype for dtype, names in _ARITHMETIC.items() if names & found]


def choose(stored: torch.dtype, parameters: int) -> torch.dtype:
    """The dtype that `auto` takes on this CPU; logs one line if it is not the stored one, or is a slow one.

    Args:
        stored: dtype of the checkpoint's weights. One wider than 16 bits is taken as it is, so that no weight is
            rounded that was not rounded before.
        parameters: how many numbers the checkpoint's tensors hold.
    """
    if stored not in _ARITHMETIC:
        return stored
    fastest = _fastest(stored)
    if fastest == stored:
        return stored
    if fastest != torch.float32:
        logger.warning("%s", _loading_message(fastest, stored, f"{_name(fastest)} takes as much memory"))
        return fastest
    needed, available = int(parameters * torch.float32.itemsize * _MEMORY_FACTOR), available_bytes()
    if needed > available:
        logger.warning(
            "weights stay in %s: %s, but float32 needs %.1f GB of memory and %.1f GB are available",
            _name(stored),
            cost(stored),
            needed / 1e9,
            available / 1e9,
        )
        return stored
    logger.warning("%s", _loading_message(torch.float32, stored, f"dtype='{_name(stored)}' takes half of the memory"))
    return torch.float32


def check(dtype: torch.dtype) -> None:
    """Warns about a dtype that was asked for and is slow on this CPU."""
    if dtype in _ARITHMETIC and (fastest := _fastest(dtype)) != dtype:
        message = "weights in %s, as asked for: %s (dtype='auto' or '%s' is faster)"
        logger.warning(message, _name(dtype), cost(dtype), _name(fastest))


def cost(dtype: torch.dtype) -> str:
    """A clause that says what products in a 16-bit dtype cost on a CPU that has no arithmetic for it."""
    fewest, most = SLOWER[dtype]
    times = f"{fewest} to {most} times as long as in float32 (measured with AVX2)"
    return f"this CPU has no {_name(dtype)} arithmetic, and products of many rows take {times}"


def describe() -> str:
    """One line for `mg-fast doctor`: the dtypes that this CPU computes in, and what `auto` therefore takes."""
    fast = fast_dtypes()
    slow = {dtype: _fastest(dtype) for dtype in _ARITHMETIC if dtype not in fast}
    arithmetic = " and ".join(["float32", *map(_name, fast)])
    if not slow:
        return f"arithmetic in {arithmetic}; dtype=auto keeps 16-bit checkpoints as they are"
    slower = ", ".join(f"{_name(dtype)} {SLOWER[dtype][0]} to {SLOWER[dtype][1]} times as long" for dtype in slow)
    taken = " and ".join(f"{_name(other)} for {_name(dtype)}" for dtype, other in slow.items())
    memory = (
        f", where float32 fits in {available_bytes() / 1e9:.1f} GB of available memory"
        if torch.float32 in slow.values()
        else ""
    )
    return f"arithmetic in {arithmetic} (measured with AVX2: {slower}); dtype=auto takes {taken}{memory}"


def _fastest(stored: torch.dtype) -> torch.dtype:
    """The dtype in which this CPU multiplies fastest, among those that can hold the numbers of a 16-bit dtype.

    float16 lacks the range for bfloat16's numbers.
    """
    fast = fast_dtypes()
    return next((dtype for dtype in (stored, torch.bfloat16) if dtype in fast), torch.float32)


def _loading_message(dtype: torch.dtype, stored: torch.dtype, memory: str) -> str:
    return f"weights are loaded in {_name(dtype)}, not in the checkpoint's {_name(stored)}: {cost(stored)} ({memory})"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
