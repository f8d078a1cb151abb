"""What a saved cache must be for a layer to go on with it: a file is looked at before anything is changed."""

import torch
from torch import Tensor

from kvtiers.errors import SavedCacheError
from kvtiers.history import History
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
    wide = (history.batch, history.kv_heads)
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
