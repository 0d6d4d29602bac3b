"""`python -m bench formulas`: FLOP and bytes by form.

They are those of patch info mining, of the high-resolution tower, of deformable attention and of the synchronizer.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from .costs.mining import MINING, Sizes, mining_floor, triton_mining
from .costs.sampling import (
    BLOCKS,
    LANGUAGE,
    SAMPLERS,
    SyncSizes,
    block_sizes,
    deformable_floor,
    packed_sync_flop,
    reference_sync_flop,
    sync_floor,
)
from .costs.tower import FORMS, Tower, tower_cost, tower_floor
from .registry import Cost, dtype_name


def table() -> str:
    """The costs of all forms beside their floors, for pictures of 768 and 1536 pixels."""
    lines = [f"{'setting':38}{'form':24}{'GFLOP':>8}{'MB':>9}{'MB / floor':>12}"]
    for setting, costs, floor in _settings():
        for form, cost in (costs | {"floor": Cost(0, floor.bytes)}).items():
            flop = f"{cost.flop / 1e9:.{1 if cost.flop >= 1e8 else 3}f}" if cost.flop else "-"
            moved = f"{cost.bytes / 1e6:>9.1f}{cost.bytes / floor.bytes:>12.1f}" if cost.bytes else f"{'-':>9}{'-':>12}"
            lines.append(f"{setting:38}{form:24}{flop:>8}{moved}")
    return "\n".join(lines)


def _settings() -> Iterator[tuple[str, dict[str, Cost], Cost]]:
    """Each setting, its costs by form, and its floor."""
    settings = [(pixels, dtype) for pixels in (768, 1536) for dtype in (torch.bfloat16, torch.float32)]
    for pixels, dtype in settings:
        sizes = Sizes.of_picture(pixels, dtype)
        costs = {form: cost(sizes) for form, cost in MINING.items()}
        costs["triton, without cache"] = triton_mining(sizes, cached=False)
        yield f"{pixels}{' HD' * (sizes.grid > 1)} {dtype_name(dtype)}", costs, mining_floor(sizes)
    for pixels, dtype in settings:
        tower = Tower(dtype, size=pixels)
        costs = {form: tower_cost(tower, form) for form in FORMS}
        yield f"tower {pixels} {dtype_name(dtype)}", costs, tower_floor(tower)
    for dtype in (torch.bfloat16, torch.float32):
        for name, sizes in SAMPLERS.items():
            yield f"{name} {dtype_name(dtype)}", {}, deformable_floor(replace(sizes, dtype=dtype))
        for name, sizes in _synchronizers(dtype):
            # Only the products of these forms are known by formula.
            forms = {"reference": reference_sync_flop, "packed, values kept": packed_sync_flop}
            yield (
                f"{name} {dtype_name(dtype)}",
                {form: Cost(flop(sizes)) for form, flop in forms.items()},
                sync_floor(sizes),
            )


def _synchronizers(dtype: torch.dtype) -> Iterator[tuple[str, SyncSizes]]:
    """The synchronizer in a step of decoding and in a prompt with four pictures, and in each block of the decoder."""
    for queries in (1, 2048):
        yield f"synchronizer, {queries} x 4", replace(LANGUAGE, dtype=dtype, queries=queries, pictures=4)
    for name, (side, width, _) in BLOCKS.items():
        yield f"synchronizer, {name}", block_sizes(side, width, dtype)
