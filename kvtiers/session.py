"""What happens to a layer's memory as a whole: roll back, select rows, fork, and what is saved of it."""

import copy
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from jaxtyping import Int
from torch import Tensor

from kvtiers import archiving
from kvtiers.archive import Growing
from kvtiers.blocks import Blocks, Selection
from kvtiers.errors import CropError, SavedCacheError
from kvtiers.lengths import Lengths
from kvtiers.recall import MidTokens
from kvtiers.store import LayerStore

_NUMBERS = (
    "num_steps",
    "committed_steps",
    "recent_start",
    "dropped",
    "tail",
    "mid_tokens",
    "sink_slot",
    "sink_shift",
    "recent_shift",
    "stale",
    "pending",
    "selected_at",
    "together_at",
    "drafted",
)
_BUFFERS = ("rotated", "unrotated", "values")
_REDUCED = ("keys", "values", "offsets", "starts")
_MID = ("offsets", "starts", "placed", "owner", "valid")


def why_not_crop(store: LayerStore, steps: int) -> str | None:
    """Why `store` cannot be rolled back to `steps` steps exactly, or none if it can."""
    if not 0 <= steps <= store.num_steps:
        return f"it holds {store.num_steps} steps"
    if steps == store.num_steps or steps == 0:
        return None
    if store.timeline.cuts is not None and steps not in store.timeline.cuts:
        return f"step {steps} is inside a block"
    first = store.recent_start if not store.policy.in_place else 0
    if (
        steps < store.committed_steps
        and store.timeline.recent_start_at(steps) < first
        and store.recent_start > store.timeline.sink
    ):
        return f"blocks before step {store.recent_start} have left recent since then"
    if store.policy.compressor.prepares:
        return f"{type(store.policy.compressor).__name__} has already looked at the later queries"
    if not store.geometry.causal:
        return None  # every block of a video chooses anew
    renewed = store.archived and store.policy.retriever.needs_query and store.selected_at > steps
    if renewed and store.policy.refresh_steps > 1:
        return f"the selection was renewed at step {store.selected_at}, by queries that would be gone"
    if steps < store.together_at:
        return (
            f"the tokens up to step {store.together_at} chose together what they attend, those that would go included"
        )
    return None


def crop(store: LayerStore, steps: int) -> None:
    """Roll `store` back to its first `steps` steps, exactly, or raise `CropError` and change nothing."""
    reason = why_not_crop(store, steps)
    if reason is not None:
        raise CropError(
            f"layer {store.layer} cannot be rolled back to {steps} steps: {reason}; "
            "fork() the cache before steps that may have to be undone"
        )
    if steps == 0:
        store.clear()
        return
    removed = store.num_steps - steps
    if removed and store.policy.in_place:
        first = min(max(store.timeline.recent_start_at(steps), store.timeline.sink), store.recent_start)
        store.mid_tokens -= (store.recent_start - first) * store.geometry.tokens_per_step
        store.recent_start = first
    store.tail -= removed * store.geometry.tokens_per_step
    store.num_steps = steps
    store.committed_steps = min(store.committed_steps, steps)
    store.pending = max(0, store.pending - removed)
    store.drafted = store.drafted and store.num_steps > store.committed_steps
    _cut_back(store, steps)
    store._live = None


def _cut_back(store: LayerStore, steps: int) -> None:
    """Forget the committed blocks (video) beyond `steps`."""
    if store.timeline.cuts is not None:
        cuts = tuple(cut for cut in store.timeline.cuts if cut <= steps)
        store.timeline = attrs.evolve(store.timeline, cuts=cuts, sink=min(store.timeline.sink, steps))
        store.recent_start = min(store.recent_start, steps)
        store.reduced = {start: block for start, block in store.reduced.items() if start < steps}


@torch.inference_mode(mode=False)
def select_rows(store: LayerStore, rows: Int[Tensor, " rows"]) -> None:
    """Make new row i what row `rows[i]` was: reorder, repeat or select rows."""
    for name in _BUFFERS:
        buffer: Tensor | None = getattr(store, name)
        if buffer is not None:
            setattr(store, name, buffer.index_select(0, rows.to(buffer.device)))
    for shelf in store.shelves.values():
        shelf.select_rows(rows)
    store.digests.select_rows(rows)
    store.reduced = {start: _taken(block, rows) for start, block in store.reduced.items()}
    store.graph = [_taken(run, rows) for run in store.graph]
    if isinstance(store.state, Tensor):
        store.state = store.state.index_select(0, rows.to(store.state.device))
    if store.selection is not None:
        at = rows.to(store.selection.chosen.device)
        store.selection = attrs.evolve(
            store.selection,
            chosen=store.selection.chosen.index_select(0, at),
            compressed=store.selection.compressed.index_select(0, at),
        )
    if store.mid is not None:
        parts = {name: getattr(store.mid, name) for name in _MID}
        wide = {n: p.index_select(0, rows.to(p.device)) for n, p in parts.items() if p is not None and _per_row(n, p)}
        store.mid = attrs.evolve(store.mid, **wide)
    store._live = store.padding = store.source = None
    store.geometry = attrs.evolve(store.geometry, batch=rows.numel())


@torch.inference_mode(mode=False)
def fork(store: LayerStore) -> LayerStore:
    """An independent copy that continues exactly from here."""
    other = copy.copy(store)
    for name in _BUFFERS:
        buffer: Tensor | None = getattr(store, name)
        setattr(other, name, None if buffer is None else buffer.clone())
    other.shelves = {form: shelf.fork() for form, shelf in store.shelves.items()}
    other.lengths = {form: part.fork() for form, part in store.lengths.items()}
    other.digests, other.starts = store.digests.fork(), store.starts.fork()
    other.reduced, other.graph = dict(store.reduced), list(store.graph)  # never written in place
    other.state = store.state.clone() if isinstance(store.state, Tensor) else copy.deepcopy(store.state)
    other._live = None
    return other


def _taken(blocks: Blocks, rows: Tensor) -> Blocks:
    """The K/V of some rows of reduced blocks; where their tokens lie is the same for all."""
    at = rows.to(blocks.keys.device)
    return attrs.evolve(blocks, keys=blocks.keys.index_select(0, at), values=blocks.values.index_select(0, at))


def _per_row(name: str, part: Tensor) -> bool:
    """Whether the first axis of a part of `MidTokens` counts rows."""
    return part.shape[0] > 1 and part.dim() == (4 if name == "offsets" else 3)


def dump(store: LayerStore) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything that `restore` needs: named tensors, and numbers that JSON can hold."""
    if store.state is not None and not isinstance(store.state, Tensor):
        raise SavedCacheError(
            f"the state of {type(store.policy.compressor).__name__} is a {type(store.state).__name__}; "
            "only tensors can be saved, so return a tensor (or none) from age() and prepare()"
        )
    tensors: dict[str, Tensor] = {}
    for name in _BUFFERS:
        buffer: Tensor | None = getattr(store, name)
        if buffer is not None:
            kept = torch.zeros_like(buffer)
            for start, stop in ((store.sink_slot, store.sink_slot + store.sink_tokens), (_first(store), store.tail)):
                kept[:, :, start:stop] = buffer[:, :, start:stop]
            tensors[name] = kept
    for name, part in (("digests", store.digests), ("starts", store.starts)):
        if part.data is not None:
            tensors[name] = part.data.contiguous()
    if store.state is not None:
        tensors["state"] = store.state
    if store.selection is not None:
        tensors["chosen"], tensors["compressed"] = store.selection.chosen, store.selection.compressed
    if store.mid is not None:
        parts = {f"mid.{name}": getattr(store.mid, name) for name in _MID}
        tensors |= {name: part.contiguous().clone() for name, part in parts.items() if part is not None}
    spans = {}
    for start, block in store.reduced.items():
        spans[start] = block.span
        tensors |= {f"reduced.{start}.{name}": getattr(block, name).clone() for name in _REDUCED}
    shelves = {}
    for form, shelf in store.shelves.items():
        shelves[form] = {"count": shelf.count, "span": shelf.span}
        lengths = store.lengths.get(form)
        if lengths is not None and lengths.table.data is not None:
            shelves[form]["padded"] = lengths.padded
            tensors[f"lengths.{form}"] = lengths.table.data.clone()
        tensors |= {f"{form}.{name}": part.contiguous() for name, part in shelf.tensors().items()}
    numbers: dict[str, Any] = {name: getattr(store, name) for name in _NUMBERS}
    cuts = None if store.timeline.cuts is None else [store.timeline.sink, *store.timeline.cuts]
    return tensors, numbers | {"shelves": shelves, "batch": store.geometry.batch, "cuts": cuts, "reduced": spans}


def _first(store: LayerStore) -> int:
    return store.head - (0 if store.stale else store.mid_tokens)


@torch.inference_mode(mode=False)
def restore(store: LayerStore, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
    """Fill the empty `store` with what `dump` gave."""
    for name in _NUMBERS:
        setattr(store, name, numbers[name])
    if numbers["cuts"] is not None:
        sink, *cuts = numbers["cuts"]
        store.timeline = attrs.evolve(store.timeline, sink=sink, cuts=tuple(cuts))
    for name in _BUFFERS:
        setattr(store, name, tensors.get(name))
    for name, axis in (("digests", 2), ("starts", 0)):
        part = Growing(axis)
        if name in tensors:
            part.append(tensors[name])
        setattr(store, name, part)
    store.state = tensors.get("state")
    for start, span in numbers["reduced"].items():
        keys, values, offsets, starts = (tensors[f"reduced.{start}.{name}"] for name in _REDUCED)
        store.reduced[int(start)] = Blocks(keys=keys, values=values, offsets=offsets, starts=starts, span=span)
    if "chosen" in tensors:
        store.selection = Selection(chosen=tensors["chosen"], compressed=tensors["compressed"])
    if "mid.starts" in tensors:
        store.mid = MidTokens(
            offsets=tensors["mid.offsets"],
            starts=tensors["mid.starts"],
            placed=tensors["mid.placed"],
            owner=tensors.get("mid.owner"),
            valid=tensors.get("mid.valid"),
        )
    for form, about in numbers["shelves"].items():
        shelf = store.policy.archive.open()
        held = {name.removeprefix(f"{form}."): t for name, t in tensors.items() if name.startswith(f"{form}.")}
        shelf.restore(held, count=about["count"], span=about["span"])
        store.shelves[form] = shelf
        if "padded" in about:
            store.lengths[form] = Lengths.of(tensors[f"lengths.{form}"], padded=about["padded"])
    if store.keep_graph:
        store.graph = [archiving.fetched(store, "compressed", number, whole=True) for number in range(store.archived)]
