"""Preset `packforcing`: PackForcing as its paper states it (arXiv 2603.25730, sections 3 and 4.1)."""

import kvtiers
from kvtiers import Policy
from kvtiers_packforcing.dual_branch import DualBranch


def packforcing() -> Policy:
    """Eight anchor frames, history compressed 32 times and chosen by affinity, closed up, the newest block.

    Lengths are in latent frames; a block is what is committed (4 frames in the paper). Deviations: rows choose for
    themselves, and positions are `anchored`, which attends as the paper's `incremental` does.
    """
    return kvtiers.policy(
        "packforcing-lm",
        compressor=DualBranch(),
        retriever=("affinity", {"heads": "mean", "normalise": "none", "form": "compressed", "queries": 256}),
        recall="compressed",
        sink=8,
        recent=4,
        top_k=16,
        block_size=4,
    )
