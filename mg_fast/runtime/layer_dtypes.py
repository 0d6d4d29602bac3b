"""The dtypes in which the layers of a model compute; neighbouring parts may have different ones."""

import contextlib
from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn

from ..errors import BackendError

# Phrases by which torch's products, convolutions, norms and attention report tensors of different dtypes.
_REFUSED_MIXTURES = (
    "same dtype",
    "mixed dtype",
    "expected scalar type",
    "should be the same",
    "should have the same",
    "same data type",
)


def compute_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype in which a module takes its input: that of its first parameter of at least 16 bits.

    None if it has no such parameter, or if FSDP has divided it between processes: then it is computed in a dtype of
    FSDP's own, which its input is cast to.
    """
    module = running(module)
    for parameter in module.parameters(recurse=False):
        # Quantized weights are stored in fewer bits than they are computed in.
        if parameter.is_floating_point() and parameter.element_size() > 1:
            # Only the tensors of FSDP and its like have a mesh of devices.
            return None if hasattr(parameter, "device_mesh") else parameter.dtype
    for part in module.children():
        if (dtype := compute_dtype(part)) is not None:
            return dtype
    return None


def running(module: nn.Module) -> nn.Module:
    """The module that takes the input, where peft has wrapped it.

    It is the layer below its adapters, or the trained copy of a whole module.
    """
    while True:
        parts = module._modules
        if "modules_to_save" in parts and "original_module" in parts:
            active = (
                []
                if module.disable_adapters
                else [name for name in module.active_adapters if name in parts["modules_to_save"]]
            )
            module = parts["modules_to_save"][active[0]] if active else parts["original_module"]
        elif "base_layer" in parts:
            module = parts["base_layer"]
        else:
            return module


def at_seam(x: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """Casts a tensor to the dtype of the part of the model that takes it next, which may differ from its own.

    Under autocast the tensor stays as it is, because autocast casts it in each operation.
    """
    dtype = compute_dtype(module)
    return x if dtype is None or dtype == x.dtype or autocasting(x) else x.to(dtype)


def autocasting(x: torch.Tensor) -> bool:
    """Whether autocast is on for the device of a tensor."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def call(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Calls a part of the model with its input in the dtype that the part computes in."""
    return module(at_seam(x, module))


@contextlib.contextmanager
def mixed_dtypes_named(parts: Mapping[str, nn.Module]):
    """Where torch refuses a product of two dtypes, names a layer whose dtype differs from the rest of its part.

    Args:
        parts: the parts that run within the block, by name. They cast nothing inside.

    Raises:
        BackendError: replaces torch's own error.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(phrase in str(error) for phrase in _REFUSED_MIXTURES):
            raise
        for name, part in parts.items():
            dtypes = {
                where: p.dtype for where, p in part.named_parameters() if p.is_floating_point() and p.element_size() > 1
            }
            if len(kinds := Counter(dtypes.values()).most_common()) > 1:
                usual = kinds[0][0]
                where, dtype = next((where, dtype) for where, dtype in dtypes.items() if dtype != usual)
                raise BackendError(
                    f"{name}: expected all of its layers in one dtype, got {where} in {dtype} among {usual}; "
                    f"convert it with .to({usual}), or the whole part"
                ) from error
        raise


class Chain(nn.Sequential):
    """Layers in sequence, each in its own dtype: a LayerNorm is often kept in float32 among layers of 16 bits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self:
            x = call(layer, x)
        return x
