"""Weights in shards: FSDP2, so that no process holds the weights, gradients and moments of a whole model.

A tensor may be whole or one process's shard of it (a DTensor). What is here does the same to both, so that checkpoints
and averages need not know.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(module: Any, device: torch.device) -> None:
    """Cut the weights of a module over all processes. Those of a transformer are gathered layer by layer.

    All of them are cut again after every forward, those around the layers too: then a module's parameters are always
    those that its optimiser knows.
    """
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for layer in getattr(module, "blocks", ()):
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. Every process must ask at the same time if it is in shards."""
    full: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full


@torch.no_grad()
def put(held: Tensor, full: Tensor) -> None:
    """Write a whole tensor into one that may be in shards."""
    if isinstance(held, DTensor):
        full = distribute_tensor(full.to(held.device), held.device_mesh, held.placements)
    held.copy_(full)


@contextmanager
def gathered(*modules: nn.Module) -> Iterator[None]:
    """Inside of the block, the weights that belong to no layer are whole, so that a part can be called by itself."""
    with ExitStack() as stack:
        for module in modules:
            if isinstance(module, FSDPModule):
                module.unshard()
                stack.callback(module.reshard)
        yield
