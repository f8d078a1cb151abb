"""Published methods in a few lines each, for tests of the interface: they rewrite mid, or weigh tokens."""

from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, normalize, one_hot

from kvtiers import Blocks, Compressor, Geometry, Moment


def joined(leaving: Blocks, mid: Blocks | None) -> dict[str, Tensor]:
    """All that mid and the leaving blocks hold, as consecutive tokens; offsets are counted from step 0."""
    parts = [part for part in (mid, leaving) if part is not None]
    lead, found = leaving.keys.shape[:2], {"offsets": [], "bias": []}
    for part in parts:
        at = part.offsets.double().expand(*lead, part.count, -1, -1).clone()
        at[..., 0] += part.starts[:, None]
        found["offsets"].append(at.flatten(2, 3))
        bias = part.keys.new_zeros(1, 1, 1, 1) if part.bias is None else part.bias
        found["bias"].append(bias.expand(*lead, part.count, part.tokens).flatten(2, 3))
    for name in ("keys", "values", *(["attention"] if leaving.attention is not None else [])):
        found[name] = [getattr(part, name).flatten(2, 3) for part in parts]
    return {name: torch.cat(each, 2) for name, each in found.items()}


def kept(leaving: Blocks, all_of: dict[str, Tensor], at: Tensor, *, close_up: bool, **changes: Any) -> Blocks:
    """Tokens `at` [batch, kv_heads, n] of what `joined` gave, as one block from step 0."""
    keys, values, offsets = (
        all_of[name].take_along_dim(at[..., None], 2)[:, :, None] for name in ("keys", "values", "offsets")
    )
    attention = None
    if "attention" in all_of:
        group = all_of["attention"].shape[1] // at.shape[1]
        attention = all_of["attention"].gather(2, at.repeat_interleave(group, 1))[:, :, None]
    span = int(leaving.starts[-1]) + leaving.span
    if close_up:
        span, time = keys.shape[3], torch.arange(keys.shape[3], device=keys.device)
        offsets = torch.cat([time[:, None].expand_as(offsets[..., :1]), offsets[..., 1:]], -1)
    return attrs.evolve(
        leaving,
        keys=keys,
        values=values,
        offsets=offsets,
        starts=leaving.starts[:1] * 0,
        span=span,
        offsets_differ=True,
        rotated=None,
        attention=attention,
        bias=changes.get("bias"),
    )


@attrs.frozen(kw_only=True)
class Rewriting(Compressor):
    """Of all that ever left recent, at most `most` tokens a head stay. close_up: they are placed side by side."""

    rewrites: ClassVar[bool] = True
    most: int = 12
    close_up: bool = False

    def age(self, blocks: Blocks, moment: Moment) -> Blocks | None:
        raise AssertionError("a compressor that rewrites is not asked to age")

    def compressed_tokens(self, tokens: int) -> int:
        return tokens

    def mid_tokens(self, geometry: Geometry) -> int:
        return self.most


@attrs.frozen(kw_only=True)
class H2O(Rewriting):
    """The heaviest hitters: most attention since they came (arXiv 2306.14048)."""

    attention: ClassVar[Any] = "sum"
    shared: bool = False

    def rewrite(self, leaving: Blocks, mid: Blocks | None, moment: Moment) -> Blocks | None:
        all_of = joined(leaving, mid)
        score = all_of["attention"].unflatten(1, (leaving.keys.shape[1], -1)).sum(2)
        score = score.mean(1, keepdim=True).expand_as(score) if self.shared else score
        best = score.topk(min(self.most, score.shape[-1]), -1).indices.sort(-1).values
        return kept(leaving, all_of, best, close_up=self.close_up)


@attrs.frozen(kw_only=True)
class TOVA(H2O):
    """What the last query attends most, all heads together (arXiv 2401.06104)."""

    attention: ClassVar[Any] = "latest"
    window: ClassVar[int] = 1
    shared: bool = True


@attrs.frozen(kw_only=True)
class SnapKV(Rewriting):
    """Of a whole prompt, what its last `window` queries attend most, pooled over neighbours (arXiv 2404.14469)."""

    attention: ClassVar[Any] = "latest"
    window: int = 16
    pool: int = 5

    def rewrite(self, leaving: Blocks, mid: Blocks | None, moment: Moment) -> Blocks | None:
        all_of = joined(leaving, mid)
        score = all_of["attention"].unflatten(1, (leaving.keys.shape[1], -1)).sum(2) + all_of["bias"]
        score = avg_pool1d(score, self.pool, 1, self.pool // 2)
        best = score.topk(min(self.most, score.shape[-1]), -1).indices.sort(-1).values
        return kept(leaving, all_of, best, close_up=self.close_up)


@attrs.frozen(kw_only=True)
class AdaKV(Rewriting):
    """The heads of a layer share `budget` tokens (arXiv 2407.11550); all rows are as wide as the widest."""

    attention: ClassVar[Any] = "sum"
    budget: int = 24
    most: int = 64

    def rewrite(self, leaving: Blocks, mid: Blocks | None, moment: Moment) -> Blocks | None:
        all_of = joined(leaving, mid)
        score = all_of["attention"].unflatten(1, (leaving.keys.shape[1], -1)).sum(2) + all_of["bias"]
        count = min(self.budget, score[0].numel())
        alive = torch.zeros_like(score, dtype=torch.bool).flatten(1)
        alive = alive.scatter(1, score.flatten(1).topk(count).indices, True).view_as(score) & (score > -torch.inf)
        width = int(alive.sum(-1).max())
        best = alive.int().sort(dim=-1, descending=True, stable=True).indices[..., :width]
        bias = torch.zeros_like(score).masked_fill(~alive, -torch.inf).gather(-1, best)[:, :, None]
        return kept(leaving, all_of, best, close_up=self.close_up, bias=bias)


@attrs.frozen(kw_only=True)
class Streaming(Rewriting):
    """Some heads attend all of mid, the others none of it (DuoAttention, arXiv 2410.10819)."""

    retrieval_heads: tuple[int, ...] = (0,)
    most: int = 4096

    def rewrite(self, leaving: Blocks, mid: Blocks | None, moment: Moment) -> Blocks | None:
        all_of = joined(leaving, mid)
        every = torch.arange(all_of["keys"].shape[2], device=leaving.keys.device).expand(*leaving.keys.shape[:2], -1)
        bias = torch.full(every.shape, -torch.inf, device=every.device)
        bias[:, list(self.retrieval_heads)] = 0
        return kept(leaving, all_of, every, close_up=self.close_up, bias=bias[:, :, None])


@attrs.frozen(kw_only=True)
class Merge(Compressor):
    """Tokens join the most alike of every `ratio`-th; log n weighs a mean of n (ToMe, arXiv 2210.09461)."""

    ratio: int = 4
    proportional: bool = True

    def age(self, blocks: Blocks, moment: Moment) -> Blocks | None:
        keys, count = blocks.keys.float(), -(-blocks.tokens // self.ratio)
        unit = normalize(keys, dim=-1)
        into = (unit @ unit[..., :: self.ratio, :].mT).argmax(-1)
        into[..., :: self.ratio] = torch.arange(count, device=into.device)
        share = one_hot(into, count).to(keys.dtype).mT
        size = share.sum(-1)
        share = share / size[..., None]
        return attrs.evolve(
            blocks,
            keys=(share @ keys).to(blocks.keys.dtype),
            values=(share @ blocks.values.float()).to(blocks.values.dtype),
            offsets=blocks.offsets[..., :: self.ratio, :],
            rotated=None,
            bias=size.log() if self.proportional else None,
        )

    def compressed_tokens(self, tokens: int) -> int:
        return -(-tokens // self.ratio)
