"""Helpers that the operators of torch share."""

import contextlib

import torch
from torch._subclasses import FakeTensor

from . import backend as backends
from . import interpreter


def on_device(tensor: torch.Tensor):
    """A context for launches on a tensor's device, which need not be the current one; or for interpreted launches."""
    if interpreter.requested():
        return interpreter.launching()
    return (
        torch.cuda.device(tensor.device)
        if tensor.is_cuda and not backends.only_compiled()
        else contextlib.nullcontext()
    )


def architecture_of(tensor: torch.Tensor) -> int | None:
    """The compute capability that kernels on a tensor are compiled for, 90 for 9.0; None where none is compiled.

    None is compiled for tensors that are not on a GPU, by the interpreter, and for fake tensors unless kernels are
    only compiled here. So what is counted on fake tensors does not depend on the machine's GPU.
    """
    fake = isinstance(tensor, FakeTensor) and not backends.only_compiled()
    if not tensor.is_cuda or fake or interpreter.requested():
        return None
    from triton.runtime import driver

    with on_device(tensor):
        return driver.active.get_current_target().arch


@contextlib.contextmanager
def recording():
    """Lets autograd record the operations within an operator, whose body runs with autograd's dispatch keys masked."""
    masked = torch._C._dispatch_tls_local_exclude_set()
    for device in ("CPU", "CUDA"):
        masked = masked.remove(getattr(torch._C.DispatchKey, f"Autograd{device}"))
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), masked):
        yield


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Casts tensors as F.linear does under autocast, which does not look into the kernels' operators."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def copied(*tensors: torch.Tensor) -> list[int]:
    """Bytes of the copies that a launcher makes of tensors that it reads in place only if they are contiguous."""
    return [tensor.numel() * tensor.itemsize for tensor in tensors if not tensor.is_contiguous()]


def copied_rows(*tensors: torch.Tensor) -> list[int]:
    """Bytes of the copies that a launcher makes of tensors that it reads in place only if their last stride is 1."""
    return [tensor.numel() * tensor.itemsize for tensor in tensors if tensor.stride(-1) != 1]


def one_launch(x: torch.Tensor, weight: torch.Tensor, *_) -> int:
    """One kernel launch, or none if there is nothing to write."""
    return int(len(x) > 0 and len(weight) > 0)
