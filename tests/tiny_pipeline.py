"""A tiny random `CausalWanPipeline`, and the options with which it is quick."""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from kvtiers_diffusers import CausalWanPipeline
from tiny_wan import build, vae

SMALL: dict[str, Any] = {
    "height": 64,
    "width": 64,
    "block_frames": 2,
    "timesteps": (1000, 500),
    "policy": "sink-rolling-window",
    "sink": 2,
    "recent": 2,
}


def pipeline(**parts: Any) -> CausalWanPipeline:
    """One with random weights, the same every time; `parts` replace some."""
    made = {"vae": vae(), "transformer": build(), "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0), **parts}
    found = CausalWanPipeline(**made)
    found.set_progress_bar_config(disable=True)
    return found


def seeded(seed: int = 0) -> torch.Generator:
    """A generator of noise."""
    return torch.Generator().manual_seed(seed)
