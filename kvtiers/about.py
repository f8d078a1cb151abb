"""What is installed under a name, in full: `kvtiers policies NAME`."""

import inspect
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import attrs

from kvtiers.errors import UnknownPolicyError, suggest
from kvtiers.geometry import Geometry
from kvtiers.plugins import HOOKS, registry
from kvtiers.policy import SLOTS, Policy
from kvtiers.presets import describe, policy
from kvtiers.slots import Compressor

_BLOCKS = (16, 32)
"""Sizes of a block, in tokens, for which a compressor says what it leaves."""
_OF_ARCHIVES = ("retriever", "archive", "codec", "top_k", "top_k_compressed", "attend", "refresh")
_TEXT = Geometry(kv_heads=1, head_dim=64)
_VIDEO = Geometry(kv_heads=1, head_dim=64, grid=(30, 52), steps_per_commit=4, causal=False)
_UNITS = dict.fromkeys(("sink", "recent", "block_size", "chunk_size", "refresh", "budget"), "steps") | dict.fromkeys(
    ("top_k", "top_k_compressed"), "blocks"
)


def about(name: str) -> str:
    """Everything called `name`: what it does, its source, its options with their defaults, what it comes to hold.

    Raises `UnknownPolicyError` if nothing is.
    """
    kinds = [kind for kind in ("policy", *SLOTS) if name in registry().names(kind)]
    if not kinds:
        known = sorted({known for kind in ("policy", *SLOTS) for known in registry().names(kind)})
        near = suggest(name.partition(":")[0].lower(), known)
        file = " A file is read by kvtiers.load_policy()." if name.endswith(".toml") else ""
        raise UnknownPolicyError(f"nothing installed is called {name!r}; see `kvtiers policies`.{file or near}")
    return "\n\n".join("\n".join(_lines(kind, name)) for kind in kinds)


def _lines(kind: str, name: str) -> Iterator[str]:
    factory, plugin = registry().factory(kind, name), registry().provider(kind, name)
    hook = HOOKS[kind].removeprefix("kvtiers_")
    yield f"{name}: {'a preset' if kind == 'policy' else f'a choice for {kind}'}, by {plugin.origin} ({hook})"
    module = inspect.getmodule(factory)
    for text in (None if module is None or kind == "policy" else module.__doc__, factory.__doc__):
        if text:
            yield ""
            yield inspect.cleandoc(text)
    yield ""
    yield from _settings(policy(name)) if kind == "policy" else _options(factory)


def _settings(made: Policy) -> Iterator[str]:
    for key, value in describe(made).items():
        unit = f" {_UNITS[key][: None if value != 1 else -1]}" if key in _UNITS and isinstance(value, int) else ""
        idle = key in _OF_ARCHIVES and not made.archives
        yield f"  {key} = {_brief(value)}{unit}{' (not used: nothing is archived)' if idle else ''}"
    yield "  A step is a token of text, or a latent frame of video."
    if made.recent is None:
        yield "  A query attends everything."
    elif made.chunk_size is not None and (bound := made.bound(_TEXT)) is not None:
        yield f"  A query of text attends at most {bound:,} tokens."
    elif made.chunk_size is None and (bound := made.bound(_VIDEO)) is not None:
        yield f"  A query of video, 832 x 480 in blocks of 4 latent frames, attends at most {bound:,} tokens."


def _brief(value: Any) -> str:
    """A choice by its name, with its options in brackets."""
    if not isinstance(value, dict):
        return str(value)
    options = ", ".join(f"{key}={option}" for key, option in value.items() if key != "name" and option is not None)
    return f"{value['name']} ({options})" if options else str(value["name"])


def _options(factory: Any) -> Iterator[str]:
    types = {field.alias: field.type for field in attrs.fields(factory)} if attrs.has(factory) else {}
    for option in inspect.signature(factory).parameters.values():
        default = "no default" if option.default is option.empty else f"default {option.default!r}"
        # a converter without annotations hides a field's type from the signature
        found = types.get(option.name) if option.annotation is option.empty else option.annotation
        kind = "" if found is None else f": {inspect.formatannotation(found)}"
        yield f"  option {option.name}{kind}, {default}"
    with suppress(Exception, SystemExit):  # an option has no default, it is for video, or it fails: all else is told
        made = factory()
        if isinstance(made, Compressor) and not (made.keeps or made.drops or made.rewrites):
            left = ", ".join(f"{size} tokens to {made.block_tokens(size, _TEXT)}" for size in _BLOCKS)
            yield f"  It compresses a block of {left}."
