"""The command `kvtiers`: what is installed, and the commands that integrations add.

A package adds a command with an entry point of group `kvtiers.commands` that names a click command, one beneath
`kvtiers bench` with group `kvtiers.benchmarks`, one beneath `kvtiers demo` with group `kvtiers.demos`, and one beneath
`kvtiers compare` with group `kvtiers.comparisons`. It is loaded when it is asked for; one that fails to load is listed
with the reason and breaks nothing else.
"""

import json
from importlib import metadata
from typing import Any

import attrs

from kvtiers.about import about
from kvtiers.errors import MissingExtraError, PluginError, explain
from kvtiers.plugins import Plugin, registry
from kvtiers.policy import SLOTS
from kvtiers.presets import describe, policy

try:
    import click
    from rich import box
    from rich.console import Console
    from rich.table import Column, Table
except ImportError as error:
    raise MissingExtraError(f"the command line needs {error.name}; pip install 'kvtiers[cli]'") from error

COMMANDS, BENCHMARKS, DEMOS = "kvtiers.commands", "kvtiers.benchmarks", "kvtiers.demos"
COMPARISONS = "kvtiers.comparisons"
"""Entry-point groups: commands, and commands of `bench`, of `demo` and of `compare`."""


class Commands(click.Group):
    """The commands below, and those of the entry-point group `added`."""

    def __init__(self, *args: Any, added: str = COMMANDS, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.added = added

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *(entry.name for entry in metadata.entry_points(group=self.added))})

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            said = f"{error.format_message()} There are {', '.join(self.list_commands(ctx))}."
            raise click.UsageError(said, ctx) from error

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        entries = metadata.entry_points(group=self.added, name=cmd_name)
        if own is not None or not entries:
            return own
        entry = next(iter(entries))
        try:
            command = entry.load()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a command that fails to load must not break the others
            return _broken(entry, explain(error))
        if not isinstance(command, click.Command):
            return _broken(entry, f"{entry.value} is a {type(command).__name__}, which is no click command")
        return command


def _broken(entry: metadata.EntryPoint, why: str) -> click.Command:
    origin = entry.dist.name if entry.dist else "an unknown distribution"

    def fail(**_: Any) -> None:
        raise click.ClickException(f"command {entry.name!r} of {origin} cannot be loaded: {why}")

    settings = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
    return click.Command(entry.name, callback=fail, short_help=f"(broken) {why}", context_settings=settings)


@click.group(cls=Commands)
@click.version_option(package_name="kvtiers")
def main() -> None:
    """Tiered key-value caches for autoregressive transformers."""


@main.group(cls=Commands, added=BENCHMARKS)
def bench() -> None:
    """Measure speed, memory and exactness on this machine."""


@main.group(cls=Commands, added=DEMOS)
def demo() -> None:
    """See tiered memory at work."""


@main.group(cls=Commands, added=COMPARISONS)
def compare() -> None:
    """Policies side by side: what they remember, what they hold, how fast they are."""


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plugins(as_json: bool) -> None:
    """What is installed, from where, what it provides, and what failed and why."""
    rows = [_row(plugin) for plugin in registry().plugins]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    table = _table("plugin", "distribution", "version", "provides", "status")
    for row in rows:
        provides = "\n".join(f"{kind}: {', '.join(names)}" for kind, names in row["provides"].items())
        status = "\n".join([row["status"], *row["errors"]])
        table.add_row(row["name"], row["distribution"], row["version"], provides, status)
    Console().print(table)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.argument("name", required=False)
def policies(as_json: bool, name: str | None) -> None:
    """The presets, and what can be put in each slot; or everything about NAME."""
    if name is not None:
        told = about(name)
        click.echo(json.dumps({"name": name, "about": told}, indent=2) if as_json else told)
        return
    presets = sorted(map(_preset, registry().names("policy")), key=_beside)
    choices = [_choice(slot, name) for slot in SLOTS for name in registry().names(slot)]
    if as_json:
        click.echo(json.dumps({"policies": presets, "slots": choices}, indent=2))
        return
    console = Console()
    for kind in ("preset", *SLOTS):
        table = Table(kind, Column("what it does", ratio=1), "distribution", box=box.SIMPLE_HEAD, pad_edge=False)
        for row in presets if kind == "preset" else [choice for choice in choices if choice["slot"] == kind]:
            table.add_row(row["name"], row["error"] or row["about"], row["distribution"])
        console.print(table)
    console.print("`kvtiers policies NAME` says everything about one: its source, its settings, what a query attends.")


def _beside(preset: dict[str, Any]) -> int:
    """How many presets come from the same plugin: short collections are shown first, the long catalogue last."""
    plugins = [plugin.provides.get("policy", ()) for plugin in registry().plugins]
    return max((len(names) for names in plugins if preset["name"] in names), default=0)


def _table(*columns: str) -> Table:
    table = Table(show_lines=True)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _row(plugin: Plugin) -> dict[str, Any]:
    status = "disabled" if plugin.disabled_by else "failed" if plugin.errors else "ok"
    return {
        "name": plugin.name,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "module": plugin.module,
        "provides": {kind: list(names) for kind, names in plugin.provides.items()},
        "observes": plugin.observe is not None,
        "status": status,
        "errors": [explain(error) for error in plugin.errors],
    }


def _preset(name: str) -> dict[str, Any]:
    found = _choice("policy", name)
    if found["error"]:
        return found | {"settings": {}}
    try:
        made = policy(name)
    except Exception as error:  # noqa: BLE001 - one broken preset must not hide the others
        return found | {"settings": {}, "error": explain(error)}
    try:
        settings = describe(made)
    except Exception:  # noqa: BLE001 - a preset of unregistered classes works, it only cannot be written down
        settings = {field.name: repr(getattr(made, field.name)) for field in attrs.fields(type(made))}
    return found | {"settings": settings}


def _choice(kind: str, name: str) -> dict[str, Any]:
    try:
        factory, plugin = registry().factory(kind, name), registry().provider(kind, name)
    except PluginError as error:
        return {"slot": kind, "name": name, "distribution": "", "about": "", "error": explain(error)}
    about = next((line.strip() for line in (factory.__doc__ or "").splitlines() if line.strip()), "")
    return {"slot": kind, "name": name, "distribution": plugin.distribution, "about": about, "error": ""}
