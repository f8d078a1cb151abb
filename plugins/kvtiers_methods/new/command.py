"""The command `kvtiers new`."""

from pathlib import Path

import click

from kvtiers_methods.new.package import KINDS, write_package


@click.command()
@click.argument("slot", type=click.Choice(list(KINDS)))
@click.argument("name")
@click.option("--into", default=".", show_default=True, type=click.Path(path_type=Path, file_okay=False))
@click.option("--whole-past", is_flag=True, help="A compressor that chooses among all tokens that ever left recent.")
def new(slot: str, name: str, into: Path, whole_past: bool) -> None:
    """Write a package with a SLOT of your own, called NAME, whose tests pass, to begin with.

    A preset needs no package of its own: `kvtiers.policy(...)`, or a .toml file.
    """
    folder = write_package(slot, name, into, whole_past=whole_past)
    click.echo(f"{folder} is written. Next: pip install -e '{folder}[test]' and pytest {folder}")
