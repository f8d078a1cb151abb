"""Every compressor that is installed, side by side: what it makes of a block, and how far attention's output moves.

Keys, values and queries are a real model's, reading real prose. Each layer's history is fed to a layer of its own under
the preset `archive` with the compressor in its slot and every block attended in compressed form; the output of
attention for the last queries is compared with that over the full history. 0 is no difference, 1 is as far off as
attending nothing.

    python examples/custom_compressor/compare.py [--model a/hub-id-or-folder] [--tokens 1024]

Needs kvtiers[transformers,cli]. Keys are as the model rotated them, which is hard on compressors that average.
"""

import argparse
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

import kvtiers
from kvtiers.plugins import registry
from kvtiers_transformers import load_model, new_cache
from kvtiers_transformers.document import read_document

ASKING = 32  # the last queries, for which the output is compared


@torch.no_grad()
def read(model: Any, ids: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values of every layer while `model` reads `ids`, [1, heads, tokens, head_dim] each."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    before = model.config._attn_implementation

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
        seen.append((query, key, value))
        out = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("compare", attend)
    AttentionMaskInterface.register("compare", sdpa_mask)
    model.set_attn_implementation("compare")
    try:
        model(ids, use_cache=False)
    finally:
        model.set_attn_implementation(before)
    return seen


def error(
    policy: kvtiers.Policy, rotary: kvtiers.Rotary | None, query: Tensor, keys: Tensor, values: Tensor
) -> tuple[float, int]:
    """How far the output for the last queries is from that over everything (relative), and the tokens attended."""
    geometry = kvtiers.Geometry(kv_heads=keys.shape[1], query_heads=query.shape[1], head_dim=keys.shape[3])
    layer = kvtiers.Layer(policy=policy, geometry=geometry, rotary=rotary)
    asked = keys.shape[2] - ASKING
    cuts = [*range(0, asked, policy.chunk_size or asked), asked, keys.shape[2]]
    for start, stop in pairwise(cuts):
        layer.write(keys[:, :, start:stop], values[:, :, start:stop])
        layer.select(query[:, :, start:stop])
    context = layer.context()
    asking, past = query[:, :, asked:], torch.ones(ASKING, keys.shape[2], dtype=torch.bool).tril(asked)
    got = scaled_dot_product_attention(
        asking, context.keys, context.values, attn_mask=context.mask, is_causal=context.causal, enable_gqa=True
    )
    want = scaled_dot_product_attention(asking, keys, values, attn_mask=past, enable_gqa=True)
    return ((got - want).norm() / want.norm()).item(), context.keys.shape[2]


def main(model: Any, tokenizer: Any, *, tokens: int = 1024, layers: int = 6) -> Mapping[str, float]:
    """Print the table, best first, and return the mean error of each compressor."""
    console = Console()
    ids = tokenizer(read_document(), return_tensors="pt")["input_ids"][:, :tokens]
    seen = read(model, ids)
    some = slice(None, None, max(1, len(seen) // layers))
    found: dict[str, tuple[float, int, int]] = {}
    for name in track(registry().names("compressor"), description="comparing", console=console, transient=True):
        policy = kvtiers.policy("archive", compressor=name, retriever="all", attend="compressed", recent=128)
        if policy.compressor.given:
            continue  # it works on the frames of a video, not on keys and values
        rotaries = new_cache(model, policy).core.rotaries  # how its layers rotate, where the compressor must know it
        parts = zip(rotaries[some], seen[some], strict=True)
        errors, attended = zip(*(error(policy, rotary, *layer) for rotary, layer in parts), strict=True)
        block = 0 if policy.compressor.drops else policy.block_size
        kept = block if policy.compressor.keeps or not block else policy.compressor.compressed_tokens(block)
        found[name] = (sum(errors) / len(errors), kept, max(attended))
    table = Table("compressor", "from", "kept of a block", "attended", "error", title=f"{tokens} tokens")
    for name, (mean, kept, attended_tokens) in sorted(found.items(), key=lambda item: item[1]):
        origin = registry().provider("compressor", name).distribution
        table.add_row(
            name, origin, f"{kept} of {kvtiers.policy('archive').block_size}", str(attended_tokens), f"{mean:.3f}"
        )
    console.print(table)
    return {name: mean for name, (mean, _, _) in found.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, a hub id or a local folder")
    parser.add_argument("--tokens", type=int, default=1024, help="how many tokens of the document are read")
    given = parser.parse_args()
    main(*load_model(given.model), tokens=given.tokens)
