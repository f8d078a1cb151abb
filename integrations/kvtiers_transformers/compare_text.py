"""`kvtiers compare text`: policies side by side on tasks that need memory, at their own sizes or all at one."""

import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvtiers import Policy, PolicyError, bytes_in
from kvtiers.errors import KVTiersError, suggest
from kvtiers.presets import parse
from kvtiers_models.source_code import code_of
from kvtiers_transformers.budgets import attends_everything, fitted
from kvtiers_transformers.compare_report import Row, markdown, write_report
from kvtiers_transformers.compare_results import ANY_SIZE, Job, Results
from kvtiers_transformers.decoders import geometries_of
from kvtiers_transformers.plain_cache import PLAIN
from kvtiers_transformers.reading import (
    Reading,
    answer,
    document_option,
    encoded,
    encoder,
    model_option,
    read,
    tokens_option,
)
from kvtiers_transformers.recall_picture import figure_class
from kvtiers_transformers.smollm2 import load_model
from kvtiers_transformers.tasks import ALL_TASKS, TaskText, make_text, texts
from kvtiers_transformers.versions import CACHE
from kvtiers_transformers.wrap import tiered

POLICIES = ("transformers:dynamic", "full", "sliding-window", "streaming", "archive", "packforcing-lm")
OWN_SIZE = "each at its own size"
"""The budget of policies that are taken as they are."""


@click.command()
@model_option
@document_option
@tokens_option
@click.option("--tasks", default=",".join(ALL_TASKS), show_default=True, help="Tasks, separated by commas.")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(min=1), help="Texts with the tasks in them.")
@click.option(
    "--budget", help="One size for all: 1024 (tokens attended) or 20MB (held); several, with commas: a table each."
)
@click.option(
    "--out",
    default="kvtiers-compare-text",
    show_default=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the results as they come, the table (Markdown, CSV) and the picture.",
)
@click.option("--fresh", is_flag=True, help="Measure anew what is in the folder already.")
@click.argument("policies", nargs=-1)
def text(
    model: str,
    document: str,
    tokens: int,
    tasks: str,
    seeds: int,
    budget: str | None,
    out: Path,
    fresh: bool,
    policies: tuple[str, ...],
) -> None:
    """What policies remember of long texts, what that costs, and how fast they are.

    POLICIES are written `name` or `name:setting=value,...`. Caches of transformers itself are rows too:
    `transformers:dynamic`, `transformers:fp8` (8 bits), `transformers:int4` (4 bits, with optimum-quanto). What was
    measured is kept in the folder `--out`, so a comparison that was stopped goes on, and more policies can be added.
    A policy whose code has changed since is measured anew (kvtiers itself counts by its version).
    """
    wanted, specs = _tasks(tasks), tuple(dict.fromkeys(policies or POLICIES))
    chosen = {spec: _chosen(spec) for spec in specs}
    sizes = {OWN_SIZE: {}} if budget is None else _sizes(budget)
    figure_class()
    console, results = Console(), Results(out)
    loaded, tokenizer = load_model(model)
    for spec in specs:
        if spec in PLAIN:  # one that cannot be had is told before anything is measured
            PLAIN[spec](loaded.config)
    at = {size: _at_size(size, chosen, loaded, limits, tokens, console) for size, limits in sizes.items()}
    ids, encode = encoded(document, tokenizer, least=tokens), encoder(tokenizer)
    made = {
        (names, seed): make_text(names, ids, encode, tokens=tokens, seed=seed)
        for names in texts(wanted)
        for seed in range(seeds)
    }
    on = f"{model} {sha256(repr(ids).encode()).hexdigest()[:12]} {tokens}"
    theirs = f"transformers {transformers.__version__}"
    codes = {  # a size changes settings alone
        spec: theirs if policy is None else code_of(policy) for spec, policy in chosen.items()
    }
    jobs = {
        Job(
            policy=spec,
            settings=repr(policy),
            code=codes[spec],
            budget=label,
            tasks=",".join(names),
            seed=seed,
            on=on,
        ): policy
        for seed in range(seeds)
        for names in texts(wanted)
        for found in at.values()
        for spec, (policy, label) in found.items()
    }
    due = list(jobs) if fresh else [job for job in jobs if job not in results]
    if len(due) < len(jobs):
        console.print(
            f"{len(jobs) - len(due)} of {len(jobs)} measurements are there already; --fresh makes them again."
        )
    failed: set[str] = set()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("", total=len(due))
        for number, job in enumerate(due):
            progress.update(bar, description=f"{job.policy}, text {job.seed}")
            if job.policy not in failed:
                about = made[tuple(job.tasks.split(",")), job.seed]
                try:
                    results.add(job, _measure(loaded, tokenizer, jobs[job], job, about))
                except KVTiersError as error:  # the others go on
                    failed.add(job.policy)
                    console.print(f"{job.policy} is left out: {error}", markup=False)
            progress.update(bar, completed=number + 1)
    tables = {size: results.rows(list(jobs), size) for size in sizes}
    if not any(tables.values()):
        raise PolicyError("none of these policies could be measured; the reasons are above")
    write_report(out, tables, f"{model}, {tokens:,} tokens of {document}")
    for size, rows in tables.items():
        console.print(f"\n{size}\n{markdown(rows)}", markup=False, soft_wrap=True)
    console.print(f"All of this is in {out}.")


def _listed(names: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))


def _tasks(listed: str) -> list[str]:
    found = _listed(listed)
    for name in found:
        if name not in ALL_TASKS:
            raise PolicyError(f"unknown task {name!r}; there are {', '.join(ALL_TASKS)}.{suggest(name, ALL_TASKS)}")
    if not found:
        raise PolicyError(f"no tasks are named; choose from {', '.join(ALL_TASKS)}")
    return [name for name in ALL_TASKS if name in found]


def _sizes(budget: str) -> dict[str, dict[str, int]]:
    found = {name: _limits(name) for name in _listed(budget)}
    if not found:
        raise PolicyError(f"--budget names no size, as 1024 or 20MB would be; got {budget!r}")
    return found


def _chosen(spec: str) -> Policy | None:
    """The policy that `spec` names; None for a cache of transformers."""
    if spec.startswith("transformers:") and spec not in PLAIN:
        raise PolicyError(f"unknown cache {spec!r}; there are {', '.join(PLAIN)}.{suggest(spec, PLAIN)}")
    return None if spec in PLAIN else parse(spec)


def _limits(budget: str) -> dict[str, int]:
    """What a budget says: tokens that a query attends, or bytes that all layers hold."""
    number, unit = budget.removesuffix("MB"), budget[len(budget.removesuffix("MB")) :]
    if not (number.isascii() and number.isdigit()) or len(number) > 9 or int(number) == 0:
        raise PolicyError(f"--budget is a number of tokens, as 1024, or of megabytes, as 20MB, got {budget!r}")
    return {"all_bytes": int(number) * 10**6} if unit else {"tokens": int(number)}


def _at_size(
    size: str,
    chosen: Mapping[str, Policy | None],
    model: PreTrainedModel,
    limits: Mapping[str, int],
    length: int,
    console: Console,
) -> dict[str, tuple[Policy | None, str]]:
    """Policies at the size of a budget, and whether that is theirs or any; one that cannot be so small is left out."""
    geometries = geometries_of(model)
    geometry = max(geometries, key=lambda each: each.token_bytes)
    layer_bytes = limits["all_bytes"] // len(geometries) if "all_bytes" in limits else None
    found: dict[str, tuple[Policy | None, str]] = {}
    for spec, policy in chosen.items():
        if policy is None or attends_everything(policy, geometry):
            found[spec] = policy, ANY_SIZE
            continue
        if not limits:
            found[spec] = policy, size
            continue
        try:
            made = fitted(policy, geometry, tokens=limits.get("tokens"), layer_bytes=layer_bytes, length=length)
        except PolicyError as error:
            console.print(f"{spec} is left out at {size}: {error}", markup=False)
            continue
        found[spec] = made, size
    if not found:
        raise PolicyError(
            f"none of these policies fits into the budget {size}; raise it, or lower their sink, block_size or "
            "chunk_size"
        )
    return found


def _measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, policy: Policy | None, job: Job, text: TaskText
) -> list[Row]:
    """A row for each task of a text, which is read once."""
    scores: dict[str, float] = {}
    seconds: list[float] = []
    with _memory(model, job.policy, policy) as cache:
        reading = read(model, text.document, cache)
        again = 0.0 if policy is None else _after_reading(model, tokenizer, policy, text, cache)
        last = cache
        for name, questions in text.questions.items():
            marks = []
            for question in questions:
                last = cache.fork()
                said, each = answer(model, tokenizer, question.ids, last, tokens=question.tokens)
                marks.append(question.score(said))
                seconds.append(each)
            scores[name] = statistics.fmean(marks)
        held, attended = cache.memory_usage(), max(last.attended())
        if text.again:
            fork = cache.fork()
            scores["again"] = read(model, text.again, fork).perplexity
            attended = attended if text.questions else max(fork.attended())
    scores["prose"] = _prose(reading, text)
    return [
        Row(
            policy=job.policy,
            task=name,
            seed=job.seed,
            score=scores[name],
            attended=attended,
            device_bytes=bytes_in(held, "device"),
            host_bytes=bytes_in(held, "host") + bytes_in(held, "disk"),
            read_per_second=len(text.document) / (reading.seconds + again),
            seconds_per_token=statistics.fmean(seconds) if seconds else None,
        )
        for name in job.tasks.split(",")
    ]


@torch.inference_mode()
def _after_reading(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, policy: Policy, text: TaskText, cache: Any
) -> float:
    """What a policy does once the text has ended, and the seconds that it takes."""
    ids = torch.tensor([text.document], device=model.device)
    began = time.perf_counter()
    policy.compressor.after_reading(
        cache, lambda more: model(more, **{CACHE: cache}, logits_to_keep=1), ids, encoder(tokenizer)
    )
    return time.perf_counter() - began


def _prose(reading: Reading, text: TaskText) -> float:
    """The perplexity of the document's own tokens; the first of all tokens is told by nothing."""
    own = torch.ones(len(text.document), dtype=torch.bool)
    for first, end in text.planted:
        own[first:end] = False
    return float(reading.losses[own[1:]].mean().exp())


@contextmanager
def _memory(model: PreTrainedModel, spec: str, policy: Policy | None) -> Iterator[Any]:
    """A cache that the model reads into."""
    if policy is None:
        yield PLAIN[spec](model.config)
    else:
        with tiered(model, policy) as cache:
            yield cache
