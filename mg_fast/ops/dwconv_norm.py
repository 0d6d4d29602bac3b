"""Depthwise convolution and LayerNorm of ConvNeXt blocks, with the kernel as an operator of torch."""

import torch

from ..kernels.configs import dwconv_in_bands
from . import backend as backends
from . import reference
from .custom_op_support import autocast, copied, copied_rows, on_device, one_launch, recording
from .operation import Operation, Operator, product_flop, register
from .torch import dwconv_norm as torch_form

__all__ = ["MAX_CHANNELS", "dwconv_norm", "dwconv_norm_backward", "dwconv_norm_kernel"]

# The widest map whose pixels fit in the kernel's registers: the last stage of the xxlarge model.
MAX_CHANNELS = 3072


def dwconv_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float = 1e-6,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """The first half of a ConvNeXt block: 7x7 depthwise convolution (padding 3), bias, LayerNorm over channels.

    Args:
        x: [B, H, W, C], floating point, any strides; fastest with unit channel stride.
        weight: [49, C], tap 7 * ky + kx of every channel. A published weight [C, 1, 7, 7] becomes
            `weight.reshape(C, 49).t()`, through which gradients flow. Made contiguous once, it saves the kernel a copy
            in every call.
        bias, norm_weight, norm_bias: [C]. All tensors have the dtype and device of x. Under autocast all five are cast
            as F.conv2d casts its arguments.
        eps: added to the variance; 1e-6 in ConvNeXt, 1e-5 in the xxlarge of OpenCLIP.
        backend: overrides the choice in force.

    Returns:
        [B, H, W, C] in x's dtype, or in autocast's dtype where autocast is on.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message names what was expected and what came.
        BackendError: a backend was named that cannot run here.
    """
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        given = autocast(x, weight, bias, norm_weight, norm_bias)
        # Autocast would widen the norm's result, a map that the next product would narrow again.
        with torch.autocast(device, enabled=False):
            return dwconv_norm(*given, eps, backend=backend)
    arguments = x, weight, bias, norm_weight, norm_bias
    return backends.choose_form(DWCONV_NORM, backend, x.device, *arguments)(*arguments, eps)


def _check(x: torch.Tensor, weight: torch.Tensor, *vectors: torch.Tensor) -> None:
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(
            f"dwconv_norm: x must be [B, H, W, C] with at least one pixel and channel, got {list(x.shape)}"
        )
    if not x.is_floating_point():
        raise ValueError(f"dwconv_norm: x must be floating point, got {x.dtype}")
    channels = x.shape[-1]
    if weight.shape != (49, channels):
        raise ValueError(f"dwconv_norm: weight must be [49, {channels}], taps by channels, got {list(weight.shape)}")
    for name, vector in zip(("bias", "norm_weight", "norm_bias"), vectors):
        if vector.shape != (channels,):
            raise ValueError(f"dwconv_norm: {name} must be [{channels}], got {list(vector.shape)}")
    for name, tensor in zip(("weight", "bias", "norm_weight", "norm_bias"), (weight, *vectors)):
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(
                f"dwconv_norm: {name} must be {x.dtype} on {x.device} as x is, got {tensor.dtype} on {tensor.device}"
            )


def _why_not(x: torch.Tensor, *_: torch.Tensor) -> str | None:
    """Why the Triton kernel does not take this map; None where it does."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the kernel takes float16, bfloat16 and float32, got {x.dtype}"
    if x.shape[-1] > MAX_CHANNELS:
        return f"the kernel holds pixels of up to {MAX_CHANNELS} channels, these have {x.shape[-1]}"
    return None


def _dwconv_norm_reference(x, weight, bias, norm_weight, norm_bias, eps: float) -> torch.Tensor:
    kernel = weight.t().reshape(-1, 1, 7, 7)
    # The original's maps are NCHW in memory.
    return reference.dwconv_norm(x.permute(0, 3, 1, 2).contiguous(), kernel, bias, norm_weight, norm_bias, eps)


@torch.library.custom_op("mg_fast::dwconv_norm", mutates_args=())
def dwconv_norm_kernel(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """`kernels.dwconv_norm.dwconv_norm_fwd`; its gradients recompute by the PyTorch form."""
    from ..kernels.dwconv_norm import dwconv_norm_fwd

    with on_device(x):
        return dwconv_norm_fwd(x, weight, bias, norm_weight, norm_bias, eps)


@dwconv_norm_kernel.register_fake
def _(x, weight, bias, norm_weight, norm_bias, eps):
    return x.new_empty(x.shape)


@torch.library.custom_op("mg_fast::dwconv_norm_backward", mutates_args=())
def dwconv_norm_backward(
    grad: torch.Tensor, inputs: list[torch.Tensor], wanted: list[bool], eps: float
) -> list[torch.Tensor]:
    """Gradients to the `wanted` ones of (x, weight, bias, norm_weight, norm_bias).

    This is an operator so that graphs need not trace it.
    """
    with recording(), torch.enable_grad():
        leaves = [tensor.detach().requires_grad_(want) for tensor, want in zip(inputs, wanted)]
        out = torch_form.dwconv_norm(*leaves, eps)
        gradients = torch.autograd.grad(out, [leaf for leaf in leaves if leaf.requires_grad], grad)
        return [gradient.contiguous() for gradient in gradients]


@dwconv_norm_backward.register_fake
def _(grad, inputs, wanted, eps):
    return [tensor.new_empty(tensor.shape) for tensor, want in zip(inputs, wanted) if want]


def _dwconv_norm_context(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _dwconv_norm_gradients(ctx, grad):
    wanted = list(ctx.needs_input_grad[:5])
    gradients = iter(dwconv_norm_backward(grad, list(ctx.saved_tensors), wanted, ctx.eps))
    return *(next(gradients) if want else None for want in wanted), None


torch.library.register_autograd("mg_fast::dwconv_norm", _dwconv_norm_gradients, setup_context=_dwconv_norm_context)


def _in_bands(x: torch.Tensor) -> bool:
    """Whether the launcher convolves a map on tensor cores, after the copy that it may have to make."""
    _, height, width, channels = x.shape
    contiguous = height * width * channels, width * channels, channels
    return dwconv_in_bands(x.itemsize, channels, x.stride()[:3] if x.stride(-1) == 1 else contiguous)


def _launches(x: torch.Tensor, weight: torch.Tensor, *_) -> int:
    return one_launch(x, weight) * (2 if _in_bands(x) else 1)


def _workspaces(x: torch.Tensor, *weights) -> list[int]:
    # On tensor cores float16 is convolved into a buffer in float32.
    sums = [x.numel() * 4] if x.dtype == torch.float16 and _in_bands(x) else []
    return copied_rows(x) + copied(*weights[:4]) + sums


DWCONV_NORM = register(
    Operation(
        name="dwconv_norm",
        check=_check,
        why_not=_why_not,
        forms={"reference": _dwconv_norm_reference, "torch": torch_form.dwconv_norm, "triton": dwconv_norm_kernel},
        # By the same rule as in pointwise.py the kernels come first: at every published shape they are predicted to be
        # faster than cuDNN and a norm.
        auto=("triton", "torch", "reference"),
        operators=(
            Operator(
                name="mg_fast::dwconv_norm",
                launches=_launches,
                workspaces=_workspaces,
                # The norm reads the sums, which are as many numbers as the map.
                reads_again=lambda x, *_: [x] if _in_bands(x) else [],
                flop=lambda x, taps, *_: product_flop(x.numel(), len(taps), 1),
            ),
        ),
    )
)
