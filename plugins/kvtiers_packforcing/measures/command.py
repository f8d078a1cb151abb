"""`kvtiers eval video`: measure videos of the tiny world, beside true, coded and deliberately damaged ones."""

from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from kvtiers.errors import KVTiersError
from kvtiers_packforcing.measures.attention import attention
from kvtiers_packforcing.measures.clip_scores import ClipScores
from kvtiers_packforcing.measures.damages import DAMAGES
from kvtiers_packforcing.measures.lengths import seconds_option
from kvtiers_packforcing.measures.policies import policies
from kvtiers_packforcing.measures.results import Results
from kvtiers_packforcing.measures.rows import Row, Seed, codec, damaged, measure_rows, truth
from kvtiers_packforcing.measures.video_files import files_of, video_in, walk_in
from kvtiers_packforcing.measures.visits import MeasureError, cut
from kvtiers_packforcing.tiny_world import FIRST_FRAME, FRAMES_PER_BLOCK, Walks

_FOLDER = click.Path(path_type=Path, file_okay=False)


@click.group(name="eval")
def evaluate() -> None:
    """Measure what a model made."""


evaluate.add_command(policies)
evaluate.add_command(attention)


@evaluate.command()
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path), metavar="[FILE|FOLDER]...")
@click.option("--walk", "walks", multiple=True, help="The seed of the walk shown: one for all videos, or one for each.")
@click.option("--prompts", type=click.Path(path_type=Path, dir_okay=False), help="What they show: a prompt a second.")
@click.option("--truth", "with_truth", is_flag=True, help="Measure true videos and deliberately damaged ones.")
@click.option("--videos", default=8, show_default=True, type=click.IntRange(min=1), help="True videos, with --truth.")
@seconds_option("At what lengths, as far as the videos last.")
@click.option("--autoencoder", type=_FOLDER, help="The codec of the ceiling, instead of the linear one.")
@click.option("--clip", type=_FOLDER, help="A CLIP model of transformers: CLIP score and its drop.")
@click.option("--dino", type=_FOLDER, help="A DINO model of transformers: subject consistency.")
@click.option("--all", "everything", is_flag=True, help="Show all measures, not the main ones only.")
@click.option("--json", "out", type=click.Path(path_type=Path, dir_okay=False), help="Write all figures to a file.")
def video(
    paths: Sequence[Path],
    walks: Sequence[str],
    prompts: Path | None,
    with_truth: bool,
    videos: int,
    seconds: tuple[int, ...],
    autoencoder: Path | None,
    clip: Path | None,
    dino: Path | None,
    everything: bool,
    out: Path | None,
) -> None:
    """Measure videos of the tiny world: identity after absence, motion, drift, ...

    A FOLDER of mp4 files is one row, a FILE a row of its own. --walk or --prompts says what they show. With --truth no
    files are needed: it shows what each measure makes of true videos, and of videos damaged on purpose.
    """
    try:
        if with_truth == bool(paths):
            raise MeasureError("give either video files or --truth; see kvtiers eval video --help")
        if out is not None and not out.parent.is_dir():
            raise MeasureError(f"--json: there is no folder {out.parent}; make it first")
        files = files_of(paths)
        shown = _walks(files, walks, prompts, videos, max(seconds))
        rows = [codec(autoencoder)]
        scores = None if clip is None and dino is None else ClipScores(clip=clip, dino=dino)
        results = Results(seconds=seconds, scores=scores)
        if with_truth:
            rows += [truth(), *(damaged(name, strengths[-1]) for name, (_, strengths) in DAMAGES.items())]
        _measure(rows, shown, files, results)
    except KVTiersError as error:
        raise click.ClickException(str(error)) from error
    results.print(Console(), everything=everything)
    if out is not None:
        results.write(out)
        click.echo(f"All figures are in {out}")


def _walks(
    files: dict[str, list[Path]], seeds: Sequence[str], prompts: Path | None, videos: int, seconds: int
) -> list[tuple[Seed, Walks]]:
    """The walk of each video of a row, with the seed of the house that its ceiling is measured in."""
    if not files:
        return [(seed, Walks.of_seeds([seed], seconds)) for seed in seeds or range(videos)]
    if bool(seeds) == (prompts is not None):
        raise MeasureError("say what the videos show: either --walk SEED or --prompts FILE")
    longest = max(len(row) for row in files.values())
    if prompts is not None:
        walk = walk_in(prompts)
        return [(nth, walk) for nth in range(longest)]
    if len(seeds) not in (1, longest):
        raise MeasureError(f"got {len(seeds)} walks for rows of {longest} videos; give --walk once, or once for each")
    each = list(seeds) * longest if len(seeds) == 1 else seeds
    return [(seed, Walks.of_seeds([seed], seconds)) for seed in each]


def _measure(
    rows: Sequence[Row], shown: Sequence[tuple[Seed, Walks]], files: dict[str, list[Path]], results: Results
) -> None:
    """All rows, with a progress bar where there is a terminal. The ceiling need not be longer than the files."""
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        total = len(rows) * len(shown) + sum(map(len, files.values()))
        bar = progress.add_task("measuring", total=total)
        for name, paths in files.items():
            for path, (_, walk) in zip(paths, shown, strict=False):
                results.add(name, _cut(video_in(path), walk), walk)
                progress.advance(bar)
        if files and not results.lengths():
            raise MeasureError(
                f"the videos, or their prompts, are shorter than {results.seconds[0]} s; give their length, as in "
                f"--seconds {max(1, results.seconds[0] - 1)}"
            )
        longest = max(results.lengths(), default=results.seconds[-1])
        walks = [(seed, cut(walk, longest)) for seed, walk in shown]
        measure_rows(rows, walks, results, done=lambda: progress.advance(bar))


def _cut(pixels: Tensor, walk: Walks) -> Tensor:
    """What the walk has prompts for."""
    return pixels[:, :, : walk.blocks * FRAMES_PER_BLOCK - FIRST_FRAME]
