"""Counting at torch's dispatcher, without a GPU: bytes that operators move, and launches.

    python -m bench.counting

prints the launches of every part of a picture's way to image tokens, of the published models.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .accounting import Cost

ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
# what they change in place they do not read
OVERWRITES = ("copy_", "fill_", "zero_", "normal_", "uniform_")
# they read as many elements of their first input as they write
GATHERS = ("index_select", "index", "gather", "embedding")
# one kernel on a GPU, though torch would take it apart on the meta device
FUSED = ("aten::scaled_dot_product_attention",)
# the key under which operators that are made of others are registered
COMPOSITE = "CompositeImplicitAutograd"


def _pool_windows_launches(queries: torch.Tensor, pyramid: list[torch.Tensor], grid: int) -> int:
    """One for the cells, one for the global view if there is one."""
    return 1 + (queries.shape[1] > grid * grid)


def _one_launch(x: torch.Tensor, weight: torch.Tensor, *_) -> int:
    """One, if there is anything to write."""
    return int(len(x) > 0 and len(weight) > 0)


def _dual_resize_launches(picture: torch.Tensor, hr_size: int, lr_size: int, grid: int, global_view: bool, pad: bool, form: str) -> int:
    """One for the columns, one for the rows of both resolutions."""
    if form != "triton":
        raise ValueError(f"mg_fast::dual_resize declares the launches of its kernels, not those of the {form} backend within it")
    return 2


# what mg_fast's operators launch, of their arguments; not the copies that the launchers make of what they cannot read in place, which the
# library launches where no counter sees them: a published tower's maps and weights, once packed, need none
LAUNCHES: dict[str, Callable[..., int]] = {
    "mg_fast::pool_windows": _pool_windows_launches,
    "mg_fast::pool_windows_backward": lambda grad, queries, pyramid, statistics, grid: _pool_windows_launches(queries, pyramid, grid),
    "mg_fast::dwconv_norm": _one_launch,
    "mg_fast::linear_gelu": _one_launch,
    "mg_fast::linear_residual": _one_launch,
    "mg_fast::linear_residual_": _one_launch,
    "mg_fast::dual_resize": _dual_resize_launches,
}


class CountBytes(TorchDispatchMode):
    """Counts the bytes that operators read and write, by the convention of bench.accounting; of fake tensors and on the meta device too.

    Args:
        device: type of the only device whose tensors count, such as "cuda"; None: all.

    Attributes:
        by_operator: Cost, without FLOP, by the operator's name.
    """

    def __init__(self, device: str | None = None):
        super().__init__()
        self.device = device
        self.by_operator = defaultdict(Cost)

    @property
    def total(self) -> Cost:
        return sum(self.by_operator.values(), Cost())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.by_operator[str(func)] += self._cost(func, args, kwargs, out)
        return out

    def _cost(self, func, args: tuple, kwargs: dict, out) -> Cost:
        name = _name(func)
        inputs, changed, created = _tensors_of(func, args, kwargs, out)
        written = changed + created
        if name in ALLOCATIONS or not written:
            return Cost()
        if name.endswith("_like") or name.startswith("new_"):
            # only the shape and the dtype are taken from them
            inputs = []
        if name in GATHERS and created:
            return Cost(0, self._bytes(created) + self._bytes(inputs[1:]), self._bytes(written))
        return Cost(0, self._bytes(inputs), self._bytes(written))

    def _bytes(self, tensors: list[torch.Tensor]) -> int:
        """Bytes of tensors on the device, what is the same counted once: a tensor given twice, an expanded dimension."""
        on_device = [t for t in tensors if self.device is None or t.device.type == self.device]
        views = {(_storage(t), t.storage_offset(), t.shape, t.stride()): t for t in on_device}
        return sum(t.itemsize * math.prod(size for size, stride in zip(t.shape, t.stride()) if stride or not size) for t in views.values())


class CountLaunches(TorchDispatchMode):
    """Counts launches: ATen operators that write memory, one each, and those that mg_fast's operators declare in LAUNCHES.

    Views and allocations launch nothing. An operator counts once, whatever the library beneath it launches, and what it copies inside
    is not seen. Enter it within torch.inference_mode(): only there an operator of FUSED arrives whole.

    Attributes:
        by_operator: launches by the operator's name.
    """

    def __init__(self):
        super().__init__()
        self.by_operator = Counter()

    @property
    def total(self) -> int:
        return self.by_operator.total()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "prim":
            # fake tensors ask for their device in this way, which the dispatcher does not know
            return func(*args, **kwargs)
        if func._schema.name not in FUSED and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), COMPOSITE):
            # inference mode hands over operators that are made of others
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        out = func(*args, **kwargs)
        if launches := self._launches(func, args, kwargs, out):
            self.by_operator[str(func)] += launches
        return out

    def _launches(self, func, args: tuple, kwargs: dict, out) -> int:
        _, changed, created = _tensors_of(func, args, kwargs, out)
        if not func._schema.name.startswith("mg_fast::"):
            return int(bool(changed or created) and _name(func) not in ALLOCATIONS)
        if func._schema.name not in LAUNCHES:
            raise KeyError(f"{func._schema.name} declares no launches: bench.counting.LAUNCHES has {', '.join(LAUNCHES)}")
        return LAUNCHES[func._schema.name](*args, **kwargs)


def _name(func) -> str:
    return func._schema.name.split("::")[-1]


def _tensors_of(func, args: tuple, kwargs: dict, out) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """What an operator reads, what it changes in place, and what it returns in memory of its own."""
    inputs, changed = [], []
    for i, argument in enumerate(func._schema.arguments):
        tensors = _tensors(args[i] if i < len(args) else kwargs.get(argument.name))
        writes = argument.alias_info is not None and argument.alias_info.is_write
        changed += tensors if writes else []
        # `out=` is only written
        inputs += [] if writes and (argument.kwarg_only or _name(func) in OVERWRITES) else tensors
    storages = {_storage(t) for t in (*inputs, *changed)}
    return inputs, changed, [t for t in _tensors(out) if _storage(t) not in storages]


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


# of the parts of `picture_launches`
SUMS = {
    "by kernels": ("ConvNeXt-L, triton", "mining, triton", "residual, order", "projector"),
}


def picture_launches(*, hd: bool = False, dtype: torch.dtype = torch.bfloat16) -> dict[str, Counter]:
    """Launches of each part of one picture's way to image tokens of a published 7B model, by operator.

    CLIP and timm's modules run on a CPU, at their depths and in a form so narrow and small that no path is taken which only CPUs have: on
    the meta device LayerNorm and attention return other strides than on devices, and copies are counted that nobody makes. Our forms of
    the high-resolution tower run on fake CUDA tensors at their real size, by which they are chunked; a torch that is built without cuDNN
    takes its four convolutions to return other strides, and counts a copy after each.

    "ConvNeXt-L, packing" is layer scale folded and weights transposed: of a call of the module, or once for a packed inference copy.

    Args:
        hd: 1536 pixels with four cells and the global view, else 768.
        dtype: of the weights.
    """
    from timm.models.convnext import ConvNeXt
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from mg_fast import convnext, ops, reference
    from mg_fast.mini_gemini.packed_clip import PackedClip
    from mg_fast.mini_gemini.vision import build_projector, low_resolution_features
    from mg_fast.modules import ConvNeXtPyramid, PatchInfoMining
    from mg_fast.ops import mining as mining_ops
    from mg_fast.reference import Projection

    dims, views, grid, size = (192, 384, 768, 1536), 5 if hd else 1, 2 if hd else 1, 1536 if hd else 768
    vit = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=24, num_attention_heads=2, image_size=28, patch_size=14)
    clip = CLIPVisionModel(CLIPVisionConfig(**vit)).eval().to(dtype)
    packed = PackedClip.from_tower(clip)
    low, high = torch.zeros(views, 3, 28, 28, dtype=dtype), torch.zeros(1, 3, 64, 64, dtype=dtype)
    trunk = ConvNeXt(dims=(8, 16, 24, 32), depths=(3, 3, 27, 3), num_classes=0, global_pool="").eval().to(dtype)
    pyramid_of = ConvNeXtPyramid.from_timm(trunk)
    with torch.device("meta"):
        mining = PatchInfoMining(1024, dims, dtype=dtype)
        projector = build_projector("mlp2x_gelu", 1024, 4096).to(dtype)
        queries = torch.empty(1, views, 576, 1024, dtype=dtype)
        pyramid = [torch.empty(1, size // 4 >> s, size // 4 >> s, c, dtype=dtype) for s, c in enumerate(dims)]
    with FakeTensorMode():
        # of bfloat16 torch asks the GPU, which is not here, whether its convolutions take it: the other 16-bit dtype launches the same
        like = {"dtype": torch.float16 if dtype == torch.bfloat16 else dtype, "device": "cuda"}
        tower, pixels = convnext.empty_tower(dims, (3, 3, 27, 3), **like), torch.empty(1, 3, size, size, **like)
        photo = torch.empty(3000, 4000, 3, dtype=torch.uint8, device="cuda")
    projections = [
        Projection(p[0].weight, p[0].bias, p[1].weight, p[1].bias)
        for p in (mining.vlm_uni_query_projector, mining.vlm_uni_aux_projector, mining.vlm_uni_val_projector)
    ]
    parts = {
        "resize, triton": lambda: ops.dual_resize(photo, size, 336, grid=grid, global_view=hd, backend="triton"),
        "CLIP, 24 layers": lambda: low_resolution_features(clip, low, backend="reference"),
        "CLIP, 23 layers": lambda: low_resolution_features(clip, low, backend="torch"),
        "CLIP, packed": lambda: packed(low),
        "ConvNeXt-L, packing": pyramid_of.read,
        "ConvNeXt-L, timm": lambda: pyramid_of(high, backend="reference"),
        "ConvNeXt-L, torch": lambda: convnext.run_tower(*tower, pixels, "torch"),
        "ConvNeXt-L, auto": lambda: convnext.run_tower(*tower, pixels, "auto"),
        "ConvNeXt-L, triton": lambda: convnext.run_tower(*tower, pixels, "triton"),
        "mining, reference": lambda: mining(queries, pyramid, grid=grid, backend="reference"),
        "mining, torch": lambda: mining(queries, pyramid, grid=grid, backend="torch"),
        # past the choice of a backend: the meta device is none that Triton runs on
        "mining, triton": lambda: mining_ops._mine_by_kernel(queries, pyramid, *projections, grid=grid),
        "residual, order": lambda: reference.order_tokens(queries + queries, grid=grid),
        "projector": lambda: projector(queries),
    }
    launches = {}
    for name, call in parts.items():
        with torch.inference_mode():
            # tables are made once, in the first call
            call()
            with CountLaunches() as counter:
                call()
        launches[name] = counter.by_operator
    return launches


def main() -> None:
    standard, hd = picture_launches(), picture_launches(hd=True)
    print(f"{'part':20}{'768':>8}{'1536 HD':>10}")
    for name in standard:
        print(f"{name:20}{standard[name].total():>8}{hd[name].total():>10}")
    for name, parts in SUMS.items():
        print(f"{name:20}" + "".join(f"{sum(of[part].total() for part in parts):>{width}}" for of, width in ((standard, 8), (hd, 10))))


if __name__ == "__main__":
    main()
