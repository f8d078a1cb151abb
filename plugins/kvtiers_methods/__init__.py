"""Published methods as plugins, one file each. Each names its paper's section, and where it deviates from it."""

from collections.abc import Callable, Mapping

from kvtiers.archive import Codec
from kvtiers.hookspecs import hookimpl
from kvtiers.policy import Policy
from kvtiers.slots import Compressor, Realigner
from kvtiers_methods import presets
from kvtiers_methods.adakv import AdaKV
from kvtiers_methods.block_relativistic import BlockRelativistic
from kvtiers_methods.deep_forcing import DeepForcing
from kvtiers_methods.duo_attention import DuoAttention
from kvtiers_methods.expected_attention import ExpectedAttention
from kvtiers_methods.fademem import FadeMem
from kvtiers_methods.framepack import FramePack
from kvtiers_methods.h2o import H2O
from kvtiers_methods.kivi import Kivi
from kvtiers_methods.memflow import MemFlow
from kvtiers_methods.memrope import MemRoPE
from kvtiers_methods.pyramidkv import PyramidKV
from kvtiers_methods.quant_videogen import QuantVideoGen
from kvtiers_methods.snapkv import SnapKV
from kvtiers_methods.token_merging import TokenMerging
from kvtiers_methods.tova import TOVA


@hookimpl
def kvtiers_compressors() -> Mapping[str, Callable[..., Compressor]]:
    """What becomes of blocks that leave recent, or of the whole past."""
    return {
        "h2o": H2O,
        "tova": TOVA,
        "snapkv": SnapKV,
        "pyramidkv": PyramidKV,
        "adakv": AdaKV,
        "expected-attention": ExpectedAttention,
        "duo-attention": DuoAttention,
        "token-merging": TokenMerging,
        "memrope": MemRoPE,
        "deep-forcing": DeepForcing,
        "memflow": MemFlow,
        "framepack": FramePack,
        "fademem": FadeMem,
    }


@hookimpl
def kvtiers_codecs() -> Mapping[str, Callable[..., Codec]]:
    """How archived blocks are written."""
    return {"kivi": Kivi, "quant-videogen": QuantVideoGen}


@hookimpl
def kvtiers_realigners() -> Mapping[str, Callable[..., Realigner]]:
    """Which positions the context gets."""
    return {"block-relativistic": BlockRelativistic}


@hookimpl
def kvtiers_policies() -> Mapping[str, Callable[[], Policy]]:
    """Methods with sizes. DuoAttention has none: its heads are a matter of the model."""
    return {
        "h2o": presets.h2o,
        "kivi": presets.kivi,
        "tova": presets.tova,
        "snapkv": presets.snapkv,
        "pyramidkv": presets.pyramidkv,
        "adakv": presets.adakv,
        "expected-attention": presets.expected_attention,
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
