"""Where a module computes: accelerate may have offloaded its weights, or may move them for each call."""

import torch
from torch import nn


def execution_device(module: nn.Module) -> torch.device:
    """The device that a module computes on.

    Weights that accelerate has offloaded (`device_map` with "cpu" or "disk") lie on "meta" between calls. A hook brings
    them to the execution device for each call, and that device is what counts.

    Args:
        module: a module with parameters; if its parts are on several devices, the first one counts.
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
    """The hooks that accelerate has put around a module's forward, which torch does not list."""
    hook = vars(module).get("_hf_hook")
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def set_offloaded(module: nn.Module, name: str, value: torch.Tensor) -> bool:
    """Sets an offloaded parameter of a module where its weights lie: on disk, or in memory if there is no folder.

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
    """Whether accelerate replaced the forward of a module only to move inputs and outputs between devices."""
    hooks = accelerate_hooks(module)
    original = getattr(vars(module).get("_old_forward"), "__func__", None)
    placing = all(type(hook).__name__ == "AlignDevicesHook" and not hook.offload for hook in hooks)
    return bool(hooks) and placing and original is type(module).forward
