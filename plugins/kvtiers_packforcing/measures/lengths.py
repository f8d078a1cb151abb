"""The option `--seconds`: at what lengths videos are measured."""

import click


def lengths(_: click.Context, __: click.Parameter, value: str) -> tuple[int, ...]:
    """Whole seconds in ascending order, each once, of a text such as `5,30,60`."""
    parts = [part.strip() for part in value.split(",")]
    if not all(part.isdigit() and int(part) for part in parts):
        raise click.BadParameter(f"{value!r} are no whole seconds of 1 or more, as in 5,30,60")
    return tuple(sorted({int(part) for part in parts}))
