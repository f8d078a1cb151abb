"""Policies at one size: what they keep is scaled so that a step attends, or a layer holds, no more than a budget."""

from collections.abc import Callable

import attrs

from kvtiers import Compressor, Geometry, Policy, PolicyError

_LEAST_RECENT = 16
"""Steps that stay recent in the smallest size, unless the policy itself has fewer."""
_STEPS = 1024
"""Shares are tried in steps of one of so many."""


def attends_everything(policy: Policy, geometry: Geometry) -> bool:
    """Whether what `policy` attends has no limit, neither while a text is read nor after."""
    unlimited = policy.recent is None or policy.mid_bound(geometry) is None
    return unlimited and policy.compressor.kept_after_reading is None


def fitted(
    policy: Policy,
    geometry: Geometry,
    *,
    tokens: int | None = None,
    layer_bytes: int | None = None,
    length: int = 0,
    stride: int = 64,
) -> Policy:
    """`policy`, scaled (`Policy.scaled`) to the largest size for which both limits hold; what is left goes to `recent`.

    One that always attends everything stays as it is. tokens: the most that a query may attend (`Policy.bound`).
    layer_bytes: the most that a layer may hold on the device (`Policy.bound_bytes`) when it has read `length` tokens.
    stride: tokens of a forward. Larger chunks are cut to it. A policy that compresses after reading keeps the limit in
    tokens once it has, with room for a chunk. Raises `PolicyError` if the smallest size is too large.
    """
    if attends_everything(policy, geometry) or (tokens is None and layer_bytes is None):
        return policy
    if policy.budget is not None:
        tokens = policy.budget if tokens is None else min(tokens, policy.budget)
    free = attrs.evolve(policy, budget=None, chunk_size=min(policy.chunk_size or stride, stride))
    reads_twice = policy.compressor.kept_after_reading is not None
    if reads_twice and layer_bytes is not None:
        raise PolicyError("it holds the whole text while it reads, so that its size in bytes cannot be chosen")
    if reads_twice and policy.recent is not None:
        raise PolicyError("it compresses a text after reading, for which recent must be None")

    def fits(tried: Policy) -> bool:
        attended, held = tried.bound(geometry), tried.bound_bytes(geometry, length // policy.block_size)
        kept = tried.compressor.kept_after_reading
        if kept is not None:
            attended = tried.anchors(geometry) + kept + (tried.chunk_size or 0)
        few = tokens is None or (attended is not None and attended <= tokens)
        return few and (layer_bytes is None or (held is not None and held <= layer_bytes))

    least = None if policy.recent is None else min(_LEAST_RECENT, policy.recent)

    def of_share(share: int) -> Policy:
        scaled = free.scaled(share / _STEPS)
        return scaled if least is None else attrs.evolve(scaled, recent=max(least, scaled.recent or 0))

    if not fits(of_share(0)):
        limits = [f"{tokens:,} tokens"] if tokens is not None else []
        limits += [f"{layer_bytes:,} bytes of a layer"] if layer_bytes is not None else []
        compressor = type(policy.compressor)
        fixed = policy.compressor.rewrites and compressor.scaled is Compressor.scaled
        advice = f", or let {compressor.__name__}.scaled() make what it keeps smaller" if fixed else ""
        raise PolicyError(
            f"its smallest size still needs more than {' and '.join(limits)}; lower its sink, block_size or "
            f"chunk_size, or raise the budget{advice}"
        )
    most = max(_LEAST_RECENT, tokens or 2**20)
    scaled = of_share(_largest(lambda share: fits(of_share(share)), 0, most * _STEPS // _LEAST_RECENT))
    if scaled.recent:
        recent = _largest(lambda recent: fits(attrs.evolve(scaled, recent=recent)), scaled.recent, most)
        scaled = attrs.evolve(scaled, recent=recent)
    return attrs.evolve(scaled, budget=policy.budget)


def _largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest whole number up to `high` that fits. `low` fits, and so does every number below one that fits."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
