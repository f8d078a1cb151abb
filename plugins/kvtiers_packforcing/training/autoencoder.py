"""Stage `autoencoder`: a small AutoencoderKLWan whose latents are those of the tiny world's linear codec.

The encoder is taught the codec's latents, the decoder to draw the true pixels from them. Because the target of the
latents is known from the beginning, a video model can be trained on the codec's latents meanwhile.

Two things from the first attempts. Causal convolutions that only ever saw short clips take padding for history, and
get worse with time: so the last phase has clips of many frames. And most of a frame is a ground that stands still:
so pixels that move weigh up to five times as much.
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from kvtiers_packforcing.seeding import generator_of
from kvtiers_packforcing.tiny_world import (
    FIRST_FRAME,
    HEIGHT,
    LATENT_CHANNELS,
    WALK_BLOCKS,
    WIDTH,
    Houses,
    LinearCodec,
    Walks,
    contact_sheet,
    psnr,
    render,
)
from kvtiers_packforcing.training.config import Phase, TrainingConfig, TrainingConfigError, number, one_of, whole
from kvtiers_packforcing.training.stage import Stage
from kvtiers_packforcing.training.whole_sequence import decode_whole, encode_whole

_CELL = 8
_SHORT, _LONG = 9, 77
_PATCH = 2


@attrs.frozen(kw_only=True)
class AutoencoderConfig:
    """The size of the autoencoder. Its stride is 4 x 8 x 8, its latents have 16 channels."""

    base_dim: int = whole(1, default=12)
    res_blocks: int = whole(1, default=1)
    latent_noise: float = number(0.0, default=0.03)


@attrs.frozen(kw_only=True)
class AutoencoderPhase(Phase):
    """How a phase shows clips. A crop has whole cells of 8 x 8 pixels; the picture is 64 x 128.

    decoder_input: what the decoder draws from: the `codec`'s latents, the `encoder`'s, or `both`, in turns.
    """

    frames: int = whole(1)
    crop_height: int = whole(_CELL, default=HEIGHT)
    crop_width: int = whole(_CELL, default=WIDTH)
    decoder_input: str = one_of("codec", "encoder", "both")
    fit_weight: float = number(0.0, default=1.0)

    def __attrs_post_init__(self) -> None:
        if self.frames % 4 != 1:
            raise TrainingConfigError(f"frames must be 1 more than a multiple of 4, got {self.frames}")
        for name, most in (("crop_height", HEIGHT), ("crop_width", WIDTH)):
            if getattr(self, name) % _CELL or getattr(self, name) > most:
                raise TrainingConfigError(
                    f"{name} must be a multiple of {_CELL}, at most {most}, got {getattr(self, name)}"
                )


class AutoencoderStage(Stage):
    """The autoencoder of the tiny world."""

    name = "autoencoder"
    model: Any  # (diffusers has no types)
    model_config = AutoencoderConfig
    phase_config = AutoencoderPhase

    def __init__(self, config: TrainingConfig) -> None:
        super().__init__(config)
        self.codec = LinearCodec.load()

    def make_model(self, settings: AutoencoderConfig) -> Any:
        vae: Any = AutoencoderKLWan(
            base_dim=settings.base_dim,
            z_dim=LATENT_CHANNELS,
            dim_mult=[1, 2, 4],
            num_res_blocks=settings.res_blocks,
            temperal_downsample=[True, True],
            patch_size=_PATCH,
            in_channels=3 * _PATCH**2,
            out_channels=3 * _PATCH**2,
            latents_mean=[0.0] * LATENT_CHANNELS,
            latents_std=[1.0] * LATENT_CHANNELS,
        )
        with torch.no_grad():  # the variance is not trained: make it small, or its noise would drown the latents
            vae.quant_conv.weight[LATENT_CHANNELS:] = 0
            vae.quant_conv.bias[LATENT_CHANNELS:] = -12
        for module in vae.modules():
            if isinstance(module, nn.Conv3d):  # as convolutions on CPUs like it
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
        return vae

    def loss(self, phase: AutoencoderPhase, step: int, numbers: Sequence[int]) -> tuple[Tensor, Mapping[str, Tensor]]:
        pixels, wanted = (part.to(self.device) for part in self.batch(phase, step, numbers))
        latents = encode_whole(self.model, pixels)
        fit = (latents - wanted).square().mean()
        own = phase.decoder_input == "encoder" or (phase.decoder_input == "both" and step % 2 == 1)
        generators = (generator_of(self.config.run.seed, "noise", step, nth) for nth in numbers)
        noise = torch.stack([torch.randn(wanted.shape[1:], generator=generator) for generator in generators])
        noise = noise.to(self.device)
        off = decode_whole(self.model, (latents if own else wanted) + self.config.model.latent_noise * noise) - pixels
        weight = 1 + 4 * (2 * (pixels - pixels.mean(2, keepdim=True)).abs()).clamp(max=1)
        colour = (weight * off.abs()).mean()
        edges = (off[..., 1:] - off[..., :-1]).abs().mean() + (off[..., 1:, :] - off[..., :-1, :]).abs().mean()
        loss = colour + 0.5 * edges + phase.fit_weight * fit
        figures = {"colour": colour, "edges": edges, "fit": fit, "mse": off.square().mean()}
        return loss, {key: value.detach() for key, value in figures.items()}

    def batch(self, phase: AutoencoderPhase, step: int, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Clips of a step, all cropped alike: pixels, and the codec's latents of them."""
        seeds = [f"{self.config.run.seed}/{step}/{nth}" for nth in numbers]
        houses, walks = Houses.of_seeds(seeds), Walks.of_seeds(seeds, WALK_BLOCKS)
        draw = random.Random(f"crop {self.config.run.seed}/{step}")
        starts = [
            _start(random.Random(f"start {seed}"), walks.curtains[row].tolist(), phase.frames)
            for row, seed in enumerate(seeds)
        ]
        pixels = render(houses, walks, torch.tensor(starts)[:, None] + torch.arange(phase.frames))
        latents = self.codec.encode(pixels)
        top = int(draw.random() * ((HEIGHT - phase.crop_height) // _CELL + 1))
        left = int(draw.random() * ((WIDTH - phase.crop_width) // _CELL + 1))
        rows, columns = phase.crop_height // _CELL, phase.crop_width // _CELL
        pixels = pixels[..., top * _CELL : (top + rows) * _CELL, left * _CELL : (left + columns) * _CELL]
        return pixels.contiguous(memory_format=torch.channels_last_3d), latents[
            ..., top : top + rows, left : left + columns
        ]

    @torch.no_grad()
    def evaluate(self, folder: Path, step: int) -> Mapping[str, float]:
        """PSNR of clips that are not trained on, in dB, over 9 and 77 frames, from both kinds of latents."""
        houses = Houses.of_seeds([f"evaluation {nth}" for nth in range(6)])
        walk = Walks.written(("hall", 2), ("attic", 2), ("attic", 1, "closed"))
        walks = Walks(rooms=walk.rooms.expand(6, -1), curtains=walk.curtains.expand(6, -1))
        pixels = render(houses, walks, torch.arange(FIRST_FRAME, FIRST_FRAME + _LONG).expand(6, -1))
        wanted, pixels = self.codec.encode(pixels).to(self.device), pixels.to(self.device)
        short = pixels[:, :, :_SHORT]
        from_codec = decode_whole(self.model, wanted).clamp(-1, 1)
        latents = encode_whole(self.model, pixels)
        from_own = decode_whole(self.model, latents).clamp(-1, 1)
        from_short = decode_whole(self.model, encode_whole(self.model, short)).clamp(-1, 1)
        moving = (pixels - pixels.mean(2, keepdim=True)).abs().amax(1, keepdim=True) > 0.25
        shown = torch.arange(4, _LONG, 10)
        sheet = torch.stack([video[:, :, shown] for video in (pixels, from_codec, from_own)], 1).flatten(0, 1)
        contact_sheet(sheet.cpu(), folder / f"step-{step:06d}.png")
        return {
            "psnr_9": psnr(from_short, short),
            "psnr_77": psnr(from_own, pixels),
            "psnr_77_from_codec": psnr(from_codec, pixels),
            "psnr_last_block": psnr(from_own[:, :, -16:], pixels[:, :, -16:]),
            "psnr_moving": psnr(from_own[moving.expand_as(pixels)], pixels[moving.expand_as(pixels)]),
            "psnr_77_linear_codec": psnr(self.codec.decode(wanted.cpu()).clamp(-1, 1), pixels.cpu()),
            "fit_77": float((latents - wanted).square().mean()),
        }

    def export(self, folder: Path) -> None:
        """Write the autoencoder as diffusers does."""
        self.model.save_pretrained(folder)


def _start(draw: random.Random, curtains: list[bool], frames: int) -> int:
    """The first frame of a clip, on the grid of latents. A start behind a curtain, which is dull, is drawn anew."""
    last = (len(curtains) * 16 - frames - 3) // 4
    start = 3
    for _ in range(3):
        start = 3 + 4 * int(draw.random() * (last + 1))
        if not curtains[start // 16]:
            break
    return start
