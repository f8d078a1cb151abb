"""Which tokens of a context the current ones may see."""

import torch
from jaxtyping import Bool
from torch import Tensor

from kvtiers.timeline import Timeline


def causal(current: int, tokens: int, device: torch.device) -> Bool[Tensor, "current tokens"]:
    """All history, and of the current tokens those that are not later."""
    return torch.ones(current, tokens, dtype=torch.bool, device=device).tril(tokens - current)


def dropping(
    timeline: Timeline, recent_start: int, committed: int, steps: int, device: torch.device
) -> Bool[Tensor, "current tokens"]:
    """As `causal`, less what is dropped while the current tokens pass, as if they had come one at a time.

    The context holds the sink and steps `recent_start` to `steps`; the current tokens are steps `committed` to `steps`.
    """
    now = torch.arange(committed, steps, device=device)[:, None]
    anchors = torch.arange(min(timeline.sink, steps), device=device)
    step = torch.cat([anchors, torch.arange(recent_start, steps, device=device)])
    past = (now - (timeline.recent or 0) - timeline.start).clamp(min=0)
    oldest = timeline.start + past // timeline.block_size * timeline.block_size
    return (step <= now) & ((step < timeline.sink) | (step >= oldest))
