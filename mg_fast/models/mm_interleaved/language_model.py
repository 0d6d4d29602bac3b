"""MM-Interleaved's language model: Llama, some of whose layers read the feature maps of the pictures in context."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from ...ops import backend as backends
from ...runtime.placement import execution_device
from ...runtime.weights import why_not_plain
from .configuration import MMInterleavedConfig
from .gated_synchronizer import GatedFeatureSynchronizer, normalised
from .visible_pictures import in_rows, picture_index, visible

# Initial values of the text head, as the original's: the new tokens begin with a small chance.
NEW_TOKENS = 2
HEAD_BIAS, HEAD_NEW_BIAS = -100.0, 95.0


class SynchronizedDecoderLayer(LlamaDecoderLayer):
    """A layer of Llama that may read pictures between its self-attention and its MLP.

    Args:
        config: the configuration of the model.
        layer_idx: the number of the layer.
    """

    def __init__(self, config: MMInterleavedConfig, layer_idx: int):
        super().__init__(config.text_config, layer_idx)
        synchronized = config.synchronized_layers
        self.number = synchronized.index(layer_idx) if layer_idx in synchronized else None
        self.llama_cross_attn = None if self.number is None else GatedFeatureSynchronizer(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        picture_values: torch.Tensor | None = None,
        picture_features: torch.Tensor | None = None,
        picture_index: torch.Tensor | None = None,
        picture_points: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """The hidden states [B, Q, D] after the layer.

        Args:
            hidden_states: [B, Q, D].
            picture_values, picture_features, picture_index: see `SynchronizedLlamaModel`; without an index the layer is
                Llama's.
            picture_points: [1, 1, 1, 2], where the offsets start.
            **kwargs: what LlamaModel gives its layers.
        """
        residual = hidden_states
        hidden_states, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = residual + hidden_states
        if self.llama_cross_attn is not None and picture_index is not None:
            read = self.read(hidden_states, picture_points, picture_index, picture_values, picture_features)
            hidden_states = hidden_states + read.to(hidden_states)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    def read(self, hidden_states, points, index, values, features) -> torch.Tensor:
        """What the layer's synchronizer adds; the arguments are those of `GatedFeatureSynchronizer`, for all layers.

        Values and features of all layers may lie on another device than the hidden states.
        """
        synchronizer, device = self.llama_cross_attn, hidden_states.device
        if values is not None:
            values = values.narrow(-1, self.number * synchronizer.inner_dim, synchronizer.inner_dim).to(device)
        if features is not None:
            features = features.to(device)
        return synchronizer(hidden_states, points, index, values=values, features=features)


class SynchronizedLlamaModel(LlamaModel):
    """Llama with a feature synchronizer in every few layers (`config.synchronized_layers`).

    The parameters have the published names. Without pictures' arguments, the synchronizers are left out, as in the
    original. A row that sees no picture is another case: each synchronizer adds the same numbers everywhere.

    Args:
        config: the configuration of the model.
    """

    def __init__(self, config: MMInterleavedConfig):
        text = config.text_config
        # Not LlamaModel's own construction, which would build all layers for nothing.
        super(LlamaModel, self).__init__(text)
        self.padding_idx, self.vocab_size = text.pad_token_id, text.vocab_size
        self.pictures_config, self.pixels = config, config.pixels_of_llm
        self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(SynchronizedDecoderLayer(config, i) for i in range(text.num_hidden_layers))
        self.norm = LlamaRMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=text)
        self.gradient_checkpointing = False
        for layer in self.layers:
            # transformers would initialise every Linear alike. Synchronizers have initial values of their own.
            for part in layer.llama_cross_attn.modules() if layer.llama_cross_attn is not None else ():
                part._is_hf_initialized = True
        self.post_init()

    def synchronizers(self) -> list[nn.Module]:
        """The layers' synchronizers, in order."""
        return [layer.llama_cross_attn for layer in self.layers if layer.llama_cross_attn is not None]

    def project_pictures(self, maps: torch.Tensor) -> torch.Tensor:
        """The values [..., S, layers * inner] that the synchronizers of all layers read of pictures, by one product.

        Args:
            maps: [..., P, C], the pictures' feature maps, of which the last `config.pixels_of_llm` pixels are read.
        """
        features, parts = maps[..., -self.pixels :, :], self.synchronizers()
        if not _one_product(parts):
            # A layer that is more than its weights, or lies elsewhere, is called itself.
            batched = features.flatten(0, -3)[None]
            values = [part.values(batched.to(execution_device(part))) for part in parts]
            return torch.cat([value.to(values[0].device) for value in values], dim=-1)[0].unflatten(
                0, features.shape[:-2]
            )
        first = parts[0]
        like = first.attn.value_proj.weight
        gains = [part.attn.value_proj.weight.float() * part.norm2.weight.float() for part in parts]
        bias = torch.cat([part.attn.value_proj.bias for part in parts])
        # The picture side may have another dtype, or lie on another device.
        rows = normalised(features.to(like.device), first.norm2.variance_epsilon).to(like.dtype)
        return F.linear(rows, torch.cat(gains).to(like.dtype), bias)

    def picture_arguments(
        self, input_ids: torch.Tensor, num_image_per_seq: torch.Tensor, image_maps: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The arguments by which passes over a prompt, and over what follows it, read its pictures.

        Args:
            input_ids: [B, L], the prompt.
            num_image_per_seq: int64 [B].
            image_maps: [n_images, P, C], the maps of all pictures in reading order. n_images may be 0: then every row
                gets what a row without visible pictures gets, while the original refuses such a batch.

        Raises:
            PromptError: a position sees more pictures than the model has positions for.
        """
        rows = len(input_ids)
        pictures = len(image_maps) if rows == 1 or len(image_maps) == 0 else int(num_image_per_seq.max())
        index = picture_index(visible(input_ids, num_image_per_seq, self.pictures_config, pictures))
        if self._reads_maps(image_maps.device):
            features = in_rows(image_maps[:, -self.pixels :], num_image_per_seq, pictures)
            return {"picture_features": features, "picture_index": index}
        values = in_rows(self.project_pictures(image_maps), num_image_per_seq, pictures)
        return {"picture_values": values, "picture_index": index}

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        *,
        picture_values: torch.Tensor | None = None,
        picture_features: torch.Tensor | None = None,
        picture_index: torch.Tensor | None = None,
        **kwargs,
    ):
        """As LlamaModel's forward, for positions that see pictures.

        Args:
            input_ids: [B, Q].
            picture_values: [V, n, S, layers * inner], what `project_pictures` returned for the pictures of each row.
                V divides B, and each row serves B / V consecutive rows, such as the beams of a prompt.
            picture_features: [V, n, S, C], the pictures' maps, in the place of the values. Every layer then projects
                them again in every pass, as the original does.
            picture_index: int64 [B, Q, n], the relative index of the pictures at every position, 0 where a position
                does not see one.
            **kwargs: LlamaModel's other arguments.

        Raises:
            ValueError: an index without values or features, or the reverse, or both of these.
        """
        given = [tensor for tensor in (picture_values, picture_features) if tensor is not None]
        if len(given) != (picture_index is not None):
            raise ValueError(
                "expected picture_index together with picture_values or picture_features, or none of them, got "
                + (", ".join(_named(picture_values, picture_features, picture_index)) or "none")
            )
        if picture_index is not None:
            points = torch.full((1, 1, 1, 2), 0.5, device=picture_index.device)
            kwargs.update(
                picture_values=picture_values,
                picture_features=picture_features,
                picture_index=picture_index,
                picture_points=points,
            )
        return super().forward(input_ids, **kwargs)

    def _reads_maps(self, device: torch.device) -> bool:
        """Whether every pass projects the maps again: the original's steps, which are the reference."""
        return backends.choose("feature_sync", None, device) == "reference"


def _one_product(parts: list[nn.Module]) -> bool:
    """Whether the values of all synchronizers can be had by one product over features that are normalised once."""
    kinds = {(weight.dtype, weight.device) for part in parts for weight in (part.attn.value_proj.weight,)}
    return len(kinds) == 1 and not any(
        why_not_plain("norm2", part.norm2, known=(LlamaRMSNorm,))
        or why_not_plain("value_proj", part.attn.value_proj, known=(nn.Linear,))
        for part in parts
    )


def _named(values, features, index) -> list[str]:
    named = {"picture_values": values, "picture_features": features, "picture_index": index}
    return [name for name, tensor in named.items() if tensor is not None]


class TextDecoder(nn.Module):
    """The text head: logits of all tokens, to which those of the two new tokens from a head of their own are added.

    Args:
        config: the configuration of the model.
    """

    def __init__(self, config: MMInterleavedConfig):
        super().__init__()
        text = config.text_config
        self.head = nn.Linear(text.hidden_size, text.vocab_size)
        self.head_new = nn.Linear(text.hidden_size, NEW_TOKENS)
        for part in (self.head, self.head_new):
            part._is_hf_initialized = True
        nn.init.zeros_(self.head_new.weight)
        nn.init.constant_(self.head_new.bias, HEAD_NEW_BIAS)
        with torch.no_grad():
            self.head.weight[-NEW_TOKENS:].zero_()
            self.head.bias[-NEW_TOKENS:].fill_(HEAD_BIAS)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., vocabulary] of hidden states [..., D]."""
        logits = self.head(hidden)
        logits[..., -NEW_TOKENS:] += self.head_new(hidden)
        return logits
