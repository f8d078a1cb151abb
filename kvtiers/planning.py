"""What a policy costs for a model before anyone runs it: tokens, bytes and attention work, computed from shapes."""

import attrs

from kvtiers.geometry import Geometry
from kvtiers.policy import Policy


@attrs.frozen(kw_only=True)
class Shape:
    """A model and how much of it is wanted.

    layers: how many are tiered; geometry: of each. steps: history wanted, in steps of the time axis.
    growth_steps, growth_unit: the stretch for which the growth of the archive is told, as in 960 frames, "minute".
    """

    name: str
    layers: int
    geometry: Geometry
    steps: int
    growth_steps: int
    growth_unit: str

    @property
    def tokens(self) -> int:
        """Tokens of all steps."""
        return self.steps * self.geometry.tokens_per_step

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return self.layers * self.geometry.token_bytes


@attrs.frozen(kw_only=True)
class Cost:
    """What one policy costs.

    attended: tokens that one attention call sees at the end.
    cached_bytes: keys and values of the attended history, as papers count: without the block (or chunk) that attends,
        or of everything if nothing bounds what is attended.
    device_bytes: the most that is allocated there, with current slots, unrotated copies, digests, and an archive on the
        device; what grows does so by doubling, and is counted twice. archive_bytes: archived elsewhere, counted once.
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
    """What `policy` costs for `shape`, at its end."""
    geometry, block = shape.geometry, policy.block_steps(shape.geometry)
    current = min((policy.chunk_size or 1) if geometry.causal else block, shape.steps)
    bound = policy.bound(geometry)
    archives = policy.recent is not None and not policy.compressor.drops and not policy.in_place
    aged = 0 if policy.recent is None else max(0, shape.steps - policy.anchors(geometry) - policy.recent)
    blocks = aged // block if archives else 0
    attended = shape.tokens if bound is None else min(bound, shape.tokens)
    if archives and policy.recall == "compressed":
        past = max(0, shape.steps - current - policy.anchors(geometry) - (policy.recent or 0)) // block
        chosen = policy.retriever.count(policy.top_k, past)
        further = min(policy.fringe, past - chosen) if chosen else 0
        mid = (chosen + further) * policy.block_tokens(geometry, "compressed")
        attended = min(attended, shape.tokens - past * block * geometry.tokens_per_step + mid)
    of_block = sum(policy.block_tokens(geometry, form) for form in policy.forms) * shape.token_bytes
    allocated = policy.bound_bytes(geometry, blocks)
    without = 0 if bound is None else current * geometry.tokens_per_step
    return Cost(
        attended=attended,
        cached_bytes=(attended - without) * shape.token_bytes,
        device_bytes=shape.layers * (_doubled(policy, shape, blocks) if allocated is None else allocated),
        archive_bytes=0 if policy.archive.place == "device" else blocks * of_block,
        growth_bytes=shape.growth_steps // block * of_block if archives else 0,
        work=attended / shape.tokens,
    )


def _doubled(policy: Policy, shape: Shape, blocks: int) -> int:
    """The most bytes that one layer holds on the device if its context buffer grows, which it does by doubling."""
    geometry = shape.geometry
    slots = shape.tokens
    if not policy.in_place:
        slots += policy.anchors(geometry) * geometry.tokens_per_step + (policy.mid_bound(geometry) or 0)
    held = slots * (geometry.token_bytes + (geometry.key_bytes if policy.realigner.rotates else 0))
    rows, axes = geometry.batch * geometry.kv_heads, 1 + len(geometry.grid)
    full = policy.block_tokens(geometry, "full")
    digest = policy.retriever.digest_bytes(full, geometry.head_dim) * rows + 8
    chosen = rows * (3 * 8 + full * 8 * (axes + 1))
    archived = sum(policy.block_tokens(geometry, form) for form in policy.forms) * (
        geometry.token_bytes + 4 * rows * axes
    )
    held += blocks * (digest + chosen + (archived if policy.archive.place == "device" else 0))
    return 2 * held + policy.compressor.state_bytes(geometry)
