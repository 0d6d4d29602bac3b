"""Patch info mining as a module with the original's parameters."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.fx import Proxy

from .. import ops
from ..ops.reference import LAYER_NORM_EPS, CalledProjection, Projection
from ..runtime.layer_dtypes import Chain, at_seam, autocasting
from ..runtime.recording import record_call, recorded_as
from ..runtime.weights import why_all_modules_are_hooked, why_not_plain


class PatchInfoMining(nn.Module):
    """Patch info mining with the original's parameters.

    They are `vlm_uni_query_projector.*`, `vlm_uni_aux_projector.*` and `vlm_uni_val_projector.*`, each a LayerNorm (0)
    and a Linear (1), so the original's tensors load with strict=True.

    Args:
        dim: width D of the queries.
        pyramid_dims: channels of the stage maps, finest first.
    """

    def __init__(self, dim: int, pyramid_dims: Sequence[int], *, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.dim = dim
        self.pyramid_dims = tuple(pyramid_dims)

        def projector(width: int) -> Chain:
            return Chain(nn.LayerNorm(width, eps=LAYER_NORM_EPS, **dd), nn.Linear(width, dim, **dd))

        self.vlm_uni_query_projector = projector(dim)
        self.vlm_uni_aux_projector = projector(sum(pyramid_dims))
        self.vlm_uni_val_projector = projector(sum(pyramid_dims))

    def _recorded(
        self, queries: torch.Tensor, pyramid: Sequence[torch.Tensor], grid: int = 1, backend: str | None = None
    ):
        if isinstance(queries, Proxy):
            return record_call(self, queries, pyramid, grid=grid, backend=backend)
        # A trace holds only for the sizes that it was made with. The reference's steps are the same on every device.
        return PatchInfoMining.forward.unrecorded(self, queries, pyramid, grid=grid, backend="reference")

    @recorded_as(_recorded)
    def forward(
        self, queries: torch.Tensor, pyramid: Sequence[torch.Tensor], *, grid: int = 1, backend: str | None = None
    ) -> torch.Tensor:
        """Mined features of the queries' shape; the residual is not added.

        Args:
            queries: [B, N, dim] (grid 1) or [B, V, N, dim]; V = grid * grid cells row by row, or one more, the global
                view last.
            pyramid: list of [B, n_s, n_s, C_s], channels last. The window side n_0 / (grid * sqrt(N)) must be whole.
            grid: cells per side.
            backend: overrides the choice in force. If a projection is more than a plain LayerNorm and Linear (adapters,
                hooks, quantized, parametrized or offloaded layers), or their dtypes differ, every backend calls the
                projections pixel by pixel, as the reference does.
        """
        queries = at_seam(queries, self.vlm_uni_query_projector)
        # Under autocast the projections' inputs are cast anyway.
        dtype = None if autocasting(queries) else queries.dtype
        return ops.patch_mining(queries, pyramid, *self.projections(queries.device, dtype), grid=grid, backend=backend)

    def projections(
        self, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> list[Projection | CalledProjection]:
        """The projections of queries, keys and values: tensors if these say everything, otherwise calls of the modules.

        Args:
            device: the queries' device. A projection on another device is called, because something moves its input
                there during the call.
            dtype: the queries' dtype. All three projections are called if any of their tensors has another one, because
                every layer then casts its input.
        """
        widths = self.dim, sum(self.pyramid_dims), sum(self.pyramid_dims)
        projectors = self.vlm_uni_query_projector, self.vlm_uni_aux_projector, self.vlm_uni_val_projector
        found = [_projection(projector, width, self.dim, device) for projector, width in zip(projectors, widths)]
        if dtype is not None and any(
            t.dtype != dtype for projection in found if isinstance(projection, Projection) for t in projection
        ):
            return [CalledProjection(projector, width, self.dim) for projector, width in zip(projectors, widths)]
        return found

    def __prepare_scriptable__(self):
        # torch.jit.script asks every module what to read in its place.
        raise TypeError(
            "torch.jit.script cannot read PatchInfoMining, whose steps depend on sizes: use torch.jit.trace or "
            "torch.export"
        )

    def extra_repr(self) -> str:
        return f"dim={self.dim}, pyramid_dims={self.pyramid_dims}"


def unsuited_projector(name: str, projector: nn.Module, *, placed: bool = False) -> str | None:
    """Why a projector computes more than its four tensors say, as a sentence; None where it does not.

    Args:
        name: name of the projector in the sentence.
        projector: expected to be a Sequential of LayerNorm and Linear.
        placed: see `why_not_plain`.
    """
    if reason := why_all_modules_are_hooked():
        return reason
    layers = list(projector) if type(projector) in (Chain, nn.Sequential) else [projector]
    # Subclasses compute something else: low-rank adapters, quantized layers, parametrizations.
    if [type(layer) for layer in layers] != [nn.LayerNorm, nn.Linear]:
        found = " and ".join(f"{type(layer).__module__}.{type(layer).__qualname__}" for layer in layers)
        return f"{name} is {found}, expected a Sequential of LayerNorm and Linear"
    for part, reads in ((projector, ()), *((layer, ("weight", "bias")) for layer in layers)):
        if reason := why_not_plain(name, part, reads=reads, placed=placed):
            return reason
    if layers[0].eps != LAYER_NORM_EPS:
        return f"{name} has a LayerNorm eps of {layers[0].eps}, expected {LAYER_NORM_EPS}"
    return None


def _projection(
    projector: nn.Module, takes: int, gives: int, device: torch.device | None
) -> Projection | CalledProjection:
    if unsuited_projector("", projector, placed=True):
        return CalledProjection(projector, takes, gives)
    norm, linear = projector
    tensors = Projection(norm.weight, norm.bias, linear.weight, linear.bias)
    elsewhere = device is not None and any(tensor.device != device for tensor in tensors)
    return CalledProjection(projector, takes, gives) if elsewhere else tensors
