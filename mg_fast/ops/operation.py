"""The record of an operation: what the rest of the project needs to know about it, kept beside the operation.

Every file of operations registers its records when it is imported. The backend choice, `mg-fast doctor`, the launch
counter and the benchmark read the records here, so none of them has to change when an operation is added.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


def _accept(*arguments) -> None:
    """Accepts any arguments."""


def product_flop(rows: int, terms: int, columns: int) -> int:
    """FLOP of a matrix product [rows, terms] x [terms, columns]: a multiplication and an addition for every term."""
    return 2 * rows * terms * columns


@dataclass(frozen=True, kw_only=True)
class Operator:
    """What one registered operator of torch makes a GPU do.

    Every field but the name is a function that takes the operator's own arguments.

    Attributes:
        name: the registered name, such as `mg_fast::dwconv_norm`.
        launches: how many kernels the operator launches. Copies of inputs that a launcher cannot read in place are not
            counted; the maps and packed weights of a published tower need none.
        workspaces: bytes of each block of memory that it allocates in addition to its results, including the
            launchers' copies.
        flop: floating-point operations of its products and convolutions; None if it has none.
        reads_again: the tensors that later launches read once more, each named once for every such launch; None if
            every tensor is read once.
    """

    name: str
    launches: Callable[..., int]
    workspaces: Callable[..., list[int]]
    flop: Callable[..., int] | None = None
    reads_again: Callable[..., list[torch.Tensor]] | None = None


@dataclass(frozen=True, kw_only=True)
class Operation:
    """Everything that the project knows about an operation.

    Attributes:
        name: the operation's name everywhere: its function, its tests, its group in the benchmark.
        check: raises ValueError, on every backend, for arguments that do not fit; the message names what was expected
            and what came.
        why_not: a sentence that says why the kernels do not take arguments that fit; None where they do.
        forms: the implementations, by backend. There is always a `reference`.
        auto: the backends of `forms` in the order in which `auto` prefers them; it takes the first that can run.
        operators: the operators of torch that its kernels are registered as; empty for an operation that only chooses
            a backend and has no kernels of its own.
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


# The operations by name, in the order in which they were registered. `import mg_fast.ops` registers all but the two
# towers. These choose a backend and have no kernels of their own; the modules that define them register them.
OPERATIONS: dict[str, Operation] = {}


def register(operation: Operation) -> Operation:
    """Adds a record to OPERATIONS and returns it.

    Raises:
        ValueError: an operation of that name exists already.
    """
    if operation.name in OPERATIONS:
        raise ValueError(f"there is an operation called {operation.name} already")
    OPERATIONS[operation.name] = operation
    return operation


def operators() -> dict[str, Operator]:
    """The operators of all operations, by their registered names."""
    return {operator.name: operator for operation in OPERATIONS.values() for operator in operation.operators}
