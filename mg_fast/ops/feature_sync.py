"""The core of MM-Interleaved's feature synchronizer: every query reads a few points of every picture that it sees."""

from collections.abc import Sequence

import torch

from ..errors import quoted
from ..runtime.arguments import whole_number
from . import backend as backends
from .custom_op_support import copied, copied_rows, on_device, recording
from .deformable_attention import deformable_attention
from .feature_sync_reference import reference
from .operation import Operation, Operator, register
from .spatial_shapes import check_spatial_shapes, host_sizes, pairs, too_large
from .torch import feature_sync as torch_form
from .torch.feature_sync import points_of

__all__ = ["MAX_LEVELS", "MAX_POINTS", "feature_sync", "feature_sync_backward", "feature_sync_kernel"]

# The kernel's code grows with the levels, and its tile with the points.
MAX_LEVELS = 8
MAX_POINTS = 32


def feature_sync(
    values: torch.Tensor,
    queries: torch.Tensor,
    table: torch.Tensor,
    index: torch.Tensor,
    reference_points: torch.Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    *,
    base: int,
    ignore: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Deformable attention over pictures, levels and points at once, with one added to the softmax's denominator.

    For picture j with index r_j > 0, z_j = queries + table[r_j] holds the offsets o [H, P, 2] as (x, y) and the logits
    a [H, L, P] of every query, in this order. One set of offsets serves all levels: a query reads every level at
    reference + o / base. The result of a head is

        (ignore + sum exp(a) * sample) / (1 + sum exp(a)),

    where both sums run over the pictures with r_j > 0, their levels and points. A picture with r_j = 0 is not read;
    only `reference` reads it, with a weight of zero, so NaN in it spreads there.

    Args:
        values: [B, n, S, H, D], floating point: for each of n pictures the projected maps of all levels one after the
            other, each row by row. Any strides; fastest with unit channel stride. `expand` serves rows that share
            pictures.
        queries: [B, Q, H * P * 2 + H * L * P], floating point.
        table: [R, H * P * 2 + H * L * P], in the dtype of queries: what is added for a picture of each index.
        index: [B, Q, n] or [B, 1, n], int32 or int64: the relative index of every picture, below R; 0 for a picture
            that the query does not see. The most recent visible picture has index 1. An index that the table does not
            have is not looked for, because that would mean to wait for the device: `torch` and `triton` give NaN for
            its query, and read nothing. `reference` indexes the table as Python does: -1 is its last row, and an index
            behind the table is an IndexError.
        reference_points: [B, Q, 2], or with 1 in place of B or Q, floating point, (x, y) in [0, 1]; read in float32.
        spatial_shapes: (h, w) of every level, whole numbers on the host. S is the sum of h * w.
        base: the number of offset units in the width and in the height of a map.
        ignore: [H * D] in the dtype of values, what the mass of the added one reads; None stands for zeros.
        backend: overrides the choice in force.

    Returns:
        [B, Q, H * D] in the dtype of values. Where a query sees no picture it is `ignore`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message names what was expected and what came.
        BackendError: a backend was named that cannot run here.

    Gradients reach values, queries, table, reference_points and ignore. `triton` has a kernel for the forward pass; its
    gradients recompute locations and weights in PyTorch, and take those of the samples from `deformable_attention`,
    with its kernels and its deterministic choice.

    Source: MM-Interleaved (arXiv 2401.10208), class MMFS.
    """
    arguments = values, queries, table, index, reference_points, spatial_shapes, base, ignore
    form = backends.choose_form(FEATURE_SYNC, backend, values.device, *arguments)
    return form(values, queries, table, index, reference_points, host_sizes(spatial_shapes), int(base), ignore)


def _check(values, queries, table, index, reference_points, spatial_shapes, base, ignore) -> None:
    for name, tensor, layout in (
        ("values", values, "[B, n, S, H, D]"),
        ("queries", queries, "[B, Q, H * P * 2 + H * L * P]"),
        ("table", table, "[R, H * P * 2 + H * L * P]"),
        ("index", index, "[B, Q, n] or [B, 1, n]"),
        ("reference_points", reference_points, "[B or 1, Q or 1, 2]"),
        ("ignore", ignore, "[H * D]"),
    ):
        if tensor is None:
            continue
        if tensor.dim() != layout.split("]")[0].count(",") + 1:
            raise ValueError(f"feature_sync: {name} must be {layout}, got {list(tensor.shape)}")
        if name == "index":
            if tensor.dtype not in (torch.int32, torch.int64):
                raise ValueError(f"feature_sync: index must be torch.int32 or torch.int64, got {tensor.dtype}")
        elif not tensor.is_floating_point():
            raise ValueError(f"feature_sync: {name} must be floating point, got {tensor.dtype}")
        if tensor.device != values.device:
            raise ValueError(f"feature_sync: {name} must be on {values.device} as values are, got {tensor.device}")
    batch, pictures, pixels, heads, channels = values.shape
    check_spatial_shapes("feature_sync", spatial_shapes, pixels)
    levels, count, width = len(spatial_shapes), queries.shape[1], queries.shape[-1]
    if queries.shape[0] != batch:
        raise ValueError(f"feature_sync: queries must be of batch {batch} as values are, got {list(queries.shape)}")
    if not points_of(width, heads, levels):
        raise ValueError(
            f"feature_sync: the width of queries must be a multiple of heads * (2 + levels) = {heads * (2 + levels)}, "
            f"got {width}"
        )
    if table.shape[-1] != width or table.dtype != queries.dtype:
        raise ValueError(
            f"feature_sync: table must be [R, {width}] in {queries.dtype} as queries are, got {list(table.shape)} in "
            f"{table.dtype}"
        )
    if pictures > 0 and len(table) == 0:
        raise ValueError("feature_sync: table must have at least one row where there are pictures, got none")
    if list(index.shape) not in ([batch, count, pictures], [batch, 1, pictures]):
        raise ValueError(
            f"feature_sync: index must be {[batch, count, pictures]} or {[batch, 1, pictures]}, got {list(index.shape)}"
        )
    if (
        reference_points.shape[0] not in (1, batch)
        or reference_points.shape[1] not in (1, count)
        or reference_points.shape[2] != 2
    ):
        raise ValueError(
            f"feature_sync: reference_points must be [{batch} or 1, {count} or 1, 2], got "
            f"{list(reference_points.shape)}"
        )
    if (whole_number(base) or 0) < 1:
        raise ValueError(f"feature_sync: base must be a positive whole number, got {quoted(base)}")
    if ignore is not None and (list(ignore.shape) != [heads * channels] or ignore.dtype != values.dtype):
        raise ValueError(
            f"feature_sync: ignore must be [{heads * channels}] in {values.dtype} as values are, got "
            f"{list(ignore.shape)} in {ignore.dtype}"
        )


def _why_not(values, queries, table, index, reference_points, spatial_shapes, base, ignore) -> str | None:
    """Why the Triton kernel does not take these arguments; None where it does."""
    for name, tensor in (("values", values), ("queries", queries)):
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"the kernel takes {name} in float16, bfloat16 and float32, got {tensor.dtype}"
    if len(spatial_shapes) > MAX_LEVELS:
        return f"the kernel takes up to {MAX_LEVELS} levels, got {len(spatial_shapes)}"
    points = points_of(queries.shape[-1], values.shape[3], len(spatial_shapes))
    if points > MAX_POINTS:
        return f"the kernel takes up to {MAX_POINTS} points, got {points}"
    return too_large(spatial_shapes, values.shape[2])


@torch.library.custom_op("mg_fast::feature_sync", mutates_args=())
def feature_sync_kernel(
    values: torch.Tensor,
    queries: torch.Tensor,
    table: torch.Tensor,
    index: torch.Tensor,
    reference_points: torch.Tensor,
    sides: list[int],
    base: int,
    ignore: torch.Tensor | None,
) -> torch.Tensor:
    """`kernels.feature_sync.feature_sync_fwd`, with the sizes of all levels in one list: h, w, h, w, and so on.

    Its gradients recompute by the PyTorch form.
    """
    from ..kernels.feature_sync import feature_sync_fwd

    with on_device(values):
        return feature_sync_fwd(values, queries, table, index, reference_points, pairs(sides), base, ignore)


@feature_sync_kernel.register_fake
def _(values, queries, table, index, reference_points, sides, base, ignore):
    return values.new_empty(values.shape[0], queries.shape[1], values.shape[3] * values.shape[4])


def _gather(values, spatial_shapes, locations, weights) -> torch.Tensor:
    """Deformable attention in the fastest form that can run, which on a GPU has kernels for its gradients.

    Pictures are rows of a batch here, so that they do not count as levels; the arguments are those of
    `torch_form.feature_sync`'s `gather`.
    """
    batch, pictures = values.shape[:2]
    locations = locations.transpose(1, 2).flatten(0, 1)[:, :, :, None]
    locations = locations.expand(-1, -1, -1, len(spatial_shapes), -1, -1)
    weights = weights.transpose(1, 2).flatten(0, 1)
    out = deformable_attention(values.flatten(0, 1), spatial_shapes, locations, weights)
    return out.view(batch, pictures, *out.shape[1:]).sum(1)


@torch.library.custom_op("mg_fast::feature_sync_backward", mutates_args=())
def feature_sync_backward(
    grad: torch.Tensor,
    index: torch.Tensor,
    inputs: list[torch.Tensor],
    wanted: list[bool],
    sides: list[int],
    base: int,
) -> list[torch.Tensor]:
    """Gradients to the `wanted` ones of `inputs`: values, queries, table, reference_points, and ignore if there is one.

    Locations and weights are recomputed by the PyTorch form for some queries at a time, so that their memory does not
    grow with the queries; the samples' gradients are those of `deformable_attention`. Gradients that parts of the
    queries share are added up in float32. This is an operator so that graphs need not trace it.
    """
    batch, count = inputs[1].shape[:2]
    index = index.expand(-1, count, -1)
    samples = batch * inputs[0].shape[1] * inputs[1].shape[2]
    step = max(1, torch_form.SAMPLES // max(1, samples))
    sums = [
        torch.zeros(tensor.shape, dtype=torch.promote_types(tensor.dtype, torch.float32), device=tensor.device)
        for tensor, want in zip(inputs, wanted)
        if want
    ]
    for first in range(0, count, step):
        some = slice(first, first + step)
        # Queries have a part of their own, and reference points may have one.
        cut = [True if i == 1 else i == 3 and inputs[3].shape[1] > 1 for i in range(len(inputs))]
        with recording(), torch.enable_grad():
            values, queries, table, points, *ignore = leaves = [
                (tensor[:, some] if part else tensor).detach().requires_grad_(want)
                for tensor, part, want in zip(inputs, cut, wanted)
            ]
            out = torch_form.feature_sync(
                values, queries, table, index[:, some], points, pairs(sides), base, *(ignore or [None]), gather=_gather
            )
            if not out.requires_grad:
                # Without pictures or rows nothing but `ignore` reaches the result, and no gradient of it is wanted.
                continue
            sources = [leaf for leaf in leaves if leaf.requires_grad]
            found = torch.autograd.grad(out, sources, grad[:, some], allow_unused=True, materialize_grads=True)
        parts = (part for part, want in zip(cut, wanted) if want)
        for total, gradient, part in zip(sums, found, parts):
            (total[:, some] if part else total).add_(gradient)
    return [total.to(tensor.dtype) for total, tensor in zip(sums, (t for t, want in zip(inputs, wanted) if want))]


@feature_sync_backward.register_fake
def _(grad, index, inputs, wanted, sides, base):
    return [tensor.new_empty(tensor.shape) for tensor, want in zip(inputs, wanted) if want]


def _context(ctx, inputs, output):
    values, queries, table, index, reference_points, ctx.sides, ctx.base, ignore = inputs
    ctx.save_for_backward(index, values, queries, table, reference_points, *(() if ignore is None else (ignore,)))


def _gradients(ctx, grad):
    index, *tensors = ctx.saved_tensors
    places = (0, 1, 2, 4, 7)
    wanted = [ctx.needs_input_grad[place] for place in places[: len(tensors)]]
    found = iter(feature_sync_backward(grad, index, tensors, wanted, ctx.sides, ctx.base))
    gradients = [None] * 8
    for place, want in zip(places, wanted):
        gradients[place] = next(found) if want else None
    return tuple(gradients)


torch.library.register_autograd("mg_fast::feature_sync", _gradients, setup_context=_context)


def _triton(values, queries, table, index, reference_points, spatial_shapes, base, ignore) -> torch.Tensor:
    sides = [side for size in spatial_shapes for side in size]
    return feature_sync_kernel(values, queries, table, index, reference_points, sides, base, ignore)


def _flop(values, queries, table, index, reference_points, sides, base, ignore) -> int:
    """Four taps of every sample, as if every query saw every picture: eight operations for each channel."""
    levels, heads = len(sides) // 2, values.shape[3]
    points = points_of(queries.shape[-1], heads, levels)
    samples = queries.shape[0] * queries.shape[1] * values.shape[1] * heads * levels * points
    return 8 * samples * values.shape[4]


FEATURE_SYNC = register(
    Operation(
        name="feature_sync",
        check=_check,
        why_not=_why_not,
        forms={"reference": reference, "torch": torch_form.feature_sync, "triton": _triton},
        auto=("triton", "torch", "reference"),
        operators=(
            Operator(
                name="mg_fast::feature_sync",
                launches=lambda values, queries, *_: int(values.shape[0] * queries.shape[1] * values.shape[4] > 0),
                workspaces=lambda values, queries, table, index, points, sides, base, ignore: (
                    copied_rows(values, queries) + copied(table, *(() if ignore is None else (ignore,)))
                ),
                flop=_flop,
            ),
        ),
    )
)
