"""The option `--seconds`: at what lengths videos are measured."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from kvtiers_packforcing.measures.measuring import SECONDS

_Command = TypeVar("_Command", bound=Callable[..., Any])


def _lengths(_: click.Context, __: click.Parameter, value: str) -> tuple[int, ...]:
    """Whole seconds in ascending order, each once, of a text such as `5,30,60`."""
    parts = [part.strip() for part in value.split(",")]
    if not all(part.isdigit() and int(part) for part in parts):
        raise click.BadParameter(f"{value!r} are no whole seconds of 1 or more, as in 5,30,60")
    return tuple(sorted({int(part) for part in parts}))


def seconds_option(text: str) -> Callable[[_Command], _Command]:
    """The option. text: what it says for help."""
    return click.option(
        "--seconds", default=",".join(map(str, SECONDS)), show_default=True, callback=_lengths, help=text
    )
