"""Which tokens of a context the current ones may see."""

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn.functional import pad

from kvtiers.timeline import Timeline


def causal(current: int, tokens: int, device: torch.device) -> Bool[Tensor, "current tokens"]:
    """All history, and of the current tokens those that are not later."""
    return torch.ones(current, tokens, dtype=torch.bool, device=device).tril(tokens - current)


def dropping(
    timeline: Timeline, recent_start: int, committed_steps: int, num_steps: int, device: torch.device
) -> Bool[Tensor, "current tokens"]:
    """As `causal`, less what is dropped while the current tokens pass, as if they had come one at a time.

    The context holds the sink and steps `recent_start` to `num_steps`; the current tokens are those from step
    `committed_steps`.
    """
    now = torch.arange(committed_steps, num_steps, device=device)[:, None]
    anchors = torch.arange(min(timeline.sink, num_steps), device=device)
    step = torch.cat([anchors, torch.arange(recent_start, num_steps, device=device)])
    past = (now - (timeline.recent or 0) - timeline.sink).clamp(min=0)
    oldest = timeline.sink + past // timeline.block_size * timeline.block_size
    return (step <= now) & ((step < timeline.sink) | (step >= oldest))


def padding(
    valid: Bool[Tensor, "#batch #kv_heads mid_tokens"], before: int, tokens: int
) -> Bool[Tensor, "#batch #kv_heads 1 tokens"]:
    """All of a context of `tokens` tokens, `before` of them before mid, less what stands behind shorter mid blocks."""
    return pad(valid, (before, tokens - before - valid.shape[-1]), value=True)[:, :, None]
