"""`kvtiers demo video`: two minutes from a prompt under several memories, side by side, and what came back the same."""

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click
import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from kvtiers.errors import KVTiersError, MissingExtraError
from kvtiers_packforcing.demo.output import filled_whole
from kvtiers_packforcing.demo.walk_text import DEFAULT_WALK, read_walk
from kvtiers_packforcing.tiny_world.sampling_options import sampled, sampling_options
from kvtiers_packforcing.tiny_world.variants import TOP_K, choose_variants
from kvtiers_packforcing.tiny_world.weights import SHIPPED, check_weights, load_models, read_sampler

if TYPE_CHECKING:
    from kvtiers_packforcing.demo.plot import Told

POLICIES = "packforcing,sink-rolling-window,rolling-window"
_NEEDS = {"diffusers": "diffusers", "av": "diffusers", "matplotlib": "cli", "PIL": "cli"}
"""Packages that are imported once they are needed, and the extras that bring them."""

T = TypeVar("T")


@click.command()
@click.option(
    "--prompt",
    default=DEFAULT_WALK,
    help="The walk: rooms, seconds, and closed curtains, as in 'hall 4, attic 5, attic 6 closed, hall 5'.  "
    "[default: two minutes through five rooms]",
)
@click.option("--seconds", type=int, help="Length of the video.  [default: the whole walk, 120]")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of the noise.")
@click.option("--policies", default=POLICIES, show_default=True, help="Memories to compare, separated by commas.")
@click.option(
    "--top-k", default=TOP_K, show_default=True, type=click.IntRange(min=1), help="Compressed blocks that are attended."
)
@sampling_options
@click.option(
    "--weights",
    default=SHIPPED,
    type=click.Path(path_type=Path),
    help="Folder of the models.  [default: those shipped]",
)
@click.option(
    "--out",
    default="kvtiers-demo-video",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder for the video and two pictures.",
)
def video(
    prompt: str,
    seconds: int | None,
    seed: int,
    policies: str,
    top_k: int,
    steps: int | None,
    shift: float | None,
    sampling: str | None,
    weights: Path,
    out: Path,
) -> None:
    """Make a video of a walk in which rooms return, under several memories, with a model that is shipped."""
    walks = _asked("'--prompt' and '--seconds'", lambda: read_walk(prompt, seconds))
    chosen = _asked("'--policies'", lambda: choose_variants(policies, top_k=top_k))
    check_weights(weights)
    _check_extras()
    console = Console()
    with filled_whole(out) as folder, _one_thread():
        from kvtiers_packforcing.demo.showing import show

        names = ", ".join(variant.name for variant in chosen)
        sampler = sampled(read_sampler(weights), steps=steps, shift=shift, sampling=sampling)
        console.print(f"{walks.blocks} seconds, {sampler.steps} steps a block, seed {seed}, under {names}")
        columns = (TextColumn("seconds made"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console) as progress:
            bar = progress.add_task("", total=walks.blocks)
            models = load_models(weights)
            told = show(
                models, chosen, walks, folder, seed=seed, sampler=sampler, advance=lambda: progress.advance(bar)
            )
        written = sorted(path.name for path in folder.iterdir())
    console.print(table(told))
    for name in written:
        click.echo(f"  {out / name}")  # which does not break a path into lines


def table(told: "Mapping[str, Told]") -> Table:
    """What each memory held and kept, one a row."""
    made = Table(title="What each memory holds, and what comes back", box=box.SIMPLE_HEAD, padding=0)
    made.add_column("policy")
    for name in (
        "tokens\nattended", "KV device\nMB", "KV host\nMB", "seconds\na block", "returns\nalike, dB", "other rooms,\ndB"
    ):  # fmt: skip
        made.add_column(name, justify="right")
    for name, one in told.items():
        made.add_row(
            name,
            f"{one.attended:,}",
            f"{one.device_bytes[-1] / 1e6:.1f}",
            f"{one.host_bytes[-1] / 1e6:.1f}",
            f"{one.seconds:.2f}",
            "" if one.identity is None else f"{one.identity:.1f}",
            "" if one.strangers is None else f"{one.strangers:.1f}",
        )
    return made


def _asked(option: str, read: Callable[[], T]) -> T:
    """What an option says, or click's message for a wrong one."""
    try:
        return read()
    except KVTiersError as error:
        raise click.BadParameter(str(error), param_hint=option) from error


def _check_extras() -> None:
    """Raise `MissingExtraError` unless everything can be imported that will be."""
    missing = {name: extra for name, extra in _NEEDS.items() if importlib.util.find_spec(name) is None}
    if missing:
        extras = ",".join(sorted(set(missing.values())))
        raise MissingExtraError(f"kvtiers demo video needs {', '.join(missing)}; pip install 'kvtiers[{extras}]'")


@contextmanager
def _one_thread() -> Iterator[None]:
    """The models are so small that threads wait for each other longer than they work; the encoder has its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
