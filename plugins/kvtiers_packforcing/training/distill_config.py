"""What the stages that distill are told."""

from collections.abc import Sequence
from typing import Any

import attrs
from attrs import validators as v

from kvtiers import PolicyError
from kvtiers_diffusers.schedule import TIMESTEPS, warped
from kvtiers_packforcing.tiny_world.sampling import Sampler, shifted
from kvtiers_packforcing.training.config import (
    Phase,
    TrainingConfigError,
    number,
    numbers,
    one_of,
    pair,
    text,
    whole,
    yes_or_no,
)
from kvtiers_packforcing.training.layout import Layout
from kvtiers_packforcing.training.sampling import finer


@attrs.frozen(kw_only=True)
class DistillConfig:
    """Self-rollout and distribution matching. Numbers that have a default have the paper's (section 4.1).

    timesteps: of the few steps, before the shift. sink_blocks, recent_blocks: what a block attends in full.
    critic_updates: of the critic for one of the generator. share_rollouts: whether all updates of a cycle see the same
    generated clips (with fresh noise), which takes fewer rollouts than fresh clips for each. lowest_sigma,
    highest_sigma: between which both scores look, before the shift.
    """

    timesteps: tuple[float, ...] = numbers(default=tuple(map(float, TIMESTEPS)))
    shift: float = number(0.01, default=5.0)
    sink_blocks: int = whole(0, default=1)
    recent_blocks: int = whole(1, default=1)
    critic_updates: int = whole(1, default=5)
    critic_betas: tuple[float, float] = pair(default=(0.0, 0.999))
    share_rollouts: bool = yes_or_no(default=False)
    lowest_sigma: float = number(0.001, 1.0, default=0.02)
    highest_sigma: float = number(0.001, 1.0, default=0.98)

    def __attrs_post_init__(self) -> None:
        self.sigmas()
        if self.lowest_sigma >= self.highest_sigma:
            raise TrainingConfigError(
                f"lowest_sigma must be below highest_sigma ({self.highest_sigma}), got {self.lowest_sigma}"
            )

    def sigmas(self, each: int = 1) -> list[float]:
        """Noise levels of the few steps, shifted; with `each` steps for one of them, evenly before the shift."""
        try:
            return [step / 1000 for step in warped(finer(self.timesteps, each), self.shift)]
        except PolicyError as error:
            raise TrainingConfigError(f"timesteps: {error}; the paper has [1000, 750, 500, 250]") from error

    def levels(self, parts: Sequence[float]) -> list[float]:
        """The noise levels at which scores look, for parts from 0 to 1 of the way from the lowest to the highest."""
        low, high = self.lowest_sigma, self.highest_sigma
        return [shifted(low + (high - low) * part, self.shift) for part in parts]

    @property
    def layout(self) -> Layout:
        """PackForcing's: what lies between sink and recent is compressed."""
        return Layout(sink_blocks=self.sink_blocks, recent_blocks=self.recent_blocks)


@attrs.frozen(kw_only=True)
class TinyDistillConfig(DistillConfig):
    """Of the tiny world.

    start: what stage `student` exported: the generator before its first step. teacher: the same of the teacher; none:
    `start`. autoencoder: the folder that the student was trained with, if it was with one. guidance: how far the
    teacher goes on from the prompts' flow, away from that without a prompt. It must have been trained with prompts
    dropped (`prompt_drop_share`); 0 looks at the prompts alone.
    """

    start: str = text()
    teacher: str | None = attrs.field(default=None, validator=v.optional(v.instance_of(str)))
    autoencoder: str | None = attrs.field(default=None, validator=v.optional(v.instance_of(str)))
    guidance: float = number(0.0, default=0.0)

    def __attrs_post_init__(self) -> None:
        DistillConfig.__attrs_post_init__(self)
        due = [1000 * (1 - step / len(self.timesteps)) for step in range(len(self.timesteps))]
        if any(abs(given - even) > 1e-6 for given, even in zip(self.timesteps, due, strict=True)):
            raise TrainingConfigError(
                f"timesteps must be evenly spaced from 1000, since videos are made so: {due}; got {[*self.timesteps]}"
            )

    @property
    def sampler(self) -> Sampler:
        """How videos are made of what was distilled."""
        return Sampler(steps=len(self.timesteps), shift=self.shift, kind="renoise")


@attrs.frozen(kw_only=True)
class DistillPhase(Phase):
    """A phase of distillation, of one of two kinds.

    loss: `dmd` trains a critic (at up to `critic_rate`) and the generator in turns. `trajectory` has the generator say
    at each of its few steps where the teacher ends, which takes `teacher_steps` steps for each of them from the same
    noise. history: what blocks come after in a trajectory: the `true` clip, or the generator's `own`. A step is an
    update of one network, so a cycle of `dmd` has one step more than `critic_updates`.
    """

    loss: str = one_of("dmd", "trajectory", default="dmd")
    critic_rate: float | None = attrs.field(default=None)
    teacher_steps: int = whole(1, default=4)
    history: str = one_of("true", "own", default="own")

    @critic_rate.validator
    def _check_rate(self, _: object, value: Any) -> None:
        fine = value is None or (isinstance(value, int | float) and not isinstance(value, bool) and value >= 0)
        if not fine:
            raise TrainingConfigError(f"critic_rate must be a number of at least 0, got {value!r}")

    def __attrs_post_init__(self) -> None:
        if self.loss == "dmd" and self.critic_rate is None:
            raise TrainingConfigError("critic_rate is missing, which loss = 'dmd' needs; the paper has 1e-6")
