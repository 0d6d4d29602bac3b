"""The perceiver resampler: BLIP-2's Q-Former, whose learned queries read features of any number."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel


class PerceiverResampler(nn.Module):
    """Turns any number of features into a fixed number of tokens by a Q-Former (arXiv 2301.12597) of transformers.

    The parameters have the published names: `queries` and `blip2qformer.*`.

    Args:
        settings: `num_queries`; `qk_normalization`, whether the queries and keys of every head are normalised by a
            LayerNorm of the head's width (False if it is missing); and attributes of transformers' Blip2QFormerConfig,
            among them hidden_size, encoder_hidden_size (the width of the features) and cross_attention_frequency.

    Raises:
        ValueError: the settings have no number of queries.
    """

    def __init__(self, settings: dict):
        super().__init__()
        settings = dict(settings)
        queries = settings.pop("num_queries", None)
        if not isinstance(queries, int) or queries < 1:
            raise ValueError(f"PerceiverResampler: num_queries must be a positive whole number, got {queries!r}")
        normalized = settings.pop("qk_normalization", False)
        config = Blip2QFormerConfig(**settings)
        self.blip2qformer = Blip2QFormerModel(config)
        if normalized:
            for layer in self.blip2qformer.encoder.layer:
                layer.attention.attention = HeadNormAttention(layer.attention.attention)
                if layer.has_cross_attention:
                    layer.crossattention.attention = HeadNormAttention(layer.crossattention.attention)
        self.queries = nn.Parameter(torch.empty(1, queries, config.hidden_size))
        nn.init.normal_(self.queries, std=config.initializer_range)
        self.features_width = config.encoder_hidden_size

    def forward(self, features: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The tokens of features.

        Args:
            features: [n, S, encoder_hidden_size], floating point.
            mask: [n, S], bool or numbers, not zero where a feature is to be read; None reads all. A row without any
                such feature gives the mean over all of them, as in the original.

        Returns:
            [n, num_queries, hidden_size], in the dtype of the parameters.

        Raises:
            ValueError: shapes or dtypes do not fit; the message names what was expected and what came.
        """
        if features.dim() != 3 or features.shape[-1] != self.features_width or not features.is_floating_point():
            raise ValueError(
                f"PerceiverResampler: expected floating-point features ['n', 'S', {self.features_width}], got "
                f"{list(features.shape)} of {features.dtype}"
            )
        if mask is not None:
            if mask.shape != features.shape[:2]:
                raise ValueError(
                    f"PerceiverResampler: expected a mask {list(features.shape[:2])}, got {list(mask.shape)}"
                )
            # transformers takes a mask of four dimensions as it is. It would ask the host for the values of another.
            dtype = self.queries.dtype
            hidden = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
            mask = hidden.masked_fill_(mask == 0, torch.finfo(dtype).min)[:, None, None]
        return self.blip2qformer(
            query_embeds=self.queries.expand(len(features), -1, -1),
            encoder_hidden_states=features,
            encoder_attention_mask=mask,
        ).last_hidden_state


class HeadNormAttention(nn.Module):
    """The attention of a Q-Former with a LayerNorm over the queries of each head, and one over the keys of each head.

    Args:
        attention: transformers' Blip2QFormerMultiHeadAttention, whose projections become this module's.
    """

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.heads, self.head_width = attention.num_attention_heads, attention.attention_head_size
        self.dropout = attention.attention_dropout
        self.query, self.key, self.value = attention.query, attention.key, attention.value
        eps = attention.config.layer_norm_eps
        self.q_norm, self.k_norm = nn.LayerNorm(self.head_width, eps=eps), nn.LayerNorm(self.head_width, eps=eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        **_,
    ) -> tuple[torch.Tensor, None]:
        """As the class of transformers whose place it takes, without the attention's weights."""
        read, mask = hidden_states, attention_mask
        if encoder_hidden_states is not None:
            read, mask = encoder_hidden_states, encoder_attention_mask
        query, key, value = self._split(self.query(hidden_states)), self._split(self.key(read)), self.value(read)
        mixed = F.scaled_dot_product_attention(
            self.q_norm(query).transpose(1, 2),
            self.k_norm(key).transpose(1, 2),
            self._split(value).transpose(1, 2),
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return mixed.transpose(1, 2).flatten(2), None

    def _split(self, projected: torch.Tensor) -> torch.Tensor:
        return projected.unflatten(-1, (self.heads, self.head_width))
