"""A tiny Wan in the layout of the hub, with a text encoder, and a Self-Forcing checkpoint that fits it."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from tiny_wan import GOLDENS, build, vae

WORDS = ("<pad>", "<unk>", "a", "cat", "dog", "in", "the", "snow", "rain")


def write_base(folder: Path) -> Path:
    """Random weights; the transformer has the shape of the published code's rollouts."""
    build(heads=2, head_dim=48, text_dim=32, freq_dim=64, ffn_dim=192, seed=1).save_pretrained(folder / "transformer")
    vae().save_pretrained(folder / "vae")
    torch.manual_seed(2)
    config = UMT5Config(vocab_size=len(WORDS), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    words = Tokenizer(WordLevel({word: nth for nth, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def write_self_forcing(path: Path) -> Path:
    """The weights of the published code's rollouts, as Self-Forcing writes them."""
    start = "weights."
    found = load_file(GOLDENS / "causal_wan_full.safetensors")
    weights = {key.removeprefix(start): part for key, part in found.items() if key.startswith(start)}
    torch.save({"generator_ema": weights, "generator": {}}, path)
    return path
