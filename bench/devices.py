"""The device that a command runs on."""

import torch

from .errors import NoDevice


def check_device(device: str | None) -> str:
    """The device's type; for None a GPU where torch sees one, else the CPU. Raises NoDevice where it is not here."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise NoDevice(f"unknown device {device!r}: expected cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise NoDevice(
            "a GPU was asked for (--device cuda) and torch sees none here; without one: --device cpu, "
            "or `python -m bench memory`"
        )
    return device
