"""The command `kvtiers`."""

import json
import os
import re
import subprocess
import sys
from importlib import metadata

import click
import pytest
from click.testing import CliRunner

from kvtiers.__main__ import main as program
from kvtiers.about import about
from kvtiers.cli import main
from kvtiers.errors import PolicyError, UnknownPolicyError
from kvtiers.geometry import Geometry
from kvtiers.hookspecs import hookimpl
from kvtiers.plugins import registry
from kvtiers.policy import SLOTS
from kvtiers.presets import parse, policy


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


def test_policies_shows_short_collections_of_presets_before_the_long_one():
    order = [preset["name"] for preset in json.loads(run("policies", "--json").output)["policies"]]
    assert max(map(order.index, ("archive", "full", "packforcing", "packforcing-lm"))) < order.index("adakv")
    assert set(order) == set(registry().names("policy"))


def test_policies_shows_tables_by_default():
    shown = run("policies")
    assert shown.exit_code == 0
    assert "page-bounds" in shown.output


def test_policies_of_a_name_say_what_it_is_its_source_its_options_and_its_bound():
    pooled = run("policies", "mean-pool").output
    for said in ("a choice for compressor", "arXiv 1911.05507", "option ratio: int, default 8", "32 tokens to 4"):
        assert said in pooled
    preset = run("policies", "streaming").output
    bound = policy("streaming").bound(Geometry(kv_heads=1, head_dim=64))
    assert f"at most {bound:,} tokens" in preset
    assert "recent = " in preset
    assert run("policies", "none").output.count("a choice for") == 2
    assert "attends everything" in run("policies", "full").output
    video = run("policies", "packforcing").output
    for said in (
        "  realigner = contiguous\n",
        "sink = 8 steps",
        "top_k = 16 blocks",
        "chunk_size = None\n",
        "at most 27,872 tokens",
    ):
        assert said in video
    with pytest.raises(UnknownPolicyError, match=r"called 'mean-pol'.* Did you mean 'mean-pool'"):
        CliRunner().invoke(main, ["policies", "mean-pol"], catch_exceptions=False)


def test_fractions_and_truth_can_be_given():
    found = parse("memrope:slow=0.02,fast=1").compressor
    assert (found.slow, found.fast) == (0.02, 1.0)
    assert parse("token-merging:proportional=false").compressor.proportional is False


def test_everything_that_is_installed_can_be_explained():
    for kind in ("policy", *SLOTS):
        for name in registry().names(kind):
            if registry().provider(kind, name).distribution == "kvtiers":
                assert f"{name}: a" in about(name)


def test_what_a_preset_has_no_use_for_is_said():
    lines = about("h2o").splitlines()
    assert "  top_k = 28 blocks (not used: nothing is archived)" in lines
    assert "  recent = 444 steps" in lines
    assert "not used" not in about("archive")


def test_the_type_of_an_option_is_told_with_a_converter_or_without():
    assert "  option epsilon: float, default 0.0" in about("expected-attention").splitlines()
    assert "option retrieval_heads: collections.abc.Sequence[int] | int | str" in about("duo-attention")


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
    said = " ".join(run("plugin").output.split())
    assert "No such command 'plugin'." in said
    assert "There are bench, " in said
    assert "plan, plugins, policies" in said


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


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("archive:recent=²", "recent must be a whole number of at least 0 or None, got '²'"),
        ("archive:recent=--3", "got '--3'"),
        (f"archive:recent={'9' * 400}", "at most 2147483647, got a number of"),
        (f"archive:recent={'9' * 5_000}", "a number of 5,000 digits is too large"),
        ("archive:name=mine", "no setting 'name'"),
        ("archive:", None),
    ],
)
def test_a_wrong_number_on_the_line_is_one_clear_line(spec, message):
    if message is None:
        assert parse(spec) == policy("archive")
        return
    with pytest.raises(PolicyError, match=message) as refused:
        parse(spec)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "wan2.1-t2v-1.3b", "--seconds", "1e308"], "too large to be computed"),
        (["--model", "wan2.1-t2v-1.3b", "--seconds", "1e300"], "too large to be computed"),
        (["--model", "wan2.1-t2v-1.3b", "--seconds", "nan"], "seconds must be a finite number"),
        (["--model", "wan2.1-t2v-1.3b", "--size", f"{'16' * 200}x16"], "multiples of|too large to be computed"),
        (["--model", "wan2.1-t2v-1.3b", "archive:recent=²"], "recent must be a whole number"),
        (["--model", "FOLDER"], "no installed plugin knows a model"),
    ],
    ids=["1e308 seconds", "1e300 seconds", "nan seconds", "400 digits of width", "superscript", "malformed config"],
)
def test_what_cannot_be_planned_is_said_in_one_line(arguments, said, tmp_path, monkeypatch):
    pytest.importorskip("diffusers", reason="needs the extra 'diffusers'")
    pytest.importorskip("transformers", reason="needs the extra 'transformers'")
    (tmp_path / "config.json").write_text('{"model_type": "llama", ')
    if "kvtiers_models" not in [plugin.module for plugin in registry().plugins]:
        pytest.skip("needs the shapes of models, which come with an installation of everything")
    given = [str(tmp_path) if word == "FOLDER" else word for word in arguments]
    monkeypatch.setattr(sys, "argv", ["kvtiers", "plan", *given])
    with pytest.raises(SystemExit) as ended:
        program()
    line = str(ended.value.code)  # which Python prints as the last line
    assert line.startswith("kvtiers: ")
    assert re.search(said, line)
    assert "\n" not in line
    assert len(line) < 1_000


def test_a_model_that_one_plugin_trips_over_is_asked_of_the_next():
    def trips(model, **_):
        raise ZeroDivisionError("a\nmodel")

    def leaves(model, **_):
        raise SystemExit(3)

    class Odd:
        @hookimpl
        def kvtiers_shapes(self):
            return {"0 trips": trips, "0 leaves": leaves}

    with registry().registered(Odd(), "odd"):
        shown = run("plan", "--model", "/nowhere/at/all")
    assert isinstance(shown.exception, PolicyError)
    assert "'0 trips' of plugin 'odd' of (given) failed: ZeroDivisionError: a model" in str(shown.exception)
    assert "'0 leaves' of plugin 'odd' of (given) failed: SystemExit: 3" in str(shown.exception)


def test_a_factory_that_leaves_is_told_of_without_what_it_would_make():
    class Odd:
        @hookimpl
        def kvtiers_retrievers(self):
            return {"leaves": lambda count=3: sys.exit(count)}

    with registry().registered(Odd(), "odd"):
        shown = run("policies", "leaves")
    assert shown.exit_code == 0, shown.exception
    assert "option count, default 3" in shown.output


EXITS = """
import sys
from kvtiers.hookspecs import hookimpl

class Leaves:
    @hookimpl
    def kvtiers_sinks(self):
        sys.exit("no licence")

    @hookimpl
    def kvtiers_policies(self):
        return {"leaves": lambda: sys.exit("no licence")}

    @hookimpl
    def kvtiers_retrievers(self):
        return {"fine": dict}
"""


def test_a_plugin_that_wants_to_end_the_process_does_not_get_to(tmp_path, monkeypatch):
    """Neither on import, nor in a hook, nor when a preset of it is built."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "kvtt_quits.py").write_text("import sys\nsys.exit('no licence')")
    (tmp_path / "kvtt_leaves.py").write_text(EXITS + "\nsys.modules[__name__] = Leaves()")
    for name in ("quits", "leaves"):
        info = tmp_path / f"kvtt_{name}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kvtt-{name}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[kvtiers]\n{name} = kvtt_{name}\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    for command in ("plugins", "policies"):
        ran = subprocess.run(
            [sys.executable, "-m", "kvtiers", command, "--json"], capture_output=True, text=True, env=environment
        )
        assert ran.returncode == 0, ran.stderr
        said = json.loads(ran.stdout)
        if command == "plugins":
            rows = {row["name"]: row for row in said}
            why = ["PluginError: it raised SystemExit: no licence"]
            assert rows["quits"]["errors"] == rows["leaves"]["errors"] == why
            assert rows["leaves"]["provides"] == {"policy": ["leaves"], "retriever": ["fine"]}
        else:
            presets = {preset["name"]: preset for preset in said["policies"]}
            assert "failed: SystemExit: no licence" in presets["leaves"]["error"]
            assert presets["full"]["error"] == ""


def test_none_is_a_name_where_it_is_one():
    assert parse("archive:recent=none,retriever=none,sinks=none").recent is None
    assert type(parse("archive:retriever=none").retriever).__name__ == "NoBlocks"
    assert parse("archive:normalise=none,heads=mean").retriever.normalise == "none"
    assert parse("archive:digest_bits=none").retriever.digest_bits is None


def test_benchmarks_come_from_the_packages_that_have_them():
    found = {entry.name for entry in metadata.entry_points(group="kvtiers.benchmarks")}
    assert found >= {"codec", "digests", "drift", "ranks", "recall", "text", "video"}
    said = " ".join(run("bench", "speed").output.split())
    assert "No such command 'speed'. There are codec, digests, drift, ranks, recall, text, video." in said
