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
    from kvtiers.store import LayerStore


def age(store: "LayerStore", blocks: Sequence[Extent]) -> None:
    """Move `blocks`, the oldest of recent, out of it. An error leaves those that it concerns where they were."""
    start, stop = blocks[0].start, blocks[-1].stop
    if store.policy.in_place:
        store.mid_tokens += (stop - start) * store.geometry.tokens_per_step
        store.recent_start = stop
        return
    if store.policy.compressor.drops:
        store.dropped += stop - start
        store.recent_start, store.mid_tokens = stop, 0
        store._assemble(None)
        return
    for _, alike in groupby(blocks, key=lambda block: block.steps):
        run = list(alike)
        _archive(store, store.head, run)
        store.recent_start, store.mid_tokens, store.stale = run[-1].stop, 0, True


def _archive(store: "LayerStore", slot: int, run: Sequence[Extent]) -> None:
    """Write blocks of one length, whose tokens begin at `slot`, to the archive. Changes nothing if refused."""
    _, unrotated, stored = store._buffers()
    first, span, count = run[0].start, run[0].steps, len(run)
    where = slice(slot, slot + count * span * store.geometry.tokens_per_step)
    keys = unrotated[:, :, where]
    reduced = None
    if isinstance(store.policy.compressor, SourceCompressor):
        reduced = _joined([store.reduced[block.start] for block in run])
    blocks = run_of(
        keys,
        stored[:, :, where],
        count=count,
        positions=store.geometry.positions(first, first + count * span, unrotated.device),
        first=first,
        span=span,
        rotated=(store._turn(keys, first) if store.rotates else keys) if reduced is None else None,
        reduced=reduced,
    )
    kept, state = _forms(store, blocks)
    if not kept:
        store.state, store.dropped = state, store.dropped + count * span
        return
    digest = None
    if store.policy.retriever.needs_digests:
        form = store.policy.retriever.digests
        digest = digests(store, kept["compressed"] if form == "compressed" else blocks)
    _shelve(store, kept)
    if digest is not None:
        store.digests.append(digest)
    store.starts.append(blocks.starts)
    store.state = state
    for block in run:
        store.reduced.pop(block.start, None)


def digests(store: "LayerStore", blocks: Blocks) -> Tensor:
    """The digests of `blocks`, of their keys as attention saw them."""
    if blocks.rotated is None:
        blocks = attrs.evolve(blocks, rotated=_rotated(store, blocks))
    retriever, geometry = store.policy.retriever, store.geometry
    made = retriever.digest(blocks).detach()
    if geometry.even:
        return made
    tokens = store.policy.block_tokens(geometry, retriever.digests)
    most = retriever.digest_floats(tokens, geometry.head_dim) // made.shape[-1]
    if made.shape[3] > most:
        raise GeometryError(
            f"layer {store.layer}: {type(retriever).__name__} made {made.shape[3]} digests of a block of "
            f"{blocks.tokens} tokens, and its digest_floats() says {most} for the longest, {tokens} tokens; "
            "where blocks differ in length it must tell the most"
        )
    return pad(made, (0, 0, 0, most - made.shape[3]))


def _rotated(store: "LayerStore", blocks: Blocks) -> Tensor:
    """The keys of `blocks` at their original positions."""
    if not store.rotates or store.rotary is None:
        return blocks.keys
    positions = blocks.offsets.double().expand(*blocks.offsets.shape[:2], blocks.count, -1, -1).clone()
    positions[..., 0] += blocks.starts[:, None]
    return store.rotary.rotate(blocks.keys, positions)


def _forms(store: "LayerStore", blocks: Blocks) -> tuple[dict[Form, Blocks], Any]:
    """The forms in which the policy wants `blocks` archived, none if the compressor drops them."""
    wanted = store.policy.forms
    kept: dict[Form, Blocks] = {"full": blocks} if "full" in wanted else {}
    if "compressed" not in wanted:
        return kept, store.state
    if store.policy.compressor.keeps:
        return kept | {"compressed": blocks}, store.state
    compressed, state = store.policy.compressor.age(blocks, store.state)
    if compressed is None:
        return {}, state
    if compressed is not blocks:  # `rotated` was of the tokens that these were made of
        compressed = attrs.evolve(compressed, rotated=None)
    if store.observe is not None:
        before, after = (b.count * b.tokens for b in (blocks, compressed))
        event = events.Compressed(layer=store.layer, blocks=blocks.count, tokens_before=before, tokens_after=after)
        store.observe(event)
    return kept | {"compressed": compressed}, state


def _shelve(store: "LayerStore", kept: dict[Form, Blocks]) -> None:
    """Write every form to its shelf, or none."""
    shelves = {form: store.shelves.get(form) or store.policy.archive.open() for form in kept}
    written = kept
    if not store.geometry.even:
        longest = store.geometry.steps_per_commit
        written = {
            form: filled(blocks, store.policy.block_tokens(store.geometry, form), longest)
            for form, blocks in kept.items()
        }
    done: list[Form] = []
    try:
        for form, blocks in written.items():
            shelves[form].admit(blocks)
            shelves[form].write(attrs.evolve(blocks, keys=blocks.keys.detach(), values=blocks.values.detach()))
            done.append(form)
    except BaseException:
        for form in done:
            shelves[form].drop_last(kept[form].count)
        raise
    store.shelves.update(shelves)
    if store.keep_graph:
        store.graph.append(written["compressed"])
    if not store.geometry.even:
        for form, blocks in kept.items():
            store.lengths.setdefault(form, Lengths()).append(blocks, shelves[form].tokens)
    if store.observe is not None:
        for blocks in written.values():
            size = blocks.keys.nbytes + blocks.values.nbytes
            location = store.policy.archive.location
            store.observe(events.Archived(layer=store.layer, blocks=blocks.count, location=location, bytes=size))


def fetched(store: "LayerStore", form: Form, number: int, *, whole: bool = False) -> Blocks:
    """Archived block `number` of every row and head, with its own length or the `whole` of its place. Waits for it."""
    shelf, starts = store.shelves[form], store.starts.data
    device = store._buffers()[0].device
    index = torch.full((store.geometry.batch, store.geometry.kv_heads, 1), number, device=device)
    keys, values, offsets = shelf.read(index)
    first = torch.zeros(1, dtype=torch.long, device=device) if starts is None else starts[number : number + 1]
    block = Blocks(keys=keys, values=values, offsets=offsets, starts=first, span=shelf.span)
    return block if whole or form not in store.lengths else store.lengths[form].cut(block, number)


def _joined(blocks: Sequence[Blocks]) -> Blocks:
    """Blocks of one size and shape as one run."""
    first = blocks[0]
    return attrs.evolve(
        first,
        keys=torch.cat([block.keys for block in blocks], 2),
        values=torch.cat([block.values for block in blocks], 2),
        starts=torch.cat([block.starts for block in blocks]),
    )
