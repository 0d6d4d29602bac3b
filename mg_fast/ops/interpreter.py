"""Triton's interpreter, which runs the kernels on a CPU for tests and for looking into them (TRITON_INTERPRET=1).

Whatever mends the interpreter is in this file and nowhere else. It holds only while one of this project's kernels runs.
"""

import contextlib
import functools
import os
import sys
import threading

import torch

# The values that Triton itself takes for true, in lower case.
_TRUE = ("1", "true", "on", "yes", "y")

# The interpreter keeps the position in the grid, and the functions it puts in the place of triton.language's, in global
# variables. Two launches at a time would compute with each other's positions and give wrong numbers.
_one_launch = threading.RLock()


def requested() -> bool:
    """Whether the environment asks Triton to interpret kernels."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in _TRUE


def why_not() -> str | None:
    """Why kernels are not interpreted here, as a sentence; None where they are."""
    if not requested():
        return "TRITON_INTERPRET=1, set before Python starts, interprets them on the CPU"
    # Triton reads the variable once for every function, when the function is defined; its own are defined when it is
    # imported.
    triton = sys.modules.get("triton")
    if triton is None or type(triton.language.cdiv).__name__ == "InterpretedFunction":
        return None
    return "TRITON_INTERPRET=1 was set after Triton had been imported, which is too late: set it before Python starts"


@contextlib.contextmanager
def launching():
    """Within the block this thread alone launches interpreted kernels, and bfloat16 numbers are rounded as on a GPU."""
    from triton.runtime import interpreter

    with _one_launch:
        # A Triton without this function has another way of converting, which is then left alone.
        original = getattr(interpreter, "_convert_float", None)
        if original is None:
            yield
            return
        interpreter._convert_float = functools.partial(_convert_float, original)
        try:
            yield
        finally:
            interpreter._convert_float = original


def _convert_float(original, values, source, target, rounding):
    """Triton's conversion, with the right numbers between float32 and bfloat16.

    Triton's own drops the low bits of a float32 where a GPU rounds to the nearest bfloat16. Over the steps of a model
    that is a bias towards zero. A kernel cannot ask for another rounding: the interpreter passes on no rounding mode
    for plain conversions.
    """
    from triton import language

    if rounding is None and (source, target) == (language.bfloat16, language.float32):
        return values.astype("uint32") << 16
    if rounding is None and (source, target) == (language.float32, language.bfloat16):
        return torch.tensor(values, device="cpu").bfloat16().view(torch.uint16).numpy()
    return original(values, source, target, rounding)
