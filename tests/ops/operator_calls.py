"""What the files `tests/ops/*/operator_calls.py` share: calls of registered operators on the meta device, for what they
declare.

Each of those files has `CALLS`, by name of the case the operator, its arguments and how many kernels they launch, and
`COPIED`, by name the operator, arguments that its launcher cannot read in place, and the bytes of what it then
allocates beside its results.
"""

import importlib
from pathlib import Path

import torch


def meta(*shape, dtype=torch.float16):
    return torch.empty(shape, dtype=dtype, device="meta")


def slanted(*shape, dtype=torch.float16):
    """Not contiguous, nor of unit stride along the last dimension."""
    return meta(*shape[::-1], dtype=dtype).permute(*reversed(range(len(shape))))


def of_all_operations(table: str) -> dict[str, tuple]:
    """The cases of all operations, named after their operation's file."""
    return {
        f"{path.parent.name}: {case}": call
        for path in sorted(Path(__file__).parent.glob("*/operator_calls.py"))
        for case, call in getattr(
            importlib.import_module(f"tests.ops.{path.parent.name}.operator_calls"), table
        ).items()
    }
