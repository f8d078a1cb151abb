"""Stage `distill`: the tiny world's student, which takes many steps for a block, becomes one that takes four.

Generator, teacher and critic all start as what stage `student` exported. Teacher and critic are causal, as the student
is: they judge each block given the generated blocks before it (`causal_score`), since the tiny world has no model of
whole clips. The teacher may be guided away from no prompt; its few-step student then needs no guidance.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvtiers_packforcing.seeding import generator_of
from kvtiers_packforcing.tiny_world import CLIP_BLOCKS, HEIGHT, LATENT_CHANNELS, WIDTH, Clips, LinearCodec
from kvtiers_packforcing.tiny_world.vocabulary import BLOCK_FRAMES
from kvtiers_packforcing.tiny_world.weights import write_sampler
from kvtiers_packforcing.training.causal_clips import CausalClips
from kvtiers_packforcing.training.config import TrainingConfig
from kvtiers_packforcing.training.distill_config import DistillPhase, TinyDistillConfig
from kvtiers_packforcing.training.distillation import Distillation, Generated, causal_score
from kvtiers_packforcing.training.dmd import Score
from kvtiers_packforcing.training.evaluation import draw_rollout, returns_beyond_the_sink
from kvtiers_packforcing.training.precision import mixed, prepare
from kvtiers_packforcing.training.sampling import given_history, roll_out
from kvtiers_packforcing.training.saved import check_autoencoder, check_student, frozen_autoencoder, load_student
from kvtiers_packforcing.training.trajectory import trajectory_loss

_CELL = 8
"""Pixels in height and width of a latent."""


class DistillStage(Distillation):
    """The few-step video model of the tiny world."""

    name = "distill"
    model_config = TinyDistillConfig
    phase_config = DistillPhase
    alone = True

    def __init__(self, config: TrainingConfig) -> None:
        self.check(config.model)
        super().__init__(config)
        self.codec = LinearCodec.load()
        self._vae = frozen_autoencoder(config.model.autoencoder, self.device)
        teacher = config.model.teacher or config.model.start
        self.critic = load_student(teacher).to(self.device)
        self.teacher = load_student(teacher).to(self.device).eval().requires_grad_(False)
        for networks in (self.model, self.teacher, self.critic):
            prepare(networks.get_submodule("transformer"), config.run)
        self._clips = {
            name: CausalClips(
                transformer=part.get_submodule("transformer"),
                compressor=part.get_submodule("compressor"),
                layout=config.model.layout,
            )
            for name, part in (("generator", self.model), ("teacher", self.teacher), ("critic", self.critic))
        }

    @staticmethod
    def check(settings: TinyDistillConfig) -> None:
        """Raise `TrainingConfigError` for folders that hold no models. Loads nothing."""
        check_student("start", settings.start)
        if settings.teacher is not None:
            check_student("teacher", settings.teacher)
        check_autoencoder(settings.autoencoder)

    def make_model(self, settings: TinyDistillConfig) -> nn.Module:
        return load_student(settings.start)

    def export(self, folder: Path) -> None:
        """Write the transformer and the compressor as diffusers does, and how blocks are to be denoised."""
        super().export(folder)
        write_sampler(folder, self.config.model.sampler)

    @property
    def origins(self) -> Mapping[str, Path]:
        settings = self.config.model
        folders = {name: getattr(settings, name) for name in ("start", "teacher", "autoencoder")}
        return {name: Path(folder) for name, folder in folders.items() if folder is not None}

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        found = {"model": self.model}
        if any(phase.loss == "dmd" for phase in self.config.phases):
            found["critic"] = self.critic
        return found

    @property
    def others(self) -> Sequence[nn.Module]:
        return self.teacher, self.critic

    @property
    def generator(self) -> CausalClips:
        return self._clips["generator"]

    @property
    def teacher_clips(self) -> CausalClips:
        """What the teacher predicts clips with."""
        return self._clips["teacher"]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return LATENT_CHANNELS, CLIP_BLOCKS * BLOCK_FRAMES, HEIGHT // _CELL, WIDTH // _CELL

    @property
    def vae(self) -> Any:
        return self._vae

    def text(self, names: Sequence[str]) -> Tensor:
        return Clips.of_seeds(names).text()

    def pixels(self, latents: Tensor, first: bool) -> Tensor | None:
        """By the linear codec, which is quicker than the autoencoder, and whose latents these are."""
        if self.vae is None:
            return None
        if first:
            return self.codec.decode(latents.cpu()).to(self.device)
        before = torch.zeros_like(latents[:, :, :1])  # the first latent frame stands for one frame; not this one
        return self.codec.decode(torch.cat((before, latents), 2).cpu()).to(self.device)[:, :, 1:]

    def real(self, made: Generated) -> AbstractContextManager[Score]:
        return causal_score(self.teacher_clips, made, self.config.model.guidance)

    def fake(self, made: Generated) -> AbstractContextManager[Score]:
        return causal_score(self._clips["critic"], made)

    def _loss(
        self, stack: ExitStack, phase: DistillPhase, step: int, numbers: Sequence[int]
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        if phase.loss == "dmd":
            return super()._loss(stack, phase, step, numbers)
        names = self.names(step, numbers)
        clips = Clips.of_seeds(names)
        text = clips.text().to(self.device)
        if phase.history == "own":
            rollout = self.self_rollout(names, text, len(self.sigmas))
            history, pixels = rollout.latents, rollout.pixels
        else:
            history = self.codec.encode(clips.pixels()).to(self.device)
            pixels = self.pixels(history, True)
        passed = self.trajectory(history, text, self.noise("trajectory", names), phase.teacher_steps)
        wan = stack.enter_context(self.generator.packed())
        low = self.low(history, pixels)
        with mixed(self.config.run, self.device):
            return trajectory_loss(wan, self.generator, passed, self.sigmas, history=history, text=text, low=low)

    def trajectory(self, history: Tensor, text: Tensor, noise: Tensor, each: int) -> list[Tensor]:
        """What the teacher passes by at each noise level of the few steps, and where it ends."""
        with self.teacher_clips.cached(BLOCK_FRAMES, text.shape[1], self.vae) as wan:
            settings = self.config.model
            passed = given_history(
                wan, history, noise, text, settings.sigmas(each), self.pixels, guidance=settings.guidance
            )
        return [*passed[:-1:each], passed[-1]]

    @torch.no_grad()
    def evaluate(self, folder: Path, step: int) -> Mapping[str, float]:
        """Mean squared errors of blocks that are made in a few steps after a true past, in clips not trained on.

        `return` is of the block in which a room returns that only compressed history has seen, `all` of every block;
        `many_steps` are the teacher's. `off_path` is how far a few steps end from where the teacher's many steps do.
        Both begin with the same noise; later steps renoise with fresh noise, so it is not 0 for a perfect model either.
        """
        clips = returns_beyond_the_sink(8)
        names = [f"evaluation {nth}" for nth in range(8)]
        latents, text = self.codec.encode(clips.pixels()).to(self.device), clips.text().to(self.device)
        noise = self.noise("evaluation", names, len(self.sigmas))
        found = {"": self._few_steps(latents, text, noise)}
        found["_many_steps"] = self.trajectory(latents, text, noise[:, 0], 4)[-1]
        at = torch.tensor([clips.returns(row) or 0 for row in range(len(latents))])
        told: dict[str, float] = {"off_path": float((found[""] - found["_many_steps"]).square().mean())}
        for name, made in found.items():
            off = (made - latents).square().unflatten(2, (CLIP_BLOCKS, -1)).mean((1, 3, 4, 5)).cpu()
            told |= {f"return{name}": float(off[torch.arange(len(at)), at].mean()), f"all{name}": float(off.mean())}
        draw_rollout(folder / f"step-{step:06d}.png", self.codec, self._go_on)
        return told

    def _go_on(self, given: Tensor, text: Tensor) -> Tensor:
        """A video in a few steps a block, from its first blocks on."""
        shape = (len(given), len(self.sigmas), given.shape[1], text.shape[1] * BLOCK_FRAMES, *given.shape[3:])
        noise = torch.randn(shape, generator=generator_of("rollout of an evaluation")).to(self.device)
        made = self._few_steps(given.to(self.device), text.to(self.device), noise).cpu()
        return torch.cat((given, made[:, :, given.shape[2] :]), 2)

    def _few_steps(self, history: Tensor, text: Tensor, noise: Tensor) -> Tensor:
        """Blocks in a few steps each, where the first ones, or all, are remembered as `history` has them."""
        with self.generator.cached(BLOCK_FRAMES, text.shape[1], self.vae) as wan:
            return roll_out(wan, noise, text, self.sigmas, self.pixels, history=history).latents
