"""The hooks a plugin may implement: the contract between kvtiers and every policy, ours included.

A plugin is a module (or object) whose functions carry `@kvtiers.hookimpl`, named by an entry point of group `kvtiers`.
The hooks that provide something are called once, with no arguments, when the plugin is loaded. They return a mapping of
name to factory and must be cheap: import a model library inside the factory, not at the top of the plugin. The mapping
is copied and not changed. A factory is called each time its name is asked for, with the user's options as keywords, and
returns a new (or shared, if frozen) value; for options out of range it raises `TypeError` or `ValueError`.
"""

from collections.abc import Callable, Mapping

import pluggy

from kvtiers.archive import Archive, Codec
from kvtiers.events import Event
from kvtiers.planning import Shape
from kvtiers.policy import Policy
from kvtiers.slots import Compressor, Realigner, Retriever, Sink

PROJECT = "kvtiers"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def kvtiers_policies() -> Mapping[str, Callable[[], Policy]]:  # type: ignore[empty-body]
    """Presets: name -> a function of no arguments that builds the whole `Policy`. Since 0.1."""


@hookspec
def kvtiers_sinks() -> Mapping[str, Callable[..., Sink]]:  # type: ignore[empty-body]
    """Name -> factory for the slot `sinks`. Since 0.1."""


@hookspec
def kvtiers_compressors() -> Mapping[str, Callable[..., Compressor]]:  # type: ignore[empty-body]
    """Name -> factory for the slot `compressor`. Since 0.1."""


@hookspec
def kvtiers_retrievers() -> Mapping[str, Callable[..., Retriever]]:  # type: ignore[empty-body]
    """Name -> factory for the slot `retriever`. Since 0.1."""


@hookspec
def kvtiers_realigners() -> Mapping[str, Callable[..., Realigner]]:  # type: ignore[empty-body]
    """Name -> factory for the slot `realigner`. Since 0.1."""


@hookspec
def kvtiers_archives() -> Mapping[str, Callable[..., Archive]]:  # type: ignore[empty-body]
    """Name -> factory for the slot `archive`. Since 0.1."""


@hookspec
def kvtiers_codecs() -> Mapping[str, Callable[..., Codec]]:  # type: ignore[empty-body]
    """Name -> factory for the slot `codec`. Since 0.2."""


@hookspec
def kvtiers_shapes() -> Mapping[str, Callable[..., Shape | None]]:  # type: ignore[empty-body]
    """Name -> function that knows models of one kind, for `kvtiers plan`. Since 0.2.

    It is called with the model's name (or folder), and what is wanted of it as keywords (see `kvtiers plan --help`):
    `size`, `seconds`, `fps`, `block_frames` (video), `tokens` (text) and `dtype`. It returns None for a model that it
    does not know.
    """


@hookspec
def kvtiers_observe(event: Event) -> None:
    """Called after each commit, compression, archiving, selection and recall of every layer, in the caller's thread.

    `event` and the tensors in it must not be changed. Nothing is returned. An observer that raises is logged once, on
    the logger `kvtiers`, and not called again; generation goes on. Since 0.1.
    """
