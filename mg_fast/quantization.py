"""Weight-only quantisation of the language model by name, what of a model's weights is stored how, and the products that torchao lacks.

The names stand for torchao's configurations; any other transformers quantization configuration is used as it is. Towers, mining,
projector, embeddings, norms, routers and the head keep their dtype.
"""

import importlib.metadata
import importlib.util
import logging
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils.quantization_config import QuantizationConfigMixin, TorchAoConfig

from .errors import BackendError

logger = logging.getLogger(__name__)

NAMES = ("int8", "int4", "fp8")
# full paths: transformers holds these against the start of a parameter's name
UNQUANTIZED = ("model.vision_tower", "model.vision_tower_aux", "model.patch_mining", "model.mm_projector", "lm_head")
# Mixtral's experts are parameters of three dimensions in no Linear, which only a configuration by name reaches
_EXPERTS = r"model\.language_model\.layers\.\d+\.mlp\.experts\.(gate_up|down)_proj"
_LINEARS = r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.[a-z]+_proj"
_INT4_GROUPS = (128, 64, 32)
_CUDA_ARCHITECTURE = {"int4": (8, 0), "fp8": (8, 9)}
# for torch's int8 kernel on a CPU; from 8 rows on a bfloat16 product has been faster
_PACKED_ROWS = 4
# as transformers knows it; of a prompt's tokens, unlike of a decoded one's, it asks the host which experts they go to
EXPERTS_FUNCTION = "mg_fast_quantized"


def named_config(name: str, text_config, device_map, dtype: torch.dtype | None) -> TorchAoConfig:
    """The configuration that a name stands for, for one language model on one kind of device.

    Args:
        name: one of `NAMES`.
        text_config: the language model's configuration.
        device_map: as `from_pretrained` takes it.
        dtype: of the weights to be quantised.

    Raises:
        BackendError: it cannot run there, and why.
    """
    if name not in NAMES:
        raise BackendError(f"quantize: expected {', '.join(NAMES)} or a transformers quantization configuration, got {name!r}")
    _need("torchao", f"quantize={name!r}", "pip install 'mg_fast[quant]'")
    places = _places(name, device_map)
    for place in places:
        _check_device(name, place, dtype)
    experts = getattr(text_config, "num_local_experts", None) is not None
    if name == "int4" and experts:
        raise BackendError("int4 is not offered for fused experts (Mixtral), which torchao packs for no CPU: use int8 or fp8")
    try:
        config = _torchao_config(name, text_config, places[0].type)
    except ImportError as error:
        raise BackendError(f"quantize={name!r} needs torchao 0.18 or newer, got {importlib.metadata.version('torchao')}: {error}") from None
    if experts:
        from torchao.quantization import FqnToConfig

        config = FqnToConfig(OrderedDict({f"re:{_LINEARS}": config, f"re:{_EXPERTS}": config}))
    return TorchAoConfig(config, modules_to_not_convert=list(UNQUANTIZED))


def check_config(config: QuantizationConfigMixin) -> None:
    """Completes a caller's configuration: the vision parts and the head keep their dtype, unless it says itself what to skip.

    Raises:
        BackendError: it is none, or the package that it needs is not installed.
    """
    if not isinstance(config, QuantizationConfigMixin):
        raise BackendError(f"quantize: expected {', '.join(NAMES)} or a transformers quantization configuration, got {config!r}")
    method = str(getattr(getattr(config, "quant_method", None), "value", ""))
    if method.startswith("bitsandbytes"):
        _need("bitsandbytes", "a BitsAndBytesConfig", "pip install bitsandbytes")
    for attribute in ("llm_int8_skip_modules", "modules_to_not_convert"):
        if getattr(config, attribute, UNQUANTIZED) is None:
            setattr(config, attribute, list(UNQUANTIZED))


def check_cache(options: dict) -> None:
    """Raises `BackendError` where `generate` is asked for a quantised KV cache whose package is not installed."""
    if options.get("cache_implementation") == "quantized":
        backend = (options.get("cache_config") or {}).get("backend", "quanto")
        package, module = ("optimum-quanto", "optimum.quanto") if backend == "quanto" else (backend, backend)
        _need(module, f"cache_implementation='quantized' (backend {backend!r})", f"pip install {package}", package)


def _need(module: str, what: str, remedy: str, package: str | None = None) -> None:
    parent = module.partition(".")[0]
    if importlib.util.find_spec(parent) is None or importlib.util.find_spec(module) is None:
        raise BackendError(f"{what} needs {package or module}, which is not installed: {remedy}")


def _places(name: str, device_map) -> list[torch.device]:
    """Where the layers go: to devices of one kind."""
    places = set(device_map.values()) if isinstance(device_map, dict) else {"cpu" if device_map is None else device_map}
    if places & {"auto", "balanced", "balanced_low_0", "sequential"}:
        places = set(range(torch.cuda.device_count())) or {"cpu"}
    found = [torch.device("cuda", p) if isinstance(p, int) else torch.device("meta" if p == "disk" else p) for p in places]
    if len(kinds := {device.type for device in found}) > 1 or not kinds <= {"cuda", "cpu"}:
        raise BackendError(f"quantize={name!r} takes one kind of device, CUDA or CPU; the layers would go to {sorted(map(str, found))}")
    return found


def _check_device(name: str, device: torch.device, dtype: torch.dtype | None) -> None:
    if device.type == "cpu":
        if name == "fp8" or dtype != torch.bfloat16:
            better = "int8 and int4 in bfloat16 have kernels (dtype='bfloat16', --dtype bfloat16)"
            logger.warning("%s with %s on a CPU saves memory and costs time, %s", name, str(dtype).removeprefix("torch."), better)
        return
    needed, found = _CUDA_ARCHITECTURE.get(name, (0, 0)), torch.cuda.get_device_capability(device)
    if found < needed:
        needed, found = "sm_{}{}".format(*needed), "sm_{}{}".format(*found)
        raise BackendError(f"{name} needs a GPU of {needed} or newer; {torch.cuda.get_device_name(device)} is {found}")
    if name == "int4" and dtype != torch.bfloat16:
        raise BackendError(f"int4 on a GPU needs bfloat16 weights, these are {dtype}: load them with dtype='bfloat16' (--dtype bfloat16)")


def _torchao_config(name: str, text_config, device: str):
    from torchao import quantization

    # torchao would else change torch.compile's settings for the whole process
    quiet = {"set_inductor_config": False}
    if name == "int8":
        return quantization.Int8WeightOnlyConfig(**quiet)
    if name == "fp8":
        return quantization.Float8WeightOnlyConfig(**quiet)
    group = _group_size(text_config, device)
    if device == "cpu":
        from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig

        return PrototypeInt4WeightOnlyConfig(group_size=group, **quiet)
    # the form that torch's own kernels take; the others need the package mslk
    return quantization.Int4WeightOnlyConfig(group_size=group, int4_packing_format="tile_packed_to_4d", **quiet)


def _group_size(text_config, device: str) -> int:
    """The largest group of int4 that divides every width; torchao would leave the other layers as they are, and say nothing."""
    head = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    heads, pairs = text_config.num_attention_heads * head, text_config.num_key_value_heads * head
    hidden, inner = text_config.hidden_size, text_config.intermediate_size
    group = next((g for g in _INT4_GROUPS if all(width % g == 0 for width in (hidden, heads, inner))), None)
    if group is None:
        raise BackendError(
            f"int4 quantises groups of {', '.join(map(str, _INT4_GROUPS))} weights, which must divide all layers' inputs: "
            f"this model's are {hidden} (hidden), {heads} (heads) and {inner} (intermediate) wide"
        )
    if device == "cpu" and (odd := [width for width in (hidden, heads, pairs, inner) if width % 16]):
        raise BackendError(f"int4 on a CPU takes outputs in multiples of 16; this model has layers of {odd[0]} outputs")
    return group


def check_savable(model: nn.Module) -> None:
    """Raises `BackendError` for weights that torchao has no file format for."""
    if any(type(parameter.data).__name__ == "Int4OpaqueTensor" for parameter in model.parameters()):
        raise BackendError("int4 weights packed for a CPU cannot be saved, torchao has no file format for them: int8 and fp8 can")


# --- what is stored how


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a model's parameters and buffers as they are stored, scales and zero points included, shared ones counted once.

    Attributes:
        language_model: of the language model and its head.
        vision: of everything else: towers, mining and projector.
        unquantized: what the language model would take in the dtype that it computes in.
        formats: how its quantised weights are stored, as `("int8",)`; empty where none is.
    """

    language_model: int
    vision: int
    unquantized: int
    formats: tuple[str, ...]

    def __str__(self) -> str:
        quantized = f" ({', '.join(self.formats)}; {_readable(self.unquantized)} unquantised)" if self.formats else ""
        return f"language model {_readable(self.language_model)}{quantized}, vision {_readable(self.vision)}"


def weight_bytes(model: nn.Module) -> WeightBytes:
    """Counts the weights of a MiniGeminiForConditionalGeneration; bitsandbytes' without their scales, which it keeps aside."""
    language_model = vision = unquantized = 0
    formats: dict[str, None] = {}
    seen = set()
    for name, module in model.named_modules():
        of_vision = name.startswith(UNQUANTIZED[:-1])
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            stored = tensor_bytes(tensor)
            if of_vision:
                vision += stored
                continue
            language_model += stored
            if (kind := _format(tensor)) is None:
                unquantized += stored
            else:
                formats[kind] = None
                # bitsandbytes' packed tensors have other shapes and dtypes than the weights that they stand for
                shape = (module.out_features, module.in_features) if isinstance(module, nn.Linear) else tensor.shape
                dtype = tensor.dtype if tensor.is_floating_point() else model.dtype
                unquantized += torch.Size(shape).numel() * dtype.itemsize
    return WeightBytes(language_model, vision, unquantized, tuple(formats))


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor; of a tensor subclass that wraps others, as torchao's, theirs."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(tensor_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def _format(tensor: torch.Tensor) -> str | None:
    """How a quantised weight is stored; None of any other tensor."""
    kind = type(tensor) if type(tensor) is not nn.Parameter else type(tensor.data)
    if kind in (torch.Tensor, nn.Parameter, nn.Buffer):
        return None
    if kind.__name__ == "Float8Tensor":
        return "fp8"
    if kind.__name__ in ("Int8Params", "Params4bit"):
        return {"Int8Params": "bitsandbytes int8", "Params4bit": "bitsandbytes 4-bit"}[kind.__name__]
    return next((name for name in ("int8", "int4") if kind.__name__.lower().startswith(name)), kind.__name__)


def _readable(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


# --- after loading


def finish(model: nn.Module) -> None:
    """Gives a loaded model the products for its quantised weights that torchao lacks; says where most of it is not quantised."""
    language_model = model.model.language_model
    left = total = 0
    experts = False
    for name, module in language_model.layers.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2:
                continue
            total += (size := tensor_bytes(parameter))
            if _format(parameter) is None:
                left += size
            elif type(module) is nn.Linear and _is_int8(parameter):
                module.__class__ = Int8Linear
            elif not isinstance(module, nn.Linear):
                _check_experts(f"layers.{name}.{parameter_name}", parameter)
                experts = True
    if experts:
        language_model.set_experts_implementation(EXPERTS_FUNCTION)
    if 2 * left > total:
        logger.warning(
            "%s of the language model's layers, of %s as loaded, are not quantised: the quantization configuration does not reach them. "
            "A Mixtral's fused experts are parameters of three dimensions, which configurations for Linear layers pass over; "
            "quantize='int8' and 'fp8' reach them",
            _readable(left),
            _readable(total),
        )


def _is_int8(weight: torch.Tensor) -> bool:
    """Whether a weight is torchao's int8 with one scale per row and nothing done to activations."""
    return (
        _format(weight) == "int8"
        and getattr(weight, "act_quant_kwargs", weight) is None
        and getattr(weight, "act_pre_scale", weight) is None
        and weight.scale.numel() == weight.shape[0]
    )


class Int8Linear(nn.Linear):
    """A Linear of torchao's int8 weights. Everything but these two stays torchao's:

    - a few bfloat16 rows on a CPU: torch's own kernel reads the int8 weights, where torchao converts them all in every product;
    - float16: the weights are scaled before the product, where torchao sums up unscaled ones, beyond float16's range.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float16:
            return F.linear(x, self.weight.dequantize(), self.bias)
        rows = x.numel() // max(x.shape[-1], 1)
        packed = x.dtype == torch.bfloat16 and x.device.type == "cpu" and rows <= _PACKED_ROWS
        if not packed or (torch.is_grad_enabled() and x.requires_grad):
            return super().forward(x)
        scale = self.weight.scale.flatten().to(x.dtype)
        y = torch._weight_int8pack_mm(x.reshape(rows, x.shape[-1]), self.weight.qdata, scale).reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def _check_experts(name: str, weight: torch.Tensor) -> None:
    known = _format(weight) in ("int8", "fp8") and getattr(weight, "act_quant_kwargs", weight) is None
    if not known or weight.scale.shape != (*weight.shape[:2], 1):
        scales = list(weight.scale.shape) if hasattr(weight, "scale") else "none"
        raise BackendError(
            f"{name}: expected fused experts as weight-only int8 or fp8 with one scale per row, got {_format(weight)} with scales {scales}"
        )


def quantized_experts(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Mixtral's experts over quantised weights; transformers' own forms call what torchao's tensors do not have.

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
        # a decoded token: its experts' weights are gathered, the host is not asked which
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
    """Row i [S, K] times the weight of its expert: [S, N]."""
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
