"""The command `kvtiers`."""

import json
import subprocess
import sys
from importlib import metadata

import click
import pytest
from click.testing import CliRunner

from kvtiers.cli import main, parse
from kvtiers.errors import PolicyError
from kvtiers.hookspecs import hookimpl
from kvtiers.plugins import registry
from kvtiers.policy import SLOTS


def run(*arguments: str):
    return CliRunner().invoke(main, list(arguments))


def test_plugins_lists_where_everything_comes_from():
    rows = json.loads(run("plugins", "--json").output)
    ours = next(row for row in rows if row["module"] == "kvtiers_policies")
    assert ours["distribution"] == "kvtiers"
    assert ours["status"] == "ok"
    assert "recency" in ours["provides"]["retriever"]


def test_plugins_shows_a_table_by_default():
    shown = run("plugins")
    assert shown.exit_code == 0
    assert "distribution" in shown.output


def test_plugins_says_what_failed_and_why(monkeypatch):
    class Broken:
        @hookimpl
        def kvtiers_sinks(self):
            raise RuntimeError("no licence")

    from kvtiers.plugins import Registry

    monkeypatch.setattr("kvtiers.cli.registry", lambda: Registry([("broken", Broken())]))
    (row,) = json.loads(run("plugins", "--json").output)
    assert row["status"] == "failed"
    assert row["errors"] == ["RuntimeError: no licence"]
    assert "no licence" in run("plugins").output


def test_policies_lists_presets_with_their_settings_and_every_slots_choices():
    listed = json.loads(run("policies", "--json").output)
    presets = {preset["name"]: preset for preset in listed["policies"]}
    assert presets["sliding-window"]["settings"]["recent"] == 1023
    assert {choice["slot"] for choice in listed["slots"]} == set(SLOTS)
    assert all(choice["about"] for choice in listed["slots"])
    assert all(choice["distribution"] for choice in listed["slots"])


def test_policies_shows_tables_by_default():
    shown = run("policies")
    assert shown.exit_code == 0
    assert "page-bounds" in shown.output


def test_a_preset_that_fails_does_not_hide_the_others():
    def explode():
        raise RuntimeError("no licence")

    class Broken:
        @hookimpl
        def kvtiers_policies(self):
            return {"explodes": explode}

    with registry().registered(Broken(), "broken"):
        presets = {preset["name"]: preset for preset in json.loads(run("policies", "--json").output)["policies"]}
        assert run("policies").exit_code == 0
    assert "no licence" in presets["explodes"]["error"]
    assert presets["full"]["error"] == ""


@pytest.fixture
def commands(monkeypatch):
    """Entry points of group `kvtiers.commands` that a package would have brought."""
    real = metadata.entry_points
    found = [
        metadata.EntryPoint("hello", f"{__name__}:missing", "kvtiers.commands"),
        metadata.EntryPoint("sound", "kvtiers.cli:main", "kvtiers.commands"),
        metadata.EntryPoint("number", "math:pi", "kvtiers.commands"),
    ]

    def entry_points(**query):
        if query.get("group") != "kvtiers.commands":
            return real(**query)
        return metadata.EntryPoints(found).select(**query)

    monkeypatch.setattr(metadata, "entry_points", entry_points)


def test_an_added_command_runs(commands):
    shown = run("sound", "plugins", "--json")
    assert shown.exit_code == 0
    assert json.loads(shown.output)


def test_an_added_command_that_fails_to_load_is_listed_and_breaks_no_other(commands):
    shown = run("--help")
    assert shown.exit_code == 0
    assert "(broken)" in shown.output
    failed = run("hello", "--any", "thing")
    assert failed.exit_code == 1
    assert "command 'hello' of an unknown distribution cannot be loaded" in failed.output
    assert "no click command" in run("number").output


def test_a_misspelled_command_is_refused():
    assert "No such command 'plugin'" in run("plugin").output


WITHOUT_CLICK = (
    "import sys\nsys.modules['click'] = None\nsys.argv = ['kvtiers', 'plugins']\n"
    "import runpy\nrunpy.run_module('kvtiers', run_name='__main__')"
)


def test_without_the_extra_the_command_says_what_to_install():
    ran = subprocess.run([sys.executable, "-c", WITHOUT_CLICK], capture_output=True, text=True)
    assert ran.returncode == 1
    assert ran.stderr.strip() == "kvtiers: the command line needs click; pip install 'kvtiers[cli]'"


def test_the_module_runs_as_the_command():
    ran = subprocess.run([sys.executable, "-m", "kvtiers", "plugins", "--json"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)
    assert isinstance(main, click.Group)


def test_a_policy_is_written_in_one_word_with_settings_and_options_of_slots():
    found = parse("archive:top_k=8,retriever=affinity,retriever.heads=mean,retriever.queries=none,recent=none")
    assert (found.top_k, found.recent, found.retriever.heads, found.retriever.queries) == (8, None, "mean", None)
    for wrong in ("archive:retriever.heads=mean", "archive:top_k.x=1", "archive:retriever"):
        with pytest.raises(PolicyError, match=r"an option of a slot follows its name|written key=value"):
            parse(wrong)


def test_none_is_a_name_where_it_is_one():
    assert parse("archive:recent=none,retriever=none,sinks=none").recent is None
    assert type(parse("archive:retriever=none").retriever).__name__ == "NoBlocks"
    assert parse("archive:normalise=none,heads=mean").retriever.normalise == "none"


def test_benchmarks_come_from_the_packages_that_have_them():
    found = {entry.name for entry in metadata.entry_points(group="kvtiers.benchmarks")}
    assert found >= {"drift", "recall", "text", "video"}
    assert "No such command 'speed'" in run("bench", "speed").output
