"""Tiny models of which something is unlike Llama: shapes, positions, masks, or where their weights are kept."""

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tiny_models import FAMILIES

_SMALL: dict[str, Any] = FAMILIES["gpt-neox"][1]
_GROUPED: dict[str, Any] = {**_SMALL, "num_key_value_heads": 2, "head_dim": 12}
_LATENT: dict[str, Any] = {
    **_SMALL,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
}
_EXPERTS: dict[str, Any] = {
    **_LATENT,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_HYBRID = {**_EXPERTS, "num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}
_GEMMA4: dict[str, Any] = {
    **_GROUPED,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "sliding_window": 9,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 97,
}

LATENT: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek-v2": ("DeepseekV2", _EXPERTS),
    "deepseek-v3": ("DeepseekV3", _EXPERTS),
    "deepseek-v3-half": ("DeepseekV3", {**_EXPERTS, "rope_interleave": False}),
    "glm4-lite": ("Glm4MoeLite", _EXPERTS),
    "minicpm3": ("MiniCPM3", _LATENT),
}
"""Latent attention: keys of 20 channels, of which the last 8 rotate, and values of 10."""

ODD: dict[str, tuple[str, dict[str, Any]]] = {
    **LATENT,
    "kimi-linear": ("KimiLinear", _HYBRID),
    "nemotron-h": (
        "NemotronH",
        {
            **_GROUPED,
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "attention", "mlp"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 8,
        },
    ),
    "gemma4": ("Gemma4Text", _GEMMA4),
    "llama4": (
        "Llama4Text",
        {
            **_GROUPED,
            "attention_chunk_size": 16,
            "num_local_experts": 2,
            "intermediate_size_mlp": 64,
            "no_rope_layers": [1, 0],
            "moe_layers": [],
            "floor_scale": 8,
        },
    ),
    "modernbert": (
        "ModernBertDecoder",
        {
            **_SMALL,
            "local_attention": 9,
            "global_attn_every_n_layers": 2,
            **dict.fromkeys(("cls_token_id", "sep_token_id"), 1),
        },
    ),
    "hunyuan": ("HunYuanDenseV1", _GROUPED),
    "bamba": (
        "Bamba",
        {
            **_SMALL,
            "num_key_value_heads": 2,
            "attn_layer_indices": [1],
            "mamba_n_heads": 4,
            "mamba_d_head": 24,
            "mamba_d_state": 8,
            "mamba_n_groups": 2,
            "mamba_chunk_size": 8,
        },
    ),
    "bigcode": ("GPTBigCode", {k: v for k, v in _SMALL.items() if k != "intermediate_size"} | {"multi_query": True}),
}
"""The prefix of the transformers classes, and the settings, by name."""


def odd(name: str, *, attention: str = "eager", **changes: Any) -> Any:
    """A model of `ODD` in evaluation mode, the same one every time."""
    prefix, settings = ODD[name]
    config = getattr(transformers, f"{prefix}Config")(**{**settings, **changes})
    return _made(getattr(transformers, f"{prefix.removesuffix('Text')}ForCausalLM"), config, attention)


def whole(name: str, *, attention: str = "eager") -> Any:
    """A model of text and images, as it is loaded for text: "gemma3", "gemma4", "paligemma" or "qwen2-vl".

    Token 92 stands for a part of an image.
    """
    seen = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if name == "gemma3":
        config: Any = transformers.Gemma3Config(
            text_config=FAMILIES["gemma3"][1],
            vision_config={**seen, "image_size": 28, "patch_size": 14},
            mm_tokens_per_image=4,
            boi_token_index=90,
            eoi_token_index=91,
            image_token_index=92,
        )
    elif name == "gemma4":
        config = transformers.Gemma4Config(
            text_config=_GEMMA4,
            vision_config={**seen, "head_dim": 8, "num_key_value_heads": 2},
            audio_config=None,
            image_token_id=92,
            boi_token_id=90,
            eoi_token_id=91,
            audio_token_id=93,
            video_token_id=94,
        )
    elif name == "paligemma":
        config = transformers.PaliGemmaConfig(
            text_config={**_GROUPED, "model_type": "gemma"},
            vision_config={**seen, "image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model"},
            projection_dim=48,
            hidden_size=48,
            image_token_index=92,
        )
    else:
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
        config = transformers.Qwen2VLConfig(
            text_config={**_SMALL, "num_key_value_heads": 2, "rope_parameters": rope},
            vision_config={
                "depth": 1,
                "embed_dim": 16,
                "hidden_size": 48,
                "num_heads": 2,
                "mlp_ratio": 2,
                "patch_size": 4,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "in_channels": 3,
            },
            image_token_id=92,
            video_token_id=93,
            vision_start_token_id=90,
            vision_end_token_id=91,
        )
    prefix = {"gemma3": "Gemma3", "gemma4": "Gemma4", "paligemma": "PaliGemma", "qwen2-vl": "Qwen2VL"}[name]
    return _made(getattr(transformers, f"{prefix}ForConditionalGeneration"), config, attention)


def _made(kind: Any, config: Any, attention: str) -> Any:
    config._attn_implementation = attention
    torch.manual_seed(0)
    return kind(config).eval()


class PackedLinear(nn.Module):
    """A linear layer whose weight, in 8 bits, is packed into a buffer of int32, and which has no parameters."""

    qweight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        packed = (linear.weight.detach() / scale).round().to(torch.int8).contiguous().view(torch.int32)
        self.register_buffer("qweight", packed)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.qweight.view(torch.int8).to(x.dtype) * self.scale)


def packed(model: Any) -> Any:
    """`model` with every linear layer of its decoder packed."""
    for module in list(model.model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child))
    return model
