"""How far a result may be from the one it is compared with: one rule for each question, the same on every machine."""

import torch

# Tolerances against the original's recorded outputs, in float32 on a CPU, relative to the largest value. Another
# implementation on this stack reached 2e-6 and 2e-5. The rest allows for the vector units of other CPUs.
IMAGE_TOKENS = 2e-5
LOGITS = 5e-5
# One rounding of the normalised pixels (values up to 2.7): torch's bilinear kernels differ by that much between CPUs.
LR_PIXELS = 1e-6


def ieee_float32() -> None:
    """Makes float32 products and convolutions of a GPU compute in float32, in this process.

    By default cuDNN rounds the inputs of float32 convolutions to 10 bits (TF32). Plain forms that serve as a standard
    of accuracy or time must not do that: a rule that allows twice their error would then allow almost anything.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference divided by the largest expected value. The shapes must agree."""
    assert actual.shape == expected.shape, f"shapes differ: {list(actual.shape)}, expected {list(expected.shape)}"
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def errors(actual: torch.Tensor, oracle: torch.Tensor) -> tuple[float, float]:
    """The largest error relative to the oracle's largest value, and the rms error relative to the oracle's rms."""
    difference, oracle = actual.double() - oracle.double(), oracle.double()
    mean_square = (difference.square().mean() / oracle.square().mean().clamp(min=1e-60)).item()
    return (difference.abs().max() / oracle.abs().max().clamp(min=1e-30)).item(), mean_square**0.5


def assert_accurate(
    ours: torch.Tensor, plain: torch.Tensor | list[tuple[float, float]], oracle: torch.Tensor, rows: int = 1
) -> None:
    """Asserts the accuracy rule for a result.

    The rule: our error against the float64 oracle is at most twice that of the plain form in the same dtype, plus a
    floor of two units in the last place of the largest value. The root mean square error must also be small, so that no
    wide drift hides below the maximum. A weight's gradient is a sum over `rows`, whose rounding errors add up like a
    random walk.

    `plain` is the plain form's result. Where it has too few numbers to say much, `plain` is instead a list of its
    `errors` in several draws, and the worst of them counts.
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
