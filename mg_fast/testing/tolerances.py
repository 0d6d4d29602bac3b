"""How far a result may be from what it is held against. One rule for one question, the same on every machine."""

import torch

# Against the original's recorded outputs, float32 on a CPU: relative to the largest value. Another implementation on
# this stack reached 2e-6 and 2e-5; the rest is room for other CPUs' vector units.
IMAGE_TOKENS = 2e-5
LOGITS = 5e-5
# one rounding of the normalised pixels (values up to 2.7), which torch's bilinear kernels differ by between CPUs
LR_PIXELS = 1e-6


def ieee_float32() -> None:
    """Makes float32 products and convolutions of a GPU compute in float32, in this process.

    By default cuDNN rounds the inputs of float32 convolutions to 10 bits (TF32). Plain forms that are what others are
    held against, in accuracy or in time, must not do that: a rule that allows twice their error would then allow almost
    anything.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected value; shapes must agree."""
    assert actual.shape == expected.shape, f"shapes differ: {list(actual.shape)}, expected {list(expected.shape)}"
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def errors(actual: torch.Tensor, oracle: torch.Tensor) -> tuple[float, float]:
    """The largest error, relative to the oracle's largest value; the root mean square of the errors, relative to the
    oracle's.
    """
    difference, oracle = actual.double() - oracle.double(), oracle.double()
    mean_square = (difference.square().mean() / oracle.square().mean().clamp(min=1e-60)).item()
    return (difference.abs().max() / oracle.abs().max().clamp(min=1e-30)).item(), mean_square**0.5


def assert_accurate(
    ours: torch.Tensor, plain: torch.Tensor | list[tuple[float, float]], oracle: torch.Tensor, rows: int = 1
) -> None:
    """The accuracy rule: our error against the float64 oracle is at most twice the plain form's in the same dtype, plus
    a floor of two units in the last place of the largest value; and small on the whole, so that no wide drift hides
    below the maximum. A weight's gradient is a sum over `rows`, whose roundings add up like a random walk.

    `plain` is its result; or, where its numbers are too few to say much, its `errors` in several draws, the worst of
    which counts.
    """
    if oracle.numel() == 0:
        return
    draws = plain if isinstance(plain, list) else [errors(plain, oracle)]
    plain_error, plain_rms = (max(found) for found in zip(*draws))
    error, rms = errors(ours, oracle)
    bound = 2 * plain_error + 2 * torch.finfo(ours.dtype).eps * rows**0.5
    rms_bound = max((1e-5 if ours.dtype == torch.float32 else 0.005) * rows**0.5, 2 * plain_rms)
    assert error <= bound and rms <= rms_bound, (
        f"relative to the largest value: error {error:.3g} (bound {bound:.3g}), rms {rms:.3g} (bound {rms_bound:.3g})"
    )
