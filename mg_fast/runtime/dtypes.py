"""The dtypes that weights can be loaded in, by all of their usual names.

torch is imported only where a torch.dtype is made.
"""

from ..errors import BackendError, quoted

# Usual names of a dtype, and torch's name for it.
_NAMES = {
    "float32": "float32",
    "fp32": "float32",
    "float": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "half": "float16",
    "float64": "float64",
    "double": "float64",
}
CHOICES = "auto, float32, bfloat16, float16 (or fp32, bf16, fp16), or a floating-point torch.dtype"


def dtype_name(dtype: str) -> str:
    """Torch's name for a dtype, from any of its usual names, with or without `torch.` before it; `auto` is unchanged.

    Raises:
        BackendError: there is no such name; the message lists the choices.
    """
    name = dtype.removeprefix("torch.")
    if dtype == "auto":
        return dtype
    if name not in _NAMES:
        raise BackendError(f"dtype: expected {CHOICES}, got {quoted(dtype)}")
    return _NAMES[name]


def wanted_dtype(dtype):
    """The dtype that a caller means: a torch.dtype, or `auto`, which None means too.

    A dict with a dtype for each part of a model is returned unchanged, because transformers reads it.

    Raises:
        BackendError: the value is not a floating-point dtype; the message lists the choices.
    """
    import torch

    if dtype is None or isinstance(dtype, dict):
        return "auto" if dtype is None else dtype
    if isinstance(dtype, str):
        name = dtype_name(dtype)
        return name if name == "auto" else getattr(torch, name)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise BackendError(f"dtype: expected {CHOICES}, got {quoted(dtype)}")
    return dtype
