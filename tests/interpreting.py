"""Sets up kernel tests, on a GPU or interpreted on the CPU: where they run, and memory that shows what was not written.

Interpreting is also made faster here.
"""

import dataclasses
import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None


# A process either interprets kernels or compiles them; this is fixed when Triton is imported. Therefore the name of a
# file says which of the two it needs.
_KERNEL_TESTS = ("test_interpreted_", "test_fuzz_")
_AHEAD_OF_TIME_TESTS = "test_aot"


def is_kernel_test(path: Path) -> bool:
    """Whether the tests in a file run kernels, interpreted or on a GPU."""
    return path.name.startswith(_KERNEL_TESTS)


def why_skipped(path: Path) -> str | None:
    """The reason why the tests in a file cannot run in this process, or None where they can."""
    has_triton = importlib.util.find_spec("triton") is not None
    if is_kernel_test(path) and not INTERPRETED and not (has_triton and torch.cuda.is_available()):
        return (
            "needs Triton and a GPU, or a process of its own: "
            "`make interpreted`, or TRITON_INTERPRET=1 python -m pytest FILE"
        )
    if path.name.startswith(_AHEAD_OF_TIME_TESTS):
        if not has_triton:
            return "triton is published for Linux only"
        if os.environ.get("TRITON_INTERPRET") == "1":
            return "compiling ahead of time needs a process without TRITON_INTERPRET"
    return None


class _SkippedFile(pytest.Module):
    """A file that is not imported in this process and is reported with the reason."""

    def collect(self):
        pytest.skip(why_skipped(self.path), allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent):
    if why_skipped(module_path) is not None:
        return _SkippedFile.from_parent(parent, path=module_path)
    return None


if INTERPRETED:
    import triton
    from triton.runtime import interpreter

    # The interpreter repeats every integer operation in 64 bits to detect an overflow. That is half of the run time.
    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )
    # When a jit function calls another one, the interpreter patches all of triton.language again, which is most of the
    # remaining run time. The launch has patched it already, except for what Triton's own library sees as `core`, which
    # therefore stays patched.
    interpreter._patch_lang(triton.language.zeros.fn)
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
    # The interpreter spells out the type of every shape tuple for a compiler that is not used. That is a third of the
    # rest.
    triton.language.core._type_for_tuple_values = lambda values, fields=None: None
    # The interpreter builds a table of all dtypes for every look-up in it.
    _numpy_dtype, _numpy_dtypes = interpreter._get_np_dtype, {}

    def numpy_dtype(dtype):
        name = str(dtype.scalar)
        if name not in _numpy_dtypes:
            _numpy_dtypes[name] = _numpy_dtype(dtype)
        return _numpy_dtypes[name]

    interpreter._get_np_dtype = numpy_dtype
    # CPython maps memory for every 16 KiB of frames, and does so again at every call that crosses this border. Under
    # pytest's frames the border lies in the innermost loop and costs half of the run time. A thread begins with an
    # empty stack.
    _launch, _thread = interpreter.GridExecutor.__call__, ThreadPoolExecutor(1)
    interpreter.GridExecutor.__call__ = lambda *args, **kwargs: _thread.submit(_launch, *args, **kwargs).result()


@pytest.fixture(autouse=True)
def kernel_conditions(request, two_threads):
    """Prepares tests that run kernels: their tensors are made on the kernels' device, and unwritten memory shows.

    Fresh memory is NaN, so that an element that a kernel does not write makes any later check fail. One thread is used,
    because the tensors are tiny and waking a second thread would only cost time.
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
