"""ConvNeXt on channels-last maps: the `torch` and `triton` backends of the high-resolution tower.

A block is three steps: depthwise convolution and norm; expansion and GELU; contraction, with layer scale folded into
its weight, and residual. Nothing is permuted or copied between them. The expansion of a large map is made in chunks of
rows, so that the expanded map, four times as wide, never exists as a whole. Without gradients the blocks of a stage add
to one map in place. Source: Liu et al., A ConvNet for the 2020s (2022), section 2; timm/models/convnext.py for the
names of the parameters.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from ..ops import backend as backends
from ..ops.custom_op_support import autocast
from ..ops.torch import pointwise as library

# Bytes of the expansion of one chunk. On a CPU it stays in the cache; on a GPU it is more than enough to keep it busy.
CPU_EXPANSION = 2**24
GPU_EXPANSION = 2**28


class BlockTensors(NamedTuple):
    """Tensors of one block.

    `taps` [49, C] are the convolution's weights, tap by tap. Layer scale is folded into `contract` [C, 4 C] and its
    bias. `wide` are both products as the library computes them in fewer launches, where a packed tower has them.
    """

    taps: torch.Tensor
    bias: torch.Tensor
    norm_weight: torch.Tensor
    norm_bias: torch.Tensor
    eps: float
    expand: torch.Tensor
    expand_bias: torch.Tensor
    contract: torch.Tensor
    contract_bias: torch.Tensor
    wide: library.WideProducts | None = None


class DownsampleTensors(NamedTuple):
    """Tensors of a stem or downsampling: a convolution of pixel squares, and a LayerNorm before or after it.

    The squares have `stride` x `stride` pixels and do not overlap.
    """

    norm_weight: torch.Tensor
    norm_bias: torch.Tensor
    eps: float
    weight: torch.Tensor
    bias: torch.Tensor
    stride: int


class StageTensors(NamedTuple):
    """A stage's blocks, and the stem or downsampling before them; `entry` is None where the map enters unchanged."""

    entry: DownsampleTensors | None
    blocks: Sequence[BlockTensors]


def read_tower(stem: nn.Module, stages: nn.Module) -> tuple[DownsampleTensors, list[StageTensors]]:
    """The tensors of a timm stem and its stages as they are now; gradients flow back to the parameters."""
    return _entry(stem[1], stem[0]), [read_stage(stage) for stage in stages]


def read_stage(stage: nn.Module) -> StageTensors:
    downsample = stage.downsample
    entry = None if isinstance(downsample, nn.Identity) else _entry(downsample[0], downsample[1])
    return StageTensors(entry, [read_block(block) for block in stage.blocks])


def read_block(block: nn.Module) -> BlockTensors:
    """The tensors of a timm ConvNeXtBlock of the first version, whose MLP has linear layers or 1x1 convolutions."""
    first, second = block.mlp.fc1, block.mlp.fc2
    contract, contract_bias = second.weight.flatten(1), second.bias
    if block.gamma is not None:
        contract, contract_bias = contract * block.gamma[:, None], contract_bias * block.gamma
    taps = block.conv_dw.weight.flatten(1).t().contiguous()
    norm = (block.norm.weight, block.norm.bias, block.norm.eps)
    return BlockTensors(taps, block.conv_dw.bias, *norm, first.weight.flatten(1), first.bias, contract, contract_bias)


def widened(stages: Sequence[StageTensors]) -> list[StageTensors]:
    """Stages whose blocks also have `wide` products; the contractions become views of these.

    A kernel of ours would copy these views in every call: pack for it without this.
    """

    def block(narrow: BlockTensors) -> BlockTensors:
        wide = library.widen(narrow.expand, narrow.expand_bias, narrow.contract, narrow.contract_bias)
        return narrow._replace(contract=wide.contract[:, : len(narrow.expand)], wide=wide)

    return [stage._replace(blocks=[block(one) for one in stage.blocks]) for stage in stages]


def _entry(norm: nn.Module, conv: nn.Module) -> DownsampleTensors:
    # The library's convolution of a channels-last map reads this layout, and would convert another one in every call.
    weight = conv.weight.contiguous(memory_format=torch.channels_last)
    return DownsampleTensors(norm.weight, norm.bias, norm.eps, weight, conv.bias, conv.stride[0])


def empty_tower(dims: Sequence[int], depths: Sequence[int], **like) -> tuple[DownsampleTensors, list[StageTensors]]:
    """The result of `read_tower` without values, for a tower of these sizes: to compile for it, and to count.

    Args:
        dims, depths: widths and depths of the stages.
        **like: dtype and device of the tensors; `requires_grad` to count what autograd records.
    """

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, **like)

    def entry(norm: int, before: int, after: int, stride: int) -> DownsampleTensors:
        weight = torch.empty(after, before, stride, stride, **like, memory_format=torch.channels_last)
        return DownsampleTensors(empty(norm), empty(norm), 1e-6, weight, empty(after), stride)

    def block(c: int) -> BlockTensors:
        return BlockTensors(
            empty(49, c), empty(c), empty(c), empty(c), 1e-6, empty(4 * c, c), empty(4 * c), empty(c, 4 * c), empty(c)
        )

    # The stem's norm comes after its convolution, the norm of a downsampling before.
    entries = [None, *(entry(before, before, after, 2) for before, after in zip(dims, dims[1:]))]
    stages = [StageTensors(first, [block(c) for _ in range(depth)]) for first, c, depth in zip(entries, dims, depths)]
    return entry(dims[0], 3, dims[0], 4), stages


def run_tower(
    stem: DownsampleTensors, stages: Sequence[StageTensors], pixels: torch.Tensor, backend: str | None = None
) -> list[torch.Tensor]:
    """The stage maps of pictures.

    Args:
        stem, stages: as `read_tower` returns them.
        pixels: [B, 3, H, W], in the weights' dtype.
        backend: the backend of the operations.

    Returns:
        [B, H / 4 / 2**s, W / 4 / 2**s, C_s], contiguous.
    """
    x = _norm(_convolve(pixels.permute(0, 2, 3, 1), stem), stem)
    pyramid = []
    for stage in stages:
        # Blocks may add in place to a map that belongs to their stage, but not to one that is in the result.
        x = run_stage(stage, x, backend, in_place=not pyramid)
        pyramid.append(x)
    return pyramid


def run_stage(
    stage: StageTensors, x: torch.Tensor, backend: str | None = None, *, in_place: bool = False
) -> torch.Tensor:
    """Runs one stage on [B, H, W, C].

    `in_place` says that x may be overwritten; it matters only without a downsampling, which makes a map of its own.
    """
    if stage.entry is not None:
        x, in_place = _convolve(_norm(x, stage.entry), stage.entry), True
    for block in stage.blocks:
        x = run_block(block, x, backend, in_place=in_place)
        in_place = True
    return x


def run_block(
    block: BlockTensors, x: torch.Tensor, backend: str | None = None, *, in_place: bool = False
) -> torch.Tensor:
    """Runs one block on [B, H, W, C], into a new map; into `x` if `in_place` is set and no gradient is wanted."""
    shape, hidden = x.shape, block.expand.shape[0]
    normed = ops.dwconv_norm(x, block.taps, block.bias, block.norm_weight, block.norm_bias, block.eps, backend=backend)
    normed, residual = normed.reshape(-1, shape[-1]), x.reshape(-1, shape[-1])
    entering = (normed, residual, block.expand, block.expand_bias, block.contract, block.contract_bias)
    recording = torch.is_grad_enabled() and any(t.requires_grad for t in entering)
    if recording:
        expanded = ops.linear_gelu(normed, block.expand, block.expand_bias, backend=backend)
        return ops.linear_residual(expanded, block.contract, block.contract_bias, residual, backend=backend).view(shape)
    if not in_place:
        residual = residual.clone()
    if block.wide is not None and _by_library(block.wide, normed, residual, backend):
        for rows in chunks(len(normed), len(block.wide.expand) * normed.element_size(), normed.device.type):
            library.feed_forward_(normed[rows], block.wide, residual[rows])
        return residual.view(shape)
    # Weights are cast here once per block, and not in every chunk.
    expand, expand_bias, contract, contract_bias = autocast(
        block.expand, block.expand_bias, block.contract, block.contract_bias
    )
    for rows in chunks(len(normed), hidden * normed.element_size(), normed.device.type):
        expanded = ops.linear_gelu(normed[rows], expand, expand_bias, backend=backend)
        ops.linear_residual_(expanded, contract, contract_bias, residual[rows], backend=backend)
    return residual.view(shape)


def _by_library(wide: library.WideProducts, normed: torch.Tensor, residual: torch.Tensor, backend: str | None) -> bool:
    """Whether both products are the library's, in one dtype."""
    chosen = {backends.choose(name, backend, normed.device) for name in ("linear_gelu", "linear_residual")}
    return chosen == {"torch"} and wide.expand.dtype == normed.dtype == residual.dtype


def chunks(rows: int, bytes_per_row: int, device: str) -> Iterator[slice]:
    """Equal parts of the rows, each within the budget of the device."""
    budget = CPU_EXPANSION if device == "cpu" else GPU_EXPANSION
    parts = -(-rows * bytes_per_row // budget)
    step = -(-rows // max(parts, 1))
    return (slice(start, start + step) for start in range(0, rows, max(step, 1)))


def _convolve(x: torch.Tensor, entry: DownsampleTensors) -> torch.Tensor:
    out = F.conv2d(x.permute(0, 3, 1, 2), entry.weight, entry.bias, entry.stride)
    # The blocks add to this map. Where autocast narrowed it, it is widened to the weights' dtype again, because timm's
    # sum with the scaled branch has that dtype.
    return out.permute(0, 2, 3, 1).to(torch.promote_types(out.dtype, entry.weight.dtype)).contiguous()


def _norm(x: torch.Tensor, entry: DownsampleTensors) -> torch.Tensor:
    return F.layer_norm(x, entry.norm_weight.shape, entry.norm_weight, entry.norm_bias, entry.eps)
