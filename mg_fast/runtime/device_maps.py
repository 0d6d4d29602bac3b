"""Rewrites device maps so that transformers and accelerate can follow them."""

from collections.abc import Iterable, Mapping

import torch


def complete_device_map(
    device_map: Mapping[str, object], names: Iterable[str], tied: Mapping[str, str] | None = None
) -> dict[str, object]:
    """An equivalent device map in which no module has an entry beside an entry for something inside it.

    accelerate cannot place such a module, as with {"": "cpu", "lm_head": "disk"}. And transformers compares only the
    beginning of a parameter's name, so that an entry for "layers.1" also holds for "layers.10" if that has none of its
    own. In the result every module beside one that has an entry gets its own entry.

    Args:
        device_map: devices by the names of modules, "" for all others.
        names: names of the model's parameters.
        tied: for each tied parameter, the name of the parameter that it shares, under which it is stored. On disk the
            two are placed together, as they are loaded together.
    """
    # transformers and accelerate compare devices with "cpu", "disk" and numbers, and a torch.device is equal to none of
    # these.
    device_map = {name: _plain_device(device) for name, device in device_map.items()}
    complete, names = {}, list(names)

    def below(name: str, candidates: Iterable[str]) -> list[str]:
        return [other for other in candidates if other and (not name or other.startswith(f"{name}."))]

    def add(name: str, device) -> None:
        device = device_map.get(name, device)
        if not below(name, device_map):
            if device is not None:
                complete[name] = device
            return
        depth = len(name.split(".")) if name else 0
        for child in dict.fromkeys(".".join(other.split(".")[: depth + 1]) for other in below(name, names)):
            add(child, device)

    add("", None)
    for name, source in (tied or {}).items():
        entries = [
            next((entry for entry in complete if not entry or parameter.startswith(f"{entry}.")), None)
            for parameter in (name, source)
        ]
        if (
            None not in entries
            and "disk" in (places := [complete[entry] for entry in entries])
            and places[0] != places[1]
        ):
            complete[entries[0]] = places[1]
    return complete


def _plain_device(device: object) -> object:
    """A torch.device as the number of a GPU or as its name; anything else unchanged."""
    if not isinstance(device, torch.device):
        return device
    return device.index if device.type == "cuda" and device.index is not None else str(device)
