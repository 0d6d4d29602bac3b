"""Shared parts of the files `tests/ops/*/operator_calls.py`: calls of registered operators on the meta device.

They check what the operators declare. Each of those files has two tables of cases by name. `CALLS` holds the operator,
its arguments, and how many kernels they launch. `COPIED` holds the operator, arguments that its launcher cannot read in
place, and the bytes that it then allocates in addition to its results.
"""

import importlib
from pathlib import Path

import torch


def meta(*shape, dtype=torch.float16):
    return torch.empty(shape, dtype=dtype, device="meta")


def slanted(*shape, dtype=torch.float16):
    """A tensor that is not contiguous and whose last dimension does not have unit stride."""
    return meta(*shape[::-1], dtype=dtype).permute(*reversed(range(len(shape))))


def of_all_operations(table: str) -> dict[str, tuple]:
    """The cases of all operations, with the name of the operation's file in front."""
    return {
        f"{path.parent.name}: {case}": call
        for path in sorted(Path(__file__).parent.glob("*/operator_calls.py"))
        for case, call in getattr(
            importlib.import_module(f"tests.ops.{path.parent.name}.operator_calls"), table
        ).items()
    }
