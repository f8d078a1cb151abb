"""The loop: from a stage and its configuration to weights, one optimiser step at a time."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import attrs
import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from kvtiers_packforcing.training.averaging import Average
from kvtiers_packforcing.training.checkpoint import load_checkpoint, save_checkpoint
from kvtiers_packforcing.training.config import TrainingConfig
from kvtiers_packforcing.training.metrics import Metrics
from kvtiers_packforcing.training.sharing import Share
from kvtiers_packforcing.training.stage import Stage

CHECKPOINT, METRICS = "checkpoint.safetensors", "metrics.jsonl"
"""What a run keeps in its folder."""


@attrs.define(eq=False)
class Trainer:
    """A run, or one process's share of it. `step` is the number of steps that were made."""

    stage: Stage
    share: Share = attrs.field(factory=Share)
    average: Average = attrs.field(init=False)
    optimiser: AdamW = attrs.field(init=False)
    step: int = attrs.field(init=False, default=0)

    def __attrs_post_init__(self) -> None:
        self.share.check(self.config)
        settings = self.config.optimiser
        self.average = Average(self.stage.model, settings.ema_decay)
        self.optimiser = AdamW(self.stage.model.parameters(), betas=settings.betas, weight_decay=settings.weight_decay)

    @property
    def config(self) -> TrainingConfig:
        """The configuration of the stage."""
        return self.stage.config

    def advance(self) -> Mapping[str, float]:
        """Make one step, and return its figures."""
        phase, _ = self.config.phase_at(self.step)
        rate = self.config.rate_at(self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad()
        loss, figures = self.stage.backward(phase, self.step, self.share.numbers(phase.clips))
        for weight in self.stage.model.parameters():  # AdamW skips what has no gradient, and would lose count of steps
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        self.share.average(weight.grad for weight in self.stage.model.parameters() if weight.grad is not None)
        norm = clip_grad_norm_(self.stage.model.parameters(), self.config.optimiser.clip_norm, error_if_nonfinite=True)
        self.optimiser.step()
        self.step += 1
        self.average.update(self.stage.model, self.step)
        found = torch.stack([loss, *(value.detach() for value in figures.values())])
        self.share.average([found])
        told = dict(zip(("loss", *figures), found.tolist(), strict=True))
        return {**told, "norm": float(norm), "rate": rate}

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        save_checkpoint(
            path,
            step=self.step,
            config=self.config,
            model=self.stage.model,
            average=self.average,
            optimiser=self.optimiser,
        )

    def load(self, path: Path) -> None:
        """Go on from a checkpoint."""
        self.step = load_checkpoint(
            path, config=self.config, model=self.stage.model, average=self.average, optimiser=self.optimiser
        )

    @property
    def export_folder(self) -> Path:
        """Where `export` writes."""
        return Path(self.config.run.folder) / "export"

    def export(self) -> None:
        """Write the averaged weights for use."""
        with self.average.put_in(self.stage.model):
            self.stage.export(self.export_folder)

    def run(
        self, *, until: int | None = None, done: Callable[[int, Mapping[str, float]], object] = lambda *_: None
    ) -> None:
        """Make the steps that are left, up to `until`, from the folder's checkpoint on if there is one.

        done: called after every step with the number of steps made and the figures of the step.
        """
        folder = Path(self.config.run.folder)
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / CHECKPOINT).exists():
            self.load(folder / CHECKPOINT)
        self.share.wait()  # until all have read what one of them will write anew
        log = Metrics(folder / METRICS, self.step) if self.share.writes else None
        last = self.config.steps if until is None else min(until, self.config.steps)
        since: list[Mapping[str, float]] = []
        while self.step < last:
            figures = self.advance()
            since.append(figures)
            if log is not None:
                self._write(folder, log, since, stops=self.step == last)
            if self.step % self.config.run.log_every == 0:
                since = []
            done(self.step, figures)
        if self.step == self.config.steps and self.share.writes:
            self.export()

    def _write(self, folder: Path, log: Metrics, since: Sequence[Mapping[str, float]], *, stops: bool) -> None:
        """Write what is due after a step."""
        every = self.config.run
        if self.step % every.log_every == 0:
            log.write(self.step, {key: sum(line[key] for line in since) / len(since) for key in since[0]})
        ends = self.step == self.config.steps
        if every.evaluate_every and (ends or self.step % every.evaluate_every == 0):
            with self.average.put_in(self.stage.model):
                log.write(self.step, self.stage.evaluate(folder, self.step))
        if stops or self.step % every.save_every == 0:
            self.save(folder / CHECKPOINT)
        if every.keep_every and self.step % every.keep_every == 0:
            self.save(folder / f"checkpoint-{self.step}.safetensors")
