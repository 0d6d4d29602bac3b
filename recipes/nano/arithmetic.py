"""The arithmetic of nano's training: bfloat16 where the device computes in it, and float32 elsewhere."""

import functools

import torch

from mg_fast.runtime.cpu_dtype import fast_dtypes


@functools.cache
def has_bfloat16(device: str) -> bool:
    """Whether the device computes in bfloat16. A GPU is taken to do so."""
    return torch.device(device).type != "cpu" or torch.bfloat16 in fast_dtypes()


def autocast(device: str) -> torch.autocast:
    """The context in which losses are computed: autocast to bfloat16, or nothing where the device lacks it."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=has_bfloat16(device))
