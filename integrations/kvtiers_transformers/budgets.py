"""Policies at one size: `recent` is chosen so that a step attends, or a layer holds, no more than a budget."""

import attrs

from kvtiers import Geometry, Policy, PolicyError

_LEAST_RECENT = 16


def fitted(
    policy: Policy, geometry: Geometry, *, tokens: int | None = None, layer_bytes: int | None = None, length: int = 0
) -> Policy:
    """`policy` with the largest `recent` for which both limits hold; one that always attends everything stays as it is.

    tokens: the most that a query may attend (`Policy.bound`). layer_bytes: the most that a layer may hold on the device
    (`Policy.bound_bytes`) when it has read `length` tokens. Raises `PolicyError` if 16 steps of `recent` are too many.
    """
    if policy.bound(geometry) is None or (tokens is None and layer_bytes is None):
        return policy

    def fits(recent: int) -> bool:
        tried = attrs.evolve(policy, recent=recent)
        attended, held = tried.bound(geometry), tried.bound_bytes(geometry, length // policy.block_size)
        few = tokens is None or (attended is not None and attended <= tokens)
        return few and (layer_bytes is None or (held is not None and held <= layer_bytes))

    low, high = _LEAST_RECENT, max(_LEAST_RECENT, tokens or 2**20)
    if not fits(low):
        limits = [f"{tokens:,} tokens"] if tokens is not None else []
        limits += [f"{layer_bytes:,} bytes of a layer"] if layer_bytes is not None else []
        raise PolicyError(
            f"with recent = {low} it still needs more than {' and '.join(limits)}; lower its top_k, most or sink, or "
            "raise the budget"
        )
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return attrs.evolve(policy, recent=low)
