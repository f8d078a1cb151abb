"""Distillation along the teacher's trajectories: a supervised loss for a generator of few steps.

The teacher goes from noise to a clean block in many small steps, given a past. The generator is shown where it was at
each of the generator's few noise levels, and says where it will end. Noise and past determine the end, so the generator
learns one answer and not the mean of many: where a room is new, it invents one as sharply as the teacher does.
Regression onto the true next block would be right only where a room is known, and blur the others. Beside DMD it needs
no critic, and every rollout of the teacher trains all steps of all blocks. So it is what a small model is given first;
DMD can follow.

Source: the ODE initialisation of CausVid (arXiv 2412.07772, section 4.3), which Self-Forcing (arXiv 2506.08009) takes
over. Deviation: the teacher is causal, and the past may be the generator's own.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from kvtiers_packforcing.training.causal_clips import CausalClips
from kvtiers_packforcing.training.noising import by_frame
from kvtiers_packforcing.training.packed import PackedWan


def trajectory_loss(
    wan: PackedWan,
    generator: CausalClips,
    passed: Sequence[Float[Tensor, "batch channels frames height width"]],
    sigmas: Sequence[float],
    *,
    history: Float[Tensor, "batch channels frames height width"],
    text: Float[Tensor, "batch blocks words text_width"],
    low: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean squared error of the clean blocks that the generator predicts along trajectories.

    passed: what the teacher passed by at each of `sigmas`, and where it ended. Figures have the error of every step.
    """
    *points, end = passed
    streams, at = torch.stack(points, 1), torch.tensor(sigmas, device=end.device, dtype=end.dtype)
    at = at[None, :, None].expand(len(end), -1, text.shape[1])
    flow = generator.predict(wan, history, streams, at, text, low)
    off = (streams - by_frame(at) * flow - end[:, None]).square()
    by_step = off.detach().mean((0, 2, 3, 4, 5))
    return off.mean(), {f"step_{nth}": part for nth, part in enumerate(by_step, 1)}
