"""The presets for video. Lengths are in latent frames; a block is what is committed, whatever `block_size` says."""

import kvtiers
from kvtiers import Policy
from kvtiers_packforcing.dual_branch import DualBranch


def packforcing() -> Policy:
    """Eight anchor frames, history compressed 32 times and chosen by affinity, closed up, the newest block.

    Source: PackForcing (arXiv 2603.25730) sections 3 and 4.1, blocks of 4 frames. Deviations: rows choose for
    themselves, and positions are `contiguous`, which attends as the paper's `incremental` does.
    """
    return kvtiers.policy(
        "packforcing-lm",
        compressor=DualBranch(),
        retriever=("affinity", {"heads": "mean", "normalise": "none", "form": "compressed", "queries": 256}),
        realigner="contiguous",
        attend="compressed",
        sink=8,
        recent=4,
        top_k=16,
        chunk_size=None,
    )


def rolling_window() -> Policy:
    """The newest 21 latent frames of a video, blocks of 3, the current one included.

    Source: Self-Forcing (arXiv 2506.08009) section 3.3. CausVid (arXiv 2412.07772) differs in its weights, and computes
    a window anew when it moves instead of keeping keys and values; this is the nearest to it.
    """
    return kvtiers.policy("sliding-window", recent=18, chunk_size=None)


def sink_rolling_window() -> Policy:
    """The first block of a video and the newest 18 latent frames, blocks of 3, the current one included.

    It is the rolling window of Self-Forcing (arXiv 2506.08009) with an attention sink; positions keep their gap.
    """
    return kvtiers.policy("streaming", realigner="original", sink=3, recent=15, chunk_size=None)
