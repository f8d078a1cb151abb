"""Policies by name: presets and slot choices that plugins provide, put together, read from TOML, and written down."""

import inspect
import re
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any

import attrs

from kvtiers.errors import PluginError, PolicyError, SlotError, explain, suggest
from kvtiers.plugins import Registry, registry
from kvtiers.policy import FIELDS, SLOTS, Policy

_WHOLE, _FRACTION = re.compile("-?[0-9]+"), re.compile(r"-?[0-9]{1,40}\.[0-9]{1,40}")
_SLOT_FIELDS = [getattr(attrs.fields(Policy), slot) for slot in SLOTS]
KINDS: Mapping[str, type] = {"policy": Policy, **{field.name: field.type for field in _SLOT_FIELDS}}
_DEFAULTS = {field.name: None if field.metadata.get("optional") else field.default for field in attrs.fields(Policy)}


def policy(name: str | Policy, /, **changes: Any) -> Policy:
    """The preset `name` (or a policy at hand), with some settings or slots changed.

    A slot is changed by name (`retriever="NAME"`), by name with options (`retriever={"name": "NAME", "OPTION": value}`
    or `("NAME", {"OPTION": value})`), or by an instance. Other keywords are fields of `Policy`, or an option that one
    of the slots' choices has. The text "none" stands for None where a setting may be None.

    Raises `UnknownPolicyError` for a name that is not installed, `PolicyError` for an unknown keyword, a value out of
    range or a compressor that would never act, `SlotError` for an instance of the wrong kind, `PluginError` if the
    plugin that provides a name is at fault.
    """
    start: Policy = name if isinstance(name, Policy) else _build("policy", name, {})
    own = {key: _resolve(key, _meant(value, _DEFAULTS[key])) for key, value in changes.items() if key in FIELDS}
    made = attrs.evolve(start, **own)
    options = {key: value for key, value in changes.items() if key not in FIELDS}
    made = _with_options(made, options, "a policy" if isinstance(name, Policy) else f"policy {name!r}")
    idle = "compressed" not in made.forms and not (made.compressor.keeps or made.compressor.drops)
    if "compressor" in changes and idle:
        raise PolicyError(
            f"compressor {changes['compressor']!r} would never be asked: attend = 'full' attends blocks as they were "
            "and top_k_compressed = 0 attends no others; add attend='compressed' or top_k_compressed=n"
        )
    return made


def load_policy(path: str | PathLike[str]) -> Policy:
    """The policy that a TOML file describes.

    `policy = "..."` names the preset to start from; every other key is a change as in `policy(...)`, a slot
    being a name (`retriever = "NAME"`) or a table (`[retriever]` with `name` and options). TOML has no None: write
    "none". Errors are those of `policy(...)`, with the file named.
    """
    where = Path(path)
    try:
        settings = tomllib.loads(where.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"policy file {str(where)!r} cannot be read: {explain(error)}") from error
    except (ValueError, RecursionError) as error:  # a number of too many digits is a ValueError of its own
        raise PolicyError(f"policy file {str(where)!r} is not valid TOML: {explain(error)}") from error
    name = settings.pop("policy", None)
    if not isinstance(name, str):
        raise PolicyError(
            f'policy file {str(where)!r} must name the preset to start from, policy = "...", got {name!r}; '
            f"installed: {', '.join(registry().names('policy'))}"
        )
    try:
        return policy(name, **settings)
    except RecursionError as error:
        raise PolicyError(f"policy file {str(where)!r} is nested too deeply; no option of a slot is a table") from error
    except (PolicyError, PluginError, SlotError) as error:
        raise type(error)(f"policy file {str(where)!r}: {error}") from error


def describe(policy: Policy) -> dict[str, Any]:
    """`policy` as plain values that JSON can hold; `from_description` builds an equal policy from them.

    A slot is {"name": its installed name, option: value, ...}. Raises `PolicyError` for a slot that no plugin provides
    by name, or whose options are not plain values.
    """
    found = {name: getattr(policy, name) for name in FIELDS}
    return found | {slot: _describe_slot(slot, found[slot]) for slot in SLOTS}


def from_description(description: Mapping[str, Any]) -> Policy:
    """The policy that `describe` wrote down. Errors are those of `policy(...)`."""
    _refuse_unknown(description, "a policy's description")
    missing = [slot for slot in SLOTS if slot not in description]
    if missing:
        raise PolicyError(f"a policy's description must name every slot; missing: {', '.join(missing)}")
    return Policy(**{key: _resolve(key, value) for key, value in description.items()})


def build(slot: str, choice: str | Mapping[str, Any] | tuple[str, Mapping[str, Any]] | object) -> Any:
    """What `choice` means for `slot`: a name, a name with options, or an instance (returned as it is)."""
    if isinstance(choice, str):
        return _build(slot, choice, {})
    if isinstance(choice, Mapping):
        options = dict(choice)
        name = options.pop("name", None)
    elif isinstance(choice, tuple) and len(choice) == 2 and isinstance(choice[1], Mapping):
        name, options = choice[0], dict(choice[1])
    else:
        return choice
    if not isinstance(name, str):
        raise PolicyError(
            f'{slot} = {choice!r} names nothing; give {{"name": ..., options}}. Installed: '
            f"{', '.join(registry().names(slot))}"
        )
    return _build(slot, name, options)


def _resolve(key: str, value: Any) -> Any:
    return build(key, value) if key in SLOTS else value


def _with_options(made: Policy, options: Mapping[str, Any], what: str) -> Policy:
    """`made` with options of its slots' choices; each must belong to exactly one."""
    of_slot: dict[str, dict[str, Any]] = {}
    for key, value in options.items():
        slots = [slot for slot in SLOTS if key in _options_of(getattr(made, slot))]
        if not slots:
            known = [option for slot in SLOTS for option in _options_of(getattr(made, slot))]
            _refuse_unknown({key: value}, what, known)
        if len(slots) > 1:
            raise PolicyError(
                f"{what}: {key!r} is an option of {' and of '.join(slots)}; write which, as in "
                f'{slots[0]}=("name", {{{key!r}: {value!r}}})'
            )
        of_slot.setdefault(slots[0], {})[key] = value
    changed = {}
    _refuse_enormous(what, options)
    for slot, values in of_slot.items():
        old, own = getattr(made, slot), _options_of(getattr(made, slot))
        try:
            changed[slot] = attrs.evolve(old, **{key: _meant(said, own[key].default) for key, said in values.items()})
        except (TypeError, ValueError) as error:
            raise PolicyError(f"{what} with {values}: {_first(error).rstrip('.')}") from error
    return attrs.evolve(made, **changed)


def _options_of(choice: Any) -> "dict[str, attrs.Attribute[Any]]":
    """The options of a slot's choice by name."""
    return {f.alias or f.name: f for f in attrs.fields(type(choice)) if f.init} if attrs.has(type(choice)) else {}


def _refuse_unknown(settings: Mapping[str, Any], what: str, options: Sequence[str] = ()) -> None:
    """options: those of the choices that it has."""
    for key in settings:
        if key not in FIELDS:
            more = ", and the options of its choices" if options else ""
            near = suggest(key, (*FIELDS, *options))
            raise PolicyError(f"{what} has no setting {key!r}; settings: {', '.join(FIELDS)}{more}.{near}")


def _refuse_enormous(what: str, options: Mapping[str, Any]) -> None:
    """Raise `PolicyError` for a number that no tensor could be measured in, before something overflows far away."""
    for key, value in options.items():
        if isinstance(value, int) and abs(value) >= 2**63:
            raise PolicyError(f"{what}: {key} must be less than 2**63, got a number of {value.bit_length()} bits")


def _build(kind: str, name: str, options: Mapping[str, Any]) -> Any:
    """Call the factory of `name`; blame options on the user and everything else on the plugin."""
    factory = registry().factory(kind, name)
    allowed = _options(factory)
    for key in options:
        if allowed is not None and key not in allowed:
            raise PolicyError(
                f"{kind} {name!r} has no option {key!r}; "
                f"options: {', '.join(allowed) or 'none'}.{suggest(key, allowed)}"
            )
    _refuse_enormous(f"{kind} {name!r}", options)
    try:
        made = factory(**{key: _meant(said, (allowed or {}).get(key)) for key, said in options.items()})
    except (TypeError, ValueError) as error:
        if kind == "policy":
            raise _fault(kind, name, f"failed: {explain(error)}") from error
        choices = f"; options: {', '.join(allowed)}" if allowed else ""
        message = _first(error).rstrip(".")
        raise PolicyError(f"{kind} {name!r} with {dict(options)}: {message}{choices}") from error
    except RecursionError:
        raise  # of options that are nested too deeply
    except (Exception, SystemExit) as error:
        raise _fault(kind, name, f"failed: {explain(error)}") from error
    if not isinstance(made, KINDS[kind]):
        raise _fault(kind, name, f"made a {type(made).__name__}, which is no {KINDS[kind].__name__}")
    return made


def _fault(kind: str, name: str, what: str) -> PluginError:
    return PluginError(f"{kind} {name!r} of plugin {registry().provider(kind, name).origin} {what}")


def _first(error: Exception) -> str:
    """The message of an error; attrs validators carry the field and value as further arguments, which nobody reads."""
    return str(error.args[0]) if error.args else type(error).__name__


def _meant(value: Any, default: object) -> Any:
    """None for the text "none", where that is the default of a setting."""
    return None if default is None and isinstance(value, str) and value == "none" else value


def _options(factory: Any) -> dict[str, object] | None:
    """The keywords that a factory takes, with their defaults; None if it takes any."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # a factory written in C may have no signature
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name: p.default for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}


def _describe_slot(slot: str, value: Any) -> dict[str, Any]:
    if not attrs.has(type(value)):
        raise PolicyError(f"{slot} {value!r} cannot be written down: it is no attrs class; make it @attrs.frozen")
    options = {key: getattr(value, field.name) for key, field in _options_of(value).items()}
    for key, option in options.items():
        if not isinstance(option, str | int | float | None):
            raise PolicyError(
                f"{slot} {type(value).__name__} cannot be written down: option {key!r} is a {type(option).__name__}; "
                "options must be text, numbers, true, false or none"
            )
    for name in _names_of(registry(), slot, type(value)):
        description = {"name": name, **options}
        try:
            if build(slot, description) == value:
                return description
        except (PolicyError, PluginError):  # a name whose factory takes other options; the next may fit
            continue
    raise PolicyError(
        f"{slot} {type(value).__name__} cannot be written down: no plugin provides it by name; "
        f"installed: {', '.join(registry().names(slot))}"
    )


def _names_of(plugins: Registry, slot: str, made: type) -> list[str]:
    """The names of `slot` that may make a `made`: those whose factory is that class first, then factory functions."""
    factories = {}
    for name in plugins.names(slot):
        with suppress(PluginError):
            factories[name] = plugins.factory(slot, name)
    exact = [name for name, factory in factories.items() if factory is made]
    return exact + [name for name, factory in factories.items() if not isinstance(factory, type)]


def parse(spec: str) -> Policy:
    """The policy that a line names: a preset, and what is changed of it."""
    name, changes = changes_of(spec)
    return policy(name, **changes)


def changes_of(spec: str) -> tuple[str, dict[str, Any]]:
    """`name` or `name:setting=value,...`, as in `NAME:top_k=8,retriever=NAME,retriever.OPTION=VALUE`."""
    name, _, settings = spec.partition(":")
    changes: dict[str, Any] = {}
    options: dict[str, dict[str, Any]] = {}
    for part in filter(None, settings.split(",")):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise PolicyError(f"{spec!r}: settings are written key=value, got {part!r}")
        slot, dot, option = key.partition(".")
        meant = _value(value, spec)
        if dot:
            options.setdefault(slot, {})[option] = meant
        else:
            changes[key] = meant
    for slot, of_slot in options.items():
        if slot not in SLOTS or slot not in changes:
            raise PolicyError(
                f"{spec!r}: an option of a slot follows its name, as in retriever=NAME,retriever.OPTION=VALUE; the "
                f"slots are {', '.join(SLOTS)}"
            )
        changes[slot] = (changes[slot], of_slot)
    return name, changes


def _value(value: str, spec: str) -> Any:
    """A number, true or false; else the text itself."""
    if _FRACTION.fullmatch(value):
        return float(value)
    if value in ("true", "false"):
        return value == "true"
    if not _WHOLE.fullmatch(value):
        return value
    try:
        return int(value)
    except ValueError as error:  # Python reads no number of more than 4,300 digits
        raise PolicyError(f"{spec[:40]!r}...: a number of {len(value):,} digits is too large") from error
