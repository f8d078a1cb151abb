"""A whole clip in one forward of an unmodified Wan: every block sees what it would see of the cache, block by block.

Each block of each stream is a row of the model's batch, with a timestep and a prompt of its own. Only self-attention is
replaced: it finds the rows that belong together. Stream 0 is clean and is what all streams attend of the past, so one
forward trains several noisy versions of a clip. Reduced tokens go along behind the clean rows and leave their keys and
values in every layer, as they do in the cache (PackForcing, arXiv 2603.25730, section 3.3).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvtiers import GeometryError, Rotary, UnsupportedModelError
from kvtiers_diffusers.rope import rotary_of
from kvtiers_packforcing.training.layout import Layout

Table = tuple[Tensor, Tensor]


@attrs.define(eq=False)
class Packing:
    """What the attention of a forward needs to know. Rows are batch x streams x blocks."""

    layout: Layout
    shape: tuple[int, int, int]
    table: Table
    """To rotate the blocks' own tokens, [batch, 1, blocks, 1, tokens, width]."""
    reduced: Tensor | None = None
    """[rows, tokens, channels], zeros where a row has none."""
    reduced_table: Table | None = None
    """To rotate reduced tokens, [batch, blocks, 1, tokens, width]."""


class PackedWan:
    """Runs a transformer over whole clips; made by `packed`."""

    def __init__(self, transformer: Any, layout: Layout, *, detach_history: bool = False) -> None:
        self.transformer, self.layout, self.detach_history = transformer, layout, detach_history
        self.rotary: Rotary = rotary_of(transformer)
        self.now: Packing | None = None
        self.affinities: list[Tensor] | None = None

    def __call__(
        self,
        latents: Float[Tensor, "batch streams channels frames height width"],
        sigmas: Float[Tensor, "batch streams blocks"],
        text: Float[Tensor, "batch *streams blocks words text_width"],
        *,
        reduced: Float[Tensor, "batch compressed reduced_tokens token_width"] | None = None,
        offsets: Float[Tensor, "reduced_tokens 3"] | None = None,
        starts: Int[Tensor, "batch blocks"] | None = None,
        affinities: list[Tensor] | None = None,
    ) -> Float[Tensor, "batch streams channels frames height width"]:
        """The flow of every block of every stream.

        latents: stream 0 is the (nearly) clean past. sigmas: 0 to 1; a timestep is 1,000 sigma. text: of each block, or
        of each block of each stream. reduced: the reduced tokens of the blocks that `layout.compressed` names, in that
        order. offsets: their positions from the start of their block. starts: the time of each block's first frame;
        none: blocks follow each other. affinities: a list that gets, of each layer, how much the mean query of each
        noisy block likes the mean key of each clean one, in the form in which it attends that one: [batch, noisy
        streams, blocks, clean blocks, heads].
        """
        batch, streams, _, frames, height, width = latents.shape
        blocks = sigmas.shape[2]
        self._check(latents, blocks, reduced, offsets)
        length = frames // blocks
        if starts is None:
            starts = (torch.arange(blocks, device=latents.device) * length).expand(batch, -1)
        rows = latents.unflatten(3, (blocks, length)).movedim(3, 2).flatten(0, 2)
        _, high, wide = self.transformer.config.patch_size
        grid = _grid(length, height // high, width // wide).to(latents.device)
        cos, sin = self.rotary.table(_moved(grid, starts), latents.dtype)
        packing = Packing(self.layout, (batch, streams, blocks), (cos[:, None, :, None], sin[:, None, :, None]))
        if reduced is not None and offsets is not None:
            at = torch.tensor(self.layout.compressed(blocks), device=latents.device)
            clean = reduced.new_zeros(batch, blocks, *reduced.shape[2:]).index_copy(1, at, reduced)
            beside = clean.new_zeros(batch, streams - 1, *clean.shape[1:])
            packing.reduced = torch.cat((clean[:, None], beside), 1).flatten(0, 2)
            cos, sin = self.rotary.table(_moved(offsets.to(latents.device), starts), latents.dtype)
            packing.reduced_table = (cos[:, :, None], sin[:, :, None])
        self.now, self.affinities = packing, affinities
        of_streams = text if text.ndim == 5 else text[:, None].expand(-1, streams, -1, -1, -1)
        words = of_streams.flatten(0, 2)
        flow: Tensor = self.transformer(rows, sigmas.flatten() * 1000, words, return_dict=False)[0]
        whole: Tensor = flow.unflatten(0, (batch, streams, blocks)).movedim(2, 3).flatten(3, 4)
        return whole

    def _check(self, latents: Tensor, blocks: int, reduced: Tensor | None, offsets: Tensor | None) -> None:
        if latents.shape[3] % blocks:
            raise GeometryError(f"{latents.shape[3]} latent frames cannot be cut into {blocks} blocks of one length")
        wanted = len(self.layout.compressed(blocks))
        given = 0 if reduced is None else reduced.shape[1]
        if given != wanted or (reduced is None) != (offsets is None):
            raise GeometryError(
                f"this layout attends {wanted} of {blocks} blocks compressed, got reduced tokens of {given} and "
                f"{'no ' if offsets is None else ''}offsets; give both for layout.compressed({blocks})"
            )


class PackedAttention:
    """Self-attention of one layer over packed rows; a processor of diffusers."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __init__(self, packed_wan: PackedWan) -> None:
        self.packed_wan = packed_wan

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """What diffusers calls. [rows, tokens, channels] in and out."""
        now = self.packed_wan.now
        if now is None:
            raise UnsupportedModelError("a model that is packed is called through what `packed` gave, not directly")
        query, key = (
            norm(linear(hidden_states).to(norm.weight.dtype))  # in mixed precision a projection gives less than that
            for norm, linear in ((attn.norm_q, attn.to_q), (attn.norm_k, attn.to_k))
        )
        split = (
            part.unflatten(2, (attn.heads, -1)).transpose(1, 2).unflatten(0, now.shape)
            for part in (query, key, attn.to_v(hidden_states))
        )
        attended = self._attend(now, *split).flatten(0, 2).transpose(1, 2).flatten(2)
        out: Tensor = attn.to_out[1](attn.to_out[0](attended.type_as(hidden_states)))
        return out

    def _attend(self, now: Packing, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[batch, streams, blocks, heads, tokens, head_dim] in and out.

        Whole tensors are cut with `split` and `unbind`, whose gradients are put together in one piece.
        """
        rotary, more = self.packed_wan.rotary, 0 if now.reduced is None else now.reduced.shape[1]
        own = key.shape[4] - more
        (query, few_query), (key, few_key), (value, few_value) = (
            part.split((own, more), 4) for part in (query, key, value)
        )
        query, key = (rotary.apply(part, now.table) for part in (query, key))
        few_query, few_key, few_value = (part[:, 0] for part in (few_query, few_key, few_value))
        if now.reduced_table is not None:
            few_query, few_key = (rotary.apply(part, now.reduced_table) for part in (few_query, few_key))
        if self.packed_wan.affinities is not None:
            self.packed_wan.affinities.append(_affinity(now.layout, query[:, 1:], key[:, 0], few_key))
        queries, keys, values = (part.unbind(2) for part in (query, key, value))
        few_queries, few_keys, few_values = (part.unbind(1) for part in (few_query, few_key, few_value))
        clean = tuple([self._past(part[:, 0]) for part in parts] for parts in (keys, values))
        streams, blocks = now.shape[1:]
        compressed = now.layout.compressed(blocks) if more else []
        full: list[Tensor] = []
        few: list[Tensor] = []
        for block in range(blocks):
            seen = now.layout.history(block)
            past = tuple(
                [whole[at] if form == "full" else part[at] for at, form in seen]
                for whole, part in zip(clean, (few_keys, few_values), strict=True)
            )
            context = (
                torch.cat([*(part[:, None].expand(-1, streams, -1, -1, -1) for part in before), parts[block]], 3)
                for before, parts in zip(self._shown(past, block, few_keys, few_values), (keys, values), strict=True)
            )
            full.append(_attention(queries[block], *context))
            if block in compressed:
                context = (
                    torch.cat([*before, parts[block]], 2)
                    for before, parts in zip(past, (few_keys, few_values), strict=True)
                )
                few.append(_attention(few_queries[block], *context))
            elif more:
                few.append(torch.zeros_like(few_queries[block]))
        attended = torch.stack(full, 2)
        if not more:
            return attended
        beside = torch.stack(few, 1)[:, None]
        beside = torch.cat((beside, beside.new_zeros(1).expand(len(beside), streams - 1, *beside.shape[2:])), 1)
        return torch.cat((attended, beside), 4)

    def _shown(
        self, past: tuple[list[Tensor], ...], block: int, few_keys: Sequence[Tensor], few_values: Sequence[Tensor]
    ) -> tuple[list[Tensor], ...]:
        """What a block attends besides itself: its past, and in some layouts its own reduced tokens."""
        if not self.packed_wan.layout.itself:
            return past
        return tuple([*before, few[block]] for before, few in zip(past, (few_keys, few_values), strict=True))

    def _past(self, full: Tensor) -> Tensor:
        """Keys or values of a clean block at full resolution, as later blocks attend them."""
        return full.detach() if self.packed_wan.detach_history else full


@contextmanager
def packed(transformer: Any, layout: Layout, *, detach_history: bool = False) -> Iterator[PackedWan]:
    """Inside of the block, `transformer` can be run over whole clips by what this gives. After it, it is as it was.

    detach_history: whether no gradient flows into what is attended in full of earlier blocks, as if it came from a
    cache. It still flows into their reduced tokens, and so into the compressor.

    Backward passes belong inside of the block too: gradient checkpointing runs layers again.
    """
    if any(block.attn1.fused_projections for block in transformer.blocks):
        raise UnsupportedModelError("this model's projections are fused; call unfuse_qkv_projections() before training")
    wan, own = PackedWan(transformer, layout, detach_history=detach_history), dict(transformer.attn_processors)
    ours = {name: PackedAttention(wan) if ".attn1." in name else processor for name, processor in own.items()}

    def append(_: Any, args: tuple[Any, ...]) -> Any:
        reduced = None if wan.now is None else wan.now.reduced
        return None if reduced is None else (torch.cat((args[0], reduced.to(args[0])), 1), *args[1:])

    def strip(_: Any, __: tuple[Any, ...], hidden: Tensor) -> Any:
        reduced = None if wan.now is None else wan.now.reduced
        return None if reduced is None else hidden[:, : -reduced.shape[1]]

    handles = [
        transformer.blocks[0].register_forward_pre_hook(append),
        transformer.blocks[-1].register_forward_hook(strip),
    ]
    try:
        transformer.set_attn_processor(ours)
        yield wan
    finally:
        transformer.set_attn_processor(own)
        for handle in handles:
            handle.remove()


def _grid(frames: int, height: int, width: int) -> Float[Tensor, "tokens 3"]:
    axes = [torch.arange(count, dtype=torch.float64) for count in (frames, height, width)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)


def _moved(
    positions: Float[Tensor, "tokens 3"], starts: Int[Tensor, "batch blocks"]
) -> Float[Tensor, "batch blocks tokens 3"]:
    """Positions from the start of a block, for blocks that start at `starts`."""
    moved = positions.expand(*starts.shape, -1, -1).clone()
    moved[..., 0] += starts[..., None]
    return moved


def _affinity(layout: Layout, query: Tensor, key: Tensor, few_key: Tensor) -> Tensor:
    """Logits of mean queries and mean keys of blocks: [batch, noisy streams, blocks, clean blocks, heads].

    query: of noisy blocks. key, few_key: of clean ones, whole and reduced. The layout says which of them are attended.
    """
    query, means = query.mean(4) / query.shape[-1] ** 0.5, [key.mean(3)]
    if few_key.shape[3]:
        means.append(few_key.mean(3))
    whole, *reduced = (torch.einsum("bsihd,bjhd->bsijh", query, mean) for mean in means)
    if not reduced:
        return whole
    return torch.where(layout.forms(key.shape[1]).to(key.device)[..., None], reduced[0], whole)


def _attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention over the last two axes, whatever comes before them.

    On CPUs in float32: its gradient takes three times as long in bfloat16 there.
    """
    shape = query.shape[:-3]
    exact = query.device.type == "cpu" and query.dtype != torch.float64
    dtype = torch.float32 if exact else values.dtype
    query, keys, values = (part.flatten(0, -4).to(dtype) for part in (query, keys, values))
    with torch.autocast(query.device.type, enabled=False):
        out: Tensor = scaled_dot_product_attention(query, keys, values).unflatten(0, shape)
    return out
