"""CLIP's vision tower frozen for inference: fewer and larger steps, and no layer whose output is not used.

The query, key and value projections of a layer are one product. Quick GELU, x * sigmoid(1.702 x), is one pass: the
product before it computes y = 1.702 x, so that x * sigmoid(1.702 x) = silu(y) / 1.702, and the product after it divides
by 1.702. Both factors are applied to float32 sums, so no weight is rounded again. Residuals are added in place, and
attention reads and writes [B, N, heads, d] without copies. In float16 pre-activations may grow to 38489, which is
1/1.702 of what the original tower allows; beyond that the result is not finite.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionModel
from transformers.activations import QuickGELUActivation
from transformers.models.clip.modeling_clip import (
    CLIPMLP,
    CLIPAttention,
    CLIPEncoder,
    CLIPEncoderLayer,
    CLIPVisionEmbeddings,
)

from .. import ops
from ..ops.torch.pointwise import linear
from ..runtime.weights import Fingerprint, why_more_than_weights

# Slope of quick GELU.
SLOPE = 1.702
# The classes whose arithmetic the packed copy repeats.
_KNOWN = frozenset(
    {CLIPVisionModel, CLIPVisionEmbeddings, CLIPEncoder, CLIPEncoderLayer, CLIPAttention, CLIPMLP, QuickGELUActivation}
    | {nn.Linear, nn.LayerNorm, nn.Conv2d, nn.Embedding, nn.ModuleList}
)


class _Layer(NamedTuple):
    """Tensors of one encoder layer; q, k and v are concatenated, and the MLP's first bias is multiplied by SLOPE."""

    norm1_weight: torch.Tensor
    norm1_bias: torch.Tensor
    qkv_weight: torch.Tensor
    qkv_bias: torch.Tensor
    out_weight: torch.Tensor
    out_bias: torch.Tensor
    norm2_weight: torch.Tensor
    norm2_bias: torch.Tensor
    fc1_weight: torch.Tensor
    fc1_bias: torch.Tensor
    fc2_weight: torch.Tensor
    fc2_bias: torch.Tensor


class PackedClip(nn.Module):
    """A snapshot of a CLIP vision tower for inference; `from_tower` makes one.

    A call turns views [B, 3, LR, LR] of any floating dtype into patch features [B, N, D] in the tower's dtype: the
    selected hidden state without its class token, before any final norm. The module has buffers but no parameters, its
    state_dict is empty, and it cannot be trained.

    The query, key and value projections are copied (3 D * D elements a layer). All other tensors share the tower's
    memory, so a call raises an error once any of the tower's weights was changed in place. Moving, converting or
    deleting the tower changes nothing here.
    """

    def __init__(self, tower: CLIPVisionModel, select_layer: int):
        super().__init__()
        config, layers = tower.config, tower.encoder.layers
        self.image_size, self.patch_size, self.heads = config.image_size, config.patch_size, config.num_attention_heads
        self.eps = config.layer_norm_eps
        self.depth = select_layer if select_layer >= 0 else len(layers) + 1 + select_layer
        embeddings, norm = tower.embeddings, tower.pre_layrnorm
        self._keep("patch_weight", embeddings.patch_embedding.weight)
        self._keep("class_embedding", embeddings.class_embedding)
        self._keep("position_embedding", embeddings.position_embedding.weight)
        self._keep("norm_weight", norm.weight)
        self._keep("norm_bias", norm.bias)
        for i, layer in enumerate(layers[: self.depth]):
            for name, tensor in _pack(layer)._asdict().items():
                self._keep(f"layer{i}_{name}", tensor)
        # The tensors of these modules are read. Their fingerprint later tells whether any of them was changed.
        self._packed = Fingerprint([tower.embeddings, tower.pre_layrnorm, *layers[: self.depth]])
        self.training = False

    @classmethod
    def from_tower(cls, tower: CLIPVisionModel, select_layer: int = -2) -> "PackedClip":
        """Packs a tower as it is now.

        Args:
            tower: a CLIP vision model of transformers, in one dtype on one device.
            select_layer: index into the hidden states; -2 is the output of the last layer but one. Later layers are
                left out.

        Raises:
            ValueError: the tower computes something other than CLIP's layers, or has no such hidden state; the message
                says what.
        """
        if reason := unsuited(tower, select_layer):
            raise ValueError(f"PackedClip: {reason}")
        return cls(tower, select_layer)

    @classmethod
    def from_layers(cls, tower: CLIPVisionModel) -> "PackedClip":
        """Packs what is before the layers of a tower, and all its layers, for callers that run them in parts.

        Args:
            tower: an object of CLIPVisionModel or of a class that inherits from it, whose other parts are not examined.

        Raises:
            ValueError: as in `from_tower`.
        """
        if reason := unsuited(tower, -1, layers_alone=True):
            raise ValueError(f"PackedClip: {reason}")
        return cls(tower, -1)

    @torch.no_grad()
    def forward(self, views: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
        """Views [B, 3, LR, LR] to patch features [B, N, D].

        Args:
            views: floating point, on the tower's device.
            backend: overrides the choice in force, for the products with a residual.

        Raises:
            ValueError: the views have another shape or device.
            RuntimeError: a gradient to the views is wanted, or the tower's weights were changed since they were packed.
        """
        return self.run_layers(self.embed(views), 0, self.depth, backend=backend)[:, 1:]

    @torch.no_grad()
    def embed(self, views: torch.Tensor) -> torch.Tensor:
        """Views [B, 3, LR, LR] to the input [B, 1 + N, D] of the first layer, the token of the class first.

        The arguments and errors are those of `forward`.
        """
        self._check(views)
        return self._embed(views.to(self.patch_weight.dtype))

    @torch.no_grad()
    def run_layers(self, hidden: torch.Tensor, first: int, last: int, *, backend: str | None = None) -> torch.Tensor:
        """Runs the layers from `first` up to the one before `last` on hidden states [B, 1 + N, D], in place.

        Args:
            hidden: contiguous, in the dtype and on the device of the tower. It is overwritten and returned.
            first, last: indices of layers.
            backend: overrides the choice in force, for the products with a residual.
        """
        for i in range(first, last):
            self._run_layer(hidden, _Layer(*(getattr(self, f"layer{i}_{name}") for name in _Layer._fields)), backend)
        return hidden

    def check_unchanged(self) -> None:
        """Raises RuntimeError if the tower's weights were changed since they were packed."""
        if self._packed.weights_written():
            raise RuntimeError("PackedClip: the tower's weights were changed since it was packed: pack it again")

    def train(self, mode: bool = True) -> "PackedClip":
        if mode:
            raise RuntimeError("PackedClip is frozen: train the tower that it was made from, then pack that again")
        return self

    def extra_repr(self) -> str:
        width, dtype = len(self.class_embedding), self.patch_weight.dtype
        return f"image_size={self.image_size}, layers={self.depth}, width={width}, dtype={dtype}"

    def _keep(self, name: str, tensor: torch.Tensor) -> None:
        self.register_buffer(name, tensor.detach(), persistent=False)

    def _check(self, views: torch.Tensor) -> None:
        expected = (3, self.image_size, self.image_size)
        if views.dim() != 4 or tuple(views.shape[1:]) != expected or not views.is_floating_point():
            raise ValueError(
                f"PackedClip: expected floating-point views {['B', *expected]}, got {list(views.shape)} of "
                f"{views.dtype}"
            )
        if views.device != self.patch_weight.device:
            raise ValueError(f"PackedClip: the views are on {views.device}, the weights on {self.patch_weight.device}")
        if torch.compiler.is_compiling():
            return
        if views.requires_grad:
            raise RuntimeError(
                "PackedClip is frozen and gives no gradient to its views: use the tower, or views.detach()"
            )
        self.check_unchanged()

    def _embed(self, views: torch.Tensor) -> torch.Tensor:
        patches = F.conv2d(views, self.patch_weight, stride=self.patch_size).flatten(2).transpose(1, 2)
        embedded = torch.cat([self.class_embedding.expand(len(views), 1, -1), patches], dim=1).add_(
            self.position_embedding
        )
        return self._norm(embedded, self.norm_weight, self.norm_bias)

    def _run_layer(self, hidden: torch.Tensor, layer: _Layer, backend: str | None) -> None:
        """Runs one encoder layer on hidden states [B, N, D], in place."""
        b, n, d = hidden.shape
        qkv = linear(self._norm(hidden, layer.norm1_weight, layer.norm1_bias), layer.qkv_weight, layer.qkv_bias)
        query, key, value = qkv.view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(b, n, d)
        ops.linear_residual_(mixed, layer.out_weight, layer.out_bias, hidden, backend=backend)
        steep = _scaled_linear(
            self._norm(hidden, layer.norm2_weight, layer.norm2_bias), layer.fc1_weight, layer.fc1_bias, SLOPE
        )
        hidden.add_(_scaled_linear(F.silu(steep, inplace=True), layer.fc2_weight, layer.fc2_bias, 1 / SLOPE))

    def _norm(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(hidden, weight.shape, weight, bias, self.eps)


def _scaled_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, scale: float) -> torch.Tensor:
    """Computes scale * (x @ weight^T) + bias."""
    if x.device.type == "cpu" and x.dtype == torch.float32:
        # The faster products on a CPU take no factor, and a pass over a result that is in the cache costs little.
        return linear(x, weight, bias / scale).mul_(scale)
    return torch.addmm(bias, x.flatten(0, -2), weight.t(), alpha=scale).view(*x.shape[:-1], len(weight))


def _pack(layer: nn.Module) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    with torch.no_grad():
        return _Layer(
            layer.layer_norm1.weight,
            layer.layer_norm1.bias,
            torch.cat([p.weight for p in projections]),
            torch.cat([p.bias for p in projections]),
            attention.out_proj.weight,
            attention.out_proj.bias,
            layer.layer_norm2.weight,
            layer.layer_norm2.bias,
            mlp.fc1.weight,
            mlp.fc1.bias * SLOPE,
            mlp.fc2.weight,
            mlp.fc2.bias,
        )


def unsuited(tower: nn.Module, select_layer: int = -2, *, layers_alone: bool = False) -> str | None:
    """Why a tower cannot be packed, as a sentence; None where it can.

    Args:
        tower, select_layer: as in `PackedClip.from_tower`.
        layers_alone: examine only what `PackedClip.from_layers` packs.
    """
    if not isinstance(tower, CLIPVisionModel):
        return f"expected a CLIPVisionModel of transformers, got {type(tower).__name__}"
    layers = tower.encoder.layers
    if not -len(layers) - 1 <= select_layer <= len(layers):
        return f"the tower has {len(layers) + 1} hidden states, select_layer={select_layer} is none of them"
    activation = layers[0].mlp.activation_fn if len(layers) else QuickGELUActivation()
    if type(activation) is not QuickGELUActivation:
        return f"expected quick_gelu, the tower has {tower.config.hidden_act}"
    packed = nn.ModuleList([tower.embeddings, tower.pre_layrnorm, tower.encoder]) if layers_alone else tower
    return why_more_than_weights(packed, _KNOWN, placed=True)
