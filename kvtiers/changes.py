"""What can be undone or changed on a filled layer, exactly: why it cannot be rolled back, or go on under a policy."""

from collections.abc import Mapping, Sequence

from kvtiers.archive import Archive
from kvtiers.errors import CropError, PolicyError, SwapError
from kvtiers.layer import Layer
from kvtiers.policy import FIELDS, Policy

_FREE = frozenset({"retriever", "top_k", "refresh", "chunk_size", "budget", "realigner", "top_k_compressed"})


def why_not_crop(layer: Layer, steps: int) -> str | None:
    """Why `layer` cannot be rolled back to `steps` steps exactly, or None if it can."""
    policy, line = layer.policy, layer.timeline
    if not 0 <= steps <= layer.num_steps:
        return f"it holds {layer.num_steps} steps"
    if steps in (0, layer.num_steps):
        return None
    if line.cuts is not None and steps not in line.cuts:
        return f"step {steps} is inside a block"
    first = 0 if policy.in_place else layer.recent_start
    if steps < layer.committed_steps and line.recent_start_at(steps) < first and layer.recent_start > line.sink:
        return f"blocks before step {layer.recent_start} have left recent since then"
    if layer.watched.looks:
        looks = policy.compressor.attention or policy.compressor.window_queries(layer.geometry)
        return (
            f"{type(policy.compressor if looks else policy.retriever).__name__} has already looked at the later queries"
        )
    if not layer.geometry.causal:
        return None  # every block of a video chooses anew
    renewed = layer.history.count and policy.retriever.needs_query and layer.selected_at > steps
    if renewed and policy.refresh_steps > 1:
        return f"the selection was renewed at step {layer.selected_at}, by queries that would be gone"
    if steps < layer.together_at:
        return f"the tokens up to step {layer.together_at} chose what they attend together with tokens that would go"
    return None


def one_per_layer(policies: object, before: Sequence[Policy]) -> list[Policy]:
    """The policy of each layer, in place of those of `before`. Raises `SwapError` unless that is what was given, and
    needs keys of the same kind: rotated by the model, or not."""
    layers = len(before)
    each = [policies] * layers if isinstance(policies, Policy) else policies
    if not isinstance(each, Sequence) or len(each) != layers or not all(isinstance(one, Policy) for one in each):
        got = f"{len(each)} in a {type(each).__name__}" if isinstance(each, Sequence) else f"a {type(each).__name__}"
        raise SwapError(
            f"swap takes one Policy, or one for each of {layers} layers, got {got}; make one with kvtiers.policy(...)"
        )
    rotates = [policy.realigner.rotates for policy in (*before, *each)]
    if any(rotates) != all(rotates):
        raise SwapError(
            "realigners that rotate and realigners that do not cannot replace one another; start a new cache"
        )
    return list(each)


def check_policy(layer: Layer, policy: Policy) -> None:
    """Raise `SwapError` if `layer`, as filled, cannot go on under `policy`."""
    if layer.num_steps == 0:
        return
    old, number = layer.policy, layer.layer
    fixed = [name for name in FIELDS if name not in _FREE and getattr(old, name) != getattr(policy, name)]
    if policy.archive.adopts(old.archive):
        fixed = [name for name in fixed if name != "archive"]
    if fixed:
        raise SwapError(
            f"layer {number} is filled, so {', '.join(fixed)} cannot change any more; "
            f"these can: {', '.join(sorted(_FREE))}, and an archive's limit_bytes (to no less than it holds). "
            "Otherwise start a new cache"
        )
    if old.attention != policy.attention or (policy.retriever.attention and old.retriever != policy.retriever):
        raise SwapError(
            f"layer {number} has noted {old.attention or 'no'} attention for {type(old.retriever).__name__}, and "
            f"{type(policy.retriever).__name__} would need to have seen what it notes; start a new cache"
        )
    moves = {old.realigner.sink_moves, policy.realigner.sink_moves}
    if old.realigner.rotates != policy.realigner.rotates or (len(moves) > 1 and "anew" in moves):
        raise SwapError(
            f"layer {number} stores keys as {type(old.realigner).__name__} needs them, and "
            f"{type(policy.realigner).__name__} needs others; start a new cache"
        )
    if old.in_place != policy.in_place and (old.realigner.rotates or layer.recent_start > layer.timeline.sink):
        raise SwapError(
            f"layer {number} keeps its history {'in place' if old.in_place else 'in the archive'}, and this "
            "change would move it; start a new cache"
        )
    if policy.compressor.given and layer.current and not layer.stale and layer.recent_start > layer.timeline.sink:
        raise SwapError(f"layer {number} is in the middle of a block; commit or crop it first")
    archived, form = layer.history.count, policy.retriever.digests
    digests = archived and policy.retriever != old.retriever and policy.retriever.needs_digests
    gone = digests and form not in layer.history.stores and not old.compressor.keeps
    if gone or (old.leaves_without_keys and not policy.leaves_without_keys):
        raise SwapError(
            f"layer {number} no longer has the {form} keys that {type(policy.retriever).__name__} digests; "
            f"have them archived from the start (attend={form!r}), or start a new cache"
        )
    if archived and policy.top_k_compressed and "compressed" not in layer.history.stores:
        raise SwapError(
            f"layer {number} archived no compressed form for top_k_compressed={policy.top_k_compressed}; "
            "set top_k_compressed from the start, or start a new cache"
        )


def check_realigners(policies: Sequence[Policy]) -> None:
    """Raise `PolicyError` if some layers need keys that the model rotated, and others such as it did not."""
    by_kind = {policy.realigner.rotates: type(policy.realigner).__name__ for policy in policies}
    if len(by_kind) > 1:
        raise PolicyError(
            f"{by_kind[True]} places keys that the model did not rotate, and {by_kind[False]} those that it did; all "
            "layers of a cache get keys of one kind, so give them realigners of one kind"
        )


def check_steps(steps: object) -> None:
    """Raise `CropError` unless this is a number of steps."""
    if type(steps) is not int:
        raise CropError(f"a cache is rolled back by whole steps, got {steps!r}")


def check_together(before: Sequence[Policy], after: Sequence[Policy], held: Mapping[Archive, int]) -> None:
    """Raise `SwapError` if the layers of a cache cannot go on together. held: bytes in each archive."""
    for old, new in zip(before, after, strict=True):
        limit = new.archive.limit_bytes
        if limit is not None and held[old.archive] > limit:
            raise SwapError(
                f"the archive holds {held[old.archive]:,} bytes, more than limit_bytes = {limit:,}; "
                "give it no less than it holds"
            )
