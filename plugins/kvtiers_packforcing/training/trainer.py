"""The loop: from a stage and its configuration to weights, one optimiser step at a time."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import attrs
import torch

from kvtiers_packforcing.training.averaging import Average
from kvtiers_packforcing.training.checkpoint import load_checkpoint, save_checkpoint
from kvtiers_packforcing.training.config import TrainingConfig, TrainingConfigError
from kvtiers_packforcing.training.learner import Learner
from kvtiers_packforcing.training.metrics import Metrics
from kvtiers_packforcing.training.saved import digest_of
from kvtiers_packforcing.training.sharding import whole
from kvtiers_packforcing.training.sharing import Share
from kvtiers_packforcing.training.stage import Stage

CHECKPOINT, METRICS = "checkpoint.safetensors", "metrics.jsonl"
"""What a run keeps in its folder."""


@attrs.define(eq=False)
class Trainer:
    """A run, or one process's share of it. `step` is the number of steps that were made.

    origins: a digest of every folder of `Stage.origins`, as it was when the run began or went on.
    """

    stage: Stage
    share: Share = attrs.field(factory=Share)
    average: Average = attrs.field(init=False)
    learners: Mapping[str, Learner] = attrs.field(init=False)
    origins: Mapping[str, str] = attrs.field(init=False)
    step: int = attrs.field(init=False, default=0)

    def __attrs_post_init__(self) -> None:
        self.share.check(self.config)
        if self.sharded:
            self.stage.shard()
        self.origins = {name: digest_of(folder) for name, folder in self.stage.origins.items()}
        settings = self.config.optimiser
        self.average = Average(self.stage.model, settings.ema_decay)
        self.learners = {
            name: Learner(name=name, network=network, betas=self.stage.betas(name), settings=settings)
            for name, network in self.stage.networks.items()
        }

    @property
    def config(self) -> TrainingConfig:
        """The configuration of the stage."""
        return self.stage.config

    @property
    def sharded(self) -> bool:
        """Whether the weights are cut over the processes."""
        return self.config.run.sharding != "none" and self.share.world > 1

    def advance(self) -> Mapping[str, float]:
        """Make one step, and return its figures. Those of another network than `model` bear its name."""
        phase, _ = self.config.phase_at(self.step)
        learner = self.learners[self.stage.turn(self.step)]
        rate = self.config.rate_at(self.step, self.stage.peak_rate(learner.name, phase))
        learner.network.zero_grad()
        loss, figures = self.stage.backward(phase, self.step, self.share.numbers(phase.clips))
        norm = learner.update(rate, self.config.optimiser.clip_norm, self.share)
        self.step += 1
        if learner.name == "model":
            self.average.update(self.stage.model, learner.updates)
        found = torch.stack([loss, *(value.detach() for value in figures.values())])
        self.share.average([found])
        told = {**dict(zip(("loss", *figures), found.tolist(), strict=True)), "norm": norm, "rate": rate}
        return told if learner.name == "model" else {f"{learner.name}_{name}": value for name, value in told.items()}

    def save(self, path: Path) -> None:
        """Write a checkpoint. Every process calls it at the same time if weights are in shards."""
        save_checkpoint(
            path,
            step=self.step,
            config=self.config,
            learners=list(self.learners.values()),
            average=self.average,
            writes=self.share.writes,
            origins=self.origins,
        )

    def load(self, path: Path) -> None:
        """Go on from a checkpoint."""
        self.step = load_checkpoint(
            path,
            config=self.config,
            learners=list(self.learners.values()),
            average=self.average,
            origins=self.origins,
        )

    @property
    def export_folder(self) -> Path:
        """Where `export` writes."""
        return Path(self.config.run.folder) / "export"

    def export(self) -> None:
        """Write the averaged weights for use: all of them, or what was there stays."""
        with self._averaged() as stage:
            if stage is not None:
                beside, old = (self.export_folder.with_name(f"export.{name}") for name in ("part", "old"))
                shutil.rmtree(beside, ignore_errors=True)
                stage.export(beside)
                shutil.rmtree(old, ignore_errors=True)
                if self.export_folder.exists():
                    self.export_folder.rename(old)
                beside.rename(self.export_folder)
                shutil.rmtree(old, ignore_errors=True)

    @contextmanager
    def _averaged(self) -> Iterator[Stage | None]:
        """The stage with the averaged weights, whole, in the process that writes; in the others None.

        Where weights are in shards it is another stage, made for the purpose.
        """
        if not self.sharded:
            with self.average.put_in(self.stage.model):
                yield self.stage if self.share.writes else None
            return
        weights = {name: whole(weight) for name, weight in self.average.weights.items()}
        stage = None
        if self.share.writes:
            stage = type(self.stage)(self.config)
            with torch.no_grad():
                for name, weight in stage.model.named_parameters():
                    weight.copy_(weights[name])
        yield stage
        self.share.wait()

    def run(
        self, *, until: int | None = None, done: Callable[[int, Mapping[str, float]], object] = lambda *_: None
    ) -> None:
        """Make the steps that are left, up to `until`, from the folder's checkpoint on if there is one.

        done: called after every step with the number of steps made and the figures of the step.
        """
        every = self.config.run.log_every
        if until is not None and until < self.config.steps and until % every:
            raise TrainingConfigError(
                f"a run can stop after a multiple of log_every ({every}) steps, got {until}; its log would differ from "
                "that of a run that did not stop"
            )
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
            if log is not None or self.sharded:
                self._write(folder, log, since, stops=self.step == last)
            if self.step % self.config.run.log_every == 0:
                since = []
            done(self.step, figures)
        if self.step == self.config.steps and (self.share.writes or self.sharded):
            self.export()

    def _write(self, folder: Path, log: Metrics | None, since: Sequence[Mapping[str, float]], *, stops: bool) -> None:
        """Write what is due after a step. Processes without a log only give their shards."""
        every = self.config.run
        if log is not None and self.step % every.log_every == 0:
            log.write(self.step, _means(since))
        ends = self.step == self.config.steps
        if every.evaluate_every and (ends or self.step % every.evaluate_every == 0):
            with self._averaged() as stage:
                if stage is not None and log is not None:
                    log.write(self.step, stage.evaluate(folder, self.step))
        if stops or self.step % every.save_every == 0:
            self.save(folder / CHECKPOINT)
        if every.keep_every and self.step % every.keep_every == 0:
            self.save(folder / f"checkpoint-{self.step}.safetensors")


def _means(lines: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    """The mean of each figure over the steps that have it: networks that take turns have figures of their own."""
    found: dict[str, list[float]] = {}
    for line in lines:
        for name, value in line.items():
            found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}
