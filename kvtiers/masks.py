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
    timeline: Timeline, aged_to: int, settled: int, seen: int, device: torch.device
) -> Bool[Tensor, "current tokens"]:
    """As `causal`, less what is dropped while the current tokens pass, as if they had come one at a time.

    The context holds the sink and steps `aged_to` to `seen`; the current tokens are steps `settled` to `seen`.
    """
    now = torch.arange(settled, seen, device=device)[:, None]
    anchors = torch.arange(min(timeline.sink, seen), device=device)
    step = torch.cat([anchors, torch.arange(aged_to, seen, device=device)])
    past = (now - (timeline.recent or 0) - timeline.sink).clamp(min=0)
    oldest = timeline.sink + past // timeline.block_size * timeline.block_size
    return (step <= now) & ((step < timeline.sink) | (step >= oldest))


def padding(
    own: Bool[Tensor, "#batch #kv_heads mid_tokens"], before: int, tokens: int
) -> Bool[Tensor, "#batch #kv_heads 1 tokens"]:
    """All of a context of `tokens` tokens, `before` of them before mid, less what stands behind shorter mid blocks."""
    return pad(own, (before, tokens - before - own.shape[-1]), value=True)[:, :, None]
