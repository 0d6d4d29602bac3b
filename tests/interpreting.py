"""Kernels on a GPU, or interpreted on the CPU: where they run, how to interpret faster, and memory that shows what was
not written.
"""

import dataclasses
import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None


# A process either interprets kernels or compiles them: that is settled when Triton is imported. So the name of a file
# says which it needs.
_KERNEL_TESTS = ("test_interpreted_", "test_fuzz_")
_AHEAD_OF_TIME_TESTS = "test_aot"


def is_kernel_test(path: Path) -> bool:
    """Whether a file's tests run kernels, interpreted or on a GPU."""
    return path.name.startswith(_KERNEL_TESTS)


def why_skipped(path: Path) -> str | None:
    """Why the tests of a file cannot run in this process; None where they can."""
    has_triton = importlib.util.find_spec("triton") is not None
    if is_kernel_test(path) and not INTERPRETED and not (has_triton and torch.cuda.is_available()):
        return "needs Triton and a GPU, or a process of its own: `make interpreted`, or TRITON_INTERPRET=1 python -m pytest FILE"
    if path.name.startswith(_AHEAD_OF_TIME_TESTS):
        if not has_triton:
            return "triton is published for Linux only"
        if os.environ.get("TRITON_INTERPRET") == "1":
            return "compiling ahead of time needs a process without TRITON_INTERPRET"
    return None


class _SkippedFile(pytest.Module):
    """A file that is not imported here, and is reported with the reason."""

    def collect(self):
        pytest.skip(why_skipped(self.path), allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent):
    if why_skipped(module_path) is not None:
        return _SkippedFile.from_parent(parent, path=module_path)
    return None


if INTERPRETED:
    import triton
    from triton.runtime import interpreter

    # every integer operation is done a second time in 64 bits to see whether it overflowed: half of the run time
    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )
    # a call of a jit function from a jit function patches all of triton.language again, most of the rest of it: the
    # launch has done so, but for what Triton's own library sees as `core`, which stays patched
    interpreter._patch_lang(triton.language.zeros.fn)
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
    # every shape is a tuple whose type is spelt out, for a compiler that is not there: a third of what is left
    triton.language.core._type_for_tuple_values = lambda values, fields=None: None
    # a table of all dtypes is built for every look-up in it
    _numpy_dtype, _numpy_dtypes = interpreter._get_np_dtype, {}

    def numpy_dtype(dtype):
        name = str(dtype.scalar)
        if name not in _numpy_dtypes:
            _numpy_dtypes[name] = _numpy_dtype(dtype)
        return _numpy_dtypes[name]

    interpreter._get_np_dtype = numpy_dtype
    # CPython maps memory for every 16 KiB of frames, and a call back and forth across that line does so each time:
    # under pytest's frames the line lies in the innermost loop, half of the run time; a thread begins with an empty
    # stack
    _launch, _thread = interpreter.GridExecutor.__call__, ThreadPoolExecutor(1)
    interpreter.GridExecutor.__call__ = lambda *args, **kwargs: _thread.submit(_launch, *args, **kwargs).result()


@pytest.fixture(autouse=True)
def kernel_conditions(request, two_threads):
    """For tests that run kernels: what they make is there where the kernels run, and memory shows what was not written.

    Fresh memory is NaN, so that an element that a kernel does not write fails whatever looks at it. One thread, as the
    tensors are tiny:
    a second one only has to be woken up.
    """
    if not is_kernel_test(request.path):
        yield
        return
    torch.set_num_threads(1)
    monkeypatch = request.getfixturevalue("monkeypatch")

    def filled(allocate):
        def allocate_filled(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return allocate_filled

    for owner, name in [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]:
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))
    with torch.device("cpu" if INTERPRETED else "cuda"):
        yield
