"""The command `kvtiers`: what is installed, and the commands that integrations add.

A package adds a command with an entry point of group `kvtiers.commands` that names a click command, one beneath
`kvtiers bench` with group `kvtiers.benchmarks`, one beneath `kvtiers demo` with group `kvtiers.demos`, and one beneath
`kvtiers compare` with group `kvtiers.comparisons`. It is loaded when it is asked for; one that fails to load is listed
with the reason and breaks nothing else.
"""

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import attrs
import torch

from kvtiers.about import about
from kvtiers.errors import KVTiersError, MissingExtraError, PluginError, PolicyError, explain
from kvtiers.planning import Shape, cost
from kvtiers.plugins import Plugin, registry
from kvtiers.policy import SLOTS
from kvtiers.presets import describe, parse, policy
from kvtiers.scaffold import KINDS, write_package

try:
    import click
    from rich import box
    from rich.console import Console
    from rich.table import Table
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
    """The presets with their settings, and what can be put in each slot; or everything about NAME."""
    if name is not None:
        told = about(name)
        click.echo(json.dumps({"name": name, "about": told}, indent=2) if as_json else told)
        return
    presets = [_preset(name) for name in registry().names("policy")]
    choices = [_choice(slot, name) for slot in SLOTS for name in registry().names(slot)]
    if as_json:
        click.echo(json.dumps({"policies": presets, "slots": choices}, indent=2))
        return
    console = Console()
    table = _table("policy", "what it does, its slots and settings", "distribution")
    for preset in presets:
        said = preset["settings"].items()
        slots = "; ".join(f"{key} = {_brief(value)}" for key, value in said if key in SLOTS)
        sizes = ", ".join(f"{key} = {value}" for key, value in said if key not in SLOTS and value is not None)
        settings = preset["error"] or f"{slots}\n{sizes}"
        table.add_row(preset["name"], f"{preset['about']}\n{settings}", preset["distribution"])
    console.print(table)
    table = _table("slot", "name", "distribution", "what it does")
    for choice in choices:
        table.add_row(choice["slot"], choice["name"], choice["distribution"], choice["error"] or choice["about"])
    console.print(table)


@main.command()
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


@main.command()
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
        "On device: with current slots, unrotated copies and digests. What has no bound grows by a quarter when "
        "it is full: this is counted on the device, not where blocks are archived elsewhere. Attention work: "
        "beside attending everything, at the end."
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


def _table(*columns: str) -> Table:
    table = Table(show_lines=True)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _row(plugin: Plugin) -> dict[str, Any]:
    status = "disabled" if plugin.disabled else "failed" if plugin.errors else "ok"
    return {
        "name": plugin.name,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "module": plugin.module,
        "provides": {kind: list(names) for kind, names in plugin.provides.items()},
        "observes": plugin.observes,
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


def _brief(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    options = ", ".join(f"{key}={option}" for key, option in value.items() if key != "name" and option is not None)
    return f"{value['name']} ({options})" if options else str(value["name"])
