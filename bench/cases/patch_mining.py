"""Patch info mining."""

import copy
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mg_fast import ops
from mg_fast.kernels import configs
from mg_fast.modules import PatchInfoMining
from mg_fast.ops import reference
from mg_fast.ops.pooled_windows import pool_windows
from mg_fast.ops.torch import patch_mining as torch_form
from mg_fast.ops.torch.pointwise import linear

from ..costs.mining import MINING, Sizes, mining_floor
from ..registry import Call, Case, NotHere, Provider, dtype_name
from .operations import MOST_REGISTERS, POWERS, Launch, Tunable, forms
from .settings import COMBINATIONS, SETTINGS, compiled, devices_of, within


@dataclass
class MiningInputs:
    device: str
    mining: PatchInfoMining
    queries: torch.Tensor
    pyramid: list[torch.Tensor]
    grid: int

    @property
    def projections(self) -> list[reference.Projection]:
        """The projections of queries, keys and values, in this order."""
        mining = self.mining
        modules = mining.vlm_uni_query_projector, mining.vlm_uni_aux_projector, mining.vlm_uni_val_projector
        return [reference.Projection(p[0].weight, p[0].bias, p[1].weight, p[1].bias) for p in modules]


def cases() -> list[Case]:
    found = []
    for setting, batch, dtype in COMBINATIONS:
        name, quick = f"patch_mining/{setting.name}-b{batch}-{dtype}", (batch, dtype, setting.grid) == (1, "float32", 1)
        sizes = Sizes.of_picture(setting.side, getattr(torch, dtype), batch)
        found.append(mining_case(name, sizes, devices=devices_of(setting, batch, dtype), quick=quick))
    return found


def mining_case(name: str, sizes: Sizes, **options) -> Case:
    """One call of mining of these sizes."""
    own, work = forms("patch_mining", _call), {form: cost(sizes) for form, cost in MINING.items()}
    providers = {
        "reference": Provider(own["reference"], work["reference"]),
        "reference, SDPA": _with_sdpa,
        # The operator's plain form, because only one fused form takes heads as wide.
        "reference, SDPA math": partial(within, partial(sdpa_kernel, SDPBackend.MATH), _with_sdpa),
        "reference, oneDNN": _by_one_dnn,
        **compiled(own["reference"], "reference"),
        "torch": Provider(own["torch"], work["torch"]),
        **compiled(own["torch"], "torch"),
        "triton": Provider(own["triton"], work["triton"]),
        # The kernel that `auto` does not take for 16-bit maps on compute capability 9.0; elsewhere it is the same as
        # "triton".
        "triton, window pixels": partial(_by_kernel, "fine"),
    }
    return Case(
        name,
        lambda device: _make(sizes, device),
        providers,
        _exact,
        least=mining_floor(sizes),
        capturable=sizes.batch == 1,
        stage="patch info mining",
        **options,
    )


def _make(sizes: Sizes, device: str) -> MiningInputs:
    torch.manual_seed(0)
    like = {"dtype": sizes.dtype, "device": device}
    mining = PatchInfoMining(sizes.dim, [c for _, c in sizes.levels], **like)
    queries = torch.randn(sizes.batch, sizes.views, sizes.side**2, sizes.dim, **like)
    return MiningInputs(device, mining, queries, _random_pyramid(sizes, device), sizes.grid)


def _random_pyramid(sizes: Sizes, device: str) -> list[torch.Tensor]:
    return [torch.randn(sizes.batch, n, n, c, dtype=sizes.dtype, device=device) for n, c in sizes.levels]


def _exact(inputs: MiningInputs) -> torch.Tensor:
    """The original's steps in float64, picture by picture: several at once would not fit."""
    mining = copy.deepcopy(inputs.mining).double()
    pictures = []
    for i in range(len(inputs.queries)):
        pyramid = [level[i : i + 1].double() for level in inputs.pyramid]
        pictures.append(mining(inputs.queries[i : i + 1].double(), pyramid, grid=inputs.grid, backend="reference"))
    return torch.cat(pictures)


def _call(inputs: MiningInputs, backend: str) -> Call:
    return lambda: inputs.mining(inputs.queries, inputs.pyramid, grid=inputs.grid, backend=backend)


def _by_kernel(kernel: str, inputs: MiningInputs) -> Call:
    """The `triton` form by one of its two kernels."""
    forms("patch_mining", _call)["triton"](inputs)
    options = {"grid": inputs.grid, "backend": "triton", "kernel": kernel}
    return lambda: ops.patch_mining(inputs.queries, inputs.pyramid, *inputs.projections, **options)


def _with_sdpa(inputs: MiningInputs) -> Call:
    """The original's steps, with torch's fused operator for the attention."""
    options = {"grid": inputs.grid, "attend": _attend_by_sdpa}
    return lambda: reference.patch_mining(inputs.queries, inputs.pyramid, *inputs.projections, **options)


def _attend_by_sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(query[:, :, None], key, value)[:, :, 0]


class _OneDnnProjection(reference.Projection):
    """A projection by oneDNN's convolution where that is faster: the strongest plain form on a CPU."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = F.layer_norm(x, self.norm_weight.shape, self.norm_weight, self.norm_bias, reference.LAYER_NORM_EPS)
        return linear(x, self.weight, self.bias)


def _by_one_dnn(inputs: MiningInputs) -> Call:
    if inputs.device != "cpu":
        raise NotHere("it runs on CPUs only")
    projections = [_OneDnnProjection(*projection) for projection in inputs.projections]
    return lambda: reference.patch_mining(inputs.queries, inputs.pyramid, *projections, grid=inputs.grid)


def launches() -> dict[str, Launch]:
    coarse = {"kernel": "coarse", "dtypes": (torch.bfloat16,)}
    return {
        "patch_mining": _launch(1),
        "patch_mining in HD": _launch(2),
        "patch_mining on coarse pixels": _launch(1, **coarse),
        "patch_mining on coarse pixels in HD": _launch(2, **coarse),
    }


def _launch(
    grid: int, kernel: str = "fine", dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
) -> Launch:
    """A pooling kernel, forward and backward to the queries; with a grid of 2 also for the global view."""

    def make(dtype: torch.dtype) -> tuple[PatchInfoMining, torch.Tensor, list[torch.Tensor]]:
        # The windows have 4 x 4 pixels of the first map.
        queries = torch.randn(1, 1 if grid == 1 else 5, 1, 32).to(dtype)
        pyramid = [torch.randn(1, n * grid, n * grid, c).to(dtype) for n, c in ((4, 16), (2, 32))]
        return PatchInfoMining(32, (16, 32)).to(dtype), queries, pyramid

    def run(inputs: tuple, backend: str) -> list[torch.Tensor]:
        mining, queries, pyramid = inputs
        queries = queries.detach().requires_grad_()
        mined = ops.patch_mining(queries, pyramid, *mining.projections(), grid=grid, backend=backend, kernel=kernel)
        mined.backward(torch.ones_like(mined))
        return [mined.detach(), queries.grad]

    return Launch(make, run, dtypes=dtypes)


def tunable() -> Tunable:
    """What can be tuned of the forward pass; the backward pass takes the same tiles."""
    space = {"channels": POWERS[3:8], "warps": POWERS[1:5], "stages": (1, 2, 3, 4), "registers": (128, 168, 255)}
    return Tunable(space, _fits, _problems)


def _problems() -> list[tuple[object, Case]]:
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        for setting in SETTINGS:
            sizes = Sizes.of_picture(setting.side, dtype)
            bucket = configs.patch_mining_bucket(dtype.itemsize, sizes.window, [c for _, c in sizes.levels])
            # The global view of HD takes a separate launch, with its own tile if the table has one.
            keys = [bucket, (*bucket, "reduced")] if sizes.grid > 1 else [bucket]
            name = f"patch_mining/{setting.name}-b1-{dtype_name(dtype)}"
            found += [(key, _pooling_case(name, sizes)) for key in keys]
    return found


def _pooling_case(name: str, sizes: Sizes) -> Case:
    """The kernel alone, without the projections around it."""

    def make(device: str) -> tuple[torch.Tensor, list[torch.Tensor], int]:
        torch.manual_seed(0)
        # Scaled like this the scores are as large as those of trained weights: the softmax is neither flat nor a single
        # pixel.
        shape = (sizes.batch, sizes.views, sizes.side**2, sizes.channels)
        queries = torch.randn(shape, dtype=sizes.dtype, device=device) * sizes.channels**-0.5
        return queries, _random_pyramid(sizes, device), sizes.grid

    def exact(inputs: tuple) -> torch.Tensor:
        queries, pyramid, grid = inputs
        return torch_form.pool_windows(queries.double(), [level.double() for level in pyramid], grid)

    providers = {
        "torch": lambda inputs: lambda: torch_form.pool_windows(*inputs).to(sizes.dtype),
        # The tiles are those of this kernel.
        "triton": lambda inputs: lambda: pool_windows(*inputs, "fine")[0],
    }
    return Case(name, make, providers, exact, baseline="torch")


def _fits(key: tuple, tile: configs.Tile, shared: int) -> bool:
    # A program holds a chunk of channels in float32 for the pixels of a window, or for the coarse pixels under it.
    registers = key[1] * tile.channels // (32 * tile.warps)
    return 1 <= registers <= MOST_REGISTERS and key[1] * tile.channels * key[0] * tile.stages <= shared
