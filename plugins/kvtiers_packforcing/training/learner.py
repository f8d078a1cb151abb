"""A network that learns: its weights, its optimiser, and how many updates it has had."""

import attrs
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Muon, Optimizer

from kvtiers_packforcing.training.config import OptimiserConfig
from kvtiers_packforcing.training.sharding import put, whole
from kvtiers_packforcing.training.sharing import Share


@attrs.define(eq=False, kw_only=True)
class Learner:
    """One of the networks of a stage. `updates` counts its optimiser steps."""

    name: str
    network: nn.Module
    betas: tuple[float, float]
    settings: OptimiserConfig
    optimiser: AdamW = attrs.field(init=False)
    matrices: Muon | None = attrs.field(init=False, default=None)
    """What updates the matrices of layers, if it is not `optimiser`."""
    updates: int = attrs.field(init=False, default=0)

    def __attrs_post_init__(self) -> None:
        decay = self.settings.weight_decay
        named = list(self.network.named_parameters())
        ours = [weight for name, weight in named if self.settings.matrices == "muon" and _in_layer(name, weight)]
        if ours:
            self.matrices = Muon(ours, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        left = [weight for _, weight in named if all(weight is not other for other in ours)]
        self.optimiser = AdamW(left, betas=self.betas, weight_decay=decay)

    def update(self, rate: float, clip_norm: float, share: Share) -> float:
        """Make one optimiser step with the gradients that are there. Returns their norm before it was clipped."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        for group in () if self.matrices is None else self.matrices.param_groups:
            group["lr"] = rate * self.settings.matrix_rate
        for weight in self.network.parameters():  # AdamW skips what has no gradient, and would lose count of steps
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        grads = [weight.grad for weight in self.network.parameters() if weight.grad is not None]
        share.average(grad for grad in grads if not isinstance(grad, DTensor))  # FSDP has averaged those in shards
        norm = clip_grad_norm_(self.network.parameters(), clip_norm, error_if_nonfinite=True)
        self.optimiser.step()
        if self.matrices is not None:
            self.matrices.step()
        self.updates += 1
        return float(whole(norm))

    def tensors(self) -> dict[str, Tensor]:
        """Weights and moments by the names that they have in a checkpoint. They may be in shards."""
        found: dict[str, Tensor] = {}
        for name, weight in self.network.named_parameters():
            first, second = self._moments(weight)
            found |= {f"model.{name}": weight.detach(), f"first.{name}": first, f"second.{name}": second}
        return found if self.name == "model" else {f"{self.name}.{name}": part for name, part in found.items()}

    def restore(self, tensors: dict[str, Tensor], updates: int) -> None:
        """Become what `tensors` said after `updates` updates."""
        start = "" if self.name == "model" else f"{self.name}."
        self.updates = updates
        for name, weight in self.network.named_parameters():
            put(weight, tensors[f"{start}model.{name}"])
            if updates:
                moments = (torch.zeros_like(weight), torch.zeros_like(weight))
                for moment, kind in zip(moments, ("first", "second"), strict=True):
                    put(moment, tensors[f"{start}{kind}.{name}"])
                self._begin(weight, *moments)

    def _moments(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """What the optimiser remembers of a weight's gradients and of their squares. Muon has no squares."""
        optimiser, first, second = self._home(weight)
        state = optimiser.state.get(weight, {})
        return state.get(first, torch.zeros_like(weight)), state.get(second, torch.zeros_like(weight))

    def _begin(self, weight: Tensor, first: Tensor, second: Tensor) -> None:
        """Have the optimiser remember moments."""
        optimiser, *names = self._home(weight)
        state = {name: moment for name, moment in zip(names, (first, second), strict=True) if name}
        counted = {} if optimiser is self.matrices else {"step": torch.tensor(float(self.updates))}
        optimiser.state[weight] = {**counted, **state}

    def _home(self, weight: Tensor) -> tuple[Optimizer, str, str]:
        """The optimiser of a weight, and what its moments are called there."""
        if self.matrices is not None and any(weight is ours for ours in self.matrices.param_groups[0]["params"]):
            return self.matrices, "momentum_buffer", ""
        return self.optimiser, "exp_avg", "exp_avg_sq"


def _in_layer(name: str, weight: Tensor) -> bool:
    """Whether a weight is a matrix of a transformer's layer."""
    return "blocks." in name and weight.ndim == 2
