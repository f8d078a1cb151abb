"""What a policy costs for a model before anyone runs it: tokens, bytes and attention work, computed from shapes."""

import attrs

from kvtiers import Policy
from kvtiers.planning import Shape


@attrs.frozen(kw_only=True)
class Cost:
    """What one policy costs.

    attended: the most tokens that one attention call sees until the end.
    cached_bytes: keys and values of the attended history, as papers count: without the block (or chunk) that attends,
        or of everything if nothing bounds what is attended.
    device_bytes: the most that is allocated there, with current slots, unrotated copies, digests, and an archive on the
        device; what grows does so by a quarter, which is counted too. archive_bytes: archived elsewhere, counted once.
    growth_bytes: what the archive grows by in `Shape.growth_steps`, wherever it is.
    work: multiplications of attention, relative to attending everything.
    """

    attended: int
    cached_bytes: int
    device_bytes: int
    archive_bytes: int
    growth_bytes: int
    work: float


def cost(policy: Policy, shape: Shape) -> Cost:
    """What `policy` costs for `shape`."""
    geometry, block = shape.geometry, policy.block_steps(shape.geometry)
    current = min((policy.chunk_size or shape.steps) if geometry.causal else block, shape.steps)
    bound = policy.bound(geometry)
    archives = policy.recent is not None and policy.archives
    aged = 0 if policy.recent is None else max(0, shape.steps - policy.anchors(geometry) - policy.recent)
    blocks = aged // block if archives else 0
    attended = shape.tokens if bound is None else min(bound, shape.tokens)
    if archives and policy.attend == "compressed":
        near = policy.anchors(geometry) + (policy.recent or 0) + current
        past = max(0, shape.steps - near) // block
        of_tier = [(shape.steps - past * block, past)]
        if past and geometry.causal:  # just before the newest of them left recent, there were more
            of_tier.append((near + block - 1, past - 1))
        most = max(steps * geometry.tokens_per_step + _mid(policy, shape, blocks) for steps, blocks in of_tier)
        attended = min(attended, most)
    of_block = policy.archived_bytes(geometry) * shape.layers if policy.archives else 0
    allocated = policy.bound_bytes(geometry, blocks, steps=shape.steps) or 0
    without = 0 if bound is None else current * geometry.tokens_per_step
    return Cost(
        attended=attended,
        cached_bytes=(attended - without) * shape.token_bytes,
        device_bytes=shape.layers * allocated,
        archive_bytes=0 if policy.archive.location == "device" else blocks * of_block,
        growth_bytes=shape.growth_steps // block * of_block if archives else 0,
        work=attended / shape.tokens,
    )


def _mid(policy: Policy, shape: Shape, past: int) -> int:
    """Compressed tokens that are attended of `past` archived blocks."""
    chosen = policy.retriever.count(policy.top_k, past)
    further = min(policy.top_k_compressed, past - chosen) if chosen else 0
    return (chosen + further) * policy.block_tokens(shape.geometry, "compressed")
