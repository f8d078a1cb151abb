"""Every causal language model of the installed transformers, built tiny with random weights.

`MODELS` has their names. `build_tiny(name)` makes one, or raises `NotBuilt` with the reason.
"""

import warnings
from contextlib import ExitStack
from typing import Any

import attrs
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kvtiers import KVTiersError
from kvtiers.errors import explain
from kvtiers_transformers import tiered
from tiny_models import VOCABULARY, attentions, distance, drop_mask, given, tokens

CLOSE = 1e-5

MODELS: dict[str, str] = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""The class of each model type."""

_MOST_PARAMETERS = 16_000_000

_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "n_vocab", "decoder_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "n_embed", "embedding_size", "dim_model", "emb_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "dim_ff"), 64),
    **dict.fromkeys(("dff", "ffn_hidden_size", "shared_intermediate_size", "intermediate_size_mlp", "d_inner"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "lru_width", "expert_ffn_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "decoder_layers", "num_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers", "num_decoder_layers", "n_encoder_layers"), 4),
    **dict.fromkeys(("num_key_value_heads", "n_head_kv", "num_kv_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "attention_head_size"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_target_positions", "max_sequence_length"), 512),
    **dict.fromkeys(
        ("q_lora_rank", "kv_lora_rank", "index_head_dim", "o_lora_rank", "hidden_size_per_layer_input"), 16
    ),
    **dict.fromkeys(
        (
            "moe_topk",
            "num_experts_per_token",
            "moe_k",
            "n_shared_experts",
            "first_k_dense_replace",
            "n_group",
            "topk_group",
        ),
        1,
    ),
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
    "use_cache": True,
    "sliding_window": 16,
    "mamba_d_state": 8,
    "mamba_d_head": 8,
    "mamba_n_heads": 8,
    "mamba_n_groups": 1,
}

_HYBRID = ["linear_attention", "full_attention"] * 2
_OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": _HYBRID, "num_expert_group": 1},
    "bamba": {"attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 4},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": _HYBRID},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": _HYBRID, "linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"num_layers": 2, "expert_ffn_hidden_size": 32, "zero_expert_num": 2, "moe_topk": 2},
    "mamba2": {"num_heads": 8, "n_groups": 1, "state_size": 8},
    "qwen4_exp_text": {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 64], "attn_layers": ["local", "lsh"] * 2},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "zamba2": {"layer_types": ["linear_attention", "hybrid"] * 2, "num_mem_blocks": 2},
}
"""What one model type needs besides, or other than, `_SIZES`."""


LEFT_OUT: dict[str, str] = {
    "blt": "no setting makes it small",
    "cohere_compass_text": "its configuration contradicts itself unless all of it is given",
    "dots3_note": "its configuration differs by layer and takes no size for all",
    "dots3_note_text": "its configuration differs by layer and takes no size for all",
    "gemma3n": "needs timm",
    "gemma4_assistant": "an assistant without a memory of its own",
    "qwen4_exp": "its configuration contradicts itself unless all of it is given",
    "qwen4_exp_text": "its configuration contradicts itself unless all of it is given",
    "zamba": "its weights cannot be tied with few layers",
}
"""The models that are not built tiny, and why."""

QUICK = ("gpt2", "gpt_neo", "gemma2", "falcon", "cohere", "mixtral", "gptj", "opt", "lfm2", "rwkv", "bart")
"""Models as unlike as can be."""


class NotBuilt(Exception):  # noqa: N818 (says why a model is left out; no error of ours)
    """Raised for a model that cannot be built tiny."""


def build_tiny(name: str, *, attention: str = "eager") -> Any:
    """The model of type `name` in evaluation mode, the same one every time."""
    try:
        config = tiny_config(name)
        make = getattr(transformers, MODELS[name])
        inner = [config] if isinstance(config, make.config_class) else vars(config).values()
        config = next((part for part in inner if isinstance(part, make.config_class)), config)
        config._attn_implementation = attention
        with torch.device("meta"):
            count = sum(p.numel() for p in make(config).parameters())
        if count > _MOST_PARAMETERS:
            raise NotBuilt(f"{count:,} parameters")
        torch.manual_seed(0)
        model = make(config).eval()
    except NotBuilt:
        raise
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model


def tiny_config(name: str) -> Any:
    """The configuration of `build_tiny`."""
    return _tiny(CONFIG_MAPPING[name], _OWN.get(name, {}))


def _tiny(kind: Any, own: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        usual = kind()
    if hasattr(usual, "kv_lora_rank"):
        own = {"num_key_value_heads": 4, **own}
    chosen = {key: size for key, size in _SIZES.items() if _takes(usual, key)}
    if getattr(usual, "sliding_window", None) is None:
        chosen.pop("sliding_window", None)
    for key in kind.sub_configs:
        part = getattr(usual, key, None)
        if part is not None and key not in own:
            chosen[key] = _tiny(type(part), {}).to_dict()
    return kind(**{**chosen, **own})


def _takes(config: Any, key: str) -> bool:
    return key in config.to_dict() and not isinstance(getattr(type(config), key, None), property)


TOKENS, PIECES = 24, (9, 10, 11, 20)
"""How many tokens are read, and where the forwards over them end."""

_SMALL = {"sink": 2, "recent": 4, "block_size": 2, "chunk_size": None}
POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "archive": ("archive", {"realigner": "original", "recent": 64}),
    "streaming": ("streaming", {"recent": 64}),
    "packforcing-lm": ("packforcing-lm", {"recent": 64}),
    "window": ("streaming", {"realigner": "original", **_SMALL}),
}
"""Policies under which nothing is left out of the first `TOKENS` tokens; under the last one most is."""


@attrs.frozen
class Outcome:
    """What came of one model under one policy. kind: works, refused, late (refused after something ran), crashes,
    wrong or by itself (the model fails with its own cache). said: the error, or the distance."""

    kind: str
    said: str


def outcome(model: Any, policy: str, *, padded: bool = False) -> Outcome:
    """Read `TOKENS` tokens under `policy` and compare with the model's own cache, or with a mask for "window"."""
    ids, mask = tokens(TOKENS, rows=2), None
    if padded:
        mask = torch.ones_like(ids)
        mask[1, :5] = 0
    try:
        wanted = read(model, ids, DynamicCache(config=model.config), mask)
        if policy == "window":
            with torch.no_grad():
                if distance(wanted, model(ids, use_cache=False).logits) > CLOSE:
                    return Outcome("by itself", "its own cache gives another result when a text is read in pieces")
            wanted = _windowed(model, ids)
    except Exception as error:  # noqa: BLE001 (the model's own business)
        return Outcome("by itself", explain(error))
    name, changes = POLICIES[policy]
    ran: list[None] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda *_: ran.append(None))
    try:
        with tiered(model, name, **changes) as cache:
            ours = read(model, ids, cache, mask)
    except KVTiersError as error:
        return Outcome("late" if ran else "refused", str(error))
    except Exception as error:  # noqa: BLE001 (what the sweep looks for)
        return Outcome("crashes", explain(error))
    finally:
        handle.remove()
    if mask is not None:
        ours, wanted = ours[mask.bool()], wanted[mask.bool()]
    if not wanted.isfinite().all():
        return Outcome("by itself", "its own logits are not finite")
    far = distance(ours, wanted)
    return Outcome("works" if far < CLOSE else "wrong", f"{far:.1e}")


@torch.no_grad()
def read(model: Any, ids: Tensor, cache: Any, mask: Tensor | None = None) -> Tensor:
    """The logits of `ids`, in forwards that end at `PIECES`, with the mask of padding that each is due."""
    parts, start = [], 0
    for stop in (*PIECES, ids.shape[1]):
        seen = {} if mask is None else {"attention_mask": mask[:, :stop]}
        parts.append(model(ids[:, start:stop], **given(cache), **seen).logits)
        start = stop
    return torch.cat(parts, 1)


def _windowed(model: Any, ids: Tensor) -> Tensor:
    """The logits without a cache, of a model whose tiered layers are shown what `_SMALL` lets them see."""
    allowed = drop_mask(TOKENS, sink=2, recent=4, block=2)[None, None]
    numbers = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)

    def hook(_module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "attention_mask": numbers}

    own = DynamicCache(config=model.config).layers
    whole = {i for i, layer in enumerate(own) if type(layer) is DynamicLayer}
    with ExitStack() as undo, torch.no_grad():
        for module in attentions(model):
            if module.layer_idx in whole:
                undo.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        logits: Tensor = model(ids, use_cache=False).logits
    return logits
