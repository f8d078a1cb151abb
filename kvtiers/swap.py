"""Changing the policy of a filled cache: what may change, and what must then be made anew."""

import attrs

from kvtiers import archiving
from kvtiers.archive import Growing
from kvtiers.blocks import Form
from kvtiers.errors import SwapError
from kvtiers.layer import Layer
from kvtiers.policy import Policy

_FREE = frozenset({"retriever", "top_k", "refresh", "chunk_size", "budget", "realigner", "top_k_compressed"})


def check(layer: Layer, policy: Policy) -> None:
    """Raise `SwapError` if `layer`, as filled, cannot go on under `policy`."""
    if layer.num_steps == 0:
        return
    old = layer.policy
    names = [field.name for field in attrs.fields(Policy)]
    fixed = [name for name in names if name not in _FREE and getattr(old, name) != getattr(policy, name)]
    if policy.archive.adopts(old.archive):
        fixed = [name for name in fixed if name != "archive"]
    if fixed:
        raise SwapError(
            f"layer {layer.layer} is filled, so {', '.join(fixed)} cannot change any more; "
            f"these can: {', '.join(sorted(_FREE))}, and an archive's limit_bytes (to no less than it holds). "
            "Otherwise start a new cache"
        )
    if old.realigner.rotates != policy.realigner.rotates:
        raise SwapError(
            f"layer {layer.layer} stores keys {'un' if old.realigner.rotates else ''}rotated for "
            f"{type(old.realigner).__name__}, and {type(policy.realigner).__name__} needs the other; start a new cache"
        )
    if old.in_place != policy.in_place and layer.recent_start > layer.timeline.sink:
        raise SwapError(
            f"layer {layer.layer} keeps its history {'in place' if old.in_place else 'in the archive'}, and this "
            "change would move it; start a new cache"
        )
    digests = layer.archived and policy.retriever != old.retriever and policy.retriever.needs_digests
    form = policy.retriever.digests
    if digests and form not in layer.stores and not old.compressor.keeps:
        raise SwapError(
            f"layer {layer.layer} no longer has the {form} keys that {type(policy.retriever).__name__} digests; "
            f"have them archived from the start (attend={form!r}), or start a new cache"
        )
    if layer.archived and policy.top_k_compressed and "compressed" not in layer.stores:
        raise SwapError(
            f"layer {layer.layer} archived no compressed form for top_k_compressed={policy.top_k_compressed}; "
            "set top_k_compressed from the start, or start a new cache"
        )


def apply(layer: Layer, policy: Policy) -> None:
    """Go on under `policy`; the next write or select makes a new selection. What it will not extend is freed."""
    anew = policy.retriever != layer.policy.retriever
    layer.policy = policy
    if layer.num_steps == 0:
        layer.clear()  # another sink, another beginning
        return
    if not policy.retriever.needs_digests:
        layer.digests = Growing(2)
    elif anew and layer.archived:
        _digest_again(layer)
    for form in set(layer.stores) - policy.forms:
        del layer.stores[form]
        layer.lengths.pop(form, None)
    for store in layer.stores.values():
        policy.archive.adopt(store)
    layer.pending = policy.refresh_steps
    if layer.archived:
        layer.stale = True
        if not policy.retriever.needs_query:
            layer._renew(None)
    elif layer.dropped:
        layer._assemble(None)


def _digest_again(layer: Layer) -> None:
    """Digest every archived block for the new retriever."""
    wanted: Form = layer.policy.retriever.digests
    form = wanted if wanted in layer.stores else next(iter(layer.stores))
    layer.digests = Growing(2)
    for number in range(layer.archived):
        layer.digests.append(archiving.digests(layer, archiving.fetched(layer, form, number)))
