"""Models whose weights are kept elsewhere until they are needed: by accelerate's hooks, or diffusers' group offload."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

_GROUP = "group_offloading"


def group_offload(module: nn.Module) -> Any:
    """The hook of diffusers' group offload on this very module, or None."""
    registry = getattr(module, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(_GROUP)


def device_of(model: Any) -> torch.device:
    """Where `model` runs, wherever its weights are kept meanwhile."""
    for module in model.modules():
        hook = group_offload(module)
        if hook is not None:
            return torch.device(hook.config.onload_device)
        place = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if place is not None:
            return torch.device(place)
    return torch.device(model.device)


@contextmanager
def brought(model: nn.Module) -> Iterator[None]:
    """Bring what group offload brings for `model` itself, such as its buffers, as long as this lasts."""
    hook = group_offload(model)
    with ExitStack() as undo:
        if hook is not None:
            undo.callback(hook.group.offload_)
            hook.group.onload_()
            if hook.group.stream is not None:
                hook.group.stream.synchronize()
        yield


def hidden_weights(model: nn.Module) -> str | None:
    """Why what is written to the weights of `model` would not be what its forward reads; None if it would."""
    for name, module in model.named_modules():
        tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if any(tensor.is_meta for tensor in tensors):
            return f"those of {name or 'the model'} are kept elsewhere (accelerate's offload), or were never made"
        hook = group_offload(module)
        if hook is None:
            continue
        groups = [group for group in (hook.group, getattr(hook, "next_group", None)) if group is not None]
        if any(group.offload_to_disk_path is not None for group in groups):
            return "diffusers' group offload reads them from files on disk"
        if any(group.stream is not None for group in groups):
            return "diffusers' group offload with a stream reads them from copies of its own"
    return None
