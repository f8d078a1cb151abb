"""What a layer must be that was filled from a file: everything is looked at before a cache goes on with it.

A checksum tells a file that was damaged. These are the checks for one that was made to be wrong.
"""

from collections.abc import Iterator, Mapping
from itertools import chain

import torch
from torch import Tensor

from kvtiers.ageing import check_made
from kvtiers.blocks import Blocks, Form
from kvtiers.checks import Sizes, fits
from kvtiers.errors import SavedCacheError
from kvtiers.layer_state import LayerState
from kvtiers.window import Window

Claims = Iterator[tuple[object, str]]
"""Whether something holds, and what it is said of. Whoever reads them stops at the first that does not hold."""
Planes = dict[str, tuple[Sizes, torch.dtype]]
"""The shape and dtype that the planes of a window must have, by name."""
_FAR = 2.0**31
"""Steps. No tier is shifted further."""


def check_filled(layer: LayerState) -> None:
    """Raise `SavedCacheError` unless everything that was loaded makes sense together."""
    whole = (_numbers, _windows, _rotated, _watched, _mid, _history, _tokens, _waiting)
    parts = whole if layer.window.planes else whole[:1]
    for holds, what in chain.from_iterable(claims(layer) for claims in parts):
        if not holds:
            raise SavedCacheError(
                f"the file contradicts itself: the {what} of layer {layer.layer} do not go with the rest; save it again"
            )


def _numbers(layer: LayerState) -> Claims:
    line, policy, geometry = layer.timeline, layer.policy, layer.geometry
    steps, committed, start = layer.num_steps, layer.committed_steps, layer.recent_start
    yield line.cuts is None if geometry.causal else isinstance(line.cuts, tuple), "blocks"
    yield line.sink == policy.sink_steps if line.cuts is None else line.sink in (0, *line.cuts), "anchors"
    # a text's current tokens may have come under another chunk_size, before a swap
    fits = geometry.causal or steps - committed <= geometry.steps_per_commit
    yield 0 <= committed <= steps and fits, "steps"
    yield layer.window.planes or not any(True for _ in layer.tensors()), "tensors"
    yield layer.window.planes or steps == 0, "steps"
    latest = _FAR if policy.in_place else committed
    yield line.origin is None or line.sink <= line.origin <= latest, "recent steps"
    if line.cuts is None:
        first = max(line.recent_start_at(committed), line.sink, line.origin or 0)
        back = policy.in_place and line.origin is not None  # rolled back past what compact() had moved
        yield start == first or (line.sink <= start < first and back) or start == committed == 0, "recent steps"
    else:
        lengths = {stop - first for first, stop in zip((0, *line.cuts), line.cuts, strict=False)}
        due = {geometry.steps_per_commit} if geometry.even else set(range(1, geometry.steps_per_commit + 1))
        yield lengths <= due and (line.cuts or (0,))[-1] == committed, "blocks"
        yield start in (line.sink, *line.cuts) and start >= line.recent_start_at(committed), "recent steps"
    aged = max(0, start - line.sink)
    yield 0 <= layer.dropped <= aged and min(layer.tier_counts().values()) >= 0, "dropped steps"
    if not policy.archives:
        yield layer.dropped == (aged if policy.compressor.drops else 0), "dropped steps"
    counts = (layer.pending, layer.attended, layer.selected_at, layer.together_at)
    yield min(counts) >= 0 and max(counts) <= _FAR and layer.attended <= layer.window.slots, "selections"
    yield layer.pending <= steps + policy.refresh_steps, "selections"
    yield not layer.stale or policy.archives, "selections"
    late = layer.stale and layer.placed.unrotated is not None and layer.current
    yield not layer.placed.waiting or late, "current tokens"
    needed = layer.placed.needed
    may_need = policy.leaves_without_keys and 0 <= (needed or 0) <= steps * geometry.tokens_per_step
    yield needed is None or may_need, "unrotated keys"


def _windows(layer: LayerState) -> Claims:
    geometry, window, plain = layer.geometry, layer.window, layer.placed.unrotated
    per_step, anchors = geometry.tokens_per_step, min(layer.timeline.sink, layer.num_steps)
    recent = max(0, layer.num_steps - max(layer.recent_start, anchors)) * per_step
    lead, dtype = (geometry.batch, geometry.kv_heads, None), geometry.dtype
    due: Planes = {"rotated": ((*lead, geometry.head_dim), dtype), "values": ((*lead, geometry.value_dim), dtype)}
    if layer.watched.counts:
        due["attention"] = ((geometry.batch, geometry.query_heads, None, 1), torch.float32)
    if "bias" in window.planes:
        due["bias"] = ((*lead, 1), torch.float32)
    yield from _planes(window, due)
    yield window.sink == anchors * per_step and window.recent == recent, "tokens"
    free = window.begin - window.sink_slot
    yield free == 0 or (free > 0 and layer.stale) or not window.sink, "anchors"
    rotates = layer.policy.realigner.rotates
    for shift in (window.sink_shift, window.recent_shift):
        yield abs(shift) <= (_FAR if rotates else 0), "places"
    for name, least in (("bias", -torch.inf), ("attention", 0.0)):
        if name in window.planes:
            yield _in_range(window.planes[name], least), f"{name} numbers"
    yield (plain is not None) == (rotates and not layer.policy.in_place), "unrotated keys"
    if plain is not None:
        late, anew = layer.current if layer.placed.waiting else 0, layer.policy.realigner.sink_moves == "anew"
        yield from _planes(plain, {"unrotated": ((*lead, geometry.head_dim), dtype)})
        yield plain.sink == (window.sink if anew else 0) and not plain.mid, "unrotated keys"
        if layer.policy.compressor.drops:  # what compact() dropped is forgotten by the next commit
            yield plain.recent >= recent - late, "unrotated keys"
        elif not layer.policy.leaves_without_keys:
            yield plain.recent == recent - late, "unrotated keys"
        yield plain.recent % per_step == 0, "unrotated keys"
        yield plain.sink_slot + plain.sink <= plain.head, "unrotated keys"
        yield plain.sink_shift == plain.recent_shift == 0, "unrotated keys"


def _planes(window: Window, due: Planes) -> Claims:
    """Planes as they are due, and numbers that lie in them."""
    planes = window.planes
    yield set(planes) in (set(due), set()), "planes"
    yield len({plane.shape[2] for plane in planes.values()}) <= 1, "slots"
    for name, plane in planes.items():
        yield _is(plane, *due[name]), f"{name} planes"
    yield min(window.tail, window.sink, window.sink_slot, window.mid, window.recent) >= 0, "slots"
    yield window.tail <= window.slots and window.begin >= 0 and window.sink_slot + window.sink <= window.slots, "slots"
    for spare in (slice(window.sink_slot), slice(window.sink_slot + window.sink, window.begin + window.sink)):
        yield not any(plane[:, :, spare].any() for plane in planes.values()), "slots"
    yield not any(plane[:, :, window.tail :].any() for plane in planes.values()), "slots"


def _rotated(layer: LayerState) -> Claims:
    """Keys are those that are held unrotated, rotated once to where the shifts put them (invariant 4)."""
    placed, window, plain, per_step = layer.placed, layer.window, layer.placed.unrotated, layer.geometry.tokens_per_step
    yield layer.policy.realigner.sink_moves != "never" or window.sink_shift == 0, "places"
    if plain is None or not plain.planes:
        return
    late = layer.current if placed.waiting else 0
    both = min(plain.recent, window.recent - late)
    first = layer.num_steps - (late + both) // per_step + window.recent_shift
    runs = [(plain.tail - both, window.tail - late - both, both, first)]
    if plain.sink:
        runs.append((plain.sink_slot, window.sink_slot, plain.sink, window.sink_shift))
    for unrotated, rotated, tokens, step in runs:
        keys = plain.view("unrotated", slice(unrotated, unrotated + tokens))
        held = window.view("rotated", slice(rotated, rotated + tokens))
        yield _near(held, placed.turned(keys, step)), "places"


def _watched(layer: LayerState) -> Claims:
    watched, geometry = layer.watched, layer.geometry
    for queries in (watched.committed, watched.fresh):
        shape = (geometry.batch, geometry.query_heads, None, geometry.head_dim)
        yield queries is None or _is(queries, shape, geometry.dtype), "latest queries"
        yield queries is None or 0 < queries.shape[2] <= watched.size, "latest queries"
    if watched.got is not None:
        tokens = layer.window.tail - layer.window.begin
        due = (geometry.batch, geometry.query_heads, tokens)
        yield watched.counts and layer.current and _is(watched.got, due, torch.float32), "attention weights"
        yield _in_range(watched.got, 0.0), "attention weights"


def _mid(layer: LayerState) -> Claims:
    mid, window, geometry = layer.placed.mid, layer.window, layer.geometry
    if mid is None:
        yield not window.mid or layer.policy.in_place, "mid tokens"
        return
    rows, heads, axes = (1, geometry.batch), (1, geometry.kv_heads), 1 + len(geometry.grid)
    yield not layer.policy.in_place and window.mid > 0, "mid tokens"
    yield _is(mid.offsets, (rows, heads, window.mid, axes)) and _in_range(mid.offsets, -_FAR), "offsets of mid tokens"
    yield _is(mid.starts, (rows, heads, None), torch.long) and _ascending(mid.starts), "first steps of mid blocks"
    blocks = mid.starts.shape[2]
    yield 0 <= int(mid.starts.min()) <= int(mid.starts.max()) < layer.recent_start, "first steps of mid blocks"
    yield any(_is(mid.placed, (rows, heads, blocks), dtype) for dtype in (torch.long, None)), "places of mid blocks"
    yield _in_range(mid.placed, -_FAR), "places of mid blocks"
    if mid.owner is None:
        yield window.mid % blocks == 0, "mid tokens"
    else:
        yield _is(mid.owner, (rows, heads, window.mid), torch.long), "owners of mid tokens"
        yield 0 <= int(mid.owner.min()) <= int(mid.owner.max()) < blocks, "owners of mid tokens"


def _history(layer: LayerState) -> Claims:
    history, policy, geometry = layer.history, layer.policy, layer.geometry
    count, forms, wide = history.count, set(policy.forms), (geometry.batch, geometry.kv_heads)
    yield count >= 0 and (not count or policy.archives), "archived blocks"
    lengths = {history.table.length, *(store.count for store in history.stores.values())}
    yield lengths == {count}, "archived blocks"
    yield {*history.stores} == {*history.tokens} == forms if count else not history.stores, "archived forms"
    if count:
        table = history.table.data
        yield _is(table, (count, 3), torch.long), "table"
        firsts, spans, placed = [] if table is None else table.T.tolist()
        ends = [first + span for first, span in zip(firsts, spans, strict=True)]
        yield min(spans) >= 1 and max(spans) <= history.longest and min(placed) >= 1 and max(placed) <= _FAR, "spans"
        edges = zip([layer.timeline.sink, *ends], [*firsts, layer.recent_start], strict=True)
        yield all(end <= first for end, first in edges), "table"
        yield [*history.spans] == sorted(span for span in spans if span != history.longest), "spans"
        allowed = [sorted(placed), *([[]] if spans == placed else [])]
        yield [*history.compressed_spans] in allowed, "spans"
        yield sum(spans) == layer.tier_counts()["mid"], "mid steps"
    else:
        yield not history.spans and not history.compressed_spans, "spans"
        yield not policy.archives or layer.tier_counts()["mid"] == 0, "mid steps"
    yield from _digests(layer)
    selection = history.selection
    if selection is not None:
        for index in (selection.chosen, selection.compressed):
            yield _is(index, (*wide, None), torch.long) and _ascending(index), "chosen blocks"
            yield not index.numel() or 0 <= int(index.min()) <= int(index.max()) < count, "chosen blocks"
        most = count if layer.stale else policy.retriever.count(policy.top_k, count)  # stale: of a policy before a swap
        yield 0 < selection.chosen.shape[2] <= most, "chosen blocks"
    due = policy.retriever.count(policy.top_k, count) if count and not layer.stale else 0
    if due:
        yield selection is not None, "chosen blocks"
    if due and selection is not None:
        both: tuple[tuple[Form, Tensor], ...] = (
            (policy.attend, selection.chosen),
            ("compressed", selection.compressed),
        )
        tokens = (history.most_tokens[form] * x.shape[2] for form, x in both if x.shape[2])
        yield layer.window.mid == sum(tokens), "chosen blocks"


def _digests(layer: LayerState) -> Claims:
    """As the retriever makes them of an archived block; it is asked for those of one."""
    history, retriever = layer.history, layer.policy.retriever
    held = history.digests.data
    if not history.count or not retriever.needs_digests:
        yield held is None or not held.shape[2], "digests"
        return
    yield held is not None, "digests"
    made = history.digest_again(layer.policy, layer.moment(), 1).data
    if held is not None and made is not None:
        yield _is(held, (*made.shape[:2], history.count, *made.shape[3:]), made.dtype), "digests"
        yield bool(torch.isfinite(held).all()), "digests"


def _tokens(layer: LayerState) -> Claims:
    """What is noted of archived tokens, and that a block of each form can be read."""
    history, count, axes = layer.history, layer.history.count, 1 + len(layer.geometry.grid)
    wide, index = history.wide, torch.zeros(1, 1, 1, dtype=torch.long, device=layer.window.device)
    for form, one in history.tokens.items() if count else ():
        most = history.most_tokens[form]
        keys, values = history.parts(form, index.expand(*wide, -1))  # raises for what is of another shape or dtype
        due, parts = layer.policy.codec.encode(keys, values), history.stores[form].read(index.expand(*wide, -1))
        yield _kinds(due) == _kinds(parts), "archived parts"
        yield (one.constant is None) != (one.offsets is None), "offsets"
        held = one.constant if one.offsets is None else one.offsets.data
        lead = (1, 1, 1) if one.offsets is None else (*wide, count)
        yield _is(held, (*lead, most, axes), torch.float32) and _in_range(held, -_FAR), "offsets"
        if one.bias is not None:
            yield _is(one.bias.data, (*wide, count, most), torch.float32) and _in_range(one.bias.data), "biases"


def _waiting(layer: LayerState) -> Claims:
    """Compressed forms that wait for their blocks to leave recent, and mid, where a compressor rewrites it."""
    history, compressor, geometry, start = layer.history, layer.policy.compressor, layer.geometry, layer.recent_start
    blocks = {}
    if compressor.given and not layer.policy.in_place:
        recent = layer.timeline.blocks(max(start, layer.timeline.sink), layer.committed_steps)
        blocks = {str(block.start): block.steps for block in recent}
    extra = {str(layer.committed_steps)} if compressor.given and layer.current else set()
    yield set(blocks) <= set(history.waiting) <= {*blocks, *extra}, "given forms"
    for first, held in history.waiting.items():
        steps = blocks.get(first, layer.num_steps - layer.committed_steps)
        yield from _held(layer, held, compressor.block_tokens(steps, geometry), "given forms", at_most=False)
        yield held.starts.tolist() == [int(first)], "given forms"
    mid = history.rewritten
    yield compressor.rewrites if mid is not None else not (compressor.rewrites and layer.window.mid), "mid tokens"
    if mid is not None:
        yield from _held(layer, mid, compressor.mid_tokens(geometry), "mid tokens", at_most=True)
        yield int(mid.starts) >= 0 and int(mid.starts) + mid.span <= layer.recent_start, "mid tokens"
        yield mid.keys.shape[3] == layer.window.mid, "mid tokens"


def _held(layer: LayerState, held: Blocks, tokens: int, what: str, *, at_most: bool) -> Claims:
    """One block, as a compressor may make it."""
    geometry = layer.geometry
    yield all(x is not None for x in (held.keys, held.values, held.offsets, held.starts)) and held.rotated is None, what
    check_made(layer.history, held, 1, tokens, "age", layer.moment(), at_most=at_most)
    yield _is(held.starts, (1,), torch.long) and _in_range(held.offsets, -_FAR), what
    yield held.span <= _FAR and (held.bias is None or _in_range(held.bias)), what
    attention = (geometry.batch, geometry.query_heads, 1, held.keys.shape[3])
    if held.attention is not None:
        yield _is(held.attention, attention, torch.float32) and _in_range(held.attention, 0.0), what


def _kinds(parts: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (part.shape, part.dtype) for name, part in parts.items()}


def _is(x: Tensor | None, shape: Sizes, dtype: torch.dtype | None = None) -> bool:
    """Whether this is a tensor of a shape and dtype (None: any float)."""
    return x is not None and fits(x, shape) and (x.dtype == dtype if dtype else x.is_floating_point())


def _near(x: Tensor, due: Tensor) -> bool:
    """Whether two devices may have rounded the same numbers to these; what is NaN or infinite in both is passed."""
    rounding = 4 * torch.finfo(x.dtype).eps + 1e-4
    x, due = x.double().nan_to_num(), due.double().nan_to_num()
    most = due.abs().amax() if due.numel() else 0.0
    return bool(((x - due).abs() <= most * rounding).all())


def _in_range(x: Tensor | None, least: float = -torch.inf) -> bool:
    """Whether this is a tensor of which no number is NaN, below `least` or huge; a bias may be -inf."""
    return x is not None and bool(((x >= least) & (x <= _FAR)).all())


def _ascending(index: Tensor) -> bool:
    return bool((index.diff(dim=-1) > 0).all())
