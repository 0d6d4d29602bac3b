"""Patch info mining with its parameters."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.fx import Proxy

from .. import ops
from ..recording import record_call, recorded_as
from ..reference import LAYER_NORM_EPS, Projection


class PatchInfoMining(nn.Module):
    """Patch info mining with the original's parameters.

    Parameters are `vlm_uni_query_projector.*`, `vlm_uni_aux_projector.*` and `vlm_uni_val_projector.*`, each a LayerNorm (0) and a
    Linear (1), so the original's tensors load with strict=True.

    Args:
        dim: width D of the queries.
        pyramid_dims: channels of the stage maps, finest first.
    """

    def __init__(self, dim: int, pyramid_dims: Sequence[int], *, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.dim = dim
        self.pyramid_dims = tuple(pyramid_dims)

        def projector(width: int) -> nn.Sequential:
            return nn.Sequential(nn.LayerNorm(width, eps=LAYER_NORM_EPS, **dd), nn.Linear(width, dim, **dd))

        self.vlm_uni_query_projector = projector(dim)
        self.vlm_uni_aux_projector = projector(sum(pyramid_dims))
        self.vlm_uni_val_projector = projector(sum(pyramid_dims))

    def _recorded(self, queries: torch.Tensor, pyramid: Sequence[torch.Tensor], grid: int = 1, backend: str | None = None):
        if isinstance(queries, Proxy):
            return record_call(self, queries, pyramid, grid=grid, backend=backend)
        # A trace holds for the sizes that it was made with; the reference's steps are the same on every device.
        return PatchInfoMining.forward.unrecorded(self, queries, pyramid, grid=grid, backend="reference")

    @recorded_as(_recorded)
    def forward(self, queries: torch.Tensor, pyramid: Sequence[torch.Tensor], *, grid: int = 1, backend: str | None = None) -> torch.Tensor:
        """Mined features of the queries' shape, residual not added.

        Args:
            queries: [B, N, dim] (grid 1) or [B, V, N, dim]; V = grid * grid cells row by row, or one more, the global view last.
            pyramid: list of [B, n_s, n_s, C_s], channels last. The window side n_0 / (grid * sqrt(N)) must be whole.
            grid: cells per side.
            backend: overrides the choice in force.
        """
        return ops.patch_mining(queries, pyramid, *self.projections(), grid=grid, backend=backend)

    def projections(self) -> list[Projection]:
        """Of queries, keys and values."""
        return [
            Projection(p[0].weight, p[0].bias, p[1].weight, p[1].bias)
            for p in (self.vlm_uni_query_projector, self.vlm_uni_aux_projector, self.vlm_uni_val_projector)
        ]

    def __prepare_scriptable__(self):
        # torch.jit.script asks every module for what it is to read in its place.
        raise TypeError("torch.jit.script cannot read PatchInfoMining, whose steps depend on sizes: use torch.jit.trace or torch.export")

    def extra_repr(self) -> str:
        return f"dim={self.dim}, pyramid_dims={self.pyramid_dims}"
