"""Triton's interpreter, which runs the kernels on a CPU for tests and for debugging (TRITON_INTERPRET=1).

All corrections of the interpreter are in this file. They apply only while a kernel of this project runs.
"""

import contextlib
import functools
import os
import sys
import threading

import torch

# The values that Triton takes for true, in lower case.
_TRUE = ("1", "true", "on", "yes", "y")

# The interpreter keeps the position in the grid, and the functions that replace triton.language's, in global variables.
# Two launches at the same time would compute with each other's positions and give wrong numbers.
_one_launch = threading.RLock()


def requested() -> bool:
    """Whether the environment asks Triton to interpret kernels."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in _TRUE


def why_not() -> str | None:
    """Why kernels are not interpreted here, as a sentence; None where they are."""
    if not requested():
        return "TRITON_INTERPRET=1, set before Python starts, interprets them on the CPU"
    # Triton reads the variable once for every function, when the function is defined. Triton's own functions are
    # defined when it is imported.
    triton = sys.modules.get("triton")
    if triton is None or type(triton.language.cdiv).__name__ == "InterpretedFunction":
        return None
    return "TRITON_INTERPRET=1 was set after Triton had been imported, which is too late: set it before Python starts"


@contextlib.contextmanager
def launching():
    """Within the block only this thread launches interpreted kernels, and bfloat16 numbers are rounded as on a GPU."""
    from triton.runtime import interpreter

    with _one_launch:
        # A Triton without this function converts in another way, which is left alone.
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
    """Triton's conversion, corrected between float32 and bfloat16.

    Triton's own conversion drops the low bits of a float32, where a GPU rounds to the nearest bfloat16. Over the steps
    of a model that becomes a bias towards zero. A kernel cannot ask for another rounding, because the interpreter
    passes on no rounding mode for plain conversions.
    """
    from triton import language

    if rounding is None and (source, target) == (language.bfloat16, language.float32):
        return values.astype("uint32") << 16
    if rounding is None and (source, target) == (language.float32, language.bfloat16):
        return torch.tensor(values, device="cpu").bfloat16().view(torch.uint16).numpy()
    return original(values, source, target, rounding)
