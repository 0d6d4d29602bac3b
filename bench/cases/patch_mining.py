"""Patch info mining."""

import copy
import unittest.mock
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mg_fast.modules import PatchInfoMining
from mg_fast.ops import reference
from mg_fast.ops.torch.pointwise import linear

from .. import accounting
from ..registry import Call, Case, Cost, NotHere
from .operations import Launch, forms
from .settings import COMBINATIONS, compiled, devices_of, own_graphs


@dataclass
class MiningInputs:
    device: str
    mining: PatchInfoMining
    queries: torch.Tensor
    pyramid: list[torch.Tensor]
    grid: int

    @property
    def projections(self) -> list[reference.Projection]:
        modules = (
            self.mining.vlm_uni_query_projector,
            self.mining.vlm_uni_aux_projector,
            self.mining.vlm_uni_val_projector,
        )
        return [reference.Projection(p[0].weight, p[0].bias, p[1].weight, p[1].bias) for p in modules]


def cases() -> list[Case]:
    found = []
    for setting, batch, dtype in COMBINATIONS:
        hd = setting.grid > 1
        sizes = (accounting.Sizes.hd if hd else accounting.Sizes.standard)(getattr(torch, dtype), batch)
        found.append(
            mining_case(
                f"patch_mining/{setting.name}-b{batch}-{dtype}",
                sizes,
                devices=devices_of(setting, batch, dtype),
                quick=(batch, dtype, hd) == (1, "float32", False),
            )
        )
    return found


def mining_case(name: str, sizes: accounting.Sizes, **options) -> Case:
    """One call of mining of these sizes."""
    work = {"reference": accounting.reference_mining(sizes), "torch": accounting.torch_mining(sizes)}
    work |= {"triton": accounting.triton_mining(sizes)}
    least = Cost(min(cost.flop for cost in work.values()), accounting.floor_bytes(sizes))
    own = forms("patch_mining", _call)
    providers = {
        "reference": own["reference"],
        "reference, SDPA": _with_sdpa,
        "reference, SDPA math": _with_sdpa_math,
        "reference, oneDNN": _by_one_dnn,
        **compiled(own["reference"], "reference"),
        "torch": own["torch"],
        **compiled(own["torch"], "torch"),
        "triton": own["triton"],
    }
    options |= {"capturable": sizes.batch == 1, "own_graphs": own_graphs(providers)}
    return Case(name, lambda device: _make(sizes, device), providers, _exact, least=least, work=work, **options)


def _make(sizes: accounting.Sizes, device: str) -> MiningInputs:
    torch.manual_seed(0)
    like = {"dtype": sizes.dtype, "device": device}
    mining = PatchInfoMining(sizes.dim, [c for _, c in sizes.levels], **like)
    queries = torch.randn(sizes.batch, sizes.views, sizes.side**2, sizes.dim, **like)
    pyramid = [torch.randn(sizes.batch, n, n, c, **like) for n, c in sizes.levels]
    return MiningInputs(device, mining, queries, pyramid, sizes.grid)


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


def _with_sdpa(inputs: MiningInputs) -> Call:
    """The original's steps, its attention by torch's fused operator."""

    def call() -> torch.Tensor:
        with unittest.mock.patch.object(reference, "mine", _mine_by_sdpa):
            return reference.patch_mining(inputs.queries, inputs.pyramid, *inputs.projections, grid=inputs.grid)

    return call


def _with_sdpa_math(inputs: MiningInputs) -> Call:
    """The same by its plain form. Of the fused ones no other than the memory-efficient takes heads as wide."""
    call = _with_sdpa(inputs)

    def plain() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return call()

    return plain


def _mine_by_sdpa(queries, hr_map, query, key, value) -> torch.Tensor:
    patches = int(queries.shape[1] ** 0.5)
    side = hr_map.shape[-1] // patches
    windows = hr_map.permute(0, 2, 3, 1).unflatten(2, (patches, side)).unflatten(1, (patches, side)).transpose(2, 3)
    windows = windows.reshape(len(queries), patches**2, side**2, hr_map.shape[1])
    return F.scaled_dot_product_attention(query(queries)[:, :, None], key(windows), value(windows))[:, :, 0]


class _OneDnnProjection(reference.Projection):
    """The same by oneDNN's convolution where that is faster: the strongest plain form on a CPU."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return linear(
            F.layer_norm(x, self.norm_weight.shape, self.norm_weight, self.norm_bias, reference.LAYER_NORM_EPS),
            self.weight,
            self.bias,
        )


def _by_one_dnn(inputs: MiningInputs) -> Call:
    if inputs.device != "cpu":
        raise NotHere("for CPUs")
    projections = [_OneDnnProjection(*projection) for projection in inputs.projections]
    return lambda: reference.patch_mining(inputs.queries, inputs.pyramid, *projections, grid=inputs.grid)


def launches() -> dict[str, Launch]:
    return {"patch_mining": _launch(1), "patch_mining in HD": _launch(2)}


def _launch(grid: int) -> Launch:
    """The pooling kernel, forward and backward to the queries; with a grid of 2 its global view, too."""

    def make(dtype: torch.dtype) -> tuple[PatchInfoMining, torch.Tensor, list[torch.Tensor]]:
        # windows of 4 x 4 pixels of the first map
        queries = torch.randn(1, 1 if grid == 1 else 5, 1, 32).to(dtype)
        pyramid = [torch.randn(1, n * grid, n * grid, c).to(dtype) for n, c in ((4, 16), (2, 32))]
        return PatchInfoMining(32, (16, 32)).to(dtype), queries, pyramid

    def run(inputs: tuple, backend: str) -> list[torch.Tensor]:
        mining, queries, pyramid = inputs
        queries = queries.detach().requires_grad_()
        mined = mining(queries, pyramid, grid=grid, backend=backend)
        mined.backward(torch.ones_like(mined))
        return [mined.detach(), queries.grad]

    return Launch(make, run)
