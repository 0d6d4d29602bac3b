"""The record of an operation: what the rest of the project needs to know of it, said once, beside the operation itself.

Every file of operations registers its records when it is imported. The backend choice, `mg-fast doctor`, the launch
counter and the benchmark read them here, so that a new operation is seen by all of these without a change to any of
them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


def _accept(*arguments) -> None:
    """Refuses nothing."""


def product_flop(rows: int, terms: int, columns: int) -> int:
    """FLOP of a matrix product [rows, terms] x [terms, columns]: a multiplication and an addition for every term."""
    return 2 * rows * terms * columns


@dataclass(frozen=True, kw_only=True)
class Operator:
    """What a registered operator of torch makes a GPU do. Every field but the name is a function of the operator's own
    arguments.

    Attributes:
        name: as it is registered, such as `mg_fast::dwconv_norm`.
        launches: how many kernels it launches. The copies that a launcher makes of what it cannot read in place are not
            counted: a published tower's maps and its packed weights need none.
        workspaces: bytes of each block of memory that it allocates beside what it returns, the launchers' copies
            included.
        flop: floating-point operations of its products and convolutions; None where it computes none.
        reads_again: the tensors that a launch after the first reads once more; None where every tensor is read once.
    """

    name: str
    launches: Callable[..., int]
    workspaces: Callable[..., list[int]]
    flop: Callable[..., int] | None = None
    reads_again: Callable[..., list[torch.Tensor]] | None = None


@dataclass(frozen=True, kw_only=True)
class Operation:
    """Everything that is said of an operation.

    Attributes:
        name: the name that it has in every place: its function, its tests, its group in the benchmark.
        check: raises ValueError for arguments that do not fit, whatever the backend; the message names expected and
            actual.
        why_not: the sentence that says why the kernels do not take arguments that fit, None where they do.
        forms: what computes it, by backend. There is always a `reference`.
        auto: the backends of `forms` in the order in which `auto` prefers them: the first that can run is taken.
        operators: the operators of torch that its kernels are registered as; none for a choice that has no kernels of
            its own.
    """

    name: str
    check: Callable[..., None] = _accept
    why_not: Callable[..., str | None] = _accept
    forms: Mapping[str, Callable]
    auto: tuple[str, ...]
    operators: tuple[Operator, ...] = ()

    def __post_init__(self):
        if "reference" not in self.forms:
            raise ValueError(f"{self.name}: there is no reference form, only {', '.join(self.forms) or 'none'}")
        if sorted(self.auto) != sorted(self.forms):
            raise ValueError(
                f"{self.name}: auto must name every form once, got {', '.join(self.auto)} for {', '.join(self.forms)}"
            )


# By name, in the order in which they were imported. `import mg_fast.ops` registers the operations; the two towers,
# which choose a backend and have no kernels of their own, are registered by the modules that they live in.
OPERATIONS: dict[str, Operation] = {}


def register(operation: Operation) -> Operation:
    """Adds a record to OPERATIONS and returns it.

    Raises:
        ValueError: there is one of that name.
    """
    if operation.name in OPERATIONS:
        raise ValueError(f"there is an operation called {operation.name} already")
    OPERATIONS[operation.name] = operation
    return operation


def operators() -> dict[str, Operator]:
    """The operators of all operations, by the name that they are registered under."""
    return {operator.name: operator for operation in OPERATIONS.values() for operator in operation.operators}
