"""One policy per layer: a preset, a file or a `Policy`, with changes that may differ by layer."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from kvtiers.errors import PolicyError
from kvtiers.policy import SLOTS, Policy
from kvtiers.presets import build, load_policy, policy


def resolve(base: str | Path | Policy, *, layers: Sequence[int], **changes: Any) -> list[Policy]:
    """The policy of each of `layers` (layer numbers).

    base: a preset's name, the path of a .toml file, or a `Policy`. A change of a setting may be a value for all layers,
    `{layer: value, "*": value of the others}`, or a function of the layer's number; slots are the same for all layers.
    """
    slots = {name: value for name, value in changes.items() if name in SLOTS}
    own = {name: value for name, value in changes.items() if name not in SLOTS and _differs(value)}
    same = {name: value for name, value in changes.items() if name not in slots and name not in own}
    known = [field.name for field in attrs.fields(Policy)]
    if isinstance(base, Policy) or Path(base).suffix == ".toml":
        start = base if isinstance(base, Policy) else load_policy(base)
        unknown = [name for name in changes if name not in known]
        if unknown:
            raise PolicyError(f"a policy has no setting {unknown[0]!r}; settings: {', '.join(known)}")
        start = attrs.evolve(start, **same, **{name: build(name, value) for name, value in slots.items()})
    else:
        unset = {name: value for name, value in own.items() if name not in known}
        start = policy(str(base), **same, **slots, **unset)
    return [
        attrs.evolve(start, **{name: _of_layer(name, v, layer, start) for name, v in own.items()}) for layer in layers
    ]


def _differs(value: object) -> bool:
    return isinstance(value, Mapping) or callable(value)


def _of_layer(name: str, value: Mapping[Any, Any] | Callable[[int], Any], layer: int, start: Policy) -> Any:
    if isinstance(value, Mapping):
        return value.get(layer, value.get("*", getattr(start, name)))
    return value(layer)
