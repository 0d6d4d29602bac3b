"""Quantization of the language model by name: the torchao configuration for each name, and where it cannot run."""

import importlib.metadata
import importlib.util
import logging
import numbers
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin, TorchAoConfig

from ..errors import BackendError
from .stored import UNQUANTIZED

logger = logging.getLogger(__name__)

NAMES = ("int8", "int4", "fp8")
# Mixtral's experts are parameters of three dimensions outside of any Linear, which only a configuration by name
# reaches.
_EXPERTS = r"model\.language_model\.layers\.\d+\.mlp\.experts\.(gate_up|down)_proj"
_LINEARS = r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.[a-z]+_proj"
_INT4_GROUPS = (128, 64, 32)
_CUDA_ARCHITECTURE = {"int4": (8, 0), "fp8": (8, 9)}


def named_config(
    name: str, text_config, device_map, dtype: torch.dtype | None, *, unquantized: Sequence[str] = UNQUANTIZED
) -> TorchAoConfig:
    """The configuration that a name stands for, for one language model on one kind of device.

    Args:
        name: one of `NAMES`.
        text_config: the language model's configuration.
        device_map: as `from_pretrained` takes it.
        dtype: of the weights that are to be quantized.
        unquantized: full names of the modules that keep their dtype, as regular expressions; default Mini-Gemini's.

    Raises:
        BackendError: the configuration cannot run there; the message is the reason.
    """
    if name not in NAMES:
        raise BackendError(
            f"quantize: expected {', '.join(NAMES)} or a transformers quantization configuration, got {name!r}"
        )
    _need("torchao", f"quantize={name!r}", "pip install 'mg_fast[quant]'")
    places = _places(name, device_map)
    for place in places:
        _check_device(name, place, dtype)
    experts = getattr(text_config, "num_local_experts", None) is not None
    if name == "int4" and experts:
        raise BackendError(
            "int4 is not offered for fused experts (Mixtral), which torchao cannot pack for a CPU: use int8 or fp8"
        )
    try:
        config = _torchao_config(name, text_config, places[0].type)
    except ImportError as error:
        raise BackendError(
            f"quantize={name!r} needs torchao 0.18 or newer, got {importlib.metadata.version('torchao')}: {error}"
        ) from None
    if experts:
        from torchao.quantization import FqnToConfig

        config = FqnToConfig(OrderedDict({f"re:{_LINEARS}": config, f"re:{_EXPERTS}": config}))
    return TorchAoConfig(config, modules_to_not_convert=list(unquantized))


def check_config(config: QuantizationConfigMixin, unquantized: Sequence[str] = UNQUANTIZED) -> None:
    """Completes a caller's configuration, so that the vision parts and the head keep their dtype.

    A configuration that says itself what to skip is left as it is. `unquantized` is as in `named_config`.

    Raises:
        BackendError: this is not a quantization configuration, or the package that it needs is not installed.
    """
    if not isinstance(config, QuantizationConfigMixin):
        raise BackendError(
            f"quantize: expected {', '.join(NAMES)} or a transformers quantization configuration, got {config!r}"
        )
    method = str(getattr(getattr(config, "quant_method", None), "value", ""))
    if method.startswith("bitsandbytes"):
        _need("bitsandbytes", "a BitsAndBytesConfig", "pip install bitsandbytes")
    for attribute in ("llm_int8_skip_modules", "modules_to_not_convert"):
        if getattr(config, attribute, unquantized) is None:
            setattr(config, attribute, list(unquantized))


def check_cache(options: dict) -> None:
    """Raises `BackendError` if `generate` is asked for a quantized KV cache whose package is not installed."""
    if options.get("cache_implementation") == "quantized":
        backend = (options.get("cache_config") or {}).get("backend", "quanto")
        package, module = ("optimum-quanto", "optimum.quanto") if backend == "quanto" else (backend, backend)
        _need(module, f"cache_implementation='quantized' (backend {backend!r})", f"pip install {package}", package)


def _need(module: str, what: str, remedy: str, package: str | None = None) -> None:
    parent = module.partition(".")[0]
    if importlib.util.find_spec(parent) is None or importlib.util.find_spec(module) is None:
        raise BackendError(f"{what} needs {package or module}, which is not installed: {remedy}")


def _places(name: str, device_map) -> list[torch.device]:
    """The devices that the layers go to, which must be of one kind."""
    places = set(device_map.values()) if isinstance(device_map, dict) else {"cpu" if device_map is None else device_map}
    if places & {"auto", "balanced", "balanced_low_0", "sequential"}:
        places = set(range(torch.cuda.device_count())) or {"cpu"}
    found = [
        torch.device("cuda", int(p)) if isinstance(p, numbers.Integral) else torch.device("meta" if p == "disk" else p)
        for p in places
    ]
    if len(kinds := {device.type for device in found}) > 1 or not kinds <= {"cuda", "cpu"}:
        raise BackendError(
            f"quantize={name!r} takes one kind of device, CUDA or CPU; the layers would go to {sorted(map(str, found))}"
        )
    return found


def _check_device(name: str, device: torch.device, dtype: torch.dtype | None) -> None:
    if device.type == "cpu":
        if name == "fp8" or dtype != torch.bfloat16:
            better = "only int8 and int4 in bfloat16 have kernels (dtype='bfloat16', --dtype bfloat16)"
            logger.warning(
                "%s with %s on a CPU saves memory and costs time: %s", name, str(dtype).removeprefix("torch."), better
            )
        return
    needed, found = _CUDA_ARCHITECTURE.get(name, (0, 0)), torch.cuda.get_device_capability(device)
    if found < needed:
        needed, found = "sm_{}{}".format(*needed), "sm_{}{}".format(*found)
        raise BackendError(f"{name} needs a GPU of {needed} or newer; {torch.cuda.get_device_name(device)} is {found}")
    if name == "int4" and dtype != torch.bfloat16:
        raise BackendError(
            f"int4 on a GPU needs bfloat16 weights, these are {dtype}: load them with dtype='bfloat16' "
            "(--dtype bfloat16)"
        )


def _torchao_config(name: str, text_config, device: str):
    from torchao import quantization

    # Without this option torchao would change torch.compile's settings for the whole process.
    quiet = {"set_inductor_config": False}
    if name == "int8":
        return quantization.Int8WeightOnlyConfig(**quiet)
    if name == "fp8":
        return quantization.Float8WeightOnlyConfig(**quiet)
    group = _group_size(text_config, device)
    if device == "cpu":
        from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig

        return PrototypeInt4WeightOnlyConfig(group_size=group, **quiet)
    # torch's own kernels take this form; the others need the package mslk.
    return quantization.Int4WeightOnlyConfig(group_size=group, int4_packing_format="tile_packed_to_4d", **quiet)


def _group_size(text_config, device: str) -> int:
    """The largest int4 group size that divides the width of every layer.

    torchao would silently leave the other layers as they are.
    """
    head = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    heads, pairs = text_config.num_attention_heads * head, text_config.num_key_value_heads * head
    hidden, inner = text_config.hidden_size, text_config.intermediate_size
    group = next((g for g in _INT4_GROUPS if all(width % g == 0 for width in (hidden, heads, inner))), None)
    if group is None:
        raise BackendError(
            f"int4 quantizes groups of {', '.join(map(str, _INT4_GROUPS))} weights, which must divide all layers' "
            f"inputs: this model's are {hidden} (hidden), {heads} (heads) and {inner} (intermediate) wide"
        )
    if device == "cpu" and (odd := [width for width in (hidden, heads, pairs, inner) if width % 16]):
        raise BackendError(f"int4 on a CPU takes outputs in multiples of 16; this model has layers of {odd[0]} outputs")
    return group


def check_savable(model: nn.Module) -> None:
    """Raises `BackendError` for weights that torchao has no file format for."""
    if any(type(parameter.data).__name__ == "Int4OpaqueTensor" for parameter in model.parameters()):
        raise BackendError(
            "int4 weights packed for a CPU cannot be saved, because torchao has no file format for them; int8 and fp8 "
            "can be"
        )
