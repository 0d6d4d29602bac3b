"""The attention that a caller may ask for by name, and why flash-attn cannot compute it here, as a sentence."""

import importlib
import importlib.util

import torch

from ..errors import BackendError, quoted

FLASH = "flash_attention_2"
CHOICES = ("sdpa", "eager", FLASH)
# The oldest GPUs that flash-attn has kernels for: Ampere.
_OLDEST = (8, 0)


def check(name: str | None, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Raises BackendError where there is no such attention, or where it cannot run; None is the model's own choice.

    Args:
        name: as in `mg_fast.load`.
        device: where the model runs.
        dtype: of the weights. None where it is not known yet.
    """
    if name is None:
        return
    if not isinstance(name, str) or name not in CHOICES:
        raise BackendError(f"attn_implementation: expected one of {', '.join(CHOICES)}, got {quoted(name)}")
    if reason := why_not(name, device, dtype):
        raise BackendError(f"attn_implementation={name!r}: {reason}")


def why_not(name: str, device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Why an attention of `CHOICES` cannot run on this device and in this dtype; None where it can."""
    if name != FLASH:
        return None
    if device.type != "cuda":
        return f"flash-attn runs on GPUs, got the device {device}"
    if dtype not in (None, torch.float16, torch.bfloat16):
        return f"flash-attn takes float16 or bfloat16, got {str(dtype).removeprefix('torch.')}"
    if importlib.util.find_spec("flash_attn") is None:
        return "expected the package flash-attn (`pip install 'mg_fast[flash]'`), which is not installed"
    try:
        importlib.import_module("flash_attn")
    except ImportError as error:
        # Its compiled part fits one release of torch alone.
        return f"flash-attn is installed, but cannot be imported: {str(error).splitlines()[0]}"
    generation = torch.cuda.get_device_capability(device)
    if generation < _OLDEST:
        return f"flash-attn needs a GPU of compute capability 8.0 or later, got {generation[0]}.{generation[1]}"
    return None
