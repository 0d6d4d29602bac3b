"""The arithmetic of nano's training: bfloat16 where the device computes in it, and float32 elsewhere."""

import torch

# What torch calls the instructions for bfloat16 of x86 and of ARM.
BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")


def has_bfloat16(device: str) -> bool:
    """Whether bfloat16 is worth using. A CPU with AVX2 alone took ten times as long for it as for float32.

    A GPU is taken to have the instructions.
    """
    capabilities = torch.cpu.get_capabilities() if torch.device(device).type == "cpu" else {}
    return torch.device(device).type != "cpu" or any(capabilities.get(name) for name in BFLOAT16)


def autocast(device: str) -> torch.autocast:
    """The context in which losses are computed: autocast to bfloat16, or nothing where the device lacks it."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=has_bfloat16(device))
