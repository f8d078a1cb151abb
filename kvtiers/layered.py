"""One policy per layer: a preset, a file or a `Policy`, with changes that may differ by layer."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from kvtiers.errors import PolicyError, SlotError
from kvtiers.policy import SLOTS, Policy
from kvtiers.presets import load_policy, policy

_SETTINGS = tuple(field.name for field in attrs.fields(Policy))


def resolve(base: str | Path | Policy, *, layers: Sequence[int], **changes: Any) -> list[Policy]:
    """The policy of each of `layers` (layer numbers).

    base: a preset's name, the path of a .toml file, or a `Policy`. A change of a setting may be a value for all layers,
    `{layer: value, "*": value of the others}` (without `"*"` the others keep the preset's), or a function of the
    layer's number; slots are the same for all layers.
    """
    if not isinstance(base, str | Path | Policy):
        raise PolicyError(
            f"a policy is named, read from a .toml file, or a kvtiers.Policy; got a {type(base).__name__}. "
            "`kvtiers policies` lists the names"
        )
    named = base if isinstance(base, Policy) else load_policy(base) if Path(base).suffix == ".toml" else str(base)
    for name, value in changes.items():
        if name in SLOTS and inspect.isroutine(value):
            raise SlotError(
                f"slot {name!r} is the same for all layers, so it takes no function of the layer; give a name, "
                "{'name': ..., options} or an instance"
            )
        strange = [key for key in value if key != "*" and key not in layers] if isinstance(value, Mapping) else []
        if strange and name not in SLOTS:
            raise PolicyError(
                f"{name} is set for layer {strange[0]!r}, which is not tiered; layers: {', '.join(map(str, layers))}, "
                'and "*" for the others'
            )
    for name, value in changes.items():
        if name not in _SETTINGS and _differs(value):
            raise PolicyError(
                f"{name} is no setting of a policy, and an option of a slot's choice is the same for all layers; give "
                f"one value, got a {type(value).__name__}"
            )
    own = {name: value for name, value in changes.items() if name not in SLOTS and _differs(value)}
    start = policy(named, **{name: value for name, value in changes.items() if name not in own})
    return [policy(start, **{name: _of_layer(name, v, layer, start) for name, v in own.items()}) for layer in layers]


def _differs(value: object) -> bool:
    return isinstance(value, Mapping) or callable(value)


def _of_layer(name: str, value: Mapping[Any, Any] | Callable[[int], Any], layer: int, start: Policy) -> Any:
    if isinstance(value, Mapping):
        return value.get(layer, value.get("*", getattr(start, name, None)))
    return value(layer)
