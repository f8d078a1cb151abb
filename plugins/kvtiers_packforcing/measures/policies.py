"""`kvtiers eval policies`: the same walks made under many memories, and all measures of what came out."""

from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import attrs
import click
import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from kvtiers.errors import KVTiersError
from kvtiers_models.source_code import code_of
from kvtiers_packforcing.measures.figures import Figure
from kvtiers_packforcing.measures.kept import Kept
from kvtiers_packforcing.measures.lengths import seconds_option
from kvtiers_packforcing.measures.results import Results
from kvtiers_packforcing.measures.rows import codec, measure_rows
from kvtiers_packforcing.measures.visits import MeasureError
from kvtiers_packforcing.tiny_world import Walks
from kvtiers_packforcing.tiny_world.sampling import Sampler
from kvtiers_packforcing.tiny_world.sampling_options import sampled, sampling_options
from kvtiers_packforcing.tiny_world.variants import TOP_K, Variant, choose_variants, variants
from kvtiers_packforcing.tiny_world.weights import SHIPPED, Models, check_weights, fingerprint, load_models

_WALK = "evaluation walk"
Decoder = Literal["autoencoder", "codec"]


@click.command()
@click.option("--policies", default=",".join(variants()), show_default=True, help="Memories, separated by commas.")
@click.option("--walks", default=8, show_default=True, type=click.IntRange(min=1), help="Walks: prompts of a video.")
@click.option("--seeds", default=5, show_default=True, type=click.IntRange(min=1), help="Videos of each walk.")
@seconds_option("At what lengths; the longest is made.")
@sampling_options
@click.option(
    "--top-k", default=TOP_K, show_default=True, type=click.IntRange(min=1), help="Compressed blocks attended."
)
@click.option(
    "--window-blocks",
    default=5,
    show_default=True,
    type=click.IntRange(min=3),
    help="Blocks that the windows attend, the current one included.",
)
@click.option(
    "--decoder",
    default="autoencoder",
    show_default=True,
    type=click.Choice(["autoencoder", "codec"]),
    help="What makes pixels of latents; the linear codec costs nothing.",
)
@click.option("--weights", default=SHIPPED, type=click.Path(path_type=Path), help="Models.  [default: those shipped]")
@click.option("--all", "everything", is_flag=True, help="Show all measures, not the main ones only.")
@click.option(
    "--keep",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Keep the figures of each walk and memory here as they come. What is there already is not made again, unless "
    "the policy's code has changed.",
)
@click.option("--json", "out", type=click.Path(path_type=Path, dir_okay=False), help="Write figures, walk by walk.")
def policies(
    policies: str,
    walks: int,
    seeds: int,
    seconds: tuple[int, ...],
    steps: int | None,
    shift: float | None,
    sampling: str | None,
    top_k: int,
    window_blocks: int,
    decoder: Decoder,
    weights: Path,
    everything: bool,
    keep: Path | None,
    out: Path | None,
) -> None:
    """Make videos of the tiny world under many memories, and measure them: a column for each memory.

    Beside them stands the codec: the true videos of the same walks, encoded and decoded.
    """
    try:
        chosen = choose_variants(policies, top_k=top_k, window_blocks=window_blocks)
        for option, path in (("--json", out), ("--keep", keep)):
            if path is not None and not path.parent.is_dir():
                raise MeasureError(f"{option}: there is no folder {path.parent}; make it first")
        check_weights(weights)
        results = Results(seconds=seconds)
        ceiling = codec(weights / "autoencoder" if decoder == "autoencoder" else None)
        console, models, codes = Console(), load_models(weights), {}
        for variant in chosen:  # what cannot be remembered so is refused before anything is made
            with variant.remember(models) as wan:
                codes[variant.name] = code_of(wan.policies[0])
        sampler = sampled(models.sampler, steps=steps, shift=shift, sampling=sampling)
        kept = None if keep is None else Kept(keep, _made_with(weights, sampler, decoder, results.seconds))
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task("seconds made", total=walks * len(chosen) * max(seconds))
            for nth in range(walks):
                walk = Walks.of_seeds([f"{_WALK} {nth}"], max(seconds))
                measure_rows([ceiling], [(nth, walk)], results)
                for variant in chosen:
                    drawn = range(nth * seeds, (nth + 1) * seeds)
                    of = {
                        "memory": repr(variant),
                        "code": codes[variant.name],
                        "walk": nth,
                        "seeds": [drawn.start, drawn.stop],
                    }
                    found = None if kept is None else kept.find(variant.name, of)
                    if found is not None:
                        progress.advance(bar, max(seconds))
                    else:
                        found = Results(seconds=seconds)
                        measure_variant(
                            models,
                            variant,
                            walk,
                            drawn,
                            found,
                            sampler=sampler,
                            decoder=decoder,
                            done=lambda: progress.advance(bar),
                        )
                        if kept is not None:
                            kept.keep(variant.name, of, found)
                    results.take(found)
                if out is not None:
                    results.write(out)
    except KVTiersError as error:
        raise click.ClickException(str(error)) from error
    results.print(Console(), everything=everything)
    if out is not None:
        click.echo(f"All figures are in {out}")


def _made_with(weights: Path, sampler: Sampler, decoder: Decoder, seconds: Sequence[int]) -> dict[str, Any]:
    return {
        "weights": fingerprint(weights),
        "sampler": attrs.asdict(sampler),
        "decoder": decoder,
        "seconds": list(seconds),
        "kvtiers": metadata.version("kvtiers"),
    }


def measure_variant(
    models: Models,
    variant: Variant,
    walk: Walks,
    seeds: Sequence[int],
    results: Results,
    *,
    sampler: Sampler,
    decoder: Decoder,
    done: Callable[[], object] = lambda: None,
) -> None:
    """Make a video of the walk for each seed, all at once, and add its measures and costs to the variant's row.

    done: called after each second that was made.
    """
    from kvtiers_packforcing.tiny_world.making import make_videos

    rows = len(seeds)
    many = Walks(rooms=walk.rooms.expand(rows, -1), curtains=walk.curtains.expand(rows, -1))
    pixels: list[Tensor] = []
    costs: list[tuple[float, float, float]] = []
    for made in make_videos(models, [variant], many, seeds=seeds, sampler=sampler, decoder=decoder):
        block = made[variant.name]
        pixels.append(block.pixels.half())  # two minutes of a row take 94 MB so
        costs.append((block.device_bytes / rows / 1e6, block.host_bytes / rows / 1e6, block.seconds / rows))
        done()
    video = torch.cat(pixels, 2)
    for row in range(rows):
        results.add(variant.name, video[row : row + 1].float(), walk, group=seeds[0])
    results.note(variant.name, {length: _costs(costs[:length]) for length in results.seconds})


def _costs(blocks: Sequence[tuple[float, float, float]]) -> dict[str, Figure]:
    """What was held after the last of some blocks, and the seconds that one of them took, of one video."""
    seconds = sum(took for _, _, took in blocks) / len(blocks)
    values: dict[str, Any] = {"device_mb": blocks[-1][0], "host_mb": blocks[-1][1], "block_seconds": seconds}
    return {name: _one(value) for name, value in values.items()}


def _one(value: float) -> Figure:
    figure: Float[Tensor, " batch"] = torch.tensor([value])
    return Figure(values=figure, weights=torch.ones(1))
