"""Samplers, and videos made block by block through a cache, each block after what was made before it.

Source: self-rollout of Self-Forcing (arXiv 2506.08009) section 3.2, with PackForcing's tiers (arXiv 2603.25730 section
3). A step predicts the clean block; the next step begins from that, renoised with fresh noise.
"""

from collections.abc import Callable, Sequence
from functools import partial

import attrs
import torch
from jaxtyping import Float
from torch import Tensor

from kvtiers_diffusers.causal_wan import CausalWan
from kvtiers_packforcing.guidance import guided

Denoise = Callable[[Tensor, float], Tensor]
"""The flow of a noisy block at a sigma."""
Pixels = Callable[[Tensor, bool], Tensor | None]
"""The pixels of a block of latents, and whether it is the first; None if nobody looks at them."""


@attrs.frozen(eq=False, kw_only=True)
class Rollout:
    """A video that a model made of its own history.

    inputs: the noisy blocks of the last step that was made, the exit step, at noise level `sigma`. latents: what it
    made of them, which is what later blocks remember. pixels: of that, if somebody looked at them.
    """

    latents: Float[Tensor, "batch channels frames height width"]
    inputs: Float[Tensor, "batch channels frames height width"]
    sigma: float
    pixels: Float[Tensor, "batch 3 pixel_frames pixel_height pixel_width"] | None = None


def few_steps(
    denoise: Denoise, noise: Float[Tensor, "batch steps channels frames height width"], sigmas: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """The clean block after as many steps as there are `sigmas`, and the noisy input of the last one."""
    noisy = clean = noise[:, 0]
    for step, sigma in enumerate(sigmas):
        noisy = torch.lerp(clean, noise[:, step], sigma)
        clean = noisy - sigma * denoise(noisy, sigma)
    return clean, noisy


def along_the_flow(denoise: Denoise, noise: Tensor, sigmas: Sequence[float]) -> list[Tensor]:
    """What Euler's method passes by from noise to clean, at every sigma and at 0."""
    passed = [noise]
    for before, after in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        passed.append(passed[-1] + (after - before) * denoise(passed[-1], before))
    return passed


def finer(timesteps: Sequence[float], each: int) -> list[float]:
    """Timesteps with `each` even steps for one of these; the last one goes down to 0."""
    pairs = zip(timesteps, [*timesteps[1:], 0.0], strict=True)
    return [before + (after - before) * part / each for before, after in pairs for part in range(each)]


def roll_out(
    wan: CausalWan,
    noise: Float[Tensor, "batch steps channels frames height width"],
    text: Float[Tensor, "batch blocks words text_width"],
    sigmas: Sequence[float],
    pixels: Pixels,
    *,
    history: Float[Tensor, "batch channels past_frames height width"] | None = None,
) -> Rollout:
    """Blocks in a few steps each, every one after those before it.

    noise: fresh for every step. sigmas: of the steps that are made, all of them or fewer. history: what is remembered
    of the first blocks, or of all, instead of what was made of them.

    Source: the random exit step of Self-Forcing, algorithm 1.
    """
    made: list[tuple[Tensor, Tensor]] = []
    seen: list[Tensor | None] = []
    length = noise.shape[3] // text.shape[1]
    for nth, part in enumerate(noise.split(length, 3)):
        made.append(few_steps(_of_block(wan, text[:, nth]), part, sigmas))
        known = None if history is None else history[:, :, nth * length : (nth + 1) * length]
        block = made[-1][0] if known is None or not known.shape[2] else known.clone()
        seen.append(pixels(block, nth == 0))
        wan.commit(block, text[:, nth], pixels=seen[-1])
    latents, inputs = (torch.cat(parts, 2) for parts in zip(*made, strict=True))
    shown = [part for part in seen if part is not None]
    return Rollout(latents=latents, inputs=inputs, sigma=sigmas[-1], pixels=torch.cat(shown, 2) if shown else None)


def given_history(
    wan: CausalWan,
    history: Float[Tensor, "batch channels frames height width"],
    noise: Float[Tensor, "batch channels frames height width"],
    text: Float[Tensor, "batch blocks words text_width"],
    sigmas: Sequence[float],
    pixels: Pixels,
    *,
    guidance: float = 0.0,
) -> list[Float[Tensor, "batch channels frames height width"]]:
    """What `along_the_flow` passes by, in every block, where the blocks before are those of `history`.

    guidance: how far each step goes on from the prompt's flow, away from that without a prompt.
    """
    passed: list[list[Tensor]] = []
    cut = (part.tensor_split(text.shape[1], 2) for part in (history, noise))
    for nth, (clean, begin) in enumerate(zip(*cut, strict=True)):
        passed.append(along_the_flow(_of_block(wan, text[:, nth], guidance), begin, sigmas))
        wan.commit(clean.clone(), text[:, nth], pixels=pixels(clean, nth == 0))
    return [torch.cat(parts, 2) for parts in zip(*passed, strict=True)]


def _of_block(wan: CausalWan, text: Tensor, guidance: float = 0.0) -> Denoise:
    without = torch.zeros_like(text) if guidance else None  # one tensor for all steps, which is projected once

    def flow(noisy: Tensor, sigma: float) -> Tensor:
        return guided(partial(wan.denoise, noisy, sigma * 1000), text, without, guidance)

    return flow
