"""Changing the policy of a filled cache: what may change, and what must then be made anew."""

import attrs

from kvtiers import archiving
from kvtiers.archive import Growing
from kvtiers.blocks import Form
from kvtiers.errors import SwapError
from kvtiers.policy import Policy
from kvtiers.store import LayerStore

_FREE = frozenset({"retriever", "top_k", "refresh", "chunk_size", "budget", "realigner", "top_k_compressed"})


def check(store: LayerStore, policy: Policy) -> None:
    """Raise `SwapError` if `store`, as filled, cannot go on under `policy`."""
    if store.num_steps == 0:
        return
    old = store.policy
    names = [field.name for field in attrs.fields(Policy)]
    fixed = [name for name in names if name not in _FREE and getattr(old, name) != getattr(policy, name)]
    if policy.archive.adopts(old.archive):
        fixed = [name for name in fixed if name != "archive"]
    if fixed:
        raise SwapError(
            f"layer {store.layer} is filled, so {', '.join(fixed)} cannot change any more; "
            f"these can: {', '.join(sorted(_FREE))}, and an archive's limit_bytes (to no less than it holds). "
            "Otherwise start a new cache"
        )
    if old.realigner.rotates != policy.realigner.rotates:
        raise SwapError(
            f"layer {store.layer} stores keys {'un' if old.realigner.rotates else ''}rotated for "
            f"{type(old.realigner).__name__}, and {type(policy.realigner).__name__} needs the other; start a new cache"
        )
    if old.in_place != policy.in_place and store.recent_start > store.timeline.sink:
        raise SwapError(
            f"layer {store.layer} keeps its history {'in place' if old.in_place else 'in the archive'}, and this "
            "change would move it; start a new cache"
        )
    digests = store.archived and policy.retriever != old.retriever and policy.retriever.needs_digests
    form = policy.retriever.digests
    if digests and form not in store.shelves and not old.compressor.keeps:
        raise SwapError(
            f"layer {store.layer} no longer has the {form} keys that {type(policy.retriever).__name__} digests; "
            f"have them archived from the start (attend={form!r}), or start a new cache"
        )
    if store.archived and policy.top_k_compressed and "compressed" not in store.shelves:
        raise SwapError(
            f"layer {store.layer} archived no compressed form for top_k_compressed={policy.top_k_compressed}; "
            "set top_k_compressed from the start, or start a new cache"
        )


def apply(store: LayerStore, policy: Policy) -> None:
    """Go on under `policy`; the next write or select makes a new selection. What it will not extend is freed."""
    anew = policy.retriever != store.policy.retriever
    store.policy = policy
    if store.num_steps == 0:
        store.clear()  # another sink, another beginning
        return
    if not policy.retriever.needs_digests:
        store.digests = Growing(2)
    elif anew and store.archived:
        _digest_again(store)
    for form in set(store.shelves) - policy.forms:
        del store.shelves[form]
        store.lengths.pop(form, None)
    for shelf in store.shelves.values():
        policy.archive.adopt(shelf)
    store.pending = policy.refresh_steps
    if store.archived:
        store.stale = True
        if not policy.retriever.needs_query:
            store._renew(None)
    elif store.dropped:
        store._assemble(None)


def _digest_again(store: LayerStore) -> None:
    """Digest every archived block for the new retriever."""
    wanted: Form = store.policy.retriever.digests
    form = wanted if wanted in store.shelves else next(iter(store.shelves))
    store.digests = Growing(2)
    for number in range(store.archived):
        store.digests.append(archiving.digests(store, archiving.fetched(store, form, number)))
