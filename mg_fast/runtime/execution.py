"""Where a module computes and in which dtype: its weights may be offloaded, and the parts next to it may have another dtype."""

import contextlib
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ..errors import BackendError

# how torch's products, convolutions, norms and attention say that their tensors have different dtypes
_REFUSED_MIXTURES = (
    "same dtype",
    "mixed dtype",
    "expected scalar type",
    "should be the same",
    "should have the same",
    "same data type",
)


def execution_device(module: nn.Module) -> torch.device:
    """The device that a module computes on.

    Weights that accelerate has offloaded (`device_map` with "cpu" or "disk") lie on "meta" between calls. A hook brings them to the
    execution device for each call, and that device is what counts.

    Args:
        module: a module with parameters; of several parts on several devices the first one counts.
    """
    for part in module.modules():
        for hook in accelerate_hooks(part):
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        for parameter in part.parameters(recurse=False):
            return parameter.device
    return torch.device("cpu")


def accelerate_hooks(module: nn.Module) -> list:
    """The hooks that accelerate has put around a module's forward; they are not among torch's own."""
    hook = vars(module).get("_hf_hook")
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def set_offloaded(module: nn.Module, name: str, value: torch.Tensor) -> bool:
    """Gives an offloaded parameter of a module another value, where its weights lie: on disk, or in memory where there is no folder for it.

    Returns:
        Whether the weights of this module are offloaded at all.
    """
    hook = next((hook for hook in accelerate_hooks(module) if getattr(hook, "weights_map", None) is not None), None)
    if hook is None:
        return False
    weights, key = hook.weights_map, name
    while hasattr(weights, "prefix"):
        weights, key = weights.dataset, f"{weights.prefix}{key}"
    value = value.to(getattr(module, name).dtype)
    if key not in weights.state_dict and weights.save_folder is not None:
        from accelerate.utils import offload_weight

        offload_weight(value, key, weights.save_folder, weights.index)
    else:
        weights.state_dict[key] = value
    if key not in weights.all_keys:
        weights.all_keys.append(key)
    return True


def only_placed(module: nn.Module) -> bool:
    """Whether the replaced forward of a module is accelerate's, and does no more than move inputs and outputs between devices."""
    hooks = accelerate_hooks(module)
    original = getattr(vars(module).get("_old_forward"), "__func__", None)
    placing = all(type(hook).__name__ == "AlignDevicesHook" and not hook.offload for hook in hooks)
    return bool(hooks) and placing and original is type(module).forward


def compute_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype that a module takes its input in, by its first parameter of 16 bits or more; None where it has none."""
    module = running(module)
    for parameter in module.parameters(recurse=False):
        # Quantized weights are stored in fewer bits than they are computed in.
        if parameter.is_floating_point() and parameter.element_size() > 1:
            return parameter.dtype
    for part in module.children():
        if (dtype := compute_dtype(part)) is not None:
            return dtype
    return None


def running(module: nn.Module) -> nn.Module:
    """The module that takes the input where peft has wrapped it: a layer below its adapters, or the trained copy of a whole module."""
    while True:
        parts = module._modules
        if "modules_to_save" in parts and "original_module" in parts:
            active = [] if module.disable_adapters else [name for name in module.active_adapters if name in parts["modules_to_save"]]
            module = parts["modules_to_save"][active[0]] if active else parts["original_module"]
        elif "base_layer" in parts:
            module = parts["base_layer"]
        else:
            return module


def at_seam(x: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """A tensor in the dtype of the part of the model that takes it next, which may differ from the part that it comes from.

    Under autocast it stays as it is, as autocast casts it in each operation.
    """
    dtype = compute_dtype(module)
    return x if dtype is None or dtype == x.dtype or autocasting(x) else x.to(dtype)


def autocasting(x: torch.Tensor) -> bool:
    """Whether autocast is on where a tensor lies."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def call(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Calls a part of the model, its input in the dtype that it computes in."""
    return module(at_seam(x, module))


@contextlib.contextmanager
def mixed_dtypes_named(parts: Mapping[str, nn.Module]):
    """Where torch refuses a product of two dtypes in parts that cast nothing inside, says which layers differ from the rest of their part.

    Args:
        parts: what runs, by their names.

    Raises:
        BackendError: in place of torch's own error.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(phrase in str(error) for phrase in _REFUSED_MIXTURES):
            raise
        for name, part in parts.items():
            dtypes = {where: p.dtype for where, p in part.named_parameters() if p.is_floating_point() and p.element_size() > 1}
            if len(kinds := Counter(dtypes.values()).most_common()) > 1:
                usual = kinds[0][0]
                where, dtype = next((where, dtype) for where, dtype in dtypes.items() if dtype != usual)
                raise BackendError(
                    f"{name}: expected all of its layers in one dtype, got {where} in {dtype} among {usual}; "
                    f"convert it with .to({usual}), or the whole part"
                ) from error
        raise


class Chain(nn.Sequential):
    """Layers one after the other, each in its own dtype: a LayerNorm is often kept in float32 among layers of 16 bits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self:
            x = call(layer, x)
        return x


def complete_device_map(device_map: Mapping[str, object], names: Iterable[str], tied: Mapping[str, str] | None = None) -> dict[str, object]:
    """A device map that says the same without entries for a module and for something inside it.

    accelerate cannot place such a module, as with {"": "cpu", "lm_head": "disk"}. And transformers looks a parameter up by the beginning of
    its name alone, so that an entry for "layers.1" holds for "layers.10" too where that has none of its own. Here every module beside one
    that has an entry gets its own.

    Args:
        device_map: devices by the names of modules, "" for all others.
        names: of the model's parameters.
        tied: names of parameters that are others, by whose names they go. On disk they lie together, as they are loaded together.
    """
    # transformers and accelerate compare devices with "cpu", "disk" and numbers, which a torch.device is equal to none of
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
            next((entry for entry in complete if not entry or parameter.startswith(f"{entry}.")), None) for parameter in (name, source)
        ]
        if None not in entries and "disk" in (places := [complete[entry] for entry in entries]) and places[0] != places[1]:
            complete[entries[0]] = places[1]
    return complete


def _plain_device(device: object) -> object:
    """A torch.device as the number of a GPU or as its name; anything else as it is."""
    if not isinstance(device, torch.device):
        return device
    return device.index if device.type == "cuda" and device.index is not None else str(device)
