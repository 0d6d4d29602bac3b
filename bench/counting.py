"""Counting at torch's dispatcher, with or without a GPU: bytes moved, FLOP, launches, and live memory.

    with FakeTensorMode(), torch.inference_mode(), Count("cuda") as count:
        model(pixels)
    count.peak, count.total, count.launches

counts fake tensors on a GPU that need not be there. Formulas by sizes are in bench.costs, the counted models in
bench.memory.
"""

import functools
import math
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mg_fast.ops.operation import Operator, operators, product_flop

from .costs.operators import attention_flop
from .registry import Cost

ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
# Operators that change a tensor in place without reading it.
OVERWRITES = ("copy_", "fill_", "zero_", "normal_", "uniform_")
# Operators that read as many elements of their first input as they write.
GATHERS = ("index_select", "index", "gather", "embedding")
# Operators that change only as many elements of their first input as their last input has, and read none of them.
SCATTERS = ("index_copy_",)
# Operators that are one kernel on a GPU, though torch takes them apart on the meta device.
FUSED = ("aten::scaled_dot_product_attention",)
# The key under which operators that are made of others are registered.
COMPOSITE = "CompositeImplicitAutograd"
# Bytes; the blocks of CUDA's caching allocator are multiples of it. The allocator may give more, up to 1 MiB of a large
# block that it does not split. That depends on what was allocated before, and is not counted.
BLOCK = 512


def _attention_flop(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_, **__) -> int:
    """All pairs, masked or not, as torch counts them."""
    return attention_flop(query[..., 0].numel() * key.shape[-2], query.shape[-1], value.shape[-1])


def _grouped_flop(rows: torch.Tensor, weights: torch.Tensor, *rest, **options) -> int:
    # Each row meets the weights of one expert. For the gradient of the weights, [K, M] by [M, N], M are the rows.
    return product_flop(rows.shape[-2], rows.shape[-1], weights.shape[-1])


# FLOP of operators of torch for which torch has no formula.
FLOP: dict[str, Callable[..., int]] = {
    "aten::scaled_dot_product_attention": _attention_flop,
    "aten::_grouped_mm": _grouped_flop,
}
# The namespace of our operators, which declare what they do in the records of their operations.
OURS = "mg_fast::"


class CountedCall(NamedTuple):
    """One call of an operator that launches something.

    Attributes:
        name: of the operator, such as `aten::addmm`.
        launches: how many kernels the call launches.
        cost: its FLOP and bytes.
        inputs: the shapes of the tensors that it is given, in order.
        outputs: the shapes of its results.
    """

    name: str
    launches: int
    cost: Cost
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]


class Count(TorchDispatchMode):
    """Counts what operators do with real tensors, with fake ones, and on the meta device.

    Bytes and FLOP follow the convention of bench.costs. An ATen operator that writes memory counts as one launch,
    whatever its library launches; operators of mg_fast declare their launches in the records of their operations
    (`mg_fast.ops.operation.Operator`); views and allocations launch nothing. Enter it within torch.inference_mode():
    only there an operator of FUSED arrives whole.

    Memory is what was allocated since the block was entered and is not free again, by storage: results, and the
    workspaces that operators of mg_fast declare; on a GPU each in blocks of the caching allocator. What libraries
    allocate for themselves is not seen.

    Args:
        device: type of the only device whose tensors count, such as "cuda"; None: all.

    Attributes:
        costs: Cost by the operator's name.
        launches: number by the operator's name.
        calls: every call that launches something, in order.
        live: bytes that are allocated.
        peak: the most bytes that have been allocated at once.
    """

    def __init__(self, device: str | None = None):
        super().__init__()
        self.device = device
        self.costs = defaultdict(Cost)
        self.launches = Counter()
        self.calls: list[CountedCall] = []
        self.live = self.peak = 0
        self._storages: dict[int, int] = {}

    @property
    def total(self) -> Cost:
        return sum(self.costs.values(), Cost())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "prim":
            # Fake tensors ask for their device in this way, which the dispatcher does not know.
            return func(*args, **kwargs)
        name = func._schema.name
        if name not in FUSED and _is_composite(func):
            # Inference mode hands over operators that are made of others.
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        out, workspaces = _as_on_a_gpu(func, args, kwargs)
        inputs, changed, created = _tensors_of(func, args, kwargs, out)
        if not (changed or created) or not self._on_device(inputs + changed + created):
            # The tensor is a view, or lies on another device.
            return out
        declared = operators().get(name) if name.startswith(OURS) else None
        cost = self._cost(func, inputs, changed, created)
        if cost is not None:
            again = declared.reads_again(*args, **kwargs) if declared and declared.reads_again else []
            flop = _flop(func, declared, args, kwargs, out)
            cost += Cost(flop, sum(_distinct_bytes([t]) for t in self._on_device(again)))
            self.costs[str(func)] += cost
        if launches := self._launches(func, declared, args, kwargs):
            self.launches[str(func)] += launches
            shapes = (tuple(tuple(t.shape) for t in _tensors(tree)) for tree in ((args, kwargs), out))
            self.calls.append(CountedCall(name, launches, cost or Cost(), *shapes))
        if declared:
            workspaces = declared.workspaces(*args, **kwargs)
        self.allocate(self._on_device(created), workspaces)
        return out

    def _on_device(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [t for t in tensors if self.device is None or t.device.type == self.device]

    def _cost(
        self, func, inputs: list[torch.Tensor], changed: list[torch.Tensor], created: list[torch.Tensor]
    ) -> Cost | None:
        name = _name(func)
        if name in ALLOCATIONS:
            return None
        if name.endswith("_like") or name.startswith("new_"):
            # Such an operator takes only the shape and the dtype of its inputs.
            inputs = []
        inputs, created = self._on_device(inputs), self._on_device(created)
        read = _distinct_bytes(inputs)
        if name in GATHERS and created:
            read = _distinct_bytes(created) + _distinct_bytes(inputs[1:])
        if name in SCATTERS and inputs:
            return Cost(0, _distinct_bytes(inputs[1:]), inputs[-1].nbytes)
        return Cost(0, read, _distinct_bytes(self._on_device(changed) + created))

    def _launches(self, func, declared: Operator | None, args: tuple, kwargs: dict) -> int:
        name = func._schema.name
        if not name.startswith(OURS):
            return int(_name(func) not in ALLOCATIONS)
        if declared is None:
            raise KeyError(f"{name} declares no launches: the records of mg_fast.ops have {', '.join(operators())}")
        return declared.launches(*args, **kwargs)

    def allocate(self, created: list[torch.Tensor], workspaces: Sequence[int] = ()) -> None:
        """Counts the memory of tensors until it is freed, and that of workspaces, in bytes, for the moment."""
        for tensor in created:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._storages:
                self._storages[key] = self._blocks(storage.nbytes(), tensor.device.type)
                self.live += self._storages[key]
                weakref.finalize(storage, self._free, key).atexit = False
        device = created[0].device.type if created else self.device
        self.peak = max(self.peak, self.live + sum(self._blocks(size, device) for size in workspaces))

    def _free(self, key: int) -> None:
        self.live -= self._storages.pop(key)

    @staticmethod
    def _blocks(size: int, device: str | None) -> int:
        return -(-size // BLOCK) * BLOCK if device == "cuda" else size


@functools.cache
def _is_composite(func) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), COMPOSITE)


def _as_on_a_gpu(func, args: tuple, kwargs: dict) -> tuple[object, list[int]]:
    """What an operator returns on a GPU, and the bytes of each block that it allocates beside.

    Fake tensors on a GPU that is not here differ from that in a few operators.
    """
    first, name = args[0] if args else None, func._schema.name
    if name == "aten::_to_copy" and isinstance(first, FakeTensor) and first.constant is not None:
        # torch.tensor(1.0, device="cuda") would make a tensor on a real GPU.
        return func(torch.empty_like(first), **kwargs), []
    if not (isinstance(first, FakeTensor) and first.device.type == "cuda"):
        return func(*args, **kwargs), []
    if name == "aten::convolution" and first.dtype == torch.bfloat16:
        # torch asks the GPU, which is not here, whether its convolutions take bfloat16. The other 16-bit dtype does the
        # same work.
        narrow = (a.to(torch.float16) if isinstance(a, torch.Tensor) else a for a in args)
        return func(*narrow, **kwargs).to(torch.bfloat16), []
    if name == "aten::native_layer_norm" and not first.is_contiguous():
        # The norm copies its input, and returns a contiguous result.
        return func(first.contiguous(), *args[1:], **kwargs), [first.nbytes]
    if name == "aten::scaled_dot_product_attention":
        # Flash attention has its result as [B, N, heads, d] in memory, and allocates a logarithm for each row.
        value = args[2]
        out = first.new_empty(len(first), first.shape[2], first.shape[1], value.shape[-1]).transpose(1, 2)
        return out, [4 * first[..., 0].numel()]
    return func(*args, **kwargs), []


def _flop(func, declared: Operator | None, args: tuple, kwargs: dict, out) -> int:
    if formula := declared.flop if declared else FLOP.get(func._schema.name):
        return formula(*args, **kwargs)
    formula = flop_registry.get(func._overloadpacket)
    return formula(*args, **kwargs, out_val=out) if formula else 0


def _distinct_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of tensors. A tensor that is given twice counts once, and so does an expanded dimension."""
    views = {(_storage(t), t.storage_offset(), t.shape, t.stride()): t for t in tensors}
    return sum(
        t.itemsize * math.prod(size for size, stride in zip(t.shape, t.stride()) if stride or not size)
        for t in views.values()
    )


def _name(func) -> str:
    return func._schema.name.split("::")[-1]


def _tensors_of(
    func, args: tuple, kwargs: dict, out
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """The tensors that an operator reads, those that it changes in place, and its results in memory of their own."""
    inputs, changed = [], []
    for i, argument in enumerate(func._schema.arguments):
        tensors = _tensors(args[i] if i < len(args) else kwargs.get(argument.name))
        writes = argument.alias_info is not None and argument.alias_info.is_write
        changed += tensors if writes else []
        # An argument of `out=` is only written.
        inputs += [] if writes and (argument.kwarg_only or _name(func) in OVERWRITES) else tensors
    storages = {_storage(t) for t in (*inputs, *changed)}
    return inputs, changed, [t for t in _tensors(out) if _storage(t) not in storages]


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
