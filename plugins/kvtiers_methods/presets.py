"""Presets. A token of text attends about 1,024 tokens, or as many in the mean where layers or heads differ.

`kivi` attends everything, and `kvzip` does until it is told to compress. Those that say so are for video; their lengths
are latent frames, in blocks of three as a rule: where whole blocks do not come to a setting, the next one comes in as
well.
"""

import attrs

from kvtiers.policy import Policy
from kvtiers.presets import policy
from kvtiers.slots import Compressor
from kvtiers_methods.adakv import AdaKV
from kvtiers_methods.block_relativistic import BlockRelativistic
from kvtiers_methods.deep_forcing import DeepForcing
from kvtiers_methods.expected_attention import ExpectedAttention
from kvtiers_methods.fademem import FadeMem
from kvtiers_methods.framepack import FramePack
from kvtiers_methods.h2o import H2O
from kvtiers_methods.infllm import InfLLM
from kvtiers_methods.kivi import Kivi
from kvtiers_methods.kvzip import KVzip
from kvtiers_methods.landmarks import Landmarks
from kvtiers_methods.low_rank import LowRank
from kvtiers_methods.memflow import MemFlow
from kvtiers_methods.memrope import MemRoPE
from kvtiers_methods.press import Press
from kvtiers_methods.pyramidkv import PyramidKV
from kvtiers_methods.quant_videogen import QuantVideoGen
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


def press() -> Policy:
    """What a scorer press of kvpress keeps (`press` names it), and the newest tokens. Source: kvpress."""
    return _half(Press())


def infllm() -> Policy:
    """Blocks on the host, known by their tokens that were attended most. Source: InfLLM (arXiv 2402.04617)."""
    return policy("archive", retriever=InfLLM(representatives=4), archive="host", block_size=32, top_k=14)


def quest() -> Policy:
    """Blocks of 16 by the bounds of their keys, in each channel. Source: Quest (arXiv 2406.10774) section 3.

    Deviations: the paper attends everything in the first two layers; here the sink and the newest tokens are attended
    beside the blocks that are found.
    """
    return policy("archive", retriever="page-bounds")


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
    """Everything is attended, the newest 128 tokens exactly, older ones in 2 bits. Source: KIVI (arXiv 2402.02750).

    Deviation: the paper reads them back inside attention; here what is attended lies in the window as it is read back,
    so that what is small is the archive, on any device, and not the window.
    """
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
    """Video: a window of twelve frames, three of them anchors and three current. Source: LongLive (arXiv 2509.22622).

    The sizes are those of the authors' configuration, in which the anchors count as part of the window.
    Where the prompt changes, call `rewind_recent()` and commit those frames again under the new one (its KV recache).
    """
    return policy("streaming", sink=3, recent=6, realigner="original", chunk_size=None)


def deep_forcing() -> Policy:
    """Video: ten anchor frames right before the tokens of two that late queries like best, the newest three, current.

    Source: Deep Forcing (arXiv 2512.05081) section 5.1: S = 10, N = 16, R = 4. Deviation: blocks of three make anchors
    twelve; recent is one block, so that with the current one 20 frames are attended, of the 21 that the model knows.
    """
    return _rewritten(DeepForcing(), sink=10, recent=3)


def infinity_rope() -> Policy:
    """Video: the first block, the newest three frames, current; the newest never gets past the 21st position.

    Source: Infinity-RoPE (arXiv 2511.20649) section 5: f0 = 21. KV flush (4.2), when the prompt changes:
    `compact(recent=1)` keeps the first block and the last. RoPE cut (4.3), a jump of positions within a block, is not
    to be had: the frames of a block lie one after the other. Deviation: the paper's cache of six frames has one as sink
    and two as recent; here a sink of one is the whole first block, which may be of one frame (`even=False`), and recent
    is a block.
    """
    return policy("streaming", sink=1, recent=3, realigner=BlockRelativistic(onset=15), chunk_size=None)


def memflow() -> Policy:
    """Video: three anchor frames, a bank of three that the prompt chooses, a window of nine, three of them current.

    Source: MemFlow (arXiv 2512.14699) and the sizes of the authors' configuration.
    """
    return _rewritten(MemFlow(), sink=3, recent=6, realigner="original")


def framepack() -> Policy:
    """Video: the newest three frames in full, and 18 before them, each level of three half as large as the one before.

    Source: FramePack (arXiv 2504.12626) section 3.1.
    """
    return _rewritten(FramePack(), sink=0, recent=3)


def rolling_forcing() -> Policy:
    """Video: three anchor frames, turned to right before the window, and the newest 18 frames, three of them current.

    Source: Rolling Forcing (arXiv 2509.25161), its attention sink, and the authors' code. Attention sees distances
    alone, so anchors that stay and a window that closes up to them are the same. Deviations: the paper denoises five
    blocks together, each noisier than the one before, of which the first is committed; here a block is denoised alone,
    and finished frames have the places of the others. In the authors' clean pass the anchor lies at the beginning.
    """
    return policy("streaming", sink=3, recent=15, realigner="contiguous", chunk_size=None)


def fademem() -> Policy:
    """Video: twelve frames stand for all of the past, placed within 18 before the current block.

    Source: FadeMem (arXiv 2606.10671), the authors' configuration for inference.
    """
    return _rewritten(FadeMem(), sink=0, recent=0)


def quant_videogen() -> Policy:
    """Video: everything is attended, the newest three frames exactly, older ones in groups and 2 bits.

    Source: Quant VideoGen (arXiv 2602.02958) section 5. Keys are written before rotation. Deviation: the paper reads
    them back inside attention; here what is attended lies in the window as it is read back, so that what is small is
    the archive, on any device, and not the window.
    """
    return policy(
        "archive", codec=QuantVideoGen(), retriever="all", realigner="contiguous", sink=0, recent=3, chunk_size=None
    )


def _rewritten(compressor: Compressor, *, sink: int, recent: int, realigner: str = "contiguous") -> Policy:
    return policy(
        "streaming",
        compressor=compressor,
        attend="compressed",
        sink=sink,
        recent=recent,
        realigner=realigner,
        chunk_size=None,
    )


def _half(compressor: Compressor) -> Policy:
    return policy(
        "archive", compressor=compressor, retriever="recency", attend="compressed", sink=4, recent=444, block_size=16
    )
