"""The presets that come with kvtiers, one function each."""

from kvtiers.policy import Policy
from kvtiers_policies.affinity import Affinity
from kvtiers_policies.all_blocks import AllBlocks
from kvtiers_policies.bounded import Bounded
from kvtiers_policies.contiguous import Contiguous
from kvtiers_policies.device import DeviceArchive
from kvtiers_policies.drop import Drop
from kvtiers_policies.exact import Exact
from kvtiers_policies.first import FirstSteps
from kvtiers_policies.host import HostArchive
from kvtiers_policies.keep import Keep
from kvtiers_policies.mean_pool import MeanPool
from kvtiers_policies.no_blocks import NoBlocks
from kvtiers_policies.no_sink import NoSink
from kvtiers_policies.original import Original


def full() -> Policy:
    """Remember everything and attend to all of it: the reference."""
    return Policy(
        sinks=NoSink(),
        compressor=Keep(),
        retriever=AllBlocks(),
        realigner=Original(),
        archive=DeviceArchive(),
        codec=Exact(),
        recent=None,
        chunk_size=None,
    )


def sliding_window() -> Policy:
    """Attend the newest 1,024 tokens, the current one included. Source: Longformer (arXiv 2004.05150) section 3.1."""
    return Policy(
        sinks=NoSink(),
        compressor=Drop(),
        retriever=NoBlocks(),
        realigner=Original(),
        archive=DeviceArchive(),
        codec=Exact(),
        recent=1023,
        block_size=1,
    )


def streaming() -> Policy:
    """Four anchors and a window, closed up. Source: StreamingLLM (arXiv 2309.17453) section 3.2."""
    return Policy(
        sinks=FirstSteps(),
        compressor=Drop(),
        retriever=NoBlocks(),
        realigner=Contiguous(),
        archive=DeviceArchive(),
        codec=Exact(),
        sink=4,
        recent=988,
        block_size=32,
    )


def archive() -> Policy:
    """Four anchors, a window, and the archived blocks that each KV head's queries ask for, in full detail."""
    return Policy(
        sinks=FirstSteps(),
        compressor=Keep(),
        retriever=Affinity(heads="per-kv", normalise="softmax", combine="max", digest_tokens=1, digest_bits=3),
        realigner=Original(),
        archive=DeviceArchive(),
        codec=Exact(),
        sink=4,
        recent=476,
        top_k=28,
        attend="full",
        block_size=16,
        chunk_size=64,
    )


def packforcing_lm() -> Policy:
    """PackForcing on text (arXiv 2603.25730): anchors, history recalled from the host by affinity, recent.

    Blocks are recalled in full form, which measured best on text; `attend="compressed"` or `top_k_compressed=n` bring
    in what the compressor made of them. Positions are drawn in only as far as the model needs it (`bounded`): closing
    history up, as PackForcing does for video, costs recall where a text holds many things that are alike.
    """
    return Policy(
        sinks=FirstSteps(),
        compressor=MeanPool(),
        retriever=Affinity(heads="per-kv", normalise="softmax", combine="max", digest_tokens=1, digest_bits=3),
        realigner=Bounded(),
        archive=HostArchive(),
        codec=Exact(),
        sink=4,
        recent=476,
        top_k=28,
        top_k_compressed=0,
        attend="full",
        block_size=16,
        chunk_size=64,
    )
