"""Policies at one size: what they keep is scaled so that a step attends, or a layer holds, no more than a budget."""

from collections.abc import Callable

import attrs

from kvtiers import Geometry, Policy, PolicyError

_LEAST_RECENT = 16
_ANSWER = 20
"""Tokens of an answer, for which one that compresses after reading leaves room."""
_STEPS = 1024
"""Shares are tried in steps of one of so many."""


def fitted(
    policy: Policy, geometry: Geometry, *, tokens: int | None = None, layer_bytes: int | None = None, length: int = 0
) -> Policy:
    """`policy`, scaled (`Policy.scaled`) to the largest size for which both limits hold; what is left goes to `recent`.

    One that always attends everything stays as it is. tokens: the most that a query may attend (`Policy.bound`).
    layer_bytes: the most that a layer may hold on the device (`Policy.bound_bytes`) when it has read `length` tokens.
    One that compresses after reading is to keep both then. Raises `PolicyError` if its smallest size is too large.
    """
    if attends_everything(policy, geometry) or (tokens is None and layer_bytes is None):
        return policy

    def fits(tried: Policy) -> bool:
        attended, held = tried.bound(geometry), tried.bound_bytes(geometry, length // policy.block_size)
        kept = tried.compressor.kept_after_reading
        if kept is not None:
            attended = tried.anchors(geometry) + kept + _ANSWER
            held = attended * tried.token_bytes(geometry)
        few = tokens is None or (attended is not None and attended <= tokens)
        return few and (layer_bytes is None or (held is not None and held <= layer_bytes))

    def of_share(share: int) -> Policy:
        scaled = policy.scaled(share / _STEPS)
        return scaled if policy.recent is None else attrs.evolve(scaled, recent=max(_LEAST_RECENT, scaled.recent or 0))

    def with_recent(recent: int) -> Policy:
        return attrs.evolve(scaled, recent=recent)

    if not fits(of_share(0)):
        limits = [f"{tokens:,} tokens"] if tokens is not None else []
        limits += [f"{layer_bytes:,} bytes of a layer"] if layer_bytes is not None else []
        raise PolicyError(
            f"with recent = {_LEAST_RECENT} and all else as small as can be it still needs more than "
            f"{' and '.join(limits)}; lower its sink, block_size or chunk_size, or raise the budget"
        )
    high = max(_LEAST_RECENT, tokens or 2**20)
    scaled = of_share(_largest(lambda share: fits(of_share(share)), 0, high * _STEPS // _LEAST_RECENT))
    if policy.recent is None:
        return scaled
    return with_recent(_largest(lambda recent: fits(with_recent(recent)), scaled.recent or 0, high))


def attends_everything(policy: Policy, geometry: Geometry) -> bool:
    """Whether what `policy` attends has no limit, neither while it reads nor after."""
    return policy.bound(geometry) is None and policy.compressor.kept_after_reading is None


def _largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest whole number up to `high` that fits, where `low` does and all that are smaller than one that does."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
