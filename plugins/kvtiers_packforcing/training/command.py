"""`kvtiers train CONFIG.toml`: run a training, or go on with it; `--dry-run` says what it would cost."""

import resource
import time
from collections.abc import Mapping
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kvtiers.errors import KVTiersError
from kvtiers_packforcing.training.precision import slow_bfloat16
from kvtiers_packforcing.training.sharing import joined
from kvtiers_packforcing.training.stages import STAGES, load_config, make_stage
from kvtiers_packforcing.training.trainer import CHECKPOINT, Trainer

_COPIES = 5
"""Of every weight: itself, its gradient, two moments and the average."""


@click.command()
@click.argument("config", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--dry-run", is_flag=True, help="Print steps, parameters, memory and time per step, and train nothing.")
@click.option("--until", type=click.IntRange(min=1), help="Stop after this step; a later run goes on from there.")
@click.option("--export", is_flag=True, help="Write the averaged weights of the run so far for use, and train nothing.")
def train(config: Path, dry_run: bool, until: int | None, export: bool) -> None:
    """Train what CONFIG describes. A run that was stopped goes on from its checkpoint, bit for bit.

    CONFIG is a TOML file, or `tiny-world-autoencoder`, `tiny-world`, `tiny-world-distill` or `wan2.1-1.3b`, which come
    with kvtiers.
    """
    try:
        said = load_config(config)
        torch.set_num_threads(said.run.threads)
        if dry_run and (outline := STAGES[said.run.stage].outline(said)) is not None:
            click.echo("\n".join([f"stage {said.run.stage}: {said.steps:,} steps", *outline.lines]))
            return
        with joined() as share:
            share.check(said)
            trainer = Trainer(make_stage(said), share)
            if share.writes and not export and (advice := slow_bfloat16(said, trainer.stage.device)):
                click.echo(advice, err=True)
            if dry_run:
                _cost(trainer)
            elif export:
                trainer.load(Path(said.run.folder) / CHECKPOINT)
                trainer.export()
                click.echo(f"The weights after {trainer.step} steps are in {trainer.export_folder}")
            else:
                _run(trainer, until)
    except (KVTiersError, OSError) as error:
        raise click.ClickException(str(error)) from error


def _run(trainer: Trainer, until: int | None) -> None:
    """Train with a progress bar, or quietly where there is no terminal."""
    console = Console(quiet=not trainer.share.writes)
    folder = Path(trainer.config.run.folder)
    console.print(f"{'Going on' if (folder / CHECKPOINT).exists() else 'Training'} in {folder}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(trainer.stage.name, total=trainer.config.steps)

        def done(step: int, figures: Mapping[str, float]) -> None:
            progress.update(bar, completed=step, description=f"{trainer.stage.name} {_loss_of(figures)}")

        trainer.run(until=until, done=done)
    console.print(f"{trainer.step} of {trainer.config.steps} steps are done.")


def _loss_of(figures: Mapping[str, float]) -> str:
    """The first figure of a step, which is its loss, with its name."""
    return next(f"{name} {value:.4f}" for name, value in figures.items())


def _cost(trainer: Trainer) -> None:
    """Say what a run would cost. Each phase makes two steps of every network; the second is timed.

    Nothing is written, but for a file of prompts' embeddings where the model needs one and it can be made.
    """
    config, console = trainer.config, Console(quiet=not trainer.share.writes)
    console.print(f"stage {trainer.stage.name}: {config.steps:,} steps")
    size = 0
    for name, network in trainer.stage.networks.items():
        weights = list(network.parameters())
        copies = _COPIES if name == "model" else _COPIES - 1  # which is not averaged
        size += copies * sum(weight.numel() * weight.element_size() for weight in weights)
        console.print(f"{name}: {sum(weight.numel() for weight in weights):,} parameters")
    first, total, total_work = 0, 0.0, 0.0
    for nth, phase in enumerate(config.phases, 1):
        turns = [trainer.stage.turn(step) for step in range(first, first + phase.steps)]
        for turn in dict.fromkeys(turns):
            seconds, work = _timed(trainer, first + turns.index(turn))
            count = turns.count(turn)
            total, total_work = total + seconds * count, total_work + work * count
            which = "" if len(set(turns)) == 1 else f" of the {turn}"
            console.print(f"phase {nth}: {count:,} steps{which} of {seconds:.2f} s ({work:.2f} s of one core)")
        first += phase.steps
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    console.print(
        f"memory: {size / 1e6:.0f} MB for weights, gradients, moments and average; {peak / 1e9:.2f} GB for the whole "
        f"process at its peak\nin all {total / 3600:.2f} h, as busy as this machine is now "
        f"({total_work / 3600:.2f} h of one core)"
    )
    if torch.cuda.is_available():
        console.print(f"on the GPU {torch.cuda.max_memory_allocated() / 1e9:.2f} GB at the peak")


def _timed(trainer: Trainer, step: int) -> tuple[float, float]:
    """Seconds of a step, and seconds of one core, after it was made once."""
    seconds = work = 0.0
    for _ in range(2):
        trainer.step = step
        begun, worked = time.perf_counter(), time.process_time()
        trainer.advance()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds, work = time.perf_counter() - begun, time.process_time() - worked
    return seconds, work
