"""Random numbers that are the same on every device."""

import torch


def normal(generator: torch.Generator | int, *shape: int) -> torch.Tensor:
    """Normal numbers [*shape], float32, drawn on the CPU from a generator or a seed and moved to the default device."""
    generator = torch.Generator().manual_seed(generator) if isinstance(generator, int) else generator
    return torch.randn(shape, generator=generator, device="cpu").to(torch.get_default_device())
