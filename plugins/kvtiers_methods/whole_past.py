"""What the methods that decide over the whole past share: all that ever left recent is one block, made anew each time.

A token that was left out is gone. Each KV head may keep tokens of its own.
"""

from typing import Any, ClassVar

import attrs
import torch
from attrs import validators as v
from jaxtyping import Float, Int
from torch import Tensor

from kvtiers.blocks import Blocks
from kvtiers.errors import PolicyError, SlotError
from kvtiers.geometry import Geometry
from kvtiers.slots import Compressor, Moment


@attrs.frozen(eq=False, kw_only=True)
class Past:
    """The tokens of mid and of what leaves recent, in order of origin. Offsets are counted from step 0.

    first: the step at which mid begins, right behind the sink. attention: by query head, if the compressor asked for
    it. bias: what is added to a token's logits; minus infinity for a token that a head does not have.
    """

    leaving: Blocks
    first: Int[Tensor, " 1"]
    keys: Float[Tensor, "batch kv_heads tokens head_dim"]
    values: Float[Tensor, "batch kv_heads tokens value_dim"]
    offsets: Float[Tensor, "batch kv_heads tokens axes"]
    bias: Float[Tensor, "batch kv_heads tokens"]
    attention: Float[Tensor, "batch query_heads tokens"] | None

    @classmethod
    def of(cls, leaving: Blocks, mid: Blocks | None) -> "Past":
        """What `Compressor.rewrite` is given."""
        parts, lead = [part for part in (mid, leaving) if part is not None], leaving.keys.shape[:2]
        offsets, biases = [], []
        for part in parts:
            offsets.append(positions_of(part).expand(*lead, -1, -1, -1).flatten(2, 3))
            bias = part.keys.new_zeros(1, 1, 1, 1) if part.bias is None else part.bias
            biases.append(bias.expand(*lead, part.count, part.tokens).flatten(2, 3))
        masses = [part.attention.flatten(2, 3) for part in parts if part.attention is not None]
        return cls(
            leaving=leaving,
            first=parts[0].starts[:1],
            keys=torch.cat([part.keys.flatten(2, 3) for part in parts], 2),
            values=torch.cat([part.values.flatten(2, 3) for part in parts], 2),
            offsets=torch.cat(offsets, 2),
            bias=torch.cat(biases, 2),
            attention=torch.cat(masses, 2) if len(masses) == len(parts) else None,
        )

    def noted(self) -> Float[Tensor, "batch kv_heads group tokens"]:
        """The attention, by the KV head that serves a query head."""
        if self.attention is None:
            raise PolicyError("no attention was noted; a compressor says in `attention` which one it needs")
        noted: Tensor = self.attention.unflatten(1, (self.keys.shape[1], -1))
        return noted

    def mass(self) -> Float[Tensor, "batch kv_heads tokens"]:
        """The attention of all query heads of a KV head, with minus infinity where the head lacks the token."""
        mass: Tensor = self.noted().sum(2) + self.bias
        return mass

    def block(
        self,
        at: Int[Tensor, "batch kv_heads kept"],
        *,
        close_up: bool,
        bias: Float[Tensor, "batch kv_heads kept"] | None = None,
    ) -> Blocks:
        """Tokens `at` as one block that begins where mid does. close_up: they are placed one step after the other."""
        keys, values, offsets = (
            part.take_along_dim(at[..., None], 2)[:, :, None] for part in (self.keys, self.values, self.offsets)
        )
        attention = None
        if self.attention is not None:
            group = self.attention.shape[1] // at.shape[1]
            attention = self.attention.gather(2, at.repeat_interleave(group, 1))[:, :, None]
        span = int(self.leaving.starts[-1]) + self.leaving.span - int(self.first)
        offsets[..., 0] -= self.first
        if close_up:
            span, time = keys.shape[3], torch.arange(keys.shape[3], device=keys.device)
            offsets = torch.cat([time[:, None].expand_as(offsets[..., :1]), offsets[..., 1:]], -1)
        return attrs.evolve(
            self.leaving,
            keys=keys,
            values=values,
            offsets=offsets,
            starts=self.first,
            span=span,
            offsets_differ=True,
            rotated=None,
            attention=attention,
            bias=None if bias is None else bias[:, :, None],
        )


@attrs.frozen(kw_only=True)
class WholePast(Compressor):
    """Of all that ever left recent, at most `most` tokens of each KV head stay: those with the highest `scores`.

    close_up: they are placed side by side, under a realigner that closes up; else where they were.
    """

    rewrites: ClassVar[bool] = True
    most: int = attrs.field(default=508, validator=[v.instance_of(int), v.ge(1)])
    close_up: bool = attrs.field(default=False, validator=v.instance_of(bool))

    def scaled(self, share: float) -> Compressor:
        return attrs.evolve(self, most=max(1, round(self.most * share)))

    def scores(self, past: Past, moment: Moment) -> Float[Tensor, "batch kv_heads tokens"]:
        """How much each token matters; minus infinity where `past.bias` is. A method says it here, or in `rewrite`."""
        raise SlotError(f"{type(self).__name__} defines neither scores() nor rewrite(); define one of them")

    def budget(self, layer: int) -> int:
        """How many tokens a KV head of a layer keeps."""
        return self.most

    def rewrite(self, leaving: Blocks, mid: Blocks | None, moment: Moment) -> Blocks | None:
        past = Past.of(leaving, mid)
        return past.block(best(self.scores(past, moment), self.budget(moment.layer)), close_up=self.close_up)

    def age(self, blocks: Blocks, moment: Moment) -> Blocks | None:
        raise PolicyError(f"{type(self).__name__} rewrites all of mid; it does not age blocks")

    def compressed_tokens(self, tokens: int) -> int:
        return tokens

    def mid_tokens(self, geometry: Geometry) -> int:
        return self.most


def positions_of(blocks: Blocks) -> Float[Tensor, "*blocks tokens axes"]:
    """Where the tokens of blocks were, [batch or 1, kv_heads or 1, blocks, tokens, axes]."""
    found = blocks.offsets.double().expand(*blocks.offsets.shape[:2], blocks.count, -1, -1).clone()
    found[..., 0] += blocks.starts[:, None]
    return found


def remade(
    leaving: Blocks,
    keys: Float[Tensor, "batch kv_heads tokens head_dim"],
    values: Float[Tensor, "batch kv_heads tokens value_dim"],
    offsets: Float[Tensor, "tokens axes"],
    *,
    starts: Int[Tensor, " 1"],
    span: int,
    moment: Moment,
) -> Blocks:
    """One block of new tokens for all of mid. keys: before rotation; they are rotated where stored keys are."""
    made = attrs.evolve(
        leaving,
        keys=keys.to(leaving.keys.dtype)[:, :, None],
        values=values.to(leaving.values.dtype)[:, :, None],
        offsets=offsets[None, None, None],
        starts=starts,
        span=span,
        offsets_differ=False,
        rotated=None,
        attention=None,
        bias=None,
    )
    return attrs.evolve(made, keys=turned(made.keys, positions_of(made), moment))


def turned(
    x: Float[Tensor, "*batch tokens head_dim"], positions: Float[Tensor, "*batch_or_1 tokens axes"], moment: Moment
) -> Float[Tensor, "*batch tokens head_dim"]:
    """`x` rotated to `positions`, if the stored keys are rotated and the model rotates; else as it is."""
    if not moment.keys_rotated or moment.rotary is None:
        return x
    rotated: Tensor = moment.rotary.rotate(x, positions)
    return rotated


def unturned(
    x: Float[Tensor, "*batch tokens head_dim"], positions: Float[Tensor, "*batch_or_1 tokens axes"], moment: Moment
) -> Float[Tensor, "*batch tokens head_dim"]:
    """`x` as it was before `turned` rotated it to these positions."""
    rotary = moment.rotary
    if not moment.keys_rotated or rotary is None:
        return x
    cos, sin = (part / rotary.scaling**2 for part in rotary.table(-positions, x.dtype))
    plain: Tensor = rotary.apply(x, (cos, sin))
    return plain


def unrotated_queries(past: Past, moment: Moment) -> Float[Tensor, "batch kv_heads group window head_dim"]:
    """The latest queries in float32, as they were before the model rotated them, by the KV head that serves them."""
    if moment.queries is None:
        raise PolicyError("no queries were noted; a compressor says in `window_queries` how many it needs")
    count, per_step = moment.queries.shape[2], moment.geometry.tokens_per_step
    were = moment.geometry.positions(moment.step - -(-count // per_step), moment.step, moment.device)[-count:]
    queries: Tensor = unturned(moment.queries.float(), were, moment).unflatten(1, (past.keys.shape[1], -1))
    return queries


def rotated_keys(past: Past, moment: Moment) -> Float[Tensor, "batch kv_heads tokens head_dim"]:
    """Keys in float32, as they are rotated at their original positions."""
    keys = past.keys.float()
    if moment.keys_rotated or moment.rotary is None:
        return keys
    rotated: Tensor = moment.rotary.rotate(keys, past.offsets)
    return rotated


def seen_from(
    past: Past, moment: Moment, steps: Float[Tensor, " steps"]
) -> Float[Tensor, "batch kv_heads tokens head_dim"]:
    """Keys in float32, so that the product with an unrotated query is the mean over where it may be asked: `steps`
    further than now."""
    keys, rotary = rotated_keys(past, moment), moment.rotary
    if rotary is None:
        return keys
    asked = torch.zeros(len(steps), past.offsets.shape[-1], dtype=torch.float64, device=keys.device)
    asked[:, 0] = moment.step + steps
    cos, sin = (part.mean(0).expand(keys.shape[2], -1) for part in rotary.table(-asked))
    seen: Tensor = rotary.apply(keys, (cos, sin))
    return seen


def fraction(default: float, *checks: Any) -> Any:
    """A field for a number with a fraction; a whole number stands for one."""
    return attrs.field(
        default=default,
        converter=lambda value: float(value) if type(value) is int else value,
        validator=[v.instance_of(float), *checks],
    )


def best(scores: Float[Tensor, "batch kv_heads tokens"], count: int) -> Int[Tensor, "batch kv_heads kept"]:
    """The `count` highest of each KV head, or all if there are fewer, in order of origin."""
    return scores.topk(min(count, scores.shape[-1]), -1).indices.sort(-1).values
