"""`kvtiers bench ranks`: why a block was not chosen. Where do retrievers rank the block that holds the answer?

A key is planted in a document, twice in one passage, so that several blocks may have the answer. The document is read
once with everything attended. Then the question is asked, and the key is told token by token, still with everything
attended, so that all retrievers see the queries of the full cache. Beside the ranks stands how much attention the
blocks get: only heads that read them need them.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import attrs
import click
import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvtiers import Moment, Policy, PolicyError, Retriever, policy
from kvtiers.presets import parse
from kvtiers_transformers.reading import (
    Needle,
    depths_option,
    document_option,
    encoded,
    encoder,
    model_option,
    narrow_table,
    needles,
    numbers,
    seeds_option,
    tokens_option,
)
from kvtiers_transformers.smollm2 import load_model
from kvtiers_transformers.tasks import passkey
from kvtiers_transformers.versions import CACHE
from kvtiers_transformers.wrap import tiered

MASS = "attention"
"""The row of the attention itself: each block by the attention that its keys get, of all that is archived."""
_DEFAULT = ("archive", "archive:digest_bits=1", "archive:retriever=page-bounds")

Seen = Callable[[int, Tensor], object]
"""Told of a layer's number and the scores [kv_heads, blocks]."""


@attrs.frozen(kw_only=True)
class Ranks:
    """What a retriever makes of the blocks with the key, by step, layer and KV head.

    A step is the question (its last chunk, which chooses at once), then each token of the key but the last. above: how
    many blocks it scores higher than the best of them. share: of all scores, what they got. blocks: archived at the
    question.
    """

    above: list[list[list[int]]]
    share: list[list[list[float]]]
    blocks: int


@click.command()
@model_option
@document_option
@tokens_option
@seeds_option(3, least=1)
@depths_option("0.1,0.5")
@click.option(
    "--heads", default=20, show_default=True, type=click.IntRange(min=1), help="Heads that read the key most."
)
@click.option("--json", "out", type=click.Path(path_type=Path, dir_okay=False), help="Write every rank here.")
@click.argument("policies", nargs=-1)
def ranks(
    model: str,
    document: str,
    tokens: int,
    seeds: int,
    depths: str,
    heads: int,
    out: Path | None,
    policies: tuple[str, ...],
) -> None:
    """Where retrievers rank the block that holds the answer, and whether the heads that read it would get it.

    POLICIES are names, or name:setting=value,...; each must have an archive and choose by a query. Of each
    its retriever and its top_k count; all else is that of the first.
    """
    if out is not None and not out.parent.is_dir():
        raise click.UsageError(f"--json: there is no folder {out.parent}; make it first")
    console = Console()
    chosen = {spec: parse(spec) for spec in policies or _DEFAULT}
    check(chosen)
    loaded, tokenizer = load_model(model)
    text = encoded(document, tokenizer, least=tokens)
    tasks = needles(text, encoder(tokenizer), tokens=tokens, depths=numbers(depths), seeds=seeds)
    with Progress(console=console) as progress:
        bar = progress.add_task("reading", total=len(tasks) * (len(chosen) + 2))
        found = [rank(loaded, tokenizer, chosen, task, lambda: progress.advance(bar)) for task in tasks]
    title = f"The blocks with the key, of {found[0][MASS].blocks} archived ({document})"
    console.print(ranks_table(found, {spec: made.top_k for spec, made in chosen.items()}, heads, title))
    if out is not None:
        raw = [{spec: attrs.asdict(each) for spec, each in of_task.items()} for of_task in found]
        out.write_text(json.dumps(raw), encoding="utf-8")
        console.print(f"Every rank is in {out}")


def check(policies: Mapping[str, Policy]) -> None:
    """Raise `PolicyError` for a policy that cannot be ranked here, or policies whose blocks differ in size."""
    for spec, made in policies.items():
        if not (made.archives and made.retriever.needs_query and made.chunk_size and "full" in made.forms):
            raise PolicyError(f"{spec} ranks no archived blocks of text by a query; choose one such as archive")
        if made.retriever.attention is not None:
            raise PolicyError(
                f"{spec} chooses by the attention that tokens got while the document was read, which is not noted "
                "here; choose another policy"
            )
    sizes = {made.block_size for made in policies.values()}
    if len(sizes) > 1:
        raise PolicyError(f"blocks are of {sorted(sizes)} tokens; give all policies the same block_size")


@torch.inference_mode()
def rank(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    policies: Mapping[str, Policy],
    task: Needle,
    done: Callable[[], object] = lambda: None,
) -> dict[str, Ranks]:
    """The ranks under each policy's retriever, and under the attention itself (`MASS`)."""
    first, encode = next(iter(policies.values())), encoder(tokenizer)
    places = places_of(task, encode)
    most = (len(task.document) + len(task.question)) // first.block_size + 1
    whole = attrs.evolve(first, top_k=most, refresh=1)
    steps = [task.question, *([token] for token in encode(f" {task.key}")[:-1])]
    judges = {MASS: policy("archive", combine="sum", digest_tokens=1, digest_bits=None).retriever}
    judges |= {spec: made.retriever for spec, made in policies.items()}
    found = {}
    with tiered(model, whole) as cache:
        model(torch.tensor([task.document], device=model.device), **{CACHE: cache}, logits_to_keep=1)
        done()
        sink = cache.tier_counts()["sink"]
        wanted = sorted({(at - sink) // first.block_size for at in places})
        archived = cache.tier_counts()["mid"] // first.block_size
        if not 0 <= wanted[0] <= wanted[-1] < archived:
            raise click.UsageError(
                f"the key at depth {task.depth} lies outside the archive, in sink or recent; give depths further "
                "inside, or more --tokens"
            )
        for spec, judge in judges.items():
            seen: dict[int, Tensor] = {}
            asked = cache.fork()
            asked.swap(attrs.evolve(whole, retriever=watched(judge, seen.__setitem__)))
            above, share, blocks = [], [], 0
            for step in steps:
                model(torch.tensor([step], device=model.device), **{CACHE: asked}, logits_to_keep=1)
                layers = [_told(seen[layer], wanted) for layer in sorted(seen)]
                above.append([each[0] for each in layers])
                share.append([each[1] for each in layers])
                blocks = blocks or max(scores.shape[-1] for scores in seen.values())
            found[spec] = Ranks(above=above, share=share, blocks=blocks)
            done()
    return found


def places_of(task: Needle, encode: Callable[[str], list[int]]) -> list[int]:
    """Where the digits of the key stand in the document; where they cannot be told apart, the passage that has them."""
    for part in (encode(f" {task.key}"), encode(passkey(task.key))):
        starts = range(len(task.document) - len(part) + 1)
        found = [start for start in starts if task.document[start : start + len(part)] == part]
        if found:
            return [start + nth for start in found for nth in range(len(part))]
    raise click.UsageError("the tokenizer writes the key otherwise in the document than alone; choose another model")


def watched(retriever: Retriever, seen: Seen) -> Retriever:
    """The same retriever, whose scores are shown to `seen`."""
    kind: Any = type(retriever)

    class Watched(kind):  # type: ignore[misc]
        def score(self, query: Any, digests: Any, archived: int, moment: Moment) -> Any:
            scores = super().score(query, digests, archived, moment)
            seen(moment.layer, scores[0].expand(moment.geometry.kv_heads, -1).float())
            return scores

    made: Retriever = Watched(**{field.alias: getattr(retriever, field.name) for field in attrs.fields(kind)})
    return made


def _told(scores: Float[Tensor, "kv_heads blocks"], wanted: list[int]) -> tuple[list[int], list[float]]:
    """How many blocks are scored above the best of `wanted`, and the share of the scores that those got."""
    mine = scores[:, wanted]
    above = (scores > mine.amax(1, keepdim=True)).sum(1)
    return above.tolist(), (mine.sum(1) / scores.sum(1)).tolist()


def ranks_table(found: Sequence[Mapping[str, Ranks]], sizes: Mapping[str, int], heads: int, title: str) -> Table:
    """A row for each retriever, a column for each step, over the `heads` heads that give the key most attention."""
    made = narrow_table(title)
    made.caption = (
        f"First row: what share of the attention to archived keys these blocks get in the {heads} heads that give them "
        "most. Others: how many of these heads would get one of them, and its median rank (1: the first). Tokens are "
        "those of the key, as they are fed"
    )
    made.add_column("retriever")
    steps = min(len(one[MASS].above) for one in found)  # a tokenizer may write one key in fewer tokens than another
    for step in range(steps):
        made.add_column("question" if step == 0 else f"token {step}", justify="right")
    readers = [[_readers(one[MASS].share[step], heads) for step in range(steps)] for one in found]
    shares = []
    for step in range(steps):
        of = [one[MASS].share[step][i][j] for one, by in zip(found, readers, strict=True) for i, j in by[step]]
        shares.append(f"{sum(of) / len(of):.0%}")
    made.add_row(MASS, *shares)
    for spec, size in sizes.items():
        cells = []
        for step in range(steps):
            got = [one[spec].above[step][i][j] for one, by in zip(found, readers, strict=True) for i, j in by[step]]
            cells.append(f"{sum(each < size for each in got) / len(got):.0%}, {median(got) + 1:.0f}")
        made.add_row(spec, *cells)
    return made


def _readers(shares: Sequence[Sequence[float]], heads: int) -> list[tuple[int, int]]:
    """Layer and KV head of those that give the key most attention."""
    every = [(share, layer, head) for layer, of in enumerate(shares) for head, share in enumerate(of)]
    return [(layer, head) for _, layer, head in sorted(every, reverse=True)[:heads]]
