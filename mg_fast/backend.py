"""Which implementation of an operation runs, and the sentence that says why another cannot.

Order of authority: the `backend=` of a call, `use_backend(...)`, the environment variable MG_FAST_BACKEND, `auto`.
`auto` takes the fastest backend that is right for the operation; naming one that cannot run raises `BackendError` with the reason.
"""

import contextlib
import importlib.util
import os
import threading

import torch

from .errors import BackendError

BACKENDS = ("reference", "torch", "triton")
CHOICES = ("auto", *BACKENDS)

# what exists, fastest last; an operation that gains a backend gets its name here
IMPLEMENTED = {
    "low_resolution_tower": ("reference", "torch"),
    "high_resolution_tower": ("reference",),
    "patch_mining": ("reference", "torch"),
}

_local = threading.local()


def requested(backend: str | None = None) -> str:
    """The choice in force here: argument, context, environment, `auto`."""
    choice = backend or getattr(_local, "choice", None) or os.environ.get("MG_FAST_BACKEND") or "auto"
    if choice not in CHOICES:
        raise BackendError(f"unknown backend {choice!r}: expected one of {', '.join(CHOICES)}")
    return choice


@contextlib.contextmanager
def use_backend(backend: str):
    """Within the block, run every operation on this backend (`auto`, `reference`, `torch`, `triton`). Per thread.

    Raises:
        BackendError: at once for an unknown name; at the operation, with the reason, for a backend that it has not.
    """
    previous = getattr(_local, "choice", None)
    _local.choice = requested(backend)
    try:
        yield
    finally:
        _local.choice = previous


def why_not(operation: str, backend: str, device: torch.device | str = "cpu") -> str | None:
    """None where `backend` can run `operation` on tensors of `device`, else the reason as a sentence."""
    if backend not in IMPLEMENTED[operation]:
        return f"{operation} has no {backend} implementation in this version, only {', '.join(IMPLEMENTED[operation])}"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (it is published for Linux only)"
        if torch.device(device).type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"triton runs on CUDA tensors, these are on {torch.device(device).type} (TRITON_INTERPRET=1 interprets on the CPU)"
    return None


def check_everywhere(backend: str | None, device: torch.device | str) -> None:
    """Raises `BackendError` with the reason where a backend was asked for, by any means, that some operation cannot run on."""
    for operation in IMPLEMENTED:
        choose(operation, backend, device)


def choose(operation: str, backend: str | None = None, device: torch.device | str = "cpu") -> str:
    """The backend that runs `operation` on tensors of `device`; `BackendError` if the one asked for cannot."""
    choice = requested(backend)
    if choice != "auto":
        if reason := why_not(operation, choice, device):
            raise BackendError(f"backend {choice!r} cannot run {operation}: {reason}")
        return choice
    # the reference runs everywhere, so the search always ends
    return next(b for b in reversed(IMPLEMENTED[operation]) if why_not(operation, b, device) is None)
