"""Presets. A query of text attends at most 1,024 tokens, or as many in the mean where layers or heads differ.

`kivi` attends everything; it saves bytes. `memrope` and `longlive` are for video.
"""

import attrs

from kvtiers.policy import Policy
from kvtiers.presets import policy
from kvtiers.slots import Compressor
from kvtiers_methods.adakv import AdaKV
from kvtiers_methods.expected_attention import ExpectedAttention
from kvtiers_methods.h2o import H2O
from kvtiers_methods.infllm import InfLLM
from kvtiers_methods.kivi import Kivi
from kvtiers_methods.kvzip import KVzip
from kvtiers_methods.landmarks import Landmarks
from kvtiers_methods.low_rank import LowRank
from kvtiers_methods.memrope import MemRoPE
from kvtiers_methods.pyramidkv import PyramidKV
from kvtiers_methods.snapkv import SnapKV
from kvtiers_methods.token_merging import TokenMerging
from kvtiers_methods.tova import TOVA
from kvtiers_methods.triattention import TriAttention
from kvtiers_methods.unrotated import Unrotated
from kvtiers_policies.contiguous import Contiguous


def h2o() -> Policy:
    """The heaviest hitters and as many of the newest tokens. Source: H2O (arXiv 2306.14048) section 5."""
    return _half(H2O())


def tova() -> Policy:
    """What the newest query attends most, and the newest tokens. Source: TOVA (arXiv 2401.06104)."""
    return _half(TOVA())


def snapkv() -> Policy:
    """What the latest queries attend most, chosen anew as tokens leave recent. Source: SnapKV (arXiv 2404.14469)."""
    return _half(SnapKV())


def pyramidkv() -> Policy:
    """As `snapkv`, with more in lower layers: 508 in the mean of `layers`. Source: PyramidKV (arXiv 2406.02069)."""
    return _half(PyramidKV())


def adakv() -> Policy:
    """Heavy hitters, 508 a KV head in the mean, 1,016 at most. Source: Ada-KV (arXiv 2407.11550)."""
    return _half(AdaKV())


def expected_attention() -> Policy:
    """What queries to come are expected to attend, and the newest. Source: Expected Attention (arXiv 2510.00636)."""
    return attrs.evolve(_half(ExpectedAttention()), realigner=Contiguous())


def triattention() -> Policy:
    """What queries like the latest ones prefer, and the newest. Source: TriAttention (arXiv 2604.04921)."""
    return _half(TriAttention())


def kvzip() -> Policy:
    """Everything, until `kvtiers_methods.kvzip.reconstruct` is called. Source: KVzip (arXiv 2505.23416)."""
    return attrs.evolve(_half(KVzip(most=1016)), recent=None)


def infllm() -> Policy:
    """Blocks on the host, known by their tokens that were attended most. Source: InfLLM (arXiv 2402.04617)."""
    return policy("archive", retriever=InfLLM(representatives=4), archive="host", block_size=32, top_k=14)


def shadowkv() -> Policy:
    """Keys of low rank, fetched by landmarks with every token, and outliers. Source: ShadowKV (arXiv 2410.21465)."""
    return policy(
        "archive",
        codec=LowRank(rank=8),
        retriever=Landmarks(outliers=2),
        realigner=Unrotated(),
        archive="host",
        block_size=32,
        top_k=12,
        refresh="chunk",
    )


def token_merging() -> Policy:
    """The past in a fourth of its tokens, merged; the newest are attended. Source: ToMe (arXiv 2210.09461)."""
    return policy("archive", compressor=TokenMerging(), retriever="recency", attend="compressed", recent=508, top_k=128)


def kivi() -> Policy:
    """Everything is attended, the newest 128 tokens exactly, older ones in 2 bits. Source: KIVI (arXiv 2402.02750)."""
    return policy("archive", codec=Kivi(), retriever="all", sink=0, recent=128, block_size=32)


def memrope() -> Policy:
    """Video: three anchor frames, two frames of running means, the newest four. Source: MemRoPE (arXiv 2603.12513)."""
    return policy(
        "streaming",
        compressor=MemRoPE(),
        attend="compressed",
        sink=3,
        recent=4,
        realigner="contiguous",
        chunk_size=None,
    )


def longlive() -> Policy:
    """Video: three anchor frames and a window of twelve, three of them current. Source: LongLive (arXiv 2509.22622).

    Where the prompt changes, call `rewind_recent()` and commit those frames again under the new one (its KV recache).
    """
    return policy("streaming", sink=3, recent=9, realigner="original", chunk_size=None)


def _half(compressor: Compressor) -> Policy:
    return policy(
        "archive", compressor=compressor, retriever="recency", attend="compressed", sink=4, recent=444, block_size=16
    )
