"""Multi-scale deformable attention: every query reads a few points of several maps, with weights of its own."""

from collections.abc import Sequence

import torch

from . import backend as backends
from .custom_op_support import copied, copied_rows, on_device
from .operation import Operation, Operator, register
from .spatial_shapes import check_spatial_shapes, host_sizes, pairs, too_large
from .torch import deformable_attention as torch_form

__all__ = [
    "MAX_CHANNELS",
    "MAX_LEVELS",
    "deformable_attention",
    "deformable_attention_backward",
    "deformable_attention_kernel",
    "deformable_attention_sum",
]

# The widest head whose pixels the kernels hold in registers, and the most levels that they are compiled for.
MAX_CHANNELS, MAX_LEVELS = 256, 8


def deformable_attention(
    value: torch.Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """The weighted sum of bilinear samples of several maps, as Deformable DETR defines it (arXiv 2010.04159).

    A location (x, y) lies at the pixel coordinates (x * w - 0.5, y * h - 0.5) of a map of h x w pixels. Pixels outside
    of the map are zero, so a sample far outside contributes nothing. A location that is not finite contributes nothing
    either. NaN in values or weights stays visible.

    Args:
        value: [B, S, H, D], floating point: the maps of all levels one after the other, each row by row; H heads of D
            channels. Any strides; fastest with unit channel stride.
        spatial_shapes: (h, w) of every level, whole numbers on the host. S is the sum of h * w.
        sampling_locations: [B, Q, H, L, P, 2], floating point, (x, y) in [0, 1] of the level's map. They are read in
            float32 whatever the dtype of `value`, so float32 locations lose nothing beside 16-bit values.
        attention_weights: [B, Q, H, L, P], floating point. They need not sum to one.
        backend: overrides the choice in force.

    Returns:
        [B, Q, H * D] in value's dtype, under autocast too: 16-bit values are widened where they are read, and all
        arithmetic is float32 anyway.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message names what was expected and what came.
        BackendError: a backend was named that cannot run here.

    The gradients have the dtypes of their inputs. With `torch.use_deterministic_algorithms(True)` the gradient of value
    has equal bits in every run of the kernels; they then sort the pixels of all samples, which takes 32 bytes for each
    of the four pixels of a sample, and more time.
    """
    arguments = value, spatial_shapes, sampling_locations, attention_weights
    form = backends.choose_form(DEFORMABLE_ATTENTION, backend, value.device, *arguments)
    return form(value, host_sizes(spatial_shapes), sampling_locations, attention_weights)


def _check(value, spatial_shapes, sampling_locations, attention_weights) -> None:
    for name, tensor, layout in (
        ("value", value, "[B, S, H, D]"),
        ("sampling_locations", sampling_locations, "[B, Q, H, L, P, 2]"),
        ("attention_weights", attention_weights, "[B, Q, H, L, P]"),
    ):
        if tensor.dim() != layout.count(",") + 1:
            raise ValueError(f"deformable_attention: {name} must be {layout}, got {list(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"deformable_attention: {name} must be floating point, got {tensor.dtype}")
        if tensor.device != value.device:
            raise ValueError(f"deformable_attention: {name} must be on {value.device} as value is, got {tensor.device}")
    check_spatial_shapes("deformable_attention", spatial_shapes, value.shape[1])
    batch, _, heads, _ = value.shape
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    expected = [batch, queries, heads, len(spatial_shapes), points]
    if list(sampling_locations.shape) != [*expected, 2]:
        raise ValueError(
            f"deformable_attention: sampling_locations must be [B, Q, H, L, P, 2] = {[*expected, 2]} for value "
            f"{list(value.shape)} and {len(spatial_shapes)} levels, got {list(sampling_locations.shape)}"
        )
    if list(attention_weights.shape) != expected:
        raise ValueError(
            f"deformable_attention: attention_weights must be [B, Q, H, L, P] = {expected} as sampling_locations are, "
            f"got {list(attention_weights.shape)}"
        )


def reference(
    value: torch.Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
) -> torch.Tensor:
    """The steps of the original in the dtype of values, to which it casts locations and weights.

    grid_sample takes one dtype.
    """
    given = value, sampling_locations.to(value.dtype), attention_weights.to(value.dtype)
    if value.device.type == "cpu" and value.itemsize == 2:
        # There grid_sample computes addresses with as many bits as the values have, and reads wrong pixels, or memory
        # that is not its own, where they lie more than 32767 elements apart.
        given = tuple(tensor.float() for tensor in given)
    widened, *rest = given
    # Autocast widens the result.
    return torch_form.by_grid_sample(widened, spatial_shapes, *rest).to(value.dtype)


def _why_not(value, spatial_shapes, sampling_locations, attention_weights) -> str | None:
    """Why the Triton kernels do not take these tensors; None where they do."""
    if value.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the kernel takes values in float16, bfloat16 and float32, got {value.dtype}"
    if value.shape[-1] > MAX_CHANNELS:
        return f"the kernel holds pixels of up to {MAX_CHANNELS} channels a head, these have {value.shape[-1]}"
    if len(spatial_shapes) > MAX_LEVELS:
        return f"the kernel is compiled for up to {MAX_LEVELS} levels, these are {len(spatial_shapes)}"
    return too_large(spatial_shapes, value.shape[1])


def _attend_by_kernel(value, spatial_shapes, sampling_locations, attention_weights) -> torch.Tensor:
    sides = [side for size in spatial_shapes for side in size]
    return deformable_attention_kernel(value, sides, sampling_locations, attention_weights)


@torch.library.custom_op("mg_fast::deformable_attention", mutates_args=())
def deformable_attention_kernel(
    value: torch.Tensor, sides: list[int], locations: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """`kernels.deformable_attention.deformable_attention_fwd`."""
    from ..kernels.deformable_attention import deformable_attention_fwd

    with on_device(value):
        return deformable_attention_fwd(value, sides, locations, weights)


@deformable_attention_kernel.register_fake
def _(value, sides, locations, weights):
    return value.new_empty(*locations.shape[:2], value.shape[2] * value.shape[3])


@torch.library.custom_op("mg_fast::deformable_attention_backward", mutates_args=())
def deformable_attention_backward(
    grad: torch.Tensor,
    value: torch.Tensor,
    sides: list[int],
    locations: torch.Tensor,
    weights: torch.Tensor,
    wanted: list[bool],
) -> list[torch.Tensor]:
    """`kernels.deformable_attention_backward.deformable_attention_bwd`."""
    from ..kernels.deformable_attention_backward import deformable_attention_bwd

    with on_device(value):
        return deformable_attention_bwd(grad, value, sides, locations, weights, wanted)


@deformable_attention_backward.register_fake
def _(grad, value, sides, locations, weights, wanted):
    dtypes = torch.float32, locations.dtype, weights.dtype
    return [
        tensor.new_empty(tensor.shape, dtype=dtype)
        for tensor, dtype, want in zip((value, locations, weights), dtypes, wanted)
        if want
    ]


@torch.library.custom_op("mg_fast::deformable_attention_sum", mutates_args=())
def deformable_attention_sum(
    grad: torch.Tensor,
    sides: list[int],
    locations: torch.Tensor,
    weights: torch.Tensor,
    order: torch.Tensor,
    ends: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`kernels.deformable_attention_backward.sum_rows_bwd`."""
    from ..kernels.deformable_attention_backward import sum_rows_bwd

    with on_device(grad):
        return sum_rows_bwd(grad, sides, locations, weights, order, ends, dtype)


@deformable_attention_sum.register_fake
def _(grad, sides, locations, weights, order, ends, dtype):
    batch, _, heads = locations.shape[:3]
    pixels = sum(h * w for h, w in pairs(sides))
    return grad.new_empty(batch, pixels, heads, grad.shape[-1] // heads, dtype=dtype)


def _context(ctx, inputs, output):
    value, ctx.sides, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _gradients(ctx, grad):
    value, locations, weights = ctx.saved_tensors
    to_value, *others = (ctx.needs_input_grad[i] for i in (0, 2, 3))
    by_sorting = to_value and torch.are_deterministic_algorithms_enabled()
    wanted = [to_value and not by_sorting, *others]
    gradients = iter(
        deformable_attention_backward(grad, value, ctx.sides, locations, weights, wanted) if any(wanted) else ()
    )
    # Atomics add in float32.
    grad_value = next(gradients).to(value.dtype) if wanted[0] else None
    if by_sorting:
        grad_value = _sorted_sum(grad, value, ctx.sides, locations, weights)
    return grad_value, None, *(next(gradients) if want else None for want in others)


def _sorted_sum(grad, value, sides, locations, weights) -> torch.Tensor:
    """The gradient of value with equal bits in every run.

    The pixels of all samples are sorted by the row of value that they lie in, and every row adds up its own in order.
    """
    batch, pixels, heads, _ = value.shape
    rows = torch_form.pixel_rows(locations.float(), pairs(sides)).flatten()
    rows, order = torch.sort(rows, stable=True)
    every_row = torch.arange(batch * pixels * heads + 1, dtype=rows.dtype, device=rows.device)
    ends = torch.searchsorted(rows, every_row)
    return deformable_attention_sum(grad, sides, locations, weights, order, ends, value.dtype)


torch.library.register_autograd("mg_fast::deformable_attention", _gradients, setup_context=_context)


def deformable_attention_flop(value: torch.Tensor, locations: torch.Tensor) -> int:
    """Floating-point operations: four multiplications and additions for every channel of every sample."""
    return 8 * (locations.numel() // 2) * value.shape[-1]


def _backward_flop(grad, value, sides, locations, weights, wanted) -> int:
    """The products of the gradient with the pixels, and the products that are added to the gradient of value."""
    return deformable_attention_flop(value, locations) * (bool(wanted[0]) + any(wanted[1:]))


DEFORMABLE_ATTENTION = register(
    Operation(
        name="deformable_attention",
        check=_check,
        why_not=_why_not,
        forms={"reference": reference, "torch": torch_form.deformable_attention, "triton": _attend_by_kernel},
        auto=("triton", "torch", "reference"),
        operators=(
            Operator(
                name="mg_fast::deformable_attention",
                launches=lambda value, sides, locations, weights: int(locations.shape[:3].numel() * value.shape[3] > 0),
                workspaces=lambda value, sides, locations, weights: copied_rows(value) + copied(locations, weights),
                flop=lambda value, sides, locations, weights: deformable_attention_flop(value, locations),
            ),
            Operator(
                name="mg_fast::deformable_attention_backward",
                launches=lambda grad, value, sides, locations, weights, wanted: int(
                    weights.numel() > 0 and any(wanted)
                ),
                workspaces=lambda grad, value, sides, locations, weights, wanted: (
                    copied_rows(value) + copied(grad, locations, weights)
                ),
                flop=_backward_flop,
            ),
            Operator(
                name="mg_fast::deformable_attention_sum",
                launches=lambda grad, sides, locations, weights, order, ends, dtype: int(
                    (len(ends) - 1) * grad.shape[-1] > 0
                ),
                workspaces=lambda grad, sides, locations, weights, *_: copied(grad, locations, weights),
                flop=lambda grad, sides, locations, weights, *_: (
                    8 * weights.numel() * (grad.shape[-1] // locations.shape[2])
                ),
            ),
        ),
    )
)
