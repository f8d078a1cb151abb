"""What a saved cache must be for a layer to go on with it: a file is looked at before anything is changed."""

import torch
from torch import Tensor

from kvtiers.errors import SavedCacheError
from kvtiers.history import History
from kvtiers.layer_state import LayerState
from kvtiers.slots import Moment


def check_history(history: History, moment: Moment) -> None:
    """Raise `SavedCacheError` unless what was filled makes sense for this layer."""
    forms = set(history.policy.forms) if history.count else set(history.stores)
    lengths = {history.table.length, *(store.count for store in history.stores.values())}
    noted = [growing for one in history.tokens.values() for growing in (one.offsets, one.bias) if growing is not None]
    lengths |= {growing.length for growing in noted}
    if history.policy.retriever.needs_digests:
        lengths.add(history.digests.length)
    told, table = set(history.tokens), history.table.data
    wrong = lengths - {history.count} or set(history.stores) != forms or (history.count and told != forms)
    wrong = wrong or (table is not None and table.shape[1:] != (3,))
    wrong = wrong or len(history.compressed_spans) not in (0, history.count)
    chosen = [x for x in (history.chosen, history.chosen_compressed) if x is not None]
    wide = history.wide
    for x in chosen:
        bad = x.dtype != torch.long or x.dim() != 3 or x.shape[:2] != wide
        wrong = wrong or bad or (x.numel() and not 0 <= int(x.min()) <= int(x.max()) < history.count)
    axes = 1 + len(moment.geometry.grid)
    for form in forms if not wrong else ():
        index = torch.zeros(*wide, 1, dtype=torch.long)
        keys, values = history.parts(form, index)
        shape = (*wide, 1, history.most_tokens[form])
        geometry = moment.geometry
        wrong = wrong or keys.shape != (*shape, geometry.head_dim) or values.shape != (*shape, geometry.value_dim)
        offsets = history.offsets_at(form, index.to(moment.device))
        wrong = wrong or offsets.dim() != 5 or offsets.shape[3:] != (history.most_tokens[form], axes)
    for held in (*history.waiting.values(), *([history.rewritten] if history.rewritten else [])):
        tensors: list[Tensor | None] = [held.keys, held.values, held.offsets, held.starts]  # or the file had none
        wrong = wrong or any(x is None for x in tensors)
        wrong = wrong or any(x.dim() != 5 or x.shape[:2] != wide for x in (held.keys, held.values))
    if wrong:
        raise SavedCacheError(f"the archive of layer {history.layer} does not fit together: {lengths} blocks, {forms}")


def check_layer_state(layer: LayerState) -> None:
    """Raise `SavedCacheError` unless what was loaded makes sense together."""
    geometry, per_step, window, mid = layer.geometry, layer.geometry.tokens_per_step, layer.window, layer.placed.mid
    line = layer.timeline
    anchors = min(line.sink, layer.num_steps)
    recent = max(0, layer.num_steps - max(layer.recent_start, anchors))
    numbers = (0, layer.committed_steps, layer.num_steps)
    wrong = sorted(numbers) != list(numbers) or min(layer.dropped, layer.pending) < 0
    wrong = wrong or layer.recent_start > max(layer.num_steps, line.sink)
    wrong = wrong or window.sink != anchors * per_step or window.recent != recent * per_step
    wrong = wrong or (layer.num_steps > 0) != bool(window.planes)
    if line.cuts is not None:
        wrong = wrong or list(line.cuts) != sorted(set(line.cuts)) or (line.cuts or (0,))[-1] != layer.committed_steps
    if wrong:
        raise SavedCacheError(f"the numbers of layer {layer.layer} do not fit together: {layer.tier_counts()}")
    lead = (geometry.batch, geometry.kv_heads)
    shapes = {"rotated": (*lead, geometry.head_dim), "values": (*lead, geometry.value_dim), "bias": (*lead, 1)}
    if layer.watched.counts:
        shapes["attention"] = (geometry.batch, geometry.query_heads, 1)
    window.check(f"layer {layer.layer}", shapes)
    if layer.placed.unrotated is not None:
        layer.placed.unrotated.check(f"layer {layer.layer} (unrotated)", {"unrotated": (*lead, geometry.head_dim)})
    if window.planes:
        check_history(layer.history, layer.moment(window.planes["rotated"].device))
    if mid is not None:
        parts = (mid.offsets, mid.starts, mid.placed)
        if any(x is None for x in parts) or mid.offsets.dim() != 4 or mid.offsets.shape[2] != window.mid:
            raise SavedCacheError(f"the mid tokens of layer {layer.layer} lie nowhere")
    elif window.mid and not layer.policy.in_place:
        raise SavedCacheError(f"the mid tokens of layer {layer.layer} lie nowhere")
