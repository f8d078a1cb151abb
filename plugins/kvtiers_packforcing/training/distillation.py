"""What stages that distill have in common: the generator's self-rollout, and turns of generator and critic.

Source: PackForcing (arXiv 2603.25730) sections 3 and 4.1, over Self-Forcing (arXiv 2506.08009).

The generator makes every clip as it will make videos: block by block, through the cache, in a few steps. A random step
is the last one (the exit step), and only it is trained. So the rollout needs no gradient. One packed forward over what
it made then predicts the exit step of all blocks again, with a gradient, which ends at the past: keys and values that
are attended in full are constants. What lies between sink and recent is attended as the compressor's tokens of what was
generated, and through these the loss reaches the compressor.
"""

import abc
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn

from kvtiers_packforcing.guidance import guided
from kvtiers_packforcing.seeding import generator_of
from kvtiers_packforcing.tiny_world.vocabulary import BLOCK_FRAMES
from kvtiers_packforcing.training.causal_clips import CausalClips
from kvtiers_packforcing.training.config import TrainingConfig
from kvtiers_packforcing.training.dmd import Score, critic_loss, generator_loss
from kvtiers_packforcing.training.packed import PackedWan
from kvtiers_packforcing.training.precision import mixed
from kvtiers_packforcing.training.sampling import Rollout, roll_out
from kvtiers_packforcing.training.sharding import shard
from kvtiers_packforcing.training.stage import Stage


@attrs.frozen(eq=False, kw_only=True)
class Generated:
    """Clips that the generator made of `text`, and what its compressor's low-resolution branch sees of them."""

    text: Tensor
    rollout: Rollout
    low: Tensor | None


class Distillation(Stage):
    """A generator that learns to make in a few steps what a teacher makes in many, and a critic that follows it."""

    alone: ClassVar[bool]
    """Whether the scores look at each block at a noise level of its own, or at a clip at one."""

    def __init__(self, config: TrainingConfig) -> None:
        super().__init__(config)
        self.sigmas = config.model.sigmas()
        self._held: tuple[object, Generated] | None = None

    # ------------------------------------------------------------------ what a kind of videos has to say

    @property
    @abc.abstractmethod
    def generator(self) -> CausalClips:
        """What is trained, with its compressor."""

    @property
    @abc.abstractmethod
    def others(self) -> Sequence[nn.Module]:
        """The networks beside the generator, each a container of its parts."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int, int, int]:
        """Channels, frames, height and width of a clip's latents."""

    @property
    @abc.abstractmethod
    def vae(self) -> Any:
        """The autoencoder of the compressor's low-resolution branch, if it has one."""

    @abc.abstractmethod
    def text(self, names: Sequence[str]) -> Tensor:
        """The prompts of clips with these names, [batch, blocks, words, text_width]."""

    @abc.abstractmethod
    def pixels(self, latents: Tensor, first: bool) -> Tensor | None:
        """The pixels of a video's next block, or of its `first` ones, for `vae`; None if that looks at none."""

    @abc.abstractmethod
    def real(self, made: Generated) -> AbstractContextManager[Score]:
        """The teacher's score of these clips."""

    @abc.abstractmethod
    def fake(self, made: Generated) -> AbstractContextManager[Score]:
        """The critic's score of these clips. It is trained inside of the block."""

    # ------------------------------------------------------------------ turns

    def turn(self, step: int) -> str:
        phase, within = self.config.phase_at(step)
        return "critic" if phase.loss == "dmd" and within % self._cycle < self._cycle - 1 else "model"

    def peak_rate(self, network: str, phase: Any) -> float:
        rate: float = phase.critic_rate if network == "critic" else phase.peak_rate
        return rate

    def betas(self, network: str) -> tuple[float, float]:
        found: tuple[float, float] = self.config.model.critic_betas if network == "critic" else super().betas(network)
        return found

    @property
    def _cycle(self) -> int:
        """Steps from one update of the generator to its next."""
        return 1 + int(self.config.model.critic_updates)

    def _drawn_at(self, step: int) -> int:
        """The step that says which clips are made for a step: its own, or the first one of its cycle."""
        return step - self.config.phase_at(step)[1] % self._cycle if self.config.model.share_rollouts else step

    def shard(self) -> None:
        for networks in (self.model, *self.others):
            for network in networks.children():
                shard(network, self.device)

    def export(self, folder: Path) -> None:
        """Write the transformer and the compressor as diffusers does."""
        for name, part in self.model.named_children():
            network: Any = part
            network.save_pretrained(folder / name)

    # ------------------------------------------------------------------ losses

    def loss(self, phase: Any, step: int, numbers: Sequence[int]) -> tuple[Tensor, Mapping[str, Tensor]]:
        with ExitStack() as stack:
            return self._loss(stack, phase, step, numbers)

    def backward(self, phase: Any, step: int, numbers: Sequence[int]) -> tuple[Tensor, Mapping[str, Tensor]]:
        with ExitStack() as stack:  # layers may be run again for their gradients
            loss, figures = self._loss(stack, phase, step, numbers)
            loss.backward()
        return loss.detach(), figures

    def _loss(
        self, stack: ExitStack, phase: Any, step: int, numbers: Sequence[int]
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """A step of DMD. What must last until gradients were taken is entered into `stack`."""
        made = self.generated(step, numbers)
        sigmas, noise = self._levels(step, numbers)
        if self.turn(step) == "critic":
            fake = stack.enter_context(self.fake(made))
            with mixed(self.config.run, self.device):
                return critic_loss(made.rollout.latents, sigmas, noise, fake=fake), {}
        wan = stack.enter_context(self.generator.packed(detach_history=True))
        with mixed(self.config.run, self.device):
            clips = self.exit_step(wan, made)
        with mixed(self.config.run, self.device), self.real(made) as real, self.fake(made) as fake:
            return generator_loss(clips, sigmas, noise, real=real, fake=fake, alone=self.alone)

    def generated(self, step: int, numbers: Sequence[int]) -> Generated:
        """The clips that the generator makes for a step."""
        at, weights = self._drawn_at(step), sum(weight._version for weight in self.model.parameters())
        key = (at, tuple(numbers), weights)
        if self._held is None or self._held[0] != key:
            names = self.names(at, numbers)
            draw = random.Random(f"exit {self.config.run.seed}/{at}")  # the same one for all clips of a step
            self._held = key, self._make(names, 1 + int(draw.random() * len(self.sigmas)))
        return self._held[1]

    def _make(self, names: Sequence[str], steps: int) -> Generated:
        text = self.text(names).to(self.device)
        rollout = self.self_rollout(names, text, steps)
        return Generated(text=text, rollout=rollout, low=self.low(rollout.latents, rollout.pixels))

    def self_rollout(self, names: Sequence[str], text: Tensor, steps: int) -> Rollout:
        """Clips of the generator that exit after `steps` steps."""
        noise = self.noise("rollout", names, steps)
        with self.generator.cached(BLOCK_FRAMES, text.shape[1], self.vae) as wan:
            return roll_out(wan, noise, text, self.sigmas[:steps], self.pixels)

    def exit_step(self, wan: PackedWan, made: Generated) -> Tensor:
        """What the rollout made, predicted again from its noisy inputs, with a gradient."""
        rollout = made.rollout
        sigmas = torch.full((len(made.text), 1, made.text.shape[1]), rollout.sigma, device=self.device)
        sigmas = sigmas.to(rollout.inputs.dtype)
        flow = self.generator.predict(wan, rollout.latents, rollout.inputs[:, None], sigmas, made.text, made.low)
        return rollout.inputs - rollout.sigma * flow[:, 0]

    def low(self, latents: Tensor, pixels: Tensor | None) -> Tensor | None:
        """What `CausalClips.low_resolution` finds of clips."""
        if self.vae is None or pixels is None:
            return None
        return self.generator.low_resolution(latents, pixels, latents.shape[2] // BLOCK_FRAMES, self.vae)

    # ------------------------------------------------------------------ what is drawn

    def names(self, step: int, numbers: Sequence[int]) -> list[str]:
        """Of the clips of a step; all that is drawn for a clip depends on its name."""
        return [f"{self.config.run.seed}/{step}/{nth}" for nth in numbers]

    def noise(self, what: str, names: Sequence[str], *times: int) -> Tensor:
        """Noise of the shape of a clip for each name, or several times of it."""
        shape = (*times, *self.shape)
        drawn = [torch.randn(shape, generator=generator_of(what, name)) for name in names]
        return torch.stack(drawn).to(self.device)

    def _levels(self, step: int, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Where the scores look: noise levels, [batch, blocks], and noise."""
        names, blocks = self.names(step, numbers), self.shape[1] // BLOCK_FRAMES
        parts = [
            torch.rand(blocks if self.alone else 1, generator=generator_of("levels", name)).expand(blocks).tolist()
            for name in names
        ]
        levels = torch.tensor([self.config.model.levels(part) for part in parts], device=self.device)
        return levels, self.noise("score", names)


@contextmanager
def whole_score(
    transformer: Any, made: Generated, negative: Tensor | None = None, guidance: float = 0.0
) -> Iterator[Score]:
    """The score of whole clips by a model that looks at all frames at once, as Wan was trained.

    guidance: how far to go on from the prompt's flow, away from that of `negative` [1, words, text_width], counted as
    Self-Forcing's code does.
    """

    def score(noisy: Tensor, sigmas: Tensor) -> Tensor:
        def flow_of(words: Tensor) -> Tensor:
            flow: Tensor = transformer(noisy, sigmas[:, 0] * 1000, words, return_dict=False)[0]
            return flow

        without = None if negative is None else negative.expand(len(noisy), -1, -1)
        return guided(flow_of, made.text[:, 0], without, guidance)

    yield score


@contextmanager
def causal_score(clips: CausalClips, made: Generated, guidance: float = 0.0) -> Iterator[Score]:
    """The score of each block given the generated blocks before it, at once for all blocks.

    guidance: how far to go on from the prompts' flow, away from that without a prompt; the past keeps its prompts.

    By the chain rule the KL divergence of whole clips is the sum of those of each block given its past, which the
    generator itself makes. So a causal teacher can be matched without a model of whole clips.
    """
    with clips.packed() as wan:

        def score(noisy: Tensor, sigmas: Tensor) -> Tensor:
            def flow_of(words: Tensor) -> Tensor:
                text = torch.stack((made.text, words), 1)
                return clips.predict(wan, made.rollout.latents, noisy[:, None], sigmas[:, None], text, made.low)[:, 0]

            return guided(flow_of, made.text, torch.zeros_like(made.text), guidance)

        yield score
