"""How blocks leave the recent tier of a layer: compressed, digested, and written to the archive, or dropped."""

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor
from torch.nn.functional import pad

from kvtiers import events
from kvtiers.blocks import Blocks, Extent, Form, run_of
from kvtiers.errors import GeometryError
from kvtiers.lengths import Lengths, filled
from kvtiers.policy import SourceCompressor

if TYPE_CHECKING:
    from kvtiers.layer import Layer


def age(layer: "Layer", blocks: Sequence[Extent]) -> None:
    """Move `blocks`, the oldest of recent, out of it. An error leaves those that it concerns where they were."""
    start, stop = blocks[0].start, blocks[-1].stop
    if layer.policy.in_place:
        layer.mid_tokens += (stop - start) * layer.geometry.tokens_per_step
        layer.recent_start = stop
        return
    if layer.policy.compressor.drops:
        layer.dropped += stop - start
        layer.recent_start, layer.mid_tokens = stop, 0
        layer._assemble(None)
        return
    for _, alike in groupby(blocks, key=lambda block: block.steps):
        run = list(alike)
        _archive(layer, layer.head, run)
        layer.recent_start, layer.mid_tokens, layer.stale = run[-1].stop, 0, True


def _archive(layer: "Layer", slot: int, run: Sequence[Extent]) -> None:
    """Write blocks of one length, whose tokens begin at `slot`, to the archive. Changes nothing if refused."""
    _, unrotated, stored = layer._buffers()
    first, span, count = run[0].start, run[0].steps, len(run)
    where = slice(slot, slot + count * span * layer.geometry.tokens_per_step)
    keys = unrotated[:, :, where]
    reduced = None
    if isinstance(layer.policy.compressor, SourceCompressor):
        reduced = _joined([layer.reduced[block.start] for block in run])
    blocks = run_of(
        keys,
        stored[:, :, where],
        count=count,
        positions=layer.geometry.positions(first, first + count * span, unrotated.device),
        first=first,
        span=span,
        rotated=(layer._turn(keys, first) if layer.rotates else keys) if reduced is None else None,
        reduced=reduced,
    )
    kept, state = _forms(layer, blocks)
    if not kept:
        layer.state, layer.dropped = state, layer.dropped + count * span
        return
    digest = None
    if layer.policy.retriever.needs_digests:
        form = layer.policy.retriever.digests
        digest = digests(layer, kept["compressed"] if form == "compressed" else blocks)
    _store(layer, kept)
    if digest is not None:
        layer.digests.append(digest)
    layer.starts.append(blocks.starts)
    layer.state = state
    for block in run:
        layer.reduced.pop(block.start, None)


def digests(layer: "Layer", blocks: Blocks) -> Tensor:
    """The digests of `blocks`, of their keys as attention saw them."""
    if blocks.rotated is None:
        blocks = attrs.evolve(blocks, rotated=_rotated(layer, blocks))
    retriever, geometry = layer.policy.retriever, layer.geometry
    made = retriever.digest(blocks).detach()
    if geometry.even:
        return made
    tokens = layer.policy.block_tokens(geometry, retriever.digests)
    most = retriever.digest_floats(tokens, geometry.head_dim) // made.shape[-1]
    if made.shape[3] > most:
        raise GeometryError(
            f"layer {layer.layer}: {type(retriever).__name__} made {made.shape[3]} digests of a block of "
            f"{blocks.tokens} tokens, and its digest_floats() says {most} for the longest, {tokens} tokens; "
            "where blocks differ in length it must tell the most"
        )
    return pad(made, (0, 0, 0, most - made.shape[3]))


def _rotated(layer: "Layer", blocks: Blocks) -> Tensor:
    """The keys of `blocks` at their original positions."""
    if not layer.rotates or layer.rotary is None:
        return blocks.keys
    positions = blocks.offsets.double().expand(*blocks.offsets.shape[:2], blocks.count, -1, -1).clone()
    positions[..., 0] += blocks.starts[:, None]
    return layer.rotary.rotate(blocks.keys, positions)


def _forms(layer: "Layer", blocks: Blocks) -> tuple[dict[Form, Blocks], Any]:
    """The forms in which the policy wants `blocks` archived, none if the compressor drops them."""
    wanted = layer.policy.forms
    kept: dict[Form, Blocks] = {"full": blocks} if "full" in wanted else {}
    if "compressed" not in wanted:
        return kept, layer.state
    if layer.policy.compressor.keeps:
        return kept | {"compressed": blocks}, layer.state
    compressed, state = layer.policy.compressor.age(blocks, layer.state)
    if compressed is None:
        return {}, state
    if compressed is not blocks:  # `rotated` was of the tokens that these were made of
        compressed = attrs.evolve(compressed, rotated=None)
    if layer.observe is not None:
        before, after = (b.count * b.tokens for b in (blocks, compressed))
        event = events.Compressed(layer=layer.layer, blocks=blocks.count, tokens_before=before, tokens_after=after)
        layer.observe(event)
    return kept | {"compressed": compressed}, state


def _store(layer: "Layer", kept: dict[Form, Blocks]) -> None:
    """Write every form to its store, or none."""
    stores = {form: layer.stores.get(form) or layer.policy.archive.open() for form in kept}
    written = kept
    if not layer.geometry.even:
        longest = layer.geometry.steps_per_commit
        written = {
            form: filled(blocks, layer.policy.block_tokens(layer.geometry, form), longest)
            for form, blocks in kept.items()
        }
    done: list[Form] = []
    try:
        for form, blocks in written.items():
            stores[form].admit(blocks)
            stores[form].write(attrs.evolve(blocks, keys=blocks.keys.detach(), values=blocks.values.detach()))
            done.append(form)
    except BaseException:
        for form in done:
            stores[form].drop_last(kept[form].count)
        raise
    layer.stores.update(stores)
    if layer.keep_graph:
        layer.graph.append(written["compressed"])
    if not layer.geometry.even:
        for form, blocks in kept.items():
            layer.lengths.setdefault(form, Lengths()).append(blocks, stores[form].tokens)
    if layer.observe is not None:
        for blocks in written.values():
            size = blocks.keys.nbytes + blocks.values.nbytes
            location = layer.policy.archive.location
            layer.observe(events.Archived(layer=layer.layer, blocks=blocks.count, location=location, bytes=size))


def fetched(layer: "Layer", form: Form, number: int, *, whole: bool = False) -> Blocks:
    """Archived block `number` of every row and head, with its own length or the `whole` of its place. Waits for it."""
    store, starts = layer.stores[form], layer.starts.data
    device = layer._buffers()[0].device
    index = torch.full((layer.geometry.batch, layer.geometry.kv_heads, 1), number, device=device)
    keys, values, offsets = store.read(index)
    first = torch.zeros(1, dtype=torch.long, device=device) if starts is None else starts[number : number + 1]
    block = Blocks(keys=keys, values=values, offsets=offsets, starts=first, span=store.span)
    return block if whole or form not in layer.lengths else layer.lengths[form].cut(block, number)


def _joined(blocks: Sequence[Blocks]) -> Blocks:
    """Blocks of one size and shape as one run."""
    first = blocks[0]
    return attrs.evolve(
        first,
        keys=torch.cat([block.keys for block in blocks], 2),
        values=torch.cat([block.values for block in blocks], 2),
        starts=torch.cat([block.starts for block in blocks]),
    )
