"""`kvtiers compare text`: policies side by side on tasks that need memory, at their own sizes or all at one."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import attrs
import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedModel

from kvtiers import Policy, PolicyError, bytes_in
from kvtiers.cli import parse
from kvtiers.errors import suggest
from kvtiers_transformers.budgets import fitted
from kvtiers_transformers.compare_report import PERPLEXITIES, Row, markdown, write_report
from kvtiers_transformers.decoders import attentions_of, decoder_of
from kvtiers_transformers.geometries import geometry_of
from kvtiers_transformers.plain_cache import PlainCache
from kvtiers_transformers.reading import answer, document_option, encoded, encoder, model_option, read, tokens_option
from kvtiers_transformers.recall_picture import figure_class
from kvtiers_transformers.smollm2 import load_model
from kvtiers_transformers.tasks import TASKS, Task, make_task
from kvtiers_transformers.wrap import tiered

DYNAMIC = "transformers:dynamic"
"""The row of transformers' own cache, which has no policy."""
POLICIES = (DYNAMIC, "full", "sliding-window", "streaming", "archive", "packforcing-lm")
ALL_TASKS = (*TASKS, *PERPLEXITIES)


@attrs.frozen(kw_only=True)
class _Job:
    """One policy on one task with one seed. settings: what its name stood for. on: what it was run on."""

    policy: str
    settings: str
    task: str
    seed: int
    on: str


@click.command()
@model_option
@document_option
@tokens_option
@click.option("--tasks", default=",".join(ALL_TASKS), show_default=True, help="Tasks, separated by commas.")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(min=1), help="Texts of each task.")
@click.option("--budget", help="One size for all, by their `recent`: 1024 (tokens attended) or 20MB (held).")
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

    POLICIES are written `name` or `name:setting=value,...`; `transformers:dynamic` is transformers' own cache. What was
    measured is kept in the folder `--out`, so a comparison that was stopped goes on, and more policies can be added.
    """
    wanted, specs = _tasks(tasks), tuple(dict.fromkeys(policies or POLICIES))
    chosen = {spec: None if spec == DYNAMIC else parse(spec) for spec in specs}
    limits = _limits(budget)
    figure_class()
    console, results = Console(), _Results(out)
    loaded, tokenizer = load_model(model)
    if limits:
        chosen = _all_fitted(chosen, loaded, limits, tokens, console)
    ids, encode = encoded(document, tokenizer, least=tokens), encoder(tokenizer)
    for name in (task for task in wanted if task in TASKS):  # one without room is told before anything is measured
        make_task(name, ids, encode, tokens=tokens, seed=0)
    on = f"{model} {sha256(repr(ids).encode()).hexdigest()[:12]} {tokens} {budget or 'own sizes'}"
    jobs = [
        _Job(policy=spec, settings=repr(policy), task=task, seed=seed, on=on)
        for task in wanted
        for seed in range(seeds)
        for spec, policy in chosen.items()
    ]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("", total=len(jobs))
        for job in jobs:
            progress.update(bar, description=f"{job.task}, {job.policy}")
            if job not in results:
                measured = _measure(loaded, tokenizer, chosen[job.policy], job, ids, encode, tokens)
                results.add(job, measured)
            progress.advance(bar)
    rows = results.rows(jobs)
    title = f"{model}, {tokens:,} tokens of {document}, {budget or 'each policy at its own size'}"
    write_report(out, rows, title)
    console.print(markdown(rows), markup=False, soft_wrap=True)
    console.print(f"All of this is in {out}.")


def _tasks(listed: str) -> list[str]:
    found = [name.strip() for name in listed.split(",") if name.strip()]
    for name in found:
        if name not in ALL_TASKS:
            raise PolicyError(f"unknown task {name!r}; there are {', '.join(ALL_TASKS)}.{suggest(name, ALL_TASKS)}")
    if not found:
        raise PolicyError(f"no tasks are named; choose from {', '.join(ALL_TASKS)}")
    return found


def _limits(budget: str | None) -> dict[str, int]:
    """What `--budget` says: tokens that a query attends, or bytes that all layers hold."""
    if budget is None:
        return {}
    number, unit = budget.removesuffix("MB"), budget[len(budget.removesuffix("MB")) :]
    if not (number.isascii() and number.isdigit()) or len(number) > 9 or int(number) == 0:
        raise PolicyError(f"--budget is a number of tokens, as 1024, or of megabytes, as 20MB, got {budget!r}")
    return {"all_bytes": int(number) * 10**6} if unit else {"tokens": int(number)}


def _all_fitted(
    chosen: Mapping[str, Policy | None],
    model: PreTrainedModel,
    limits: Mapping[str, int],
    length: int,
    console: Console,
) -> dict[str, Policy | None]:
    """Policies at the size of the budget. Those that cannot be brought to it are named and left out."""
    decoder = decoder_of(model)
    attentions = attentions_of(decoder)
    layer_bytes = limits["all_bytes"] // len(attentions) if "all_bytes" in limits else None
    geometry = geometry_of(decoder, attentions[0])
    found: dict[str, Policy | None] = {}
    for spec, policy in chosen.items():
        if policy is None or policy.bound(geometry) is None:
            found[spec] = policy
            console.print(f"{spec}: attends everything, whatever the budget is", markup=False)
            continue
        try:
            made = fitted(policy, geometry, tokens=limits.get("tokens"), layer_bytes=layer_bytes, length=length)
        except PolicyError as error:
            console.print(f"{spec} is left out: {error}", markup=False)
            continue
        found[spec] = made
        console.print(f"{spec}: recent = {made.recent}", markup=False)
    if not found:
        raise PolicyError("none of these policies fits into the budget; raise it, or lower their top_k, most or sink")
    return found


class _Results:
    """What was measured, in a file of one JSON line each. A line that was not written whole is left out."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "results.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PolicyError(f"--out {folder} cannot be made: {error.strerror}; give another folder") from error
        self._rows: dict[_Job, Row] = {}
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ():
            try:
                said = json.loads(line)
                self._rows[_Job(**said["job"])] = Row(**said["row"])
            except (ValueError, TypeError, KeyError):
                continue

    def __contains__(self, job: _Job) -> bool:
        return job in self._rows

    def rows(self, jobs: Sequence[_Job]) -> list[Row]:
        """What was measured of jobs, and of other policies on the same: of each what its name stood for at last."""
        latest = {job.policy: job.settings for job in self._rows} | {job.policy: job.settings for job in jobs}
        asked = {(job.task, job.seed, job.on) for job in jobs}
        others = [
            job
            for job in self._rows
            if (job.task, job.seed, job.on) in asked and job.settings == latest[job.policy] and job not in jobs
        ]
        return [self._rows[job] for job in (*jobs, *others) if job in self._rows]

    def add(self, job: _Job, row: Row) -> None:
        """Keep a result for good."""
        self._rows[job] = row
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * torn)
            file.write(json.dumps({"job": attrs.asdict(job), "row": attrs.asdict(row)}) + "\n")


def _measure(
    model: PreTrainedModel,
    tokenizer: Any,
    policy: Policy | None,
    job: _Job,
    ids: Sequence[int],
    encode: Callable[[str], list[int]],
    tokens: int,
) -> Row:
    if job.task in TASKS:
        task = make_task(job.task, ids, encode, tokens=tokens, seed=job.seed)
    else:
        task = Task(name=job.task, document=_prose(job.task, ids, tokens, job.seed), questions=())
    with _memory(model, policy) as cache:
        reading = read(model, task.document, cache)
        scores, seconds = [], []
        for question in task.questions:
            said, each = answer(model, tokenizer, question.ids, cache.fork(), tokens=question.tokens)
            scores.append(question.score(said))
            seconds.append(each)
        held, attended = cache.memory_usage(), max(cache.attended())
    if task.questions:
        score = sum(scores) / len(scores)
    else:
        counted = reading.losses[1 - _again(tokens) :] if job.task == "again" else reading.losses
        score = float(counted.mean().exp())
    return Row(
        policy=job.policy,
        task=job.task,
        seed=job.seed,
        score=score,
        attended=attended,
        device_bytes=bytes_in(held, "device"),
        host_bytes=bytes_in(held, "host") + bytes_in(held, "disk"),
        read_per_second=len(task.document) / reading.seconds,
        seconds_per_token=sum(seconds) / len(seconds) if seconds else None,
    )


def _again(tokens: int) -> int:
    """Tokens of the passage that comes a second time."""
    return tokens // 8


def _prose(task: str, ids: Sequence[int], tokens: int, seed: int) -> list[int]:
    """A stretch of the document; for `again` its beginning comes a second time at the end."""
    length = tokens - _again(tokens) if task == "again" else tokens
    first = seed * length % max(1, len(ids) - length + 1)
    found = list(ids[first : first + length])
    return found + found[: _again(tokens)] if task == "again" else found


@contextmanager
def _memory(model: PreTrainedModel, policy: Policy | None) -> Iterator[Any]:
    """A cache that the model reads into."""
    if policy is None:
        yield PlainCache(config=model.config)
    else:
        with tiered(model, policy) as cache:
            yield cache
