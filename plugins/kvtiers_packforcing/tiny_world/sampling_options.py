"""The command line's options of how blocks are sampled, for every command that makes videos of the tiny world."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import attrs
import click

from kvtiers_packforcing.tiny_world.sampling import KINDS, Sampler

_Command = TypeVar("_Command", bound=Callable[..., Any])
_DEFAULT = "default: as the weights say"


def sampling_options(command: _Command) -> _Command:
    """Adds `--steps`, `--shift` and `--sampling`; `sampled` takes what they say."""
    for option in (
        click.option(
            "--sampling",
            type=click.Choice(KINDS),
            help=f"How a step is made: along one flow, two, or with fresh noise.  [{_DEFAULT}]",
        ),
        click.option(
            "--shift",
            type=click.FloatRange(min=0, min_open=True),
            callback=_finite,
            help=f"Wan's shift of the noise levels: beyond 1, more of them are high.  [{_DEFAULT}]",
        ),
        click.option("--steps", type=click.IntRange(min=1), help=f"Denoising steps of a block.  [{_DEFAULT}]"),
    ):
        command = option(command)
    return command


def sampled(sampler: Sampler, *, steps: int | None, shift: float | None, sampling: str | None) -> Sampler:
    """The sampler, with what was asked for in place of its own."""
    asked: dict[str, Any] = {"steps": steps, "shift": shift, "kind": sampling}
    return attrs.evolve(sampler, **{name: value for name, value in asked.items() if value is not None})


def _finite(_: click.Context, __: click.Parameter, value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is no finite number; Wan's shift is 3 to 5")
    return value
