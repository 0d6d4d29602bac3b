"""Fixed position embeddings of sines and cosines, and stored ones resized to other grids, each made only once."""

import math

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from ...runtime.device_tables import cached_on_device, tensors_are_fake

# For every stored table, the state that it was in, and what it was resized to then.
_resized = WeakTensorKeyDictionary()


def _sines(positions: torch.Tensor, width: int) -> torch.Tensor:
    """[len(positions), width]: the sines of all frequencies, and then their cosines.

    All steps are in float32, as in the original: at position 2000, rounding has moved angles by up to 1e-4.
    """
    frequencies = 1.0 / 10000 ** (torch.arange(width // 2, dtype=torch.float32, device="cpu") / (width / 2))
    angles = positions.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


@cached_on_device(limit=2**28)
def sequence_positions(length: int, width: int, device: torch.device) -> torch.Tensor:
    """The embeddings of the positions 0 .. length - 1 of a sequence, float32 [length, width]; width is even."""
    # The table is made on the CPU, because other devices round sines otherwise.
    return _sines(torch.arange(length, device="cpu"), width).to(device)


def grid_positions(side: int, width: int) -> torch.Tensor:
    """The embeddings of a square grid's cells, row by row, float32 [side * side, width] on the CPU.

    The first half of the channels depends on the row, the second half on the column. The width is a multiple of 4.
    """
    cells = torch.arange(side * side, device="cpu")
    return torch.cat([_sines(cells // side, width // 2), _sines(cells % side, width // 2)], dim=1)


def resized_positions(
    stored: torch.Tensor, sides: tuple[int, ...], *, skip: int = 0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """A stored table of position embeddings, resized to other square grids.

    Grids are resized bicubically (align_corners=False) in float32. The result is kept as long as the stored tensor is
    neither written, moved nor deleted, and must not be written. Writes through `.data` are not seen. Where gradients to
    the stored table are wanted, the result is made anew.

    Args:
        stored: [skip + g * g, width], floating point, the embeddings of a grid row by row.
        sides: the sides of the grids that are wanted.
        skip: rows before those of the grid, which are left out.
        dtype: the dtype of the result.

    Returns:
        [sum of side * side, width], the grids one after the other, each row by row.
    """
    request = tuple(sides), skip, dtype
    if (
        torch.compiler.is_compiling()
        or stored.is_meta
        or tensors_are_fake()
        or (stored.requires_grad and torch.is_grad_enabled())
    ):
        return _resize(stored, *request)
    state = None if stored.is_inference() else stored._version, stored.data_ptr(), stored.dtype, stored.device
    known, tables = _resized.get(stored, (None, None))
    if known != state:
        tables = {}
    if (table := tables.get(request)) is not None:
        return table
    # Tensors that are made in inference mode could not be used for training later.
    with torch.inference_mode(False), torch.no_grad():
        source = stored.clone() if stored.is_inference() else stored
        table = _resize(source, *request)
    if stored.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            # The table has no values until the graph is replayed.
            return table
        # Other streams will read the table, so it must be complete.
        torch.cuda.current_stream(stored.device).synchronize()
    _resized[stored] = state, {**tables, request: table}
    return table


def _resize(stored: torch.Tensor, sides: tuple[int, ...], skip: int, dtype: torch.dtype) -> torch.Tensor:
    grid = stored[skip:].to(torch.promote_types(stored.dtype, torch.float32))
    side = math.isqrt(len(grid))
    if side * side != len(grid):
        raise ValueError(f"resized_positions: expected the embeddings of a square grid, got {len(grid)} rows")
    cells = grid.t().reshape(1, -1, side, side)
    resized = [
        cells if size == side else F.interpolate(cells, size=(size, size), mode="bicubic", align_corners=False)
        for size in sides
    ]
    return torch.cat([each[0].flatten(1).t() for each in resized]).to(dtype)
