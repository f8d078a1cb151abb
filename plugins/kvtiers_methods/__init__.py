"""Published methods as plugins, one file each. Each names its paper's section, and where it deviates from it."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec

from kvtiers.archive import Codec
from kvtiers.hookspecs import hookimpl
from kvtiers.policy import Policy
from kvtiers.slots import Compressor, Realigner, Retriever
from kvtiers_methods import presets
from kvtiers_methods.adakv import AdaKV
from kvtiers_methods.block_relativistic import BlockRelativistic
from kvtiers_methods.deep_forcing import DeepForcing
from kvtiers_methods.duo_attention import DuoAttention
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
from kvtiers_methods.press import by_name
from kvtiers_methods.pyramidkv import PyramidKV
from kvtiers_methods.quant_videogen import QuantVideoGen
from kvtiers_methods.snapkv import SnapKV
from kvtiers_methods.token_merging import TokenMerging
from kvtiers_methods.tova import TOVA
from kvtiers_methods.triattention import TriAttention
from kvtiers_methods.unrotated import Unrotated

_KVPRESS = find_spec("kvpress") is not None


@hookimpl
def kvtiers_compressors() -> Mapping[str, Callable[..., Compressor]]:
    """What becomes of blocks that leave recent, or of the whole past."""
    return {
        **({"press": by_name} if _KVPRESS else {}),
        "h2o": H2O,
        "tova": TOVA,
        "snapkv": SnapKV,
        "pyramidkv": PyramidKV,
        "adakv": AdaKV,
        "expected-attention": ExpectedAttention,
        "triattention": TriAttention,
        "kvzip": KVzip,
        "duo-attention": DuoAttention,
        "token-merging": TokenMerging,
        "memrope": MemRoPE,
        "deep-forcing": DeepForcing,
        "memflow": MemFlow,
        "framepack": FramePack,
        "fademem": FadeMem,
    }


@hookimpl
def kvtiers_retrievers() -> Mapping[str, Callable[..., Retriever]]:
    """Which archived blocks a query attends."""
    return {"infllm": InfLLM, "landmarks": Landmarks}


@hookimpl
def kvtiers_realigners() -> Mapping[str, Callable[..., Realigner]]:
    """Which positions the attended tokens get."""
    return {"unrotated": Unrotated, "block-relativistic": BlockRelativistic}


@hookimpl
def kvtiers_codecs() -> Mapping[str, Callable[..., Codec]]:
    """How archived blocks are written."""
    return {"kivi": Kivi, "low-rank": LowRank, "quant-videogen": QuantVideoGen}


@hookimpl
def kvtiers_policies() -> Mapping[str, Callable[[], Policy]]:
    """Methods with sizes. DuoAttention has none: its heads are a matter of the model."""
    return {
        **({"press": presets.press} if _KVPRESS else {}),
        "h2o": presets.h2o,
        "kivi": presets.kivi,
        "tova": presets.tova,
        "snapkv": presets.snapkv,
        "pyramidkv": presets.pyramidkv,
        "adakv": presets.adakv,
        "expected-attention": presets.expected_attention,
        "triattention": presets.triattention,
        "kvzip": presets.kvzip,
        "infllm": presets.infllm,
        "quest": presets.quest,
        "shadowkv": presets.shadowkv,
        "token-merging": presets.token_merging,
        "memrope": presets.memrope,
        "longlive": presets.longlive,
        "deep-forcing": presets.deep_forcing,
        "infinity-rope": presets.infinity_rope,
        "memflow": presets.memflow,
        "framepack": presets.framepack,
        "rolling-forcing": presets.rolling_forcing,
        "fademem": presets.fademem,
        "quant-videogen": presets.quant_videogen,
    }
