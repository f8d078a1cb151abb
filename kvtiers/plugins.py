"""The plugin loader: what is installed under the entry-point group `kvtiers`, what it provides, and what failed.

A plugin that fails is recorded with its distribution and exception. It is raised when someone asks for a name that it
may have provided, and never before, so a broken package that nobody uses breaks nothing. `KVTIERS_DISABLE_PLUGINS=a,b`
skips plugins by entry-point name or distribution, `KVTIERS_PLUGINS=a,b` loads only these.
"""

import inspect
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from typing import Any

import attrs
import pluggy

from kvtiers import hookspecs
from kvtiers.errors import PluginError, UnknownPolicyError, explain, suggest
from kvtiers.events import Event

GROUP = "kvtiers"
DISABLE, ONLY = "KVTIERS_DISABLE_PLUGINS", "KVTIERS_PLUGINS"
HOOKS: Mapping[str, str] = {
    "policy": "kvtiers_policies",
    "sinks": "kvtiers_sinks",
    "compressor": "kvtiers_compressors",
    "retriever": "kvtiers_retrievers",
    "realigner": "kvtiers_realigners",
    "archive": "kvtiers_archives",
    "codec": "kvtiers_codecs",
    "shape": "kvtiers_shapes",
}
"""What can be asked for by name (a preset, one of `kvtiers.policy.SLOTS`, or what knows the shapes of models), and the
hook that provides it."""

_log = logging.getLogger("kvtiers")
Factory = Callable[..., Any]


class UnprovidedError(UnknownPolicyError, PluginError):
    """When nobody provides the name that was asked for, and a plugin that may have provided it failed."""


@attrs.frozen(kw_only=True, eq=False)
class Plugin:
    """One plugin: where it comes from, what it provides, and what went wrong.

    factories: for each kind of `HOOKS`, what it provides by name. failed: the kinds whose names are not known because
        of an error. observe: is told of every event. disabled_by: the environment variable that says that it is not to
        be loaded.
    """

    name: str
    distribution: str
    version: str
    module: str
    factories: Mapping[str, Mapping[str, Factory]] = attrs.field(factory=dict, repr=False)
    observe: Callable[..., Any] | None = attrs.field(default=None, repr=False)
    disabled_by: str | None = None
    errors: tuple[Exception, ...] = ()
    failed: frozenset[str] = frozenset()

    @property
    def provides(self) -> dict[str, tuple[str, ...]]:
        """The names that it gives, sorted, for each kind of `HOOKS` of which it gives any."""
        return {kind: tuple(sorted(found)) for kind, found in self.factories.items() if found}

    @property
    def error(self) -> Exception | None:
        """The first thing that went wrong."""
        return self.errors[0] if self.errors else None

    @property
    def origin(self) -> str:
        """Name, distribution and version, for messages."""
        return f"{self.name!r} of {self.distribution} {self.version}".rstrip()


class Registry:
    """The plugins in use. `registry()` is the one of this process; build others from (name, module) pairs in tests."""

    def __init__(self, plugins: Iterable[tuple[str, object]] = ()) -> None:
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._plugins: list[Plugin] = []
        self._observers: tuple[Plugin, ...] = ()
        for name, plugin in plugins:
            record = Plugin(name=name, distribution="(given)", version="", module=_module(plugin))
            self._add(self._inspect(plugin, record))

    @classmethod
    def installed(cls) -> "Registry":
        """A registry of every installed plugin, loaded one by one. Never raises."""
        found = cls()
        skipped, only = (
            {name.strip() for name in os.environ.get(env, "").split(",")} - {""} for env in (DISABLE, ONLY)
        )
        seen = set()
        for entry in metadata.entry_points(group=GROUP):
            distribution = entry.dist.name if entry.dist else "(unknown)"
            version = entry.dist.version if entry.dist else ""
            if (distribution, entry) in seen:  # the same distribution is on the path twice
                continue
            seen.add((distribution, entry))
            record = Plugin(name=entry.name, distribution=distribution, version=version, module=entry.value)
            names = {entry.name, distribution}
            by = DISABLE if names & skipped else ONLY if only and not names & only else None
            found._add(attrs.evolve(record, disabled_by=by) if by else found._load(entry, record))
        return found

    @property
    def plugins(self) -> tuple[Plugin, ...]:
        """Every plugin, those that failed or clash included, in the order of loading."""
        found = []
        for plugin in self._plugins:
            given = [(kind, name) for kind, names in plugin.provides.items() for name in names]
            several = [(*each, by) for each in given if len(by := self._providers(*each)) > 1]
            found.append(attrs.evolve(plugin, errors=(*plugin.errors, *(_clash(*each) for each in several))))
        return tuple(found)

    def names(self, kind: str) -> tuple[str, ...]:
        """The names installed for one kind of `HOOKS`, sorted."""
        return tuple(sorted({name for plugin in self._plugins for name in plugin.factories.get(kind, {})}))

    def factory(self, kind: str, name: str) -> Factory:
        """The factory of `name`. Errors are those of `provider`."""
        return self.provider(kind, name).factories[kind][name]

    def provider(self, kind: str, name: str) -> Plugin:
        """The plugin that provides `name`.

        Raises `UnknownPolicyError` for a name that nobody provides (an `UnprovidedError`, which is a `PluginError` too,
        if a plugin that failed may have), `PluginError` for a name that two plugins provide.
        """
        providers = self._providers(kind, name)
        if len(providers) == 1:
            return providers[0]
        if providers:
            raise _clash(kind, name, providers)
        known = self.names(kind)
        message = f"unknown {kind} {name!r}; installed: {', '.join(known) or 'none'}.{suggest(name, known)}"
        for by, why in ((DISABLE, "Disabled by"), (ONLY, "Left out by")):
            out = [plugin.origin for plugin in self._plugins if plugin.disabled_by == by]
            message += f" {why} {by}: {', '.join(out)}." if out else ""
        broken = [plugin for plugin in self._plugins if kind in plugin.failed]
        if not broken:
            raise UnknownPolicyError(message)
        why = "; ".join(f"{plugin.origin} ({explain(plugin.errors[0])})" for plugin in broken)
        raise UnprovidedError(f"{message} It may belong to a plugin that failed: {why}. See `kvtiers plugins`.") from (
            broken[0].errors[0]
        )

    def register(self, plugin: object, name: str | None = None) -> Plugin:
        """Add a module or object with hook implementations. Raises `PluginError` at once if it is at fault."""
        name = name or getattr(plugin, "__name__", None) or type(plugin).__name__
        if any(other.name == name for other in self._plugins):
            raise PluginError(f"a plugin named {name!r} is registered already; choose another name, or unregister it")
        record = Plugin(name=name, distribution="(given)", version="", module=_module(plugin))
        loaded = self._inspect(plugin, record)
        if loaded.error is not None:
            self._manager.unregister(name=name)
            raise PluginError(f"plugin {name!r} cannot be registered: {explain(loaded.error)}") from loaded.error
        for kind, names in loaded.provides.items():
            for each in names:
                if other := self._providers(kind, each):
                    self._manager.unregister(name=name)
                    origin = other[0].origin
                    raise PluginError(f"plugin {name!r} provides the {kind} {each!r}, as {origin} does; rename it")
        self._add(loaded)
        return loaded

    def unregister(self, name: str) -> None:
        """Remove the plugin called `name`."""
        known = [plugin.name for plugin in self._plugins]
        if name not in known:
            raise PluginError(f"no plugin is named {name!r}; registered: {', '.join(known)}.{suggest(name, known)}")
        if self._manager.has_plugin(name):
            self._manager.unregister(name=name)
        self._plugins = [plugin for plugin in self._plugins if plugin.name != name]
        self._observers = tuple(plugin for plugin in self._observers if plugin.name != name)

    @contextmanager
    def registered(self, plugin: object, name: str | None = None) -> Iterator[Plugin]:
        """`register` for the length of a `with` block."""
        record = self.register(plugin, name)
        try:
            yield record
        finally:
            if any(other.name == record.name for other in self._plugins):
                self.unregister(record.name)

    def observers_active(self) -> bool:
        """Whether anybody listens; if not, an event need not even be built."""
        return bool(self._observers)

    def observe(self, event: Event) -> None:
        """Tell every observer. One that raises is logged and not called again."""
        for plugin in self._observers:
            try:
                if plugin.observe is not None:
                    plugin.observe(event)
            except (Exception, SystemExit):  # noqa: BLE001 - an observer never breaks generation
                self._observers = tuple(other for other in self._observers if other is not plugin)
                _log.warning("observer %s failed and is not called again", plugin.origin, exc_info=True)

    def _load(self, entry: metadata.EntryPoint, record: Plugin) -> Plugin:
        try:
            module = entry.load()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - recorded, and raised when it is asked for
            return _broken(record, error)
        return self._inspect(module, record)

    def _inspect(self, plugin: object, record: Plugin) -> Plugin:
        """Register `plugin`, call its providing hooks, and note everything that goes wrong."""
        try:
            self._manager.register(plugin, record.name)
        except Exception as error:  # noqa: BLE001 - recorded, and raised when it is asked for
            if self._manager.has_plugin(record.name):
                self._manager.unregister(name=record.name)
            return _broken(record, error)
        errors = _misspelled(self._manager, plugin)
        failed = set(HOOKS) if errors else set()  # what a misspelled hook would have provided is not known
        own = {caller.name: impl.function for caller in self._manager.get_hookcallers(plugin) or ()
               for impl in caller.get_hookimpls() if impl.plugin is plugin}  # fmt: skip
        factories: dict[str, Mapping[str, Factory]] = {}
        for kind, hook in HOOKS.items():
            try:
                factories[kind] = _provided(hook, own[hook]() if hook in own else None)
            except (Exception, SystemExit) as error:  # noqa: BLE001 - recorded, and raised when it is asked for
                errors.append(_plain(error))
                failed.add(kind)
        observe = own.get("kvtiers_observe")
        return attrs.evolve(
            record, factories=factories, observe=observe, errors=tuple(errors), failed=frozenset(failed)
        )

    def _add(self, plugin: Plugin) -> None:
        self._plugins.append(plugin)
        if plugin.observe is not None:
            self._observers = (*self._observers, plugin)

    def _providers(self, kind: str, name: str) -> list[Plugin]:
        return [plugin for plugin in self._plugins if name in plugin.factories.get(kind, {})]


def _clash(kind: str, name: str, providers: list[Plugin]) -> PluginError:
    origins = " and ".join(plugin.origin for plugin in providers)
    names = ", ".join(plugin.name for plugin in providers)
    return PluginError(
        f"the {kind} {name!r} is provided by {origins}; uninstall one, or set {DISABLE} to one of: {names}"
    )


def _module(plugin: object) -> str:
    return plugin.__name__ if inspect.ismodule(plugin) else type(plugin).__module__


def _broken(record: Plugin, error: BaseException) -> Plugin:
    return attrs.evolve(record, errors=(_plain(error),), failed=frozenset(HOOKS))


def _plain(error: BaseException) -> Exception:
    """An error that may be raised later: a plugin that asked to end the process does not get to."""
    return error if isinstance(error, Exception) else PluginError(f"it raised {explain(error)}")


def _misspelled(manager: pluggy.PluginManager, plugin: object) -> list[Exception]:
    """What pluggy does not know as a hook, and hooks that lack their marker."""
    hooks = (*HOOKS.values(), "kvtiers_observe")
    found: list[Exception] = []
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        marked = [name for name in dir(plugin) if manager.parse_hookimpl_opts(plugin, name) is not None]
        wrong = next(name for name in marked if name not in hooks)
        problem = PluginError(f"there is no hook {wrong!r}; hooks: {', '.join(hooks)}.{suggest(wrong, hooks)}")
        problem.__cause__ = error
        found.append(problem)
    for name in hooks:
        function = getattr(plugin, name, None)
        if inspect.isroutine(function) and manager.parse_hookimpl_opts(plugin, name) is None:
            found.append(PluginError(f"{name!r} is not marked; put @kvtiers.hookimpl above it"))
    return found


def _provided(hook: str, result: object) -> Mapping[str, Factory]:
    """Check what one hook of one plugin returned; None is nothing."""
    if result is None:
        return {}
    if not isinstance(result, Mapping):
        raise PluginError(f"hook {hook} must return a mapping of name to factory, got {type(result).__name__}")
    for name, factory in result.items():
        if not isinstance(name, str) or not name:
            raise PluginError(f"hook {hook} must map names (text), got the key {name!r}")
        if not callable(factory):
            raise PluginError(f"hook {hook} must map {name!r} to a factory, got {type(factory).__name__}")
    return dict(result)


@cache
def registry() -> Registry:
    """The plugins installed in this process, loaded on the first call."""
    return Registry.installed()


def register(plugin: object, name: str | None = None) -> Plugin:
    """`Registry.register` on the registry of this process, for a notebook or a test."""
    return registry().register(plugin, name)


def unregister(name: str) -> None:
    """`Registry.unregister` on the registry of this process."""
    registry().unregister(name)
