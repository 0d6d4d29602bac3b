"""`python -m bench formulas`: FLOP and bytes of patch info mining and of the high-resolution tower, by form."""

from collections.abc import Iterator

import torch

from .costs.mining import MINING, Sizes, mining_floor, triton_mining
from .costs.tower import FORMS, Tower, tower_cost, tower_floor
from .registry import Cost, dtype_name


def table() -> str:
    """The costs of all forms beside their floors, for pictures of 768 and 1536 pixels."""
    lines = [f"{'setting':20}{'form':24}{'GFLOP':>8}{'MB':>9}{'MB / floor':>12}"]
    for setting, costs, floor in _settings():
        for form, cost in (costs | {"floor": Cost(0, floor.bytes)}).items():
            flop = f"{cost.flop / 1e9:.1f}" if cost.flop else "-"
            ratio = cost.bytes / floor.bytes
            lines.append(f"{setting:20}{form:24}{flop:>8}{cost.bytes / 1e6:>9.1f}{ratio:>12.1f}")
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
