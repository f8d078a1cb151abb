"""`kvtiers bench digests`: how small the digests of archived blocks can be, and still lead to the right ones.

A document is read once with everything attended. Then the question is asked of copies of that cache which keep other
digests, and attend only the blocks that these choose. So a row of the table differs from the next in the choice alone.
"""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import attrs
import click
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvtiers import Policy
from kvtiers.blocks import Blocks
from kvtiers.cli import parse
from kvtiers.policy import Retriever
from kvtiers_transformers.bench import model_option
from kvtiers_transformers.cache import TransformersCache
from kvtiers_transformers.document import read_document
from kvtiers_transformers.reading import Needle, answer, encoder, narrow_table, needle
from kvtiers_transformers.smollm2 import load_model
from kvtiers_transformers.wrap import tiered

DIGESTS = ("8x32", "4x32", "2x32", "2x8", "2x4", "1x32", "1x8", "1x4", "1x3", "1x2", "1x1")
_TIMED_TOKENS = 16_384


@attrs.frozen(kw_only=True)
class Index:
    """What one kind of digest costs and finds.

    label: keys per digest x bits per channel. bytes: per archived token and KV head; share: of the K/V it stands for.
    found, losses: per document, whether the key was said, and its loss in nats. choosing: seconds per layer in which
    16,384 archived tokens are scored for a single query, and for the queries of a chunk.
    """

    label: str
    bytes: float
    share: float
    found: dict[str, list[bool]]
    losses: dict[str, list[float]]
    choosing: tuple[float, float]


@click.command()
@model_option
@click.option(
    "--document",
    "documents",
    multiple=True,
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="A text file to read beside the novel that kvtiers ships; may be given several times.",
)
@click.option("--policy", "spec", default="archive", show_default=True, help="Whose retriever is varied.")
@click.option("--tokens", default=4096, show_default=True, type=click.IntRange(min=1024), help="Of each document.")
@click.option("--seeds", default="0,1,2", show_default=True, help="What picks keys and passages.")
@click.option("--depths", default="0.1,0.4,0.7", show_default=True, help="Where keys are planted.")
@click.argument("digests", nargs=-1)
def digests(
    model: str,
    documents: tuple[Path, ...],
    spec: str,
    tokens: int,
    seeds: str,
    depths: str,
    digests: tuple[str, ...],
) -> None:
    """Keys found by digests of growing size, what they weigh, and how long a choice takes.

    DIGESTS are written `keys x bits`, as in 1x3: a digest for each key, of three bits per channel; 32 bits are float32.
    """
    console = Console()
    policy, kinds = parse(spec), list(digests or DIGESTS)
    judges = {kind: retriever_for(policy, kind) for kind in kinds}
    loaded, tokenizer = load_model(model)
    encode = encoder(tokenizer)
    texts = {path.stem: encode(read_document(path)) for path in documents}
    texts = {"novel": encode(read_document()), **texts}
    for name, ids in texts.items():
        if len(ids) < tokens:
            raise click.UsageError(f"{name} has {len(ids):,} tokens; {tokens:,} are needed")
    cases = [
        (name, needle(ids, encode, tokens=tokens, depth=float(depth), seed=int(seed)))
        for name, ids in texts.items()
        for seed in seeds.split(",")
        for depth in depths.split(",")
    ]
    results: dict[str, list[tuple[str, bool, float]]] = {kind: [] for kind in ("all", *kinds)}
    with Progress(console=console) as progress:
        bar = progress.add_task("reading", total=len(cases) * (len(kinds) + 6))
        for name, task in cases:
            found = ask_all(loaded, tokenizer, policy, judges, task, lambda steps: progress.advance(bar, steps))
            for kind, (said, loss) in found.items():
                results[kind].append((name, said, loss))
    console.print(digests_table([_index(loaded, policy, kind, rows) for kind, rows in results.items()], tokens))


def retriever_for(policy: Policy, kind: str) -> Retriever:
    """The policy's retriever with digests as `kind` says, such as `2x8`."""
    keys, _, bits = kind.partition("x")
    if not (keys.isdigit() and bits.isdigit()):
        raise click.UsageError(f"digests are written keys x bits, as in 1x2, got {kind!r}")
    judge: Any = policy.retriever
    try:
        varied: Retriever = attrs.evolve(
            judge, digest_tokens=int(keys), digest_bits=None if bits == "32" else int(bits)
        )
        return varied
    except (TypeError, ValueError) as error:
        raise click.UsageError(f"{type(policy.retriever).__name__} makes no digests of {kind}: {error}") from error


@torch.inference_mode()
def ask_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    policy: Policy,
    judges: dict[str, Retriever],
    task: Needle,
    advance: Callable[[int], object],
) -> dict[str, tuple[bool, float]]:
    """Whether the key was said, and its loss, by what chose the blocks; under `all`, everything was attended."""
    everything = max(1, len(task.document) // policy.block_size)
    whole = attrs.evolve(policy, retriever=next(iter(judges.values())), top_k=everything)
    with tiered(model, whole) as cache:
        model(torch.tensor([task.document], device=model.device), past_key_values=cache, logits_to_keep=1)
        advance(5)
        found = {}
        for kind, judge in ({"all": whole.retriever} | judges).items():
            asked = cache.fork()
            if kind != "all":
                asked.swap(attrs.evolve(policy, retriever=judge))
            loss = key_loss(model, tokenizer, task, asked.fork())
            found[kind] = task.found_in(answer(model, tokenizer, task.question, asked)[0]), loss
            advance(1)
    return found


@torch.inference_mode()
def key_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Needle, cache: TransformersCache
) -> float:
    """Nats that the digits of the key cost as the answer to its question."""
    digits = torch.tensor([encoder(tokenizer)(f" {task.key}")], device=model.device)
    question = torch.tensor([task.question], device=model.device)
    first = model(question, past_key_values=cache, logits_to_keep=1).logits[0]
    rest = model(digits, past_key_values=cache).logits[0, :-1]
    return float(torch.nn.functional.cross_entropy(torch.cat([first, rest]).float(), digits[0], reduction="sum"))


def _index(model: PreTrainedModel, policy: Policy, kind: str, rows: Sequence[tuple[str, bool, float]]) -> Index:
    names = list(dict.fromkeys(name for name, _, _ in rows))
    size, head_dim = policy.block_size, _head_dim(model)
    judge = None if kind == "all" else retriever_for(policy, kind)
    held = 0.0 if judge is None else judge.digest_bytes(size, head_dim) / size
    return Index(
        label=kind,
        bytes=held,
        share=held / (2 * head_dim * model.dtype.itemsize),
        found={name: [said for at, said, _ in rows if at == name] for name in names},
        losses={name: [loss for at, _, loss in rows if at == name] for name in names},
        choosing=(math.nan, math.nan) if judge is None else choosing_times(judge, model, policy),
    )


def _head_dim(model: PreTrainedModel) -> int:
    config: Any = model.config
    found: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return found


@torch.inference_mode()
def choosing_times(judge: Retriever, model: PreTrainedModel, policy: Policy) -> tuple[float, float]:
    """Seconds in which one layer scores 16,384 tokens for a single query, and for a chunk's; medians of nine."""
    config: Any = model.config
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, _head_dim(model)
    count, size = _TIMED_TOKENS // policy.block_size, policy.block_size
    keys = torch.randn(1, kv_heads, count, size, width, device=model.device)
    blocks = Blocks(
        keys=keys,
        values=keys,
        offsets=torch.zeros(1, 1, 1, size, 1, device=model.device),
        starts=torch.arange(count, device=model.device) * size,
        span=size,
        rotated=keys,
    )
    held = judge.digest(blocks)
    found = []
    for queries in (1, policy.chunk_size or 1):
        query = torch.randn(1, heads, queries, width, device=model.device)
        taken = []
        for _ in range(10):
            began = time.perf_counter()
            judge.score(query, held, count)
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            taken.append(time.perf_counter() - began)
        found.append(median(taken[1:]))
    return found[0], found[1]


def digests_table(results: list[Index], tokens: int) -> Table:
    """One kind of digest a row; the first row attends everything."""
    made = narrow_table(f"A key in {tokens:,} tokens, by the digests that choose what is attended")
    made.caption = f"ms: one layer scores {_TIMED_TOKENS:,} tokens, for one query and for a chunk"
    made.add_column("keys\nx bits")
    for name in (
        "bytes per token\nand KV head",
        "of K/V",
        *(f"{name}\nfound, loss" for name in results[0].found),
        "ms",
    ):
        made.add_column(name, justify="right")
    for row in results:
        cells = [f"{sum(row.found[name])}/{len(row.found[name])} {fmean(row.losses[name]):.2f}" for name in row.found]
        whole = math.isnan(row.choosing[0])
        times = "" if whole else " ".join(f"{seconds * 1e3:.1f}" for seconds in row.choosing)
        made.add_row(row.label, "" if whole else f"{row.bytes:.1f}", "" if whole else f"{row.share:.1%}", *cells, times)
    return made
