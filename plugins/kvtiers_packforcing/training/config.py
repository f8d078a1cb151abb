"""What a run is told, from a TOML file. Everything is checked before a model is made or a file is read.

A file has the tables `[run]`, `[optimiser]`, `[model]` and one or more `[[phases]]`. What `[model]` and the phases may
say depends on the stage that `[run]` names.
"""

import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import attrs

from kvtiers.errors import KVTiersError, suggest

Value = TypeVar("Value")
_CONFIGS = Path(__file__).parent / "configs"


class TrainingConfigError(KVTiersError, ValueError):
    """When a training configuration cannot be read, or says what cannot be meant."""


def whole(low: int, high: int | None = None, **settings: Any) -> Any:
    """A field for a whole number from `low` to `high`, both included."""
    allowed = f"of at least {low}" if high is None else f"from {low} to {high}"

    def check(_: object, attribute: "attrs.Attribute[Any]", value: object) -> None:
        if (
            not isinstance(value, int)
            or isinstance(value, bool)
            or not (low <= value and (high is None or value <= high))
        ):
            raise TrainingConfigError(f"{attribute.name} must be a whole number {allowed}, got {value!r}")

    return attrs.field(validator=check, **settings)


def _float(value: Any) -> Any:
    """A whole number that stands for one with a fraction."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def number(low: float, high: float = math.inf, **settings: Any) -> Any:
    """A field for a number from `low` to `high`."""

    def check(_: object, attribute: "attrs.Attribute[Any]", value: object) -> None:
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            reach = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            raise TrainingConfigError(f"{attribute.name} must be a number {reach}, got {value!r}")

    return attrs.field(converter=_float, validator=check, **settings)


def one_of(*names: str, **settings: Any) -> Any:
    """A field for one of a few names."""

    def check(_: object, attribute: "attrs.Attribute[Any]", value: object) -> None:
        if value not in names:
            allowed = ", ".join(map(repr, names))
            raise TrainingConfigError(
                f"{attribute.name} must be one of {allowed}, got {value!r}.{suggest(value, names)}"
            )

    return attrs.field(validator=check, **settings)


def yes_or_no(**settings: Any) -> Any:
    """A field that is true or false."""

    def check(_: object, attribute: "attrs.Attribute[Any]", value: object) -> None:
        if not isinstance(value, bool):
            raise TrainingConfigError(f"{attribute.name} must be true or false, got {value!r}")

    return attrs.field(validator=check, **settings)


def text(**settings: Any) -> Any:
    """A field for a text that is not empty."""

    def check(_: object, attribute: "attrs.Attribute[Any]", value: object) -> None:
        if not isinstance(value, str) or not value:
            raise TrainingConfigError(f"{attribute.name} must be a text, got {value!r}")

    return attrs.field(validator=check, **settings)


def values(value: Any) -> Any:
    """What TOML has as an array."""
    return tuple(value) if isinstance(value, list) else value


def numbers(**settings: Any) -> Any:
    """A field for one or more numbers."""

    def check(_: object, attribute: "attrs.Attribute[Any]", value: object) -> None:
        if not isinstance(value, tuple) or not value or not all(isinstance(each, float) for each in value):
            raise TrainingConfigError(f"{attribute.name} must be an array of numbers, got {value!r}")

    def floats(value: Any) -> Any:
        return tuple(_float(each) for each in value) if isinstance(value, list | tuple) else value

    return attrs.field(converter=floats, validator=check, **settings)


def pair(**settings: Any) -> Any:
    """A field for two numbers from 0 to below 1."""
    return attrs.field(converter=values, validator=_pair, **settings)


def _pair(_: object, attribute: "attrs.Attribute[Any]", value: object) -> None:
    fine = (
        isinstance(value, tuple) and len(value) == 2 and all(isinstance(b, int | float) and 0 <= b < 1 for b in value)
    )
    if not fine:
        raise TrainingConfigError(f"{attribute.name} must be two numbers from 0 to below 1, got {value!r}")


@attrs.frozen(kw_only=True)
class RunConfig:
    """Where a run goes, when it writes and how it computes. All of `*_every` count optimiser steps; 0 means never.

    precision: of matrix products that are trained; weights, moments and rollouts through a cache are float32. compile:
    the layers of the transformer, once for every layout. gradient_checkpointing: layers are run again for their
    gradients, which takes less memory and more time. sharding: whether several processes each hold all weights, or cut
    them up (`fsdp2`).
    """

    stage: str = text()
    folder: str = text()
    seed: int = whole(0, default=0)
    threads: int = whole(1, default=1)
    log_every: int = whole(1, default=20)
    save_every: int = whole(1, default=100)
    keep_every: int = whole(0, default=0)
    evaluate_every: int = whole(0, default=0)
    precision: str = one_of("float32", "bfloat16", default="float32")
    compile: bool = yes_or_no(default=False)
    gradient_checkpointing: bool = yes_or_no(default=False)
    sharding: str = one_of("none", "fsdp2", default="none")

    def __attrs_post_init__(self) -> None:
        for name in ("save_every", "keep_every", "evaluate_every"):
            if getattr(self, name) % self.log_every:  # or a run that is resumed would log other averages
                raise TrainingConfigError(
                    f"{name} must be a multiple of log_every ({self.log_every}), got {getattr(self, name)}"
                )


@attrs.frozen(kw_only=True)
class OptimiserConfig:
    """AdamW, clipped by the norm of all gradients, and an exponential moving average of the weights (EMA).

    matrices: what updates the matrices of layers. `muon` is torch's own (arXiv 2502.16982), which needs
    fewer steps than AdamW in the tiny world. matrix_rate: what Muon's learning rate is, as a multiple of the others'.
    """

    betas: tuple[float, float] = pair(default=(0.9, 0.99))
    weight_decay: float = number(0.0, default=1e-4)
    clip_norm: float = number(0.0, default=1.0)
    ema_decay: float = number(0.0, 1.0, default=0.995)
    warmup_steps: int = whole(0, default=20)
    matrices: str = one_of("adamw", "muon", default="adamw")
    matrix_rate: float = number(0.0, default=1.0)
    last_share: float = number(0.0, 1.0, default=0.03)


@attrs.frozen(kw_only=True)
class Phase:
    """A part of the run with a learning rate of its own: up over `warmup_steps`, then down along a cosine.

    clips: of a step.
    """

    steps: int = whole(1)
    clips: int = whole(1)
    peak_rate: float = number(0.0)


@attrs.frozen(kw_only=True)
class TrainingConfig:
    """A whole run. `model` and `phases` are of the classes of the stage."""

    run: RunConfig
    optimiser: OptimiserConfig
    model: Any
    phases: tuple[Any, ...]

    TABLES: ClassVar[tuple[str, ...]] = ("run", "optimiser", "model", "phases")

    @property
    def steps(self) -> int:
        """Optimiser steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    def phase_at(self, step: int) -> tuple[Any, int]:
        """The phase of a step, and the step's number in it. Steps count from 0."""
        within = step
        for phase in self.phases:
            if within < phase.steps:
                return phase, within
            within -= phase.steps
        return self.phases[-1], self.phases[-1].steps - 1

    def rate_at(self, step: int, peak_rate: float | None = None) -> float:
        """The learning rate of a step: it depends on nothing but the step. peak_rate: none takes the phase's."""
        phase, within = self.phase_at(step)
        low = self.optimiser.last_share
        rising = min(1.0, (within + 1) / (self.optimiser.warmup_steps + 1))
        falling: float = low + (1 - low) * 0.5 * (1 + math.cos(math.pi * within / phase.steps))
        return float(phase.peak_rate if peak_rate is None else peak_rate) * rising * falling


def shipped() -> dict[str, Path]:
    """The configurations that come with the package, by name."""
    return {path.name.removesuffix(".toml"): path for path in sorted(_CONFIGS.iterdir()) if path.suffix == ".toml"}


def read_table(path: Path | str) -> Mapping[str, Any]:
    """A TOML file, as it is, or the configuration that comes with the package under this name."""
    if not Path(path).exists() and str(path) in shipped():
        path = shipped()[str(path)]
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise TrainingConfigError(
            f"cannot read {path}: {error.strerror}; give a TOML file, or the name of a configuration that comes with "
            f"kvtiers: {', '.join(shipped())}.{suggest(str(path), shipped())}"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TrainingConfigError(f"{path} is no TOML: {error}") from error


def config_of(table: Mapping[str, Any], model: type, phase: type) -> TrainingConfig:
    """The configuration that a table of tables says, for a stage with these classes."""
    _known(table, TrainingConfig.TABLES, "the file")
    phases = table.get("phases")
    if not isinstance(phases, Sequence) or isinstance(phases, str) or not phases:
        raise TrainingConfigError("the file must have at least one [[phases]]")
    return TrainingConfig(
        run=made(RunConfig, table.get("run", {}), "[run]"),
        optimiser=made(OptimiserConfig, table.get("optimiser", {}), "[optimiser]"),
        model=made(model, table.get("model", {}), "[model]"),
        phases=tuple(made(phase, each, f"[[phases]] number {nth}") for nth, each in enumerate(phases, 1)),
    )


def made(kind: type[Value], table: object, where: str) -> Value:
    """An attrs value of one table. Errors say where."""
    if not isinstance(table, Mapping):
        raise TrainingConfigError(f"{where} must be a table, got {table!r}")
    fields = attrs.fields(kind)  # type: ignore[arg-type]  # (Value is any attrs class)
    _known(table, [field.name for field in fields], where)
    missing = [field.name for field in fields if field.default is attrs.NOTHING and field.name not in table]
    if missing:
        raise TrainingConfigError(f"{where} lacks {', '.join(missing)}")
    try:
        return kind(**table)
    except TrainingConfigError as error:
        raise TrainingConfigError(f"{where}: {error}") from error


def _known(table: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    for name in table:
        if name not in names:
            raise TrainingConfigError(
                f"{where} has no field {name!r}; there are {', '.join(names)}.{suggest(name, names)}"
            )
