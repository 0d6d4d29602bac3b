"""The language model packed for inference: weights around its synchronizers are multiplied together once.

A decoded token then costs hardly more than in the plain language model, however many pictures it sees.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ...runtime.weights import Fingerprint, why_not_plain
from .configuration import MMInterleavedConfig
from .decoding import InterleavedDecoding
from .gated_synchronizer import GatedFeatureSynchronizer, group_rows, normalised
from .language_model import SynchronizedLlamaModel


class PackedGatedFeatureSynchronizer(nn.Module):
    """A frozen `GatedFeatureSynchronizer`: the gains of both norms and the gate are folded into its weights.

    Args:
        part: the synchronizer.

    Raises:
        ValueError: a layer computes something other than its weights say.
    """

    def __init__(self, part: GatedFeatureSynchronizer):
        super().__init__()
        for name, layer, kind in (
            ("it", part, GatedFeatureSynchronizer),
            ("norm1", part.norm1, LlamaRMSNorm),
            ("norm2", part.norm2, LlamaRMSNorm),
        ):
            if reason := why_not_plain(name, layer, known=(kind,)):
                raise ValueError(f"a synchronizer cannot be packed: {reason}")
        self.attn = part.attn.pack(
            query_gain=part.norm1.weight,
            feature_gain=part.norm2.weight,
            output_gain=part.gate.detach().double().tanh(),
        )
        self.query_eps, self.feature_eps = part.norm1.variance_epsilon, part.norm2.variance_epsilon
        self._packed = Fingerprint([part])

    @property
    def inner_dim(self) -> int:
        """Width of the projected features of a pixel, all heads together."""
        return self.attn.sizes.inner

    def check_unchanged(self) -> None:
        """Raises RuntimeError if weights were changed since they were packed; nothing is checked in a trace."""
        if not torch.compiler.is_compiling() and self._packed.weights_written():
            raise RuntimeError("the weights of a synchronizer were changed since it was packed: pack the model again")

    def forward(
        self,
        hidden: torch.Tensor,
        points: torch.Tensor,
        index: torch.Tensor,
        *,
        values: torch.Tensor,
        features: None = None,
    ) -> torch.Tensor:
        """What is added to hidden states; the arguments are those of `GatedFeatureSynchronizer`, without features."""
        dtype = self.attn.query_weight.dtype
        query = normalised(hidden, self.query_eps).to(dtype)
        grouped, index = group_rows(query, index, len(values))
        values = values.unflatten(-1, (self.attn.sizes.heads, -1)).to(dtype)
        return self.attn(grouped, values, points, index=index).reshape(hidden.shape)


class PackedLlamaModel(SynchronizedLlamaModel):
    """A `SynchronizedLlamaModel` with packed synchronizers, and all other modules of the model that it was made of.

    Built by `pack_language_model`. Its synchronizers are frozen. Its other modules are not copies.
    """

    def project_pictures(self, maps: torch.Tensor) -> torch.Tensor:
        features = maps[..., -self.pixels :, :].to(self.value_weight.device)
        features = normalised(features, self.synchronizers()[0].feature_eps)
        return F.linear(features.to(self.value_weight.dtype), self.value_weight, self.value_bias)

    def forward(self, input_ids=None, *, picture_values=None, picture_features=None, **kwargs):
        if picture_features is not None:
            # The inputs were prepared for the original's steps, which project pictures in every pass.
            picture_values = self.project_pictures(picture_features)
        return super().forward(input_ids, picture_values=picture_values, **kwargs)

    def check_unchanged(self) -> None:
        """Raises RuntimeError if weights of the synchronizers were changed since they were packed."""
        for part in self.synchronizers():
            part.check_unchanged()

    def _reads_maps(self, device: torch.device) -> bool:
        return False


def pack_language_model(model: SynchronizedLlamaModel) -> PackedLlamaModel:
    """A language model for inference whose synchronizers are packed; it shares all other modules with `model`.

    Raises:
        ValueError: a synchronizer computes something other than its weights say, or the model lies on several devices.
    """
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) > 1:
        raise ValueError(f"expected the language model on one device, got {', '.join(sorted(devices))}")
    with torch.device("meta"):
        packed = PackedLlamaModel(model.pictures_config)
    packed.config = model.config
    packed.embed_tokens, packed.norm, packed.rotary_emb = model.embed_tokens, model.norm, model.rotary_emb
    for mine, theirs in zip(packed.layers, model.layers, strict=True):
        for name, part in theirs.named_children():
            setattr(mine, name, part)
        if theirs.llama_cross_attn is not None:
            mine.llama_cross_attn = PackedGatedFeatureSynchronizer(theirs.llama_cross_attn)
    parts = packed.synchronizers()
    for name in ("value_weight", "value_bias"):
        packed.register_buffer(name, torch.cat([getattr(part.attn, name) for part in parts]), persistent=False)
        # Every synchronizer keeps its own rows of the common tensor, not a copy.
        for part, rows in zip(parts, getattr(packed, name).chunk(len(parts))):
            setattr(part.attn, name, rows)
    return packed.train(model.training)


class PackedInterleavedDecoding(InterleavedDecoding):
    """A DecodableModel that decodes with packed synchronizers: `Decoder(PackedInterleavedDecoding(model))`.

    It shares all other weights with the model. It is frozen: once the model's synchronizers change, its use raises an
    error.

    Args:
        model: an MMInterleavedForConditionalGeneration.

    Raises:
        ValueError: see `pack_language_model`.
    """

    def __init__(self, model: InterleavedDecoding):
        self.model, self._packed = model, pack_language_model(model.language_model)

    @property
    def mm_decoder(self) -> PackedLlamaModel:
        self._packed.check_unchanged()
        return self._packed

    @property
    def text_decoder(self) -> nn.Module:
        return self.model.text_decoder

    @property
    def soi_token(self) -> torch.Tensor:
        return self.model.soi_token

    @property
    def config(self) -> MMInterleavedConfig:
        return self.model.config

    @property
    def generation_config(self) -> GenerationConfig:
        return self.model.generation_config

    def get_image_features(self, pixel_values: torch.Tensor, **options):
        return self.model.get_image_features(pixel_values, **options)
