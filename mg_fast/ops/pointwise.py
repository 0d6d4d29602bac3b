"""The pointwise layers of a ConvNeXt block: checks the inputs, chooses the backend and calls it.

The kernels are operators of torch.
"""

import torch
import torch.nn.functional as F

from . import backend as backends
from . import reference
from .custom_op_support import autocast, copied, copied_rows, on_device, one_launch
from .operation import Operation, Operator, product_flop, register
from .torch import pointwise as torch_form

__all__ = ["linear_gelu", "linear_residual", "linear_residual_"]


def linear_gelu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, backend: str | None = None
) -> torch.Tensor:
    """Computes gelu(x W^T + b) with the exact (erf) GELU: the first pointwise layer of a ConvNeXt block.

    Args:
        x: [..., K], floating point, in one dtype with weight and bias. Under autocast all three are cast as F.linear
            casts them.
        weight: [N, K].
        bias: [N].
        backend: overrides the choice in force.

    Returns:
        [..., N] of x's dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message names what was expected and what came.
        BackendError: a backend was named that cannot run here.
    """
    x, weight, bias = autocast(x, weight, bias)
    return backends.choose_form(LINEAR_GELU, backend, x.device, x, weight, bias)(x, weight, bias)


def linear_residual(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, *, backend: str | None = None
) -> torch.Tensor:
    """Computes r + x W^T + b: the second pointwise layer of a ConvNeXt block.

    The caller folds layer scale into weight and bias.
    Args:
        x, weight, bias: as in `linear_gelu`.
        residual: [..., N], floating point.
        backend: overrides the choice in force.

    Returns:
        [..., N] in the wider dtype of x and residual.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message names what was expected and what came.
        BackendError: a backend was named that cannot run here.
    """
    x, weight, bias = autocast(x, weight, bias)
    arguments = x, weight, bias, residual
    return backends.choose_form(LINEAR_RESIDUAL, backend, x.device, *arguments)(*arguments)


def linear_residual_(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, *, backend: str | None = None
) -> torch.Tensor:
    """Computes r += x W^T + b, for inference: `linear_residual` that writes into the residual and returns it.

    Args:
        x, weight, bias, backend: as in `linear_residual`.
        residual: [..., N], contiguous, floating point; it keeps its dtype.

    Raises:
        ValueError: shapes, dtypes, devices or the layout do not fit, or a gradient is wanted, which needs the values
            that would be overwritten.
        BackendError: a backend was named that cannot run here.
    """
    x, weight, bias = autocast(x, weight, bias)
    _check("linear_residual_", x, weight, bias, residual)
    if not residual.is_contiguous():
        raise ValueError(
            f"linear_residual_: expected a contiguous residual, got strides {list(residual.stride())} for "
            f"{list(residual.shape)}"
        )
    if not torch.compiler.is_compiling() and residual.untyped_storage()._cdata == x.untyped_storage()._cdata:
        # One program would read what another has overwritten.
        raise ValueError(
            "linear_residual_: x and residual lie in the same memory: hand over a copy of one, or use linear_residual"
        )
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, weight, bias, residual)):
        raise ValueError(
            "linear_residual_: a gradient is wanted, which needs what this overwrites: use linear_residual"
        )
    unsuited = {"triton": LINEAR_RESIDUAL.why_not(x, weight, bias, residual)}
    _INTO_THE_RESIDUAL[backends.choose("linear_residual", backend, x.device, unsuited)](x, weight, bias, residual)
    return residual


def _check(
    operation: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor | None = None
) -> None:
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{operation}: expected x [..., K] and weight [N, K], got {list(x.shape)} and {list(weight.shape)}"
        )
    n = weight.shape[0]
    if bias.shape != (n,):
        raise ValueError(f"{operation}: bias must be [{n}], got {list(bias.shape)}")
    if residual is not None and residual.shape != (*x.shape[:-1], n):
        raise ValueError(f"{operation}: residual must be {[*x.shape[:-1], n]}, got {list(residual.shape)}")
    for name, tensor in {"x": x, "weight": weight, "bias": bias, "residual": residual}.items():
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"{operation}: {name} is on {tensor.device}, x is on {x.device}")
        if not tensor.is_floating_point():
            raise ValueError(f"{operation}: {name} must be floating point, got {tensor.dtype}")
        if name != "residual" and tensor.dtype != x.dtype:
            raise ValueError(f"{operation}: {name} must be {x.dtype} as x is, got {tensor.dtype}")


def _check_linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
    _check("linear_gelu", x, weight, bias)


def _check_linear_residual(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor) -> None:
    _check("linear_residual", x, weight, bias, residual)


def _why_not(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor | None = None
) -> str | None:
    """Why the Triton kernels do not take these tensors; None where they do. Weight and bias have x's dtype."""
    for tensor in (x,) if residual is None else (x, residual):
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"the kernel takes float16, bfloat16 and float32, got {tensor.dtype}"
    return None


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[..., K] as [M, K], without a copy where the rows are equally far apart."""
    return x.flatten(0, -2) if x.dim() > 1 else x[None]


def _linear_gelu_by_kernel(x, weight, bias) -> torch.Tensor:
    return _linear_gelu_operator(_rows(x), weight, bias).reshape(*x.shape[:-1], weight.shape[0])


def _linear_residual_by_kernel(x, weight, bias, residual) -> torch.Tensor:
    return _linear_residual_operator(_rows(x), weight, bias, _rows(residual)).reshape(residual.shape)


def _linear_residual_by_kernel_(x, weight, bias, residual) -> None:
    _linear_residual_operator_(_rows(x), weight, bias, _rows(residual))


# The kernels as operators of torch. Each is one node of a graph, with a fake for tracing. The launchers' docstrings say
# what they launch.


@torch.library.custom_op("mg_fast::linear_gelu", mutates_args=())
def _linear_gelu_operator(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`kernels.pointwise.linear_gelu_fwd`; its gradient recomputes the product with the library's product."""
    from ..kernels.pointwise import linear_gelu_fwd

    with on_device(x):
        return linear_gelu_fwd(x, weight, bias)


@_linear_gelu_operator.register_fake
def _(x, weight, bias):
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("mg_fast::linear_residual", mutates_args=())
def _linear_residual_operator(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor
) -> torch.Tensor:
    """`kernels.pointwise.linear_residual_fwd`; its gradient uses the library's products."""
    from ..kernels.pointwise import linear_residual_fwd

    with on_device(x):
        return linear_residual_fwd(x, weight, bias, residual)


@_linear_residual_operator.register_fake
def _(x, weight, bias, residual):
    return x.new_empty(residual.shape, dtype=torch.promote_types(x.dtype, residual.dtype))


@torch.library.custom_op("mg_fast::linear_residual_", mutates_args=("residual",))
def _linear_residual_operator_(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor
) -> None:
    """`kernels.pointwise.linear_residual_fwd`, written into the residual."""
    from ..kernels.pointwise import linear_residual_fwd

    with on_device(x):
        linear_residual_fwd(x, weight, bias, residual, out=residual)


@_linear_residual_operator_.register_fake
def _(x, weight, bias, residual):
    return None


def _linear_gradients(wanted, grad, x, weight) -> tuple[torch.Tensor | None, ...]:
    """Gradients of x W^T + b to x, weight and bias; None for each that is not wanted."""
    return grad @ weight if wanted[0] else None, grad.T @ x if wanted[1] else None, grad.sum(0) if wanted[2] else None


def _linear_gelu_gradients(ctx, grad):
    x, weight, bias = ctx.saved_tensors
    grad = torch.ops.aten.gelu_backward(grad, F.linear(x, weight, bias))
    return _linear_gradients(ctx.needs_input_grad, grad, x, weight)


def _linear_residual_gradients(ctx, grad):
    x, weight = ctx.saved_tensors
    to_residual = grad.to(ctx.residual_dtype) if ctx.needs_input_grad[3] else None
    return *_linear_gradients(ctx.needs_input_grad, grad.to(x.dtype), x, weight), to_residual


def _linear_gelu_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _linear_residual_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.residual_dtype = inputs[3].dtype


torch.library.register_autograd("mg_fast::linear_gelu", _linear_gelu_gradients, setup_context=_linear_gelu_context)
torch.library.register_autograd(
    "mg_fast::linear_residual", _linear_residual_gradients, setup_context=_linear_residual_context
)


def _flop(x: torch.Tensor, weight: torch.Tensor, *_) -> int:
    outputs, inputs = weight.shape
    return product_flop(len(x), inputs, outputs)


def _residual_workspaces(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor
) -> list[int]:
    return copied_rows(x, residual) + copied(weight, bias)


# Until a GPU has measured both, `auto` takes a kernel where the model of `python -m bench issue` predicts it to be
# faster than the library by more than the model's error. That is so at no published shape of these two operations
# (docs/kernels.md, "What auto takes").
LINEAR_GELU = register(
    Operation(
        name="linear_gelu",
        check=_check_linear_gelu,
        why_not=_why_not,
        forms={"reference": reference.linear_gelu, "torch": torch_form.linear_gelu, "triton": _linear_gelu_by_kernel},
        auto=("torch", "triton", "reference"),
        operators=(
            Operator(
                name="mg_fast::linear_gelu",
                launches=one_launch,
                workspaces=lambda x, weight, bias: copied_rows(x) + copied(weight, bias),
                flop=_flop,
            ),
        ),
    )
)
LINEAR_RESIDUAL = register(
    Operation(
        name="linear_residual",
        check=_check_linear_residual,
        why_not=_why_not,
        forms={
            "reference": reference.linear_residual,
            "torch": torch_form.linear_residual,
            "triton": _linear_residual_by_kernel,
        },
        auto=("torch", "triton", "reference"),
        operators=tuple(
            Operator(name=name, launches=one_launch, workspaces=_residual_workspaces, flop=_flop)
            for name in ("mg_fast::linear_residual", "mg_fast::linear_residual_")
        ),
    )
)
# The forms of `linear_residual_` write into the residual. They share the record of `linear_residual`.
_INTO_THE_RESIDUAL = {
    "reference": lambda x, weight, bias, residual: residual.copy_(reference.linear_residual(x, weight, bias, residual)),
    "torch": torch_form.linear_residual_,
    "triton": _linear_residual_by_kernel_,
}
