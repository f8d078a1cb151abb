"""`kvtiers compare text`: policies side by side on tasks that need memory, at their own sizes or all at one."""

import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvtiers import Geometry, Policy, PolicyError, bytes_in
from kvtiers.cli import parse
from kvtiers.errors import suggest
from kvtiers_transformers.budgets import attends_everything, fitted
from kvtiers_transformers.compare_report import Row, markdown, write_report
from kvtiers_transformers.compare_results import ANY_SIZE, Job, Results
from kvtiers_transformers.decoders import attentions_of, decoder_of
from kvtiers_transformers.geometries import geometry_of
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
from kvtiers_transformers.tasks import PERPLEXITIES, TASKS, TaskText, make_text, texts
from kvtiers_transformers.versions import CACHE
from kvtiers_transformers.wrap import tiered

POLICIES = ("transformers:dynamic", "full", "sliding-window", "streaming", "archive", "packforcing-lm")
ALL_TASKS = (*TASKS, *PERPLEXITIES)
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
@click.argument("policies", nargs=-1)
def text(
    model: str,
    document: str,
    tokens: int,
    tasks: str,
    seeds: int,
    budget: str | None,
    out: Path,
    policies: tuple[str, ...],
) -> None:
    """What policies remember of long texts, what that costs, and how fast they are.

    POLICIES are written `name` or `name:setting=value,...`. Caches of transformers itself are rows too:
    `transformers:dynamic`, `transformers:fp8` (8 bits), `transformers:int4` (4 bits, with optimum-quanto). What was
    measured is kept in the folder `--out`, so a comparison that was stopped goes on, and more policies can be added.
    """
    wanted, specs = _tasks(tasks), tuple(dict.fromkeys(policies or POLICIES))
    chosen = {spec: _chosen(spec) for spec in specs}
    sizes = {name: _limits(name) for name in _listed(budget)} if budget else {OWN_SIZE: {}}
    figure_class()
    console, results = Console(), Results(out)
    loaded, tokenizer = load_model(model)
    for spec in specs:
        if spec in PLAIN:  # one that cannot be had is told before anything is measured
            PLAIN[spec](loaded.config)
    at = {size: _all_fitted(size, chosen, loaded, limits, tokens, console) for size, limits in sizes.items()}
    ids, encode = encoded(document, tokenizer, least=tokens), encoder(tokenizer)
    for names in texts(wanted):  # one without room is told before anything is measured
        make_text(names, ids, encode, tokens=tokens, seed=0)
    on = f"{model} {sha256(repr(ids).encode()).hexdigest()[:12]} {tokens}"
    geometry = _geometry(loaded)
    jobs = {
        Job(
            policy=spec,
            settings=repr(policy),
            budget=size if policy and not attends_everything(policy, geometry) else ANY_SIZE,
            tasks=",".join(names),
            seed=seed,
            on=on,
        ): policy
        for seed in range(seeds)
        for names in texts(wanted)
        for size, policies_there in at.items()
        for spec, policy in policies_there.items()
    }
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("", total=len(jobs))
        for number, (job, policy) in enumerate(jobs.items()):
            progress.update(bar, description=f"{job.policy}, text {job.seed}")
            if job not in results:
                made = make_text(job.tasks.split(","), ids, encode, tokens=tokens, seed=job.seed)
                results.add(job, _measure(loaded, tokenizer, policy, job, made))
            progress.update(bar, completed=number + 1)
    tables = {size: results.rows(list(jobs), size) for size in sizes}
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


def _geometry(model: PreTrainedModel) -> Geometry:
    """That of the first layer, which stands for all."""
    decoder = decoder_of(model)
    return geometry_of(decoder, attentions_of(decoder)[0])


def _all_fitted(
    size: str,
    chosen: Mapping[str, Policy | None],
    model: PreTrainedModel,
    limits: Mapping[str, int],
    length: int,
    console: Console,
) -> dict[str, Policy | None]:
    """Policies at the size of a budget, if there is one. Those that cannot be brought to it are named and left out."""
    if not limits:
        return dict(chosen)
    layers, geometry = len(attentions_of(decoder_of(model))), _geometry(model)
    layer_bytes = limits["all_bytes"] // layers if "all_bytes" in limits else None
    found: dict[str, Policy | None] = {}
    for spec, policy in chosen.items():
        if policy is None or attends_everything(policy, geometry):
            found[spec] = policy
            continue
        try:
            made = fitted(policy, geometry, tokens=limits.get("tokens"), layer_bytes=layer_bytes, length=length)
        except PolicyError as error:
            console.print(f"{spec} is left out at {size}: {error}", markup=False)
            continue
        found[spec] = made
        console.print(f"{spec} at {size}: recent = {made.recent}, top_k = {made.top_k}", markup=False)
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
        if policy is not None:
            _after_reading(model, tokenizer, policy, text, cache)
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
            scores["again"] = read(model, text.again, cache.fork()).perplexity
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
            read_per_second=len(text.document) / reading.seconds,
            seconds_per_token=statistics.fmean(seconds) if seconds else None,
        )
        for name in job.tasks.split(",")
    ]


@torch.inference_mode()
def _after_reading(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, policy: Policy, text: TaskText, cache: Any
) -> None:
    """What a policy does once the text has ended."""
    ids = torch.tensor([text.document], device=model.device)
    policy.compressor.after_reading(
        cache, lambda more: model(more, **{CACHE: cache}, logits_to_keep=1), ids, encoder(tokenizer)
    )


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
