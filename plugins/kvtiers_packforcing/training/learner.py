"""A network that learns: its weights, its optimiser, and how many updates it has had."""

import attrs
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from kvtiers_packforcing.training.sharding import put, whole
from kvtiers_packforcing.training.sharing import Share


@attrs.define(eq=False, kw_only=True)
class Learner:
    """One of the networks of a stage. `updates` counts its optimiser steps."""

    name: str
    network: nn.Module
    betas: tuple[float, float]
    weight_decay: float
    optimiser: AdamW = attrs.field(init=False)
    updates: int = attrs.field(init=False, default=0)

    def __attrs_post_init__(self) -> None:
        weights = self.network.parameters()
        self.optimiser = AdamW(weights, betas=self.betas, weight_decay=self.weight_decay)

    def update(self, rate: float, clip_norm: float, share: Share) -> float:
        """Make one optimiser step with the gradients that are there. Returns their norm before it was clipped."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        for weight in self.network.parameters():  # AdamW skips what has no gradient, and would lose count of steps
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        grads = [weight.grad for weight in self.network.parameters() if weight.grad is not None]
        share.average(grad for grad in grads if not isinstance(grad, DTensor))  # FSDP has averaged those in shards
        norm = clip_grad_norm_(self.network.parameters(), clip_norm, error_if_nonfinite=True)
        self.optimiser.step()
        self.updates += 1
        return float(whole(norm))

    def tensors(self) -> dict[str, Tensor]:
        """Weights and moments, whole, by the names that they have in a checkpoint."""
        found: dict[str, Tensor] = {}
        for name, weight in self.network.named_parameters():
            state = self.optimiser.state[weight]
            first, second = (state.get(key, torch.zeros_like(weight)) for key in ("exp_avg", "exp_avg_sq"))
            found |= {f"model.{name}": whole(weight.detach())}
            found |= {f"first.{name}": whole(first), f"second.{name}": whole(second)}
        return found if self.name == "model" else {f"{self.name}.{name}": part for name, part in found.items()}

    def restore(self, tensors: dict[str, Tensor], updates: int) -> None:
        """Become what `tensors` said after `updates` updates."""
        start = "" if self.name == "model" else f"{self.name}."
        self.updates = updates
        for name, weight in self.network.named_parameters():
            put(weight, tensors[f"{start}model.{name}"])
            if updates:
                state = {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
                for key, kind in zip(state, ("first", "second"), strict=True):
                    put(state[key], tensors[f"{start}{kind}.{name}"])
                self.optimiser.state[weight] = {"step": torch.tensor(float(updates)), **state}
