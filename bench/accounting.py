"""python -m bench.accounting: FLOP and bytes of patch info mining and of the high-resolution tower, by form."""

import torch

from .costs.mining import MINING, Sizes, mining_floor, triton_mining
from .costs.tower import FORMS, Tower, tower_cost, tower_floor
from .registry import Cost

# Settings and their pixels along a side.
MINED = {"768": 768, "1536 HD": 1536}
SEEN = {"768": 768, "1536": 1536}


def main() -> None:
    print(f"{'setting':20}{'form':24}{'GFLOP':>8}{'MB':>9}{'MB / floor':>12}")
    for name, pixels in MINED.items():
        for dtype in (torch.bfloat16, torch.float32):
            sizes = Sizes.of_picture(pixels, dtype)
            costs = {form: cost(sizes) for form, cost in MINING.items()}
            costs["triton, without cache"] = triton_mining(sizes, cached=False)
            _print_costs(f"{name} {_name(dtype)}", costs, mining_floor(sizes))
    for name, pixels in SEEN.items():
        for dtype in (torch.bfloat16, torch.float32):
            tower = Tower(dtype, size=pixels)
            costs = {form: tower_cost(tower, form) for form in FORMS}
            _print_costs(f"tower {name} {_name(dtype)}", costs, tower_floor(tower))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _print_costs(setting: str, costs: dict[str, Cost], floor: Cost) -> None:
    for form, cost in (costs | {"floor": Cost(0, floor.bytes)}).items():
        flop = f"{cost.flop / 1e9:.1f}" if cost.flop else "-"
        print(f"{setting:20}{form:24}{flop:>8}{cost.bytes / 1e6:>9.1f}{cost.bytes / floor.bytes:>12.1f}")


if __name__ == "__main__":
    main()
