"""How far a result may be from what it is held against. One rule for one question, the same on every machine."""

import torch

# Against the original's recorded outputs, float32 on a CPU: relative to the largest value. Another implementation on this stack
# reached 2e-6 and 2e-5; the rest is room for other CPUs' vector units.
IMAGE_TOKENS = 2e-5
LOGITS = 5e-5
# one rounding of the normalised pixels (values up to 2.7), which torch's bilinear kernels differ by between CPUs
LR_PIXELS = 1e-6


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected value; shapes must agree."""
    assert actual.shape == expected.shape, f"shapes differ: {list(actual.shape)}, expected {list(expected.shape)}"
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).abs().max() / expected.abs().max()).item()
