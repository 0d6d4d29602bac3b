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


def assert_accurate(ours: torch.Tensor, plain: torch.Tensor, oracle: torch.Tensor, rows: int = 1) -> None:
    """The accuracy rule: our error against the float64 oracle is at most twice the plain form's in the same dtype, plus a floor of
    two units in the last place of the largest value; and small on the whole, so that no wide drift hides below the maximum.
    A weight's gradient is a sum over `rows`, whose roundings add up like a random walk."""
    if oracle.numel() == 0:
        return
    ours, plain, dtype = ours.double(), plain.double(), ours.dtype
    largest = oracle.abs().max().item()
    floor = 2 * torch.finfo(dtype).eps * largest * rows**0.5
    error, bound = (ours - oracle).abs().max().item(), 2 * (plain - oracle).abs().max().item() + floor
    rms = ((ours - oracle).square().mean().sqrt() / oracle.square().mean().sqrt().clamp(min=1e-30)).item()
    rms_bound = (1e-5 if dtype == torch.float32 else 0.005) * rows**0.5
    plain_rms = ((plain - oracle).square().mean().sqrt() / oracle.square().mean().sqrt().clamp(min=1e-30)).item()
    assert error <= bound and rms <= max(rms_bound, 2 * plain_rms), (
        f"error {error:.3g} (bound {bound:.3g}), rms {rms:.3g} (bound {rms_bound})"
    )
