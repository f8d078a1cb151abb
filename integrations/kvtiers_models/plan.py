"""The command `kvtiers plan`."""

from typing import Any

import click
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from kvtiers.errors import KVTiersError, MissingExtraError, PolicyError, explain
from kvtiers.planning import Shape
from kvtiers.plugins import registry
from kvtiers.presets import parse, policy
from kvtiers_models.costs import cost


@click.command()
@click.option("--model", required=True, help="A name, hub id or folder that an installed plugin knows.")
@click.option("--size", default="832x480", show_default=True, help="Video: width x height, in pixels.")
@click.option("--seconds", default=120.0, show_default=True, type=click.FloatRange(min=0, min_open=True))
@click.option("--fps", default=16, show_default=True, type=click.IntRange(min=1), help="Video: frames a second.")
@click.option("--block-frames", default=4, show_default=True, type=click.IntRange(min=1), help="Video: a block's.")
@click.option("--tokens", default=32_768, show_default=True, type=click.IntRange(min=1), help="Text: tokens read.")
@click.option("--dtype", default="bfloat16", show_default=True, type=click.Choice(["bfloat16", "float16", "float32"]))
@click.argument("policies", nargs=-1)
def plan(model: str, policies: tuple[str, ...], dtype: str, **wanted: Any) -> None:
    """What each policy costs for a model, computed from its shape before anything is loaded.

    POLICIES are names, or name:setting=value,... (none: every preset).
    """
    try:
        _plan(_shape(model, dtype=getattr(torch, dtype), **wanted), policies)
    except OverflowError as error:
        raise PolicyError(f"what is asked for of {model!r} is too large to be computed; ask for less") from error


def _plan(shape: Shape, policies: tuple[str, ...]) -> None:
    """Print what each policy costs."""
    table = Table(title=shape.name, box=box.SIMPLE_HEAD, padding=0)
    table.add_column("policy", overflow="fold")
    for name in (
        "tokens\nattended", "KV cached\nGB", "on device\nGB, at most", "archived\nelsewhere",
        f"archive per\n{shape.growth_unit}", "attention\nwork",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    for spec in policies or _presets_for(shape):
        found = cost(parse(spec), shape)
        sizes = (found.cached_bytes, found.device_bytes, found.archive_bytes, found.growth_bytes)
        table.add_row(spec, f"{found.attended:,}", *(f"{size / 1e9:.2f}" for size in sizes), f"{found.work:.1%}")
    console = Console()
    console.print(table)
    console.print(
        "KV cached: of the attended history, as papers count it: without the current block, or (full) of everything. "
        "On device: with room for current tokens, unrotated copies and digests. A buffer without a bound grows "
        "by a quarter when it is full, so a quarter more is counted on the device. Attention work: "
        "the share of full attention's, at the last step."
    )


def _presets_for(shape: Shape) -> list[str]:
    """The presets for a model of this shape: for text those that cut a long forward into chunks, and what keeps all."""
    found = {name: policy(name) for name in registry().names("policy")}
    text = {name for name, made in found.items() if made.chunk_size is not None}
    both = {name for name, made in found.items() if made.recent is None} - text
    return [name for name in found if name in both or (name in text) == shape.geometry.causal]


def _shape(model: str, **wanted: Any) -> Shape:
    """What the installed plugins know of `model`."""
    reasons = []
    for name in registry().names("shape"):
        try:
            found = registry().factory("shape", name)(model, **wanted)
        except MissingExtraError as error:
            reasons.append(str(error))
            continue
        except (KVTiersError, OverflowError):
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a file that is none, or a plugin at fault
            origin = registry().provider("shape", name).origin
            reasons.append(f"{name!r} of plugin {origin} failed: {explain(error)}")
            continue
        if isinstance(found, Shape):
            return found
    factories = [registry().factory("shape", name) for name in registry().names("shape")]
    known = " ".join(line for each in factories for line in (each.__doc__ or "").strip().splitlines()[:1])
    raise PolicyError(f"no installed plugin knows a model {model!r}; known are: {known} {' '.join(reasons)}".rstrip())
