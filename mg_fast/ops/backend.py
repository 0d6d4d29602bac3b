"""Chooses the implementation of an operation that runs, and says in a sentence why another one cannot.

The choice is taken from the first of these that makes one: the `backend=` of a call, `use_backend(...)`, the
environment variable MG_FAST_BACKEND, and `auto`. `auto` takes the fastest backend that is right for the operation and
its input. Naming a backend that cannot run here raises `BackendError` with the reason. An operation that has no form
for the named backend runs its next simpler form, so that a whole model can be asked to use kernels where there are any.
"""

import contextlib
import importlib.util
import os
import threading
from collections.abc import Callable, Mapping

import torch

from ..errors import BackendError, quoted
from . import interpreter
from .operation import OPERATIONS, Operation

BACKENDS = ("reference", "torch", "triton")
CHOICES = ("auto", *BACKENDS)

_local = threading.local()
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def requested(backend: str | None = None) -> str:
    """The choice in force here, from the argument, the context, the environment, or else `auto`."""
    choice = backend or getattr(_local, "choice", None) or os.environ.get("MG_FAST_BACKEND") or "auto"
    if choice not in CHOICES:
        raise BackendError(f"unknown backend {quoted(choice)}: expected one of {', '.join(CHOICES)}")
    return choice


@contextlib.contextmanager
def only_compiling():
    """Within the block and its thread, kernels are compiled for a GPU elsewhere.

    The backend choice then ignores which GPU this machine has, or that it has none.
    """
    previous = only_compiled()
    _local.only_compiling = True
    try:
        yield
    finally:
        _local.only_compiling = previous


def only_compiled() -> bool:
    """Whether kernels are only compiled here, and not run."""
    return getattr(_local, "only_compiling", False)


@contextlib.contextmanager
def use_backend(backend: str | None):
    """Within the block and its thread, every operation runs on this backend (`auto`, `reference`, `torch`, `triton`).

    None leaves the choice as it is.

    Raises:
        BackendError: at once, if the name is unknown; at a call of an operation that cannot run on this backend, with
            the reason.
    """
    previous = getattr(_local, "choice", None)
    _local.choice = requested(backend)
    try:
        yield
    finally:
        _local.choice = previous


def why_not(operation: str, backend: str, device: torch.device | str = "cpu") -> str | None:
    """None where `backend` can run `operation` on tensors on `device`; otherwise the reason as a sentence."""
    forms = OPERATIONS[operation].forms
    if backend not in forms:
        return f"{operation} has no {backend} implementation in this version, only {', '.join(forms)}"
    if backend == "triton":
        if reason := no_triton():
            return reason
        if torch.device(device).type != "cuda" and (reason := _not_interpreted()):
            return f"triton runs on CUDA tensors, these are on {torch.device(device).type} ({reason})"
        if torch.device(device).type == "cuda" and not only_compiled():
            return _gpu_unsuited(torch.device(device).index)
    return None


def no_triton() -> str | None:
    """Why this machine has no kernels at all, not even to compile for another GPU; None where it has them."""
    return None if _HAS_TRITON else "triton is not installed (it is published for Linux only)"


@torch.compiler.assume_constant_result
def _gpu_unsuited(index: int | None) -> str | None:
    """Why the kernels do not run on this GPU, as a sentence; None where they do.

    Without a GPU the result is None too, because the kernels are then compiled for a GPU elsewhere.
    """
    if not torch.cuda.is_available():
        return None
    if torch.version.hip:
        return "the kernels are compiled and tested for NVIDIA GPUs only, this one is AMD's"
    major, minor = torch.cuda.get_device_capability(index)
    return (
        None
        if major >= 8
        else f"the kernels need a GPU of compute capability 8.0 or newer, this one has {major}.{minor}"
    )


@torch.compiler.assume_constant_result
def _not_interpreted() -> str | None:
    return interpreter.why_not()


def check_everywhere(backend: str | None, device: torch.device | str) -> None:
    """Raises `BackendError` with the reason if a backend was asked for that some operation cannot run on.

    The request may come from the argument, the context or the environment.
    """
    for operation in OPERATIONS:
        choose(operation, backend, device)


def choose(
    operation: str,
    backend: str | None = None,
    device: torch.device | str = "cpu",
    unsuited: Mapping[str, str | None] | None = None,
) -> str:
    """The backend that runs `operation` on tensors on `device`.

    Args:
        operation: a key of OPERATIONS.
        backend: overrides the choice in force.
        device: the device of the tensors.
        unsuited: for a backend, the sentence that says why it does not take tensors of these shapes and dtypes.

    Raises:
        BackendError: the requested backend cannot run.
    """
    choice = requested(backend)
    reasons = {b: why_not(operation, b, device) or (unsuited or {}).get(b) for b in OPERATIONS[operation].auto}
    if choice != "auto":
        # Every operation has a reference, so the search always ends.
        choice = next(b for b in reversed(BACKENDS[: BACKENDS.index(choice) + 1]) if b in reasons)
        if reasons[choice]:
            raise BackendError(f"backend {choice!r} cannot run {operation}: {reasons[choice]}")
        return choice
    if torch.device(device).type != "cuda":
        # Interpreted kernels are for tests and never the fastest.
        reasons.pop("triton", None)
    return next(b for b in reasons if reasons[b] is None)


def choose_form(operation: Operation, backend: str | None, device: torch.device | str, *arguments) -> Callable:
    """Checks `arguments` and returns the form of `operation` that runs on them.

    Raises:
        ValueError: the arguments do not fit.
        BackendError: the backend asked for cannot run.
    """
    operation.check(*arguments)
    return operation.forms[choose(operation.name, backend, device, {"triton": operation.why_not(*arguments)})]
