"""One policy per layer: a preset, a file or a `Policy`, with slots and settings that may differ by layer."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvtiers.errors import PolicyError
from kvtiers.policy import FIELDS, SLOTS, Policy
from kvtiers.presets import load_policy, policy


def resolve(base: str | Path | Policy, *, layers: Sequence[int], **changes: Any) -> list[Policy]:
    """The policy of each of `layers` (layer numbers).

    base: a preset's name, the path of a .toml file, or a `Policy`. A change of a slot or setting may be a value for all
    layers, `{layer: value, "*": value of the others}` (without `"*"` the others keep the preset's), or a function of
    the layer's number.
    """
    if not isinstance(base, str | Path | Policy):
        raise PolicyError(
            f"a policy is named, read from a .toml file, or a kvtiers.Policy; got a {type(base).__name__}. "
            "`kvtiers policies` lists the names"
        )
    named = base if isinstance(base, Policy) else load_policy(base) if Path(base).suffix == ".toml" else str(base)
    own = {name: value for name, value in changes.items() if _differs(name, value)}
    for name, value in own.items():
        if name not in FIELDS:
            raise PolicyError(
                f"{name} is no slot or setting of a policy, and an option of a choice is the same for all layers; "
                f"give one value, or the slot itself by layer, got a {type(value).__name__}"
            )
        strange = [key for key in value if key != "*" and key not in layers] if isinstance(value, Mapping) else []
        if strange:
            raise PolicyError(
                f"{name} is set for layer {strange[0]!r}, which is not tiered; layers: {', '.join(map(str, layers))}, "
                'and "*" for the others'
            )
    start = policy(named, **{name: value for name, value in changes.items() if name not in own})
    made: dict[str, Policy] = {}
    found = []
    for layer in layers:
        mine = {name: _of_layer(name, value, layer, start) for name, value in own.items()}
        found.append(made.setdefault(repr(mine), policy(start, **mine)))
    return found


def _differs(name: str, value: object) -> bool:
    """Whether a change is one value for each layer. A slot's own choice may be a mapping with a name, or callable."""
    if name in SLOTS:
        return inspect.isroutine(value) or (isinstance(value, Mapping) and "name" not in value)
    return isinstance(value, Mapping) or callable(value)


def _of_layer(name: str, value: Any, layer: int, start: Policy) -> Any:
    if isinstance(value, Mapping):
        return value.get(layer, value.get("*", getattr(start, name, None)))
    return value(layer)
