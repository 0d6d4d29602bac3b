"""Products with quantized weights that torchao and transformers lack, and that a model gets after it was loaded."""

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..errors import BackendError
from ..private_interfaces import find
from .stored import readable, tensor_bytes, weight_format

logger = logging.getLogger(__name__)

# Rows up to which torch's int8 kernel is used on a CPU. From 8 rows on, a bfloat16 product was measured to be faster.
_PACKED_ROWS = 4
# torch's kernel reads the int8 weights in aligned pieces of so many bytes. Files align tensors to 8 bytes only.
_ALIGNMENT = 16
# The name that transformers knows the experts' function by. For a prompt's tokens, but not for a decoded token, the
# function asks the host which experts they go to.
EXPERTS_FUNCTION = "mg_fast_quantized"
_packed_product = find("torch._weight_int8pack_mm")


def finish(model: nn.Module, unquantized: Sequence[str] = ()) -> None:
    """Gives a loaded model the products for its quantized weights that torchao lacks.

    It logs a warning if most of what should be quantized of the language model's layers is not.

    Args:
        model: a model that `mg_fast.models.protocol.DecodableModel` describes.
        unquantized: names of submodules of the layers that keep their dtype by intention, so that they do not count.
    """
    language_model = model.language_model
    left = total = 0
    experts = False
    for name, module in language_model.layers.named_modules():
        if not set(unquantized).isdisjoint(name.split(".")):
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2:
                continue
            total += (size := tensor_bytes(parameter))
            if weight_format(parameter) is None:
                left += size
            elif type(module) is nn.Linear and _is_int8(parameter):
                _align(parameter)
                module.__class__ = Int8Linear
            elif not isinstance(module, nn.Linear):
                _check_experts(f"layers.{name}.{parameter_name}", parameter)
                experts = True
    if experts:
        language_model.set_experts_implementation(EXPERTS_FUNCTION)
    if 2 * left > total:
        logger.warning(
            "%s of the language model's layers, of %s as loaded, are not quantized: the quantization configuration "
            "does not reach them. A Mixtral's fused experts are parameters of three dimensions, which configurations "
            "for Linear layers pass over; "
            "quantize='int8' and 'fp8' reach them",
            readable(left),
            readable(total),
        )


def _is_int8(weight: torch.Tensor) -> bool:
    """Whether a weight is torchao's int8 with one scale per row, which leaves activations unchanged."""
    return (
        weight_format(weight) == "int8"
        and getattr(weight, "act_quant_kwargs", weight) is None
        and getattr(weight, "act_pre_scale", weight) is None
        and weight.scale.numel() == weight.shape[0]
    )


def _align(weight: torch.Tensor) -> None:
    """Moves int8 numbers that begin at an odd place of a mapped file, where torch's kernel for a CPU would crash."""
    if weight.qdata.device.type == "cpu" and weight.qdata.data_ptr() % _ALIGNMENT:
        weight.qdata = weight.qdata.clone()


class Int8Linear(nn.Linear):
    """A Linear over torchao's int8 weights. It differs from torchao's product in two cases:

    - A few bfloat16 rows on a CPU: torch's own kernel reads the int8 weights, while torchao converts all of them in
      every product.
    - float16: the weights are scaled before the product, while torchao sums unscaled ones, beyond float16's range.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float16:
            return F.linear(x, self.weight.dequantize(), self.bias)
        rows = x.numel() // max(x.shape[-1], 1)
        packed = x.dtype == torch.bfloat16 and x.device.type == "cpu" and rows <= _PACKED_ROWS
        if not packed or _packed_product is None or (torch.is_grad_enabled() and x.requires_grad):
            return super().forward(x)
        scale = self.weight.scale.flatten().to(x.dtype)
        y = _packed_product(x.reshape(rows, x.shape[-1]), self.weight.qdata, scale).reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def _check_experts(name: str, weight: torch.Tensor) -> None:
    known = weight_format(weight) in ("int8", "fp8") and getattr(weight, "act_quant_kwargs", weight) is None
    if not known or weight.scale.shape != (*weight.shape[:2], 1):
        scales = list(weight.scale.shape) if hasattr(weight, "scale") else "none"
        raise BackendError(
            f"{name}: expected fused experts as weight-only int8 or fp8 with one scale per row, "
            f"got {weight_format(weight)} with scales {scales}"
        )


def quantized_experts(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Mixtral's experts over quantized weights; transformers' own forms call what torchao's tensors do not have.

    Args:
        module: its `gate_up_proj` [E, 2 I, H] and `down_proj` [E, H, I] are torchao tensors with one scale per row.
        hidden_states: [T, H].
        top_k_index: [T, k], the experts of each token.
        top_k_weights: [T, k].

    Returns:
        [T, H].
    """
    tokens, k = top_k_index.shape
    experts = top_k_index.reshape(-1)
    if tokens * k <= module.num_experts:
        # A decoded token: the weights of its experts are gathered, without asking the host which ones they are.
        rows = hidden_states.repeat_interleave(k, dim=0)
        out = _gathered(module._apply_gate(_gathered(rows, module.gate_up_proj, experts)), module.down_proj, experts)
    else:
        order = experts.argsort(stable=True)
        rows = hidden_states[order // k]
        counts = torch.bincount(experts, minlength=module.num_experts).tolist()
        parts = [
            _product(module._apply_gate(_product(part, module.gate_up_proj, expert)), module.down_proj, expert)
            for expert, part in enumerate(rows.split(counts))
            if len(part)
        ]
        out = torch.empty_like(rows)
        out[order] = torch.cat(parts)
    return (out * top_k_weights.reshape(-1, 1)).reshape(tokens, k, -1).sum(dim=1).to(hidden_states.dtype)


def _gathered(rows: torch.Tensor, weight: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """Row i of [S, K] times the weight of its expert: [S, N]."""
    values, scale = weight.qdata[experts].to(rows.dtype), weight.scale[experts].to(rows.dtype)
    if rows.dtype == torch.float16:
        values, scale = values * scale, None
    y = torch.bmm(values, rows.unsqueeze(-1))
    return (y if scale is None else y * scale).squeeze(-1)


def _product(rows: torch.Tensor, weight: torch.Tensor, expert: int) -> torch.Tensor:
    values, scale = weight.qdata[expert].to(rows.dtype), weight.scale[expert].to(rows.dtype)
    if rows.dtype == torch.float16:
        return F.linear(rows, values * scale)
    return F.linear(rows, values) * scale.squeeze(-1)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_FUNCTION, quantized_experts)
