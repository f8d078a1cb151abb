"""What is drawn for a clip of stage `student`: levels of noise, noise, a spoilt past, and places in time."""

import random
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from kvtiers_packforcing.seeding import generator_of
from kvtiers_packforcing.tiny_world.sampling import shifted
from kvtiers_packforcing.tiny_world.vocabulary import BLOCK_FRAMES
from kvtiers_packforcing.training.student_config import StudentConfig


def draw_sigmas(streams: int, blocks: int, generator: torch.Generator) -> Tensor:
    """A noise level for each block of each stream of a clip: of half of the streams uniform, of half shifted."""
    even = torch.rand(streams, blocks, generator=generator)
    which = torch.rand(streams, 1, generator=generator) < 0.5
    return torch.where(which, shifted(even), even).clamp(0.005, 1)


def draw_starts(draw: random.Random, blocks: int, settings: StudentConfig) -> Tensor:
    """Where each block of a clip is placed, in latent frames: in a row, or with random gaps."""
    most = settings.position_gap_blocks if draw.random() < settings.position_gap_share else 0
    steps = [BLOCK_FRAMES * (1 + int(draw.random() * (most + 1))) for _ in range(blocks - 1)]
    return torch.tensor([0, *accumulate(steps)])


def draw_clip(name: str, streams: int, shape: Sequence[int], settings: StudentConfig) -> tuple[Tensor, ...]:
    """All that is random about a clip besides what it shows.

    Levels of noise, [streams, blocks]; noise, [streams, *shape]; how much the clean past is spoilt and what with, [2,
    *shape]; where blocks are placed, [blocks]; which streams are told their prompts, [streams].
    """
    blocks = shape[1] // BLOCK_FRAMES
    generator = generator_of("noise", name)
    sigmas = draw_sigmas(streams, blocks, generator)
    noise = torch.randn(streams, *shape, generator=generator)
    share = settings.clean_noise * torch.rand(1, generator=generator)
    dirt = torch.stack((share.expand(tuple(shape)), torch.randn(tuple(shape), generator=generator)))
    told = torch.rand(streams, generator=generator) >= settings.prompt_drop_share
    return sigmas, noise, dirt, draw_starts(random.Random(f"starts {name}"), blocks, settings), told


def by_frame(sigmas: Tensor) -> Tensor:
    """[batch, streams, blocks] as what multiplies latents."""
    return sigmas.repeat_interleave(BLOCK_FRAMES, 2)[:, :, None, :, None, None]
