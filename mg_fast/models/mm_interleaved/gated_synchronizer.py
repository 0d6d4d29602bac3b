"""The feature synchronizer of a layer of the language model, with its norms and its gate."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ...modules import FeatureSynchronizer
from ...runtime.layer_dtypes import at_seam, call
from .configuration import LLM_BASE, LLM_MAX_IMAGES, MMInterleavedConfig


class GatedFeatureSynchronizer(nn.Module):
    """What a layer of the language model reads from the pictures that its positions see, times the tanh of a gate.

    Args:
        config: the configuration of the model.
    """

    def __init__(self, config: MMInterleavedConfig):
        super().__init__()
        text, width = config.text_config, config.image_embed_dim
        self.gate = nn.Parameter(torch.zeros(1))
        self.norm1 = LlamaRMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self.norm2 = LlamaRMSNorm(width, eps=text.rms_norm_eps)
        self.attn = FeatureSynchronizer(
            text.hidden_size,
            width,
            text.hidden_size,
            inner_dim=width,
            heads=config.llm_mmfs_heads,
            points=config.llm_mmfs_points,
            spatial_shapes=config.spatial_shapes,
            base=LLM_BASE,
            max_images=LLM_MAX_IMAGES,
        )

    @property
    def inner_dim(self) -> int:
        """Width of the projected features of a pixel, all heads together."""
        return self.attn.sizes.inner

    def values(self, features: torch.Tensor) -> torch.Tensor:
        """The projected features [B, n, S, inner] of maps [B, n, S, C]."""
        return self.attn.values(call(self.norm2, at_seam(features, self.attn))).flatten(-2)

    def forward(
        self,
        hidden: torch.Tensor,
        points: torch.Tensor,
        index: torch.Tensor,
        *,
        values: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What is added to hidden states [B, Q, D].

        Args:
            hidden: [B, Q, D].
            points: [1, 1, 1, 2], where the offsets start.
            index: int64 [B, Q, n], the relative index of the pictures.
            values: [V, n, S, inner], the projected features. Each row serves B / V consecutive rows of `hidden`.
            features: [V, n, S, C], the maps, in the place of the values; they are projected in this call.
        """
        query = at_seam(self.norm1(hidden), self.attn)
        rows = len(features if values is None else values)
        grouped, index = group_rows(query, index, rows)
        if values is None:
            read = self.attn(grouped, at_seam(self.norm2(features), self.attn), points, index=index)
        else:
            values = values.unflatten(-1, (self.attn.sizes.heads, -1))
            read = self.attn(grouped, None, points, values=at_seam(values, self.attn.value_proj), index=index)
        return self.gate.tanh() * read.reshape(hidden.shape)


def normalised(features: torch.Tensor, eps: float) -> torch.Tensor:
    """Features [..., C] with a root mean square of one, before the norm's gain."""
    return F.rms_norm(features, features.shape[-1:], None, eps)


def group_rows(query: torch.Tensor, index: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Puts the queries [B, Q, D] and indices [B, Q, n] of consecutive rows that share pictures into `rows` rows.

    Raises:
        ValueError: B is not a multiple of `rows`.
    """
    if len(query) == rows:
        return query, index
    if rows == 0 or len(query) % rows:
        raise ValueError(f"{len(query)} row(s) of tokens cannot share the pictures of {rows} row(s)")
    count = len(query) // rows * query.shape[1]
    return query.reshape(rows, count, -1), index.reshape(rows, count, index.shape[-1])
