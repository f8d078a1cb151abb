"""Choosing and swapping policies: one prompt, one question, and one word that changes.

A fact stands at the beginning of a text that is longer than most of these policies attend. The table shows who still
knows it, how many tokens each step attended, and what was held where.

    python examples/choosing_policies.py [--model a/hub-id-or-folder]

Needs kvtiers[transformers,cli]. About a minute with SmolLM2 on 2 cores.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

import kvtiers
from kvtiers.plugins import HOOKS, registry
from kvtiers_transformers import TransformersCache, load_model, tiered
from kvtiers_transformers.document import read_document

HERE = Path(__file__).parent
FACT = "The number of Catherine's room at the inn was 48213."
QUESTION = "\n\nQuestion: What was the number of Catherine's room at the inn?\nAnswer: The number was"


def choices() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """A label, a policy, and what to change in it: all that `tiered(model, policy, **changes)` takes."""
    for name in ("full", "sliding-window", "streaming", "archive", "packforcing-lm"):
        yield name, name, {"recent": 256}  # one word decides
    yield "archive, recency", "archive", {"recent": 256, "retriever": "recency"}  # a slot, by name
    yield "streaming, per layer", "streaming", {"recent": {0: 768, "*": 256}}  # a setting, by layer
    built = kvtiers.policy("archive", recent=128, retriever={"name": "page-bounds", "digest_tokens": 4})
    yield "archive, page-bounds", built, {}
    yield "my_policy.toml", HERE / "my_policy.toml", {}


def installed() -> Table:
    """What there is to choose from: this package's own and what any plugin adds. `kvtiers policies` shows more."""
    table = Table("kind", "installed", title="What can be named", title_justify="left")
    for kind in HOOKS:
        table.add_row(kind, ", ".join(registry().names(kind)))
    return table


def attended(cache: TransformersCache) -> tuple[int, int]:
    """The fewest and the most tokens that a layer attended in the last step."""
    counts = cache.attended()
    return min(counts), max(counts)


def main(model: Any, tokenizer: Any, *, characters: int = 4000, new_tokens: int = 12) -> None:
    """Ask for the fact under every choice and print the table."""
    console = Console()
    console.print(installed())
    text = FACT + "\n\n" + read_document()[:characters].rpartition(". ")[0] + "." + QUESTION
    prompt = tokenizer(text, return_tensors="pt").to(model.device)
    length = prompt["input_ids"].shape[1]
    table = Table(
        "policy", "attended", "device", "host", "it answers", title=f"{length} tokens of prompt", title_justify="left"
    )
    for name, policy, changes in track(list(choices()), description="asking", console=console, transient=True):
        with tiered(model, policy, **changes) as cache:
            output = model.generate(**prompt, cache=cache, max_new_tokens=new_tokens, do_sample=False)
        few, many = attended(cache)
        device, host = (
            f"{kvtiers.bytes_in(cache.memory_usage(), location) / 2**20:.1f} MiB" for location in ("device", "host")
        )
        answer = " ".join(tokenizer.decode(output[0, length:], skip_special_tokens=True).split())
        table.add_row(name, str(many) if few == many else f"{few} to {many}", device, host, answer)
    console.print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, a hub id or a local folder")
    main(*load_model(parser.parse_args().model))
