"""Stage `student`: block-causal flow matching of a tiny Wan in the cache's own layout, its compressor trained with it.

Every step draws clips, consecutive ones and ones with gaps in which a room returns, and a layout of the past. A model
that never trained without its first block falls apart without it, so some layouts have no sink. Compressed tokens are
needed only where a room returns that neither sink nor recent shows, which is too seldom to learn to write and to read
them. So in some layouts all of the past is compressed, and in one each block is shown itself, compressed, as if an
earlier block had been the same. The clean past is given with a little noise, since a rollout's own past is not perfect
either.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool3d

from kvtiers_diffusers import tiered
from kvtiers_packforcing.dual_branch import DualBranch
from kvtiers_packforcing.network import HighResolution
from kvtiers_packforcing.seeding import seed_of
from kvtiers_packforcing.tiny_world import (
    FIRST_FRAME,
    FRAMES_PER_BLOCK,
    HEIGHT,
    LATENT_CHANNELS,
    TEXT_WIDTH,
    WIDTH,
    Clips,
    LinearCodec,
    render,
    text_table,
)
from kvtiers_packforcing.tiny_world.sampling import Sampler
from kvtiers_packforcing.tiny_world.vocabulary import BLOCK_FRAMES, ROOMS
from kvtiers_packforcing.tiny_world.weights import write_sampler
from kvtiers_packforcing.training.causal_clips import high_resolution
from kvtiers_packforcing.training.config import TrainingConfig, TrainingConfigError
from kvtiers_packforcing.training.evaluation import draw_rollout, returns_beyond_the_sink
from kvtiers_packforcing.training.layout import LAYOUTS, Layout
from kvtiers_packforcing.training.matching import match_prompts, mismatch
from kvtiers_packforcing.training.noising import by_frame, draw_clip
from kvtiers_packforcing.training.packed import PackedWan, packed
from kvtiers_packforcing.training.precision import mixed, prepare, uncompiled
from kvtiers_packforcing.training.saved import check_autoencoder, check_student, frozen_autoencoder, load_student
from kvtiers_packforcing.training.sharding import gathered, shard
from kvtiers_packforcing.training.stage import Stage
from kvtiers_packforcing.training.student_config import StudentConfig, StudentPhase

_GRID = (HEIGHT // 16, WIDTH // 16)
_SAMPLER = Sampler(steps=8, shift=3.0, kind="multistep")
"""How a block is denoised in an evaluation, and where the weights are used."""
_EARLIER_BLOCKS = 6
"""How many blocks before itself a block's own reduced tokens are placed at most, in layout `compressed_self`."""


class StudentStage(Stage):
    """The video model of the tiny world."""

    name = "student"
    model_config = StudentConfig
    phase_config = StudentPhase

    def __init__(self, config: TrainingConfig) -> None:
        self.preparation(config)
        super().__init__(config)
        self.codec = LinearCodec.load()
        self.offsets = DualBranch().offsets(BLOCK_FRAMES, _GRID)
        prepare(self.transformer, config.run)
        self.vae: Any = frozen_autoencoder(config.model.autoencoder, self.device)

    @classmethod
    def preparation(cls, config: TrainingConfig) -> Callable[[], object]:
        """There is nothing to do. Raises `TrainingConfigError` for folders that hold no models."""
        check_autoencoder(config.model.autoencoder)
        if config.model.start is not None:
            check_student("start", config.model.start)
        return super().preparation(config)

    def make_model(self, settings: StudentConfig) -> nn.Module:
        start: Any = None if settings.start is None else load_student(settings.start)
        made = self._made(settings, normalise=start is None or start["compressor"].config.normalise)
        if start is not None:
            theirs, ours = start.state_dict(), made.state_dict()
            if [(name, part.shape) for name, part in theirs.items()] != [(n, part.shape) for n, part in ours.items()]:
                raise TrainingConfigError(
                    f"[model]: start: the model in {settings.start} is of another size than [model] says; give the "
                    "width, layers, heads, ffn_width and compressor_width that it was trained with"
                )
            made.load_state_dict(theirs)
        if settings.match_prompts:
            match_prompts(made.get_submodule("transformer"))
        return made

    def _made(self, settings: StudentConfig, *, normalise: bool) -> nn.ModuleDict:
        """A model with random weights."""
        transformer: Any = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=settings.heads,
            attention_head_dim=settings.width // settings.heads,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            text_dim=TEXT_WIDTH,
            freq_dim=64,
            ffn_dim=settings.ffn_width,
            num_layers=settings.layers,
            cross_attn_norm=True,
        )
        nn.init.zeros_(transformer.proj_out.weight)
        nn.init.zeros_(transformer.proj_out.bias)
        widths = [settings.compressor_width * 2**layer for layer in range(4)]
        compressor = HighResolution(LATENT_CHANNELS, settings.width, widths, normalise=normalise)
        return nn.ModuleDict({"transformer": transformer, "compressor": compressor})

    @property
    def origins(self) -> Mapping[str, Path]:
        settings = self.config.model
        folders = {name: getattr(settings, name) for name in ("start", "autoencoder")}
        return {name: Path(folder) for name, folder in folders.items() if folder is not None}

    @property
    def transformer(self) -> Any:
        """The Wan transformer."""
        return self.model.get_submodule("transformer")

    @property
    def compressor(self) -> Any:
        """The HR branch of its compressor."""
        return self.model.get_submodule("compressor")

    def shard(self) -> None:
        shard(self.transformer, self.device)
        shard(self.compressor, self.device)

    def loss(self, phase: StudentPhase, step: int, numbers: Sequence[int]) -> tuple[Tensor, Mapping[str, Tensor]]:
        with packed(self.transformer, self._layout(phase, step)) as wan:
            return self._loss(wan, phase, step, numbers)

    def backward(self, phase: StudentPhase, step: int, numbers: Sequence[int]) -> tuple[Tensor, Mapping[str, Tensor]]:
        with packed(self.transformer, self._layout(phase, step)) as wan:  # layers may be run again for their gradients
            loss, figures = self._loss(wan, phase, step, numbers)
            loss.backward()
        return loss.detach(), figures

    def _loss(
        self, wan: PackedWan, phase: StudentPhase, step: int, numbers: Sequence[int]
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        names = [f"{self.config.run.seed}/{step}/{nth}" for nth in numbers]
        clips = Clips.of_seeds(names, length=phase.clip_blocks)
        latents, text = self.codec.encode(clips.pixels()).to(self.device), clips.text().to(self.device)
        drawn = [draw_clip(name, phase.noisy_streams, latents.shape[1:], self.config.model) for name in names]
        sigmas, noise, dirt, starts, told = (torch.stack(parts).to(self.device) for parts in zip(*drawn, strict=True))
        noisy = torch.lerp(latents[:, None], noise, by_frame(sigmas))
        with gathered(self.transformer):
            low = self.low_resolution(clips, latents, wan.layout)
        clean = torch.lerp(latents, dirt[:, 1], dirt[:, 0])
        earlier = random.Random(f"earlier {self.config.run.seed}/{step}").randint(1, _EARLIER_BLOCKS)
        weight = self.config.model.match_weight
        affinities: list[Tensor] | None = [] if weight else None
        with mixed(self.config.run, latents.device):
            flow = self.predict(
                wan, clean, noisy, sigmas, text, starts=starts, low=low, earlier=earlier, told=told,
                affinities=affinities,
            )  # fmt: skip
        off = (flow - (noise - latents[:, None])).square()
        own = (off.detach() * by_frame(sigmas).square()).unflatten(3, (-1, BLOCK_FRAMES)).mean((0, 1, 2, 4, 5, 6))
        loss, figures = off.mean(), {"flow": off.detach().mean(), "first_block": own[0], "later_blocks": own[1:].mean()}
        if affinities is not None:
            liked = torch.stack(affinities[1:]).float().mean(-1)  # the first layer knows no prompt yet
            every, compressed = (
                mismatch(liked, clips, which) for which in (None, wan.layout.forms(latents.shape[2] // BLOCK_FRAMES))
            )
            loss = loss + weight * (every + compressed)
            figures |= {"mismatch": every.detach(), "mismatch_compressed": compressed.detach()}
        return loss, figures

    def predict(
        self,
        wan: PackedWan,
        clean: Tensor,
        noisy: Tensor,
        sigmas: Tensor,
        text: Tensor,
        *,
        starts: Tensor | None = None,
        low: Tensor | None = None,
        earlier: int = 1,
        told: Tensor | None = None,
        affinities: list[Tensor] | None = None,
    ) -> Tensor:
        """The flow of noisy streams, given a clean past. [batch, streams, channels, frames, height, width]

        low: what `low_resolution` gave for the layout. earlier: how many blocks before itself a block attends its own
        reduced tokens, in a layout in which it does: as if that block had shown the same. told: which noisy streams are
        told their prompts, [batch, streams]; none: all. The others are given zeros. affinities: see `PackedWan`.
        """
        count = sigmas.shape[2]
        blocks = wan.layout.compressed(count)
        more: dict[str, Tensor] = {}
        if blocks:
            tokens = high_resolution(self.compressor, clean, count, blocks)
            offsets = self.offsets.clone()
            if wan.layout.itself:
                offsets[:, 0] -= earlier * BLOCK_FRAMES
            more = {"reduced": tokens if low is None else tokens + low, "offsets": offsets}
        levels = torch.cat((torch.zeros_like(sigmas[:, :1]), sigmas), 1)
        if told is not None:
            heard = torch.cat((torch.ones_like(told[:, :1]), told), 1)
            text = text[:, None] * heard[:, :, None, None, None]
        every = torch.cat((clean[:, None], noisy), 1)
        return wan(every, levels, text, starts=starts, affinities=affinities, **more)[:, 1:]

    def low_resolution(self, clips: Clips, latents: Tensor, layout: Layout) -> Tensor | None:
        """The tokens of the compressor's low-resolution branch, of the blocks that a layout compresses.

        [batch, compressed, reduced_tokens, width], or None without an autoencoder or such blocks. It pools true pixels.
        """
        blocks = layout.compressed(clips.blocks.shape[1])
        if self.vae is None or not blocks:
            return None
        reducer = DualBranch(branches="lr").bind(self.transformer, self.vae)
        found = []
        for block in blocks:
            first = clips.blocks[:, block, None] * FRAMES_PER_BLOCK
            frames = first + torch.arange(-1 if block else FIRST_FRAME, FRAMES_PER_BLOCK)
            pixels = render(clips.houses, clips.walks, frames).to(self.device)
            if block:  # the frame before the block, which the cache remembers
                reducer.restore({"last": adaptive_avg_pool3d(pixels[:, :, :1], (1, HEIGHT // 4, WIDTH // 4))})
                pixels = pixels[:, :, 1:]
            cut = latents[:, :, block * BLOCK_FRAMES : (block + 1) * BLOCK_FRAMES]
            found.append(reducer.reduce(cut, pixels).tokens)
        return torch.stack(found, 1)

    def _layout(self, phase: StudentPhase, step: int) -> Layout:
        draw = random.Random(f"layout {self.config.run.seed}/{step}")
        return LAYOUTS[draw.choices(list(phase.layouts), list(phase.layouts.values()))[0]]

    @torch.no_grad()
    @uncompiled()
    def evaluate(self, folder: Path, step: int) -> Mapping[str, float]:
        """`told` in returns that are not trained on, by layout.

        Where a room returns that the first block does not show, `sink_window` and `window` cannot know it. If
        `packforcing` is no better there, the model does not use its memory. `return_misnamed` is its error where the
        room that returns is told another room's name. If it is no worse, the model does not know its prompts.
        """
        clips = returns_beyond_the_sink(16)
        found = {
            f"{figure}_{name}": value
            for name, layout in LAYOUTS.items()
            for figure, value in self.told(clips, layout).items()
        }
        found["return_misnamed"] = self.told(clips, LAYOUTS["packforcing"], misnamed=True)["return"]
        draw_rollout(folder / f"step-{step:06d}.png", self.codec, self.rollout)
        return found

    @torch.no_grad()
    def told(self, clips: Clips, layout: Layout, *, misnamed: bool = False) -> Mapping[str, float]:
        """How well clean latents are told from noisy ones. The noise is the same every time.

        * `return`: the mean squared error of the clean latents where a room returns, over three levels of noise.
        * `all`: that of all blocks.
        * `mismatch`: how far queries are from liking blocks of their own room more, in the form in which they attend
          them; 1: not at all. It is left out of a model of one layer. `mismatch_compressed` is that among compressed
          blocks alone, in a layout that has any: whole blocks hide what compressed ones lack.

        clips: of kind `return`. misnamed: whether the block of the return is told the name of another room.
        """
        latents, text = self.codec.encode(clips.pixels()).to(self.device), clips.text().to(self.device)
        blocks = clips.blocks.shape[1]
        rows, at = torch.arange(len(latents)), torch.tensor([clips.returns(row) or 0 for row in range(len(latents))])
        if misnamed:
            rooms = clips.walks.rooms[rows, clips.blocks[rows, at]]
            text[rows, at, 0] = text_table()[(rooms + 1) % len(ROOMS)].to(self.device)
        generator = torch.Generator().manual_seed(seed_of("evaluation"))
        sigmas = torch.tensor([0.95, 0.8, 0.5], device=self.device)[None, :, None].expand(len(latents), -1, blocks)
        noise = torch.randn(len(latents), 3, *latents.shape[1:], generator=generator).to(self.device)
        noisy = torch.lerp(latents[:, None], noise, by_frame(sigmas))
        affinities: list[Tensor] = []
        with packed(self.transformer, layout) as wan:
            low = self.low_resolution(clips, latents, layout)
            flow = self.predict(wan, latents, noisy, sigmas, text, low=low, affinities=affinities)
        off = ((flow - (noise - latents[:, None])) * by_frame(sigmas)).square()
        by_block = off.unflatten(3, (blocks, -1)).mean((1, 2, 4, 5, 6)).cpu()
        found = {"return": float(by_block[rows, at].mean()), "all": float(by_block.mean())}
        if affinities[1:]:  # the first layer knows no prompt yet
            liked = torch.stack(affinities[1:]).float().mean(-1)
            found["mismatch"] = float(mismatch(liked, clips))
            if layout.mid == "compressed":
                found["mismatch_compressed"] = float(mismatch(liked, clips, layout.forms(blocks)))
        return found

    @torch.no_grad()
    def rollout(
        self, given: Tensor, text: Tensor, *, sampler: Sampler = _SAMPLER, seed: int = 0, top_k: int = 2
    ) -> Tensor:
        """The latents of a video through the cache: `given` blocks, then one for each further prompt.

        given: [batch, channels, frames, height, width]. text: [batch, blocks, words, text_width]. sampler: of the
        blocks that are not given. seed: of their noise.
        """
        generator, made = torch.Generator().manual_seed(seed), []
        options: dict[str, Any] = {"sink": BLOCK_FRAMES, "recent": BLOCK_FRAMES, "top_k": top_k}
        options |= {"branches": "hr" if self.vae is None else "both", "compressor_network": self.compressor}
        given, text = given.to(self.device), text.to(self.device)
        with tiered(self.transformer, "packforcing", vae=self.vae, **options) as wan:
            for nth in range(text.shape[1]):
                block = given[:, :, nth * BLOCK_FRAMES : (nth + 1) * BLOCK_FRAMES]
                if not block.shape[2]:
                    shape = (*block.shape[:2], BLOCK_FRAMES, *block.shape[3:])
                    noises = [torch.randn(shape, generator=generator) for _ in range(sampler.noises)]
                    block = sampler.denoise(wan, [noise.to(self.device) for noise in noises], text[:, nth])
                wan.commit(block, text[:, nth])
                made.append(block)
        return torch.cat(made, 2).cpu()

    def export(self, folder: Path) -> None:
        """Write the transformer and the compressor as diffusers does, and how blocks are to be denoised."""
        self.transformer.save_pretrained(folder / "transformer")
        self.compressor.save_pretrained(folder / "compressor")
        write_sampler(folder, _SAMPLER)
