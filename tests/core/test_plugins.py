"""The plugin loader: what is installed is found, what is broken breaks nothing until it is asked for."""

import logging
import subprocess
import sys
import textwrap
from importlib import metadata

import pytest

import kvtiers.plugins as loader
from kvtiers.errors import PluginError, UnknownPolicyError
from kvtiers.events import Committed
from kvtiers.hookspecs import hookimpl
from kvtiers.plugins import Registry, registry
from kvtiers.policy import SLOTS


def factory() -> object:
    return object()


class Good:
    @hookimpl
    def kvtiers_sinks(self):
        return {"mine": factory}


class AlsoMine(Good):
    @hookimpl
    def kvtiers_retrievers(self):
        return {"nearest": factory}


class HookRaises:
    @hookimpl
    def kvtiers_sinks(self):
        raise RuntimeError("no licence")

    @hookimpl
    def kvtiers_retrievers(self):
        return {"fine": factory}


class NoMapping:
    @hookimpl
    def kvtiers_sinks(self):
        return ["mine"]


class NoFactory:
    @hookimpl
    def kvtiers_sinks(self):
        return {"mine": 3}


class NoName:
    @hookimpl
    def kvtiers_sinks(self):
        return {3: factory}


class Misspelled:
    @hookimpl
    def kvtiers_retreivers(self):
        return {"lost": factory}


class Unmarked:
    def kvtiers_retrievers(self):
        return {"lost": factory}


class WrongArguments:
    @hookimpl
    def kvtiers_sinks(self, cache):
        return {"mine": factory}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a distribution on the path, as pip would."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def put(distribution: str, entry: str, code: str, group: str = "kvtiers") -> None:
        module = distribution.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(code))
        info = tmp_path / f"{module}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{entry} = {module}\n")

    yield put
    for name in list(sys.modules):
        if name.startswith("kvtt_"):
            del sys.modules[name]


SINK = """
from kvtiers.hookspecs import hookimpl
@hookimpl
def kvtiers_sinks():
    return {NAME: lambda: None}
"""


def test_every_shipped_policy_is_found_through_the_entry_point():
    shipped = next(plugin for plugin in registry().plugins if plugin.module == "kvtiers_policies")
    assert shipped.distribution == "kvtiers"
    assert shipped.version
    assert shipped.error is None
    assert set(shipped.provides) == {"policy", *SLOTS}


def test_the_core_imports_no_plugin():
    code = (
        "import sys, kvtiers, kvtiers.presets, kvtiers.cli\n"
        "print([m for m in sys.modules if m.startswith('kvtiers_') or m in ('transformers', 'diffusers')])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.strip() == "[]", ran.stderr


def test_a_provided_name_gives_its_factory_and_its_provider():
    found = Registry([("good", Good())])
    assert found.factory("sinks", "mine") is factory
    assert found.provider("sinks", "mine").name == "good"
    assert found.names("sinks") == ("mine",)
    assert found.names("retriever") == ()


def test_an_unknown_name_is_refused_with_the_installed_ones_and_the_nearest():
    with pytest.raises(
        UnknownPolicyError, match=r"unknown sinks 'mime'; installed: mine\. Did you mean 'mine'\?"
    ) as got:
        Registry([("good", Good())]).factory("sinks", "mime")
    assert not isinstance(got.value, PluginError)


BROKEN = [
    pytest.param(HookRaises(), "sinks", RuntimeError, "no licence", id="hook raises"),
    pytest.param(
        NoMapping(), "sinks", PluginError, "must return a mapping of name to factory, got list", id="no mapping"
    ),
    pytest.param(NoFactory(), "sinks", PluginError, "must map 'mine' to a factory, got int", id="no factory"),
    pytest.param(NoName(), "sinks", PluginError, "must map names", id="name is no text"),
    pytest.param(
        Misspelled(),
        "retriever",
        PluginError,
        "no hook 'kvtiers_retreivers'.*Did you mean 'kvtiers_retrievers'",
        id="typo",
    ),
    pytest.param(Unmarked(), "retriever", PluginError, "'kvtiers_retrievers' is not marked", id="marker forgotten"),
    pytest.param(WrongArguments(), "sinks", Exception, "cache", id="unknown hook argument"),
]


@pytest.mark.parametrize(("plugin", "kind", "cause", "why"), BROKEN)
def test_a_broken_plugin_is_raised_with_its_cause_only_when_its_names_are_asked_for(plugin, kind, cause, why):
    found = Registry([("good", Good()), ("broken", plugin)])
    assert found.factory("sinks", "mine") is factory
    record = found.plugins[1]
    assert isinstance(record.error, cause)
    with pytest.raises(UnknownPolicyError, match=f"(?s)'broken' of .*{why}") as got:
        found.factory(kind, "lost")
    assert isinstance(got.value, PluginError)
    assert got.value.__cause__ is record.error


@pytest.mark.parametrize(("plugin", "kind", "cause", "why"), BROKEN)
def test_registering_a_broken_plugin_by_hand_fails_at_once_and_leaves_nothing(plugin, kind, cause, why):
    found = Registry()
    with pytest.raises(PluginError, match=f"(?s)plugin 'broken' cannot be registered: .*{why}") as got:
        found.register(plugin, "broken")
    assert isinstance(got.value.__cause__, cause)
    assert found.plugins == ()


def test_the_hooks_of_a_plugin_that_do_work_keep_working():
    found = Registry([("half", HookRaises())])
    assert found.factory("retriever", "fine") is factory
    with pytest.raises(UnknownPolicyError) as got:
        found.factory("retriever", "other")
    assert not isinstance(got.value, PluginError), "the sinks of this plugin failed, its retrievers are known"


def test_a_plugin_that_raises_on_import_is_recorded_with_its_distribution(install):
    install("kvtt-broken", "bad", "import a_module_that_nobody_has")
    install("kvtt-good", "good", SINK.replace("NAME", "'kvtt'"))
    found = Registry.installed()
    assert found.provider("sinks", "kvtt").distribution == "kvtt-good"
    record = next(plugin for plugin in found.plugins if plugin.name == "bad")
    assert (record.distribution, record.version) == ("kvtt-broken", "1.2")
    assert isinstance(record.error, ModuleNotFoundError)
    with pytest.raises(
        PluginError, match=r"'bad' of kvtt-broken 1\.2 \(ModuleNotFoundError: .*a_module_that_nobody"
    ) as got:
        found.factory("compressor", "magic")
    assert isinstance(got.value.__cause__, ModuleNotFoundError)


def test_two_plugins_with_one_name_clash_only_over_that_name(install):
    install("kvtt-one", "one", SINK.replace("NAME", "'same'"))
    install("kvtt-two", "two", SINK.replace("NAME", "'same'") + "@hookimpl\ndef kvtiers_archives(): return {'a': list}")
    found = Registry.installed()
    with pytest.raises(PluginError, match=r"'same' is provided by 'one' of kvtt-one 1\.2 and 'two' of kvtt-two 1\.2"):
        found.factory("sinks", "same")
    assert found.factory("archive", "a") is list
    assert found.factory("sinks", "first")
    clashing = [plugin.distribution for plugin in found.plugins if plugin.error]
    assert clashing == ["kvtt-one", "kvtt-two"]


def test_a_distribution_that_is_on_the_path_twice_does_not_clash_with_itself(install, monkeypatch):
    install("kvtt-one", "one", SINK.replace("NAME", "'mine'"))
    real = metadata.entry_points
    monkeypatch.setattr(metadata, "entry_points", lambda **query: [*real(**query), *real(**query)])
    assert Registry.installed().provider("sinks", "mine").distribution == "kvtt-one"


@pytest.mark.parametrize("disabled", ["one", "kvtt-one", " kvtt-one , other"])
def test_a_plugin_is_skipped_by_entry_point_name_or_distribution(install, monkeypatch, disabled):
    install("kvtt-one", "one", "raise RuntimeError('imported')")
    monkeypatch.setenv("KVTIERS_DISABLE_PLUGINS", disabled)
    found = Registry.installed()
    record = next(plugin for plugin in found.plugins if plugin.name == "one")
    assert record.disabled_by == "KVTIERS_DISABLE_PLUGINS"
    assert record.error is None
    with pytest.raises(UnknownPolicyError, match="Disabled by KVTIERS_DISABLE_PLUGINS: 'one' of kvtt-one"):
        found.factory("sinks", "what")


@pytest.mark.parametrize("only", ["one", "kvtt-one", " kvtt-one , kvtt-absent"])
def test_only_the_plugins_that_are_named_are_loaded(install, monkeypatch, only):
    install("kvtt-one", "one", SINK.replace("NAME", "'mine'"))
    install("kvtt-two", "two", "raise RuntimeError('imported')")
    monkeypatch.setenv("KVTIERS_PLUGINS", only)
    found = Registry.installed()
    assert [plugin.name for plugin in found.plugins if not plugin.disabled_by] == ["one"]
    assert found.names("sinks") == ("mine",)
    assert all(plugin.error is None for plugin in found.plugins)
    with pytest.raises(UnknownPolicyError, match=r"Left out by KVTIERS_PLUGINS: .*'two' of kvtt-two 1\.2") as got:
        found.factory("sinks", "first")
    assert not isinstance(got.value, PluginError)


def test_of_the_plugins_that_are_named_those_disabled_are_not_loaded(install, monkeypatch):
    install("kvtt-one", "one", SINK.replace("NAME", "'mine'"))
    install("kvtt-two", "two", SINK.replace("NAME", "'other'"))
    monkeypatch.setenv("KVTIERS_PLUGINS", "one,two")
    monkeypatch.setenv("KVTIERS_DISABLE_PLUGINS", "kvtt-two")
    assert Registry.installed().names("sinks") == ("mine",)


def test_registering_a_name_that_another_plugin_provides_is_refused():
    found = Registry([("good", Good())])
    with pytest.raises(PluginError, match="provides the sinks 'mine', as 'good'"):
        found.register(AlsoMine(), "second")
    with pytest.raises(PluginError, match="'good' is registered already"):
        found.register(Good(), "good")
    assert len(found.plugins) == 1


def test_a_registered_plugin_leaves_with_its_with_block_on_every_path():
    found = Registry()

    def fail() -> None:
        with found.registered(Good(), "good"):
            assert found.names("sinks") == ("mine",)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert found.plugins == ()


def test_unregistering_what_is_not_there_is_refused():
    with pytest.raises(PluginError, match=r"no plugin is named 'god'; registered: good\. Did you mean 'good'\?"):
        Registry([("good", Good())]).unregister("god")


def test_observers_hear_events_and_nobody_listening_is_cheap_to_know():
    heard = []
    found = Registry([("good", Good())])
    assert not found.observers_active()
    listener = _listener(heard)
    with found.registered(listener, "ear"):
        assert found.observers_active()
        found.observe(Committed(layer=1, steps=2, tokens=3))
    assert not found.observers_active()
    assert heard == [Committed(layer=1, steps=2, tokens=3)]


def test_a_failing_observer_is_logged_once_and_the_others_go_on(caplog):
    heard = []
    found = Registry([("bad", _listener([], fails=True)), ("good", _listener(heard))])
    with caplog.at_level(logging.WARNING, logger="kvtiers"):
        found.observe(Committed(layer=0, steps=1, tokens=1))
        found.observe(Committed(layer=0, steps=2, tokens=2))
    assert len(heard) == 2
    assert [record.getMessage() for record in caplog.records] == [
        "observer 'bad' of (given) failed and is not called again"
    ]


def test_an_interrupt_by_the_user_passes_through_an_observer():
    class Interrupts:
        @hookimpl
        def kvtiers_observe(self, event):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Registry([("stop", Interrupts())]).observe(Committed(layer=0, steps=1, tokens=1))


def test_the_registry_of_the_process_takes_plugins_too():
    loader.register(Good(), "kvtt good")
    try:
        assert registry().factory("sinks", "mine") is factory
    finally:
        loader.unregister("kvtt good")
    assert "mine" not in registry().names("sinks")


def _listener(heard: list, *, fails: bool = False):
    class Listener:
        @hookimpl
        def kvtiers_observe(self, event):
            if fails:
                raise ValueError("deaf")
            heard.append(event)

    return Listener()


def test_every_kind_of_name_has_its_hook_and_its_abstract_class():
    from kvtiers.presets import KINDS

    assert set(KINDS) == {"policy", *SLOTS}
    assert set(loader.HOOKS) == {*KINDS, "shape"}  # a shape is a fact of a model, no part of a policy


def test_hooks_are_documented_with_the_version_they_came_with():
    import kvtiers.hookspecs as specs

    for hook in (*loader.HOOKS.values(), "kvtiers_observe"):
        since = "0.2" if hook in ("kvtiers_codecs", "kvtiers_shapes") else "0.1"
        assert f"Since {since}." in getattr(specs, hook).__doc__, hook
