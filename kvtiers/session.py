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
from kvtiers.layer import Layer
from kvtiers.lengths import Lengths
from kvtiers.recall import MidTokens

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


def why_not_crop(layer: Layer, steps: int) -> str | None:
    """Why `layer` cannot be rolled back to `steps` steps exactly, or none if it can."""
    if not 0 <= steps <= layer.num_steps:
        return f"it holds {layer.num_steps} steps"
    if steps == layer.num_steps or steps == 0:
        return None
    if layer.timeline.cuts is not None and steps not in layer.timeline.cuts:
        return f"step {steps} is inside a block"
    first = layer.recent_start if not layer.policy.in_place else 0
    if (
        steps < layer.committed_steps
        and layer.timeline.recent_start_at(steps) < first
        and layer.recent_start > layer.timeline.sink
    ):
        return f"blocks before step {layer.recent_start} have left recent since then"
    if layer.policy.compressor.prepares:
        return f"{type(layer.policy.compressor).__name__} has already looked at the later queries"
    if not layer.geometry.causal:
        return None  # every block of a video chooses anew
    renewed = layer.archived and layer.policy.retriever.needs_query and layer.selected_at > steps
    if renewed and layer.policy.refresh_steps > 1:
        return f"the selection was renewed at step {layer.selected_at}, by queries that would be gone"
    if steps < layer.together_at:
        return (
            f"the tokens up to step {layer.together_at} chose together what they attend, those that would go included"
        )
    return None


def crop(layer: Layer, steps: int) -> None:
    """Roll `layer` back to its first `steps` steps, exactly, or raise `CropError` and change nothing."""
    reason = why_not_crop(layer, steps)
    if reason is not None:
        raise CropError(
            f"layer {layer.layer} cannot be rolled back to {steps} steps: {reason}; "
            "fork() the cache before steps that may have to be undone"
        )
    if steps == 0:
        layer.clear()
        return
    removed = layer.num_steps - steps
    if removed and layer.policy.in_place:
        first = min(max(layer.timeline.recent_start_at(steps), layer.timeline.sink), layer.recent_start)
        layer.mid_tokens -= (layer.recent_start - first) * layer.geometry.tokens_per_step
        layer.recent_start = first
    layer.tail -= removed * layer.geometry.tokens_per_step
    layer.num_steps = steps
    layer.committed_steps = min(layer.committed_steps, steps)
    layer.pending = max(0, layer.pending - removed)
    layer.drafted = layer.drafted and layer.num_steps > layer.committed_steps
    _cut_back(layer, steps)
    layer._live = None


def _cut_back(layer: Layer, steps: int) -> None:
    """Forget the committed blocks (video) beyond `steps`."""
    if layer.timeline.cuts is not None:
        cuts = tuple(cut for cut in layer.timeline.cuts if cut <= steps)
        layer.timeline = attrs.evolve(layer.timeline, cuts=cuts, sink=min(layer.timeline.sink, steps))
        layer.recent_start = min(layer.recent_start, steps)
        layer.reduced = {start: block for start, block in layer.reduced.items() if start < steps}


@torch.inference_mode(mode=False)
def select_rows(layer: Layer, rows: Int[Tensor, " rows"]) -> None:
    """Make new row i what row `rows[i]` was: reorder, repeat or select rows."""
    for name in _BUFFERS:
        buffer: Tensor | None = getattr(layer, name)
        if buffer is not None:
            setattr(layer, name, buffer.index_select(0, rows.to(buffer.device)))
    for store in layer.stores.values():
        store.select_rows(rows)
    layer.digests.select_rows(rows)
    layer.reduced = {start: _taken(block, rows) for start, block in layer.reduced.items()}
    layer.graph = [_taken(run, rows) for run in layer.graph]
    if isinstance(layer.state, Tensor):
        layer.state = layer.state.index_select(0, rows.to(layer.state.device))
    if layer.selection is not None:
        at = rows.to(layer.selection.chosen.device)
        layer.selection = attrs.evolve(
            layer.selection,
            chosen=layer.selection.chosen.index_select(0, at),
            compressed=layer.selection.compressed.index_select(0, at),
        )
    if layer.mid is not None:
        parts = {name: getattr(layer.mid, name) for name in _MID}
        wide = {n: p.index_select(0, rows.to(p.device)) for n, p in parts.items() if p is not None and _per_row(n, p)}
        layer.mid = attrs.evolve(layer.mid, **wide)
    layer._live = layer.padding = layer.source = None
    layer.geometry = attrs.evolve(layer.geometry, batch=rows.numel())


@torch.inference_mode(mode=False)
def fork(layer: Layer) -> Layer:
    """An independent copy that continues exactly from here."""
    other = copy.copy(layer)
    for name in _BUFFERS:
        buffer: Tensor | None = getattr(layer, name)
        setattr(other, name, None if buffer is None else buffer.clone())
    other.stores = {form: store.fork() for form, store in layer.stores.items()}
    other.lengths = {form: part.fork() for form, part in layer.lengths.items()}
    other.digests, other.starts = layer.digests.fork(), layer.starts.fork()
    other.reduced, other.graph = dict(layer.reduced), list(layer.graph)  # never written in place
    other.state = layer.state.clone() if isinstance(layer.state, Tensor) else copy.deepcopy(layer.state)
    other._live = None
    return other


def _taken(blocks: Blocks, rows: Tensor) -> Blocks:
    """The K/V of some rows of reduced blocks; where their tokens lie is the same for all."""
    at = rows.to(blocks.keys.device)
    return attrs.evolve(blocks, keys=blocks.keys.index_select(0, at), values=blocks.values.index_select(0, at))


def _per_row(name: str, part: Tensor) -> bool:
    """Whether the first axis of a part of `MidTokens` counts rows."""
    return part.shape[0] > 1 and part.dim() == (4 if name == "offsets" else 3)


def dump(layer: Layer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything that `restore` needs: named tensors, and numbers that JSON can hold."""
    if layer.state is not None and not isinstance(layer.state, Tensor):
        raise SavedCacheError(
            f"the state of {type(layer.policy.compressor).__name__} is a {type(layer.state).__name__}; "
            "only tensors can be saved, so return a tensor (or none) from age() and prepare()"
        )
    tensors: dict[str, Tensor] = {}
    for name in _BUFFERS:
        buffer: Tensor | None = getattr(layer, name)
        if buffer is not None:
            kept = torch.zeros_like(buffer)
            for start, stop in ((layer.sink_slot, layer.sink_slot + layer.sink_tokens), (_first(layer), layer.tail)):
                kept[:, :, start:stop] = buffer[:, :, start:stop]
            tensors[name] = kept
    for name, part in (("digests", layer.digests), ("starts", layer.starts)):
        if part.data is not None:
            tensors[name] = part.data.contiguous()
    if layer.state is not None:
        tensors["state"] = layer.state
    if layer.selection is not None:
        tensors["chosen"], tensors["compressed"] = layer.selection.chosen, layer.selection.compressed
    if layer.mid is not None:
        parts = {f"mid.{name}": getattr(layer.mid, name) for name in _MID}
        tensors |= {name: part.contiguous().clone() for name, part in parts.items() if part is not None}
    spans = {}
    for start, block in layer.reduced.items():
        spans[start] = block.span
        tensors |= {f"reduced.{start}.{name}": getattr(block, name).clone() for name in _REDUCED}
    stores = {}
    for form, store in layer.stores.items():
        stores[form] = {"count": store.count, "span": store.span}
        lengths = layer.lengths.get(form)
        if lengths is not None and lengths.table.data is not None:
            stores[form]["padded"] = lengths.padded
            tensors[f"lengths.{form}"] = lengths.table.data.clone()
        tensors |= {f"{form}.{name}": part.contiguous() for name, part in store.tensors().items()}
    numbers: dict[str, Any] = {name: getattr(layer, name) for name in _NUMBERS}
    cuts = None if layer.timeline.cuts is None else [layer.timeline.sink, *layer.timeline.cuts]
    return tensors, numbers | {"stores": stores, "batch": layer.geometry.batch, "cuts": cuts, "reduced": spans}


def _first(layer: Layer) -> int:
    return layer.head - (0 if layer.stale else layer.mid_tokens)


@torch.inference_mode(mode=False)
def restore(layer: Layer, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
    """Fill the empty `layer` with what `dump` gave."""
    for name in _NUMBERS:
        setattr(layer, name, numbers[name])
    if numbers["cuts"] is not None:
        sink, *cuts = numbers["cuts"]
        layer.timeline = attrs.evolve(layer.timeline, sink=sink, cuts=tuple(cuts))
    for name in _BUFFERS:
        setattr(layer, name, tensors.get(name))
    for name, axis in (("digests", 2), ("starts", 0)):
        part = Growing(axis)
        if name in tensors:
            part.append(tensors[name])
        setattr(layer, name, part)
    layer.state = tensors.get("state")
    for start, span in numbers["reduced"].items():
        keys, values, offsets, starts = (tensors[f"reduced.{start}.{name}"] for name in _REDUCED)
        layer.reduced[int(start)] = Blocks(keys=keys, values=values, offsets=offsets, starts=starts, span=span)
    if "chosen" in tensors:
        layer.selection = Selection(chosen=tensors["chosen"], compressed=tensors["compressed"])
    if "mid.starts" in tensors:
        layer.mid = MidTokens(
            offsets=tensors["mid.offsets"],
            starts=tensors["mid.starts"],
            placed=tensors["mid.placed"],
            owner=tensors.get("mid.owner"),
            valid=tensors.get("mid.valid"),
        )
    for form, about in numbers["stores"].items():
        store = layer.policy.archive.open()
        held = {name.removeprefix(f"{form}."): t for name, t in tensors.items() if name.startswith(f"{form}.")}
        store.restore(held, count=about["count"], span=about["span"])
        layer.stores[form] = store
        if "padded" in about:
            layer.lengths[form] = Lengths.of(tensors[f"lengths.{form}"], padded=about["padded"])
    if layer.keep_graph:
        layer.graph = [archiving.fetched(layer, "compressed", number, whole=True) for number in range(layer.archived)]
