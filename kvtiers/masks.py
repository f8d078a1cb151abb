"""Which tokens of a context the current ones may see."""

from collections.abc import Callable
from functools import lru_cache

import torch
from jaxtyping import Bool
from torch import Tensor

from kvtiers.timeline import Timeline

_REMEMBERED = 2**24
"""Bytes of a mask beyond which it is made anew for every layer, since what is remembered is held for ever."""


def causal(current: int, tokens: int, device: torch.device) -> Bool[Tensor, "current tokens"]:
    """All history, and of the current tokens those that are not later.

    Layers that need the same small mask share it: it must not be changed.
    """
    make: Callable[..., Tensor] = _causal if current * tokens <= _REMEMBERED else _causal.__wrapped__
    return make(current, tokens, device)


@lru_cache(maxsize=2)
def _causal(current: int, tokens: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it is remembered
        return torch.ones(current, tokens, dtype=torch.bool, device=device).tril(tokens - current)


def dropping(
    timeline: Timeline, recent_start: int, committed: int, steps: int, device: torch.device
) -> Bool[Tensor, "current tokens"]:
    """As `causal`, less what is dropped while the current tokens pass, as if they had come one at a time.

    The context holds the sink and steps `recent_start` to `steps`; the current tokens are steps `committed` to `steps`.
    """
    size = (steps - committed) * (steps - recent_start + timeline.sink)
    make: Callable[..., Tensor] = _dropping if size <= _REMEMBERED else _dropping.__wrapped__
    return make(timeline, recent_start, committed, steps, device)


@lru_cache(maxsize=2)
@torch.inference_mode(False)
def _dropping(timeline: Timeline, recent_start: int, committed: int, steps: int, device: torch.device) -> Tensor:
    now = torch.arange(committed, steps, device=device)[:, None]
    anchors = torch.arange(min(timeline.sink, steps), device=device)
    step = torch.cat([anchors, torch.arange(recent_start, steps, device=device)])
    past = (now - (timeline.recent or 0) - timeline.start).clamp(min=0)
    oldest = timeline.start + past // timeline.block_size * timeline.block_size
    return (step <= now) & ((step < timeline.sink) | (step >= oldest))
