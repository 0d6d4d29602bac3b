"""How a model's weights are stored, and in how many bytes."""

from dataclasses import dataclass

import torch
from torch import nn

# Mini-Gemini's modules that keep their dtype. These are full paths, because transformers compares them with the
# beginning of a parameter's name.
UNQUANTIZED = ("model.vision_tower", "model.vision_tower_aux", "model.patch_mining", "model.mm_projector", "lm_head")


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a model's parameters and buffers as they are stored.

    Scales and zero points are included, and shared tensors are counted once.

    Attributes:
        language_model: bytes of the language model and its head.
        vision: bytes of everything else: towers, patch mining and projector, or what draws pictures.
        unquantized: bytes that the language model would take in the dtype that it computes in.
        formats: how its quantized weights are stored, such as `("int8",)`; empty if none is quantized.
    """

    language_model: int
    vision: int
    unquantized: int
    formats: tuple[str, ...]

    def __str__(self) -> str:
        quantized = f" ({', '.join(self.formats)}; {readable(self.unquantized)} unquantized)" if self.formats else ""
        return f"language model {readable(self.language_model)}{quantized}, vision {readable(self.vision)}"


def weight_bytes(model: nn.Module) -> WeightBytes:
    """Counts the weights of a model that `mg_fast.models.protocol.DecodableModel` describes.

    The scales of bitsandbytes' weights are not counted, because it keeps them elsewhere.
    """
    language_model = vision = unquantized = 0
    formats: dict[str, None] = {}
    seen = set()
    of_language = {module for part in (model.language_model, model.head) for module in part.modules()}
    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            stored = tensor_bytes(tensor)
            if module not in of_language:
                vision += stored
                continue
            language_model += stored
            if (kind := weight_format(tensor)) is None:
                unquantized += stored
            else:
                formats[kind] = None
                # The packed tensors of bitsandbytes have other shapes and dtypes than the weights that they stand for.
                shape = (module.out_features, module.in_features) if isinstance(module, nn.Linear) else tensor.shape
                dtype = tensor.dtype if tensor.is_floating_point() else model.dtype
                unquantized += torch.Size(shape).numel() * dtype.itemsize
    return WeightBytes(language_model, vision, unquantized, tuple(formats))


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor; for a tensor subclass that wraps others, such as torchao's, the bytes of those."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(tensor_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def weight_format(tensor: torch.Tensor) -> str | None:
    """How a quantized weight is stored; None for any other tensor."""
    kind = type(tensor) if type(tensor) is not nn.Parameter else type(tensor.data)
    if kind in (torch.Tensor, nn.Parameter, nn.Buffer):
        return None
    if kind.__name__ == "Float8Tensor":
        return "fp8"
    if kind.__name__ in ("Int8Params", "Params4bit"):
        return {"Int8Params": "bitsandbytes int8", "Params4bit": "bitsandbytes 4-bit"}[kind.__name__]
    return next((name for name in ("int8", "int4") if kind.__name__.lower().startswith(name)), kind.__name__)


def readable(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
