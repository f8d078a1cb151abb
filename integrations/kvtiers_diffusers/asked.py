"""What a stream is asked for, checked and worked out before anything runs."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from inspect import signature
from math import ceil
from pathlib import Path
from typing import Any

import attrs

from kvtiers import Geometry, GeometryError, Policy, PolicyError, resolve
from kvtiers_diffusers.causal_wan import CausalWan
from kvtiers_diffusers.texts import is_finite

KINDS = ("np", "pt", "pil", "latent")
"""What clips can be made of."""
_NOT_TAKEN = {
    "num_inference_steps": "it makes the steps of timesteps",
    "attention_kwargs": "weights of adapters are set with set_adapters()",
    "latents": "every block begins with noise of the generator",
    "num_videos_per_prompt": "each prompt of a list makes one video",
    "max_sequence_length": "prompts have the length that the model was trained with",
}
"""Options of `WanPipeline` that a stream takes none of, and what to do instead."""


@attrs.frozen(kw_only=True)
class Asked:
    """A video to make.

    frames: of pixels. shape: of a block of latents. schedule: timesteps, shifted. scale: frames of one latent.
    before: latent frames of the clip that it begins with.
    """

    frames: int
    fps: Fraction
    shape: tuple[int, ...]
    schedule: Sequence[float]
    scale: int
    before: int

    @property
    def latents(self) -> int:
        """Latent frames to make; the first of a video becomes one frame alone."""
        return ceil(self.frames / self.scale) if self.before else 1 + ceil((self.frames - 1) / self.scale)

    @property
    def blocks(self) -> int:
        """Blocks to make."""
        return ceil(self.latents / self.shape[2])

    def second(self, latents: int) -> float:
        """The second at which a block begins that has so many latent frames before it."""
        return float(latents * self.scale / self.fps)


def length(seconds: float | int | None, num_frames: int | None, fps: Fraction) -> int:
    """The frames that were asked for. Raises `PolicyError` unless it is one or more."""
    if num_frames is not None and seconds is None:
        whole("num_frames", num_frames)
        return num_frames
    if seconds is None or num_frames is not None:
        raise PolicyError(f"give seconds or num_frames, got seconds={seconds} and num_frames={num_frames}")
    if not is_finite(seconds) or round(seconds * fps) < 1:
        raise PolicyError(
            f"seconds must be a finite number, of at least one frame at {float(fps):g} a second, got {seconds!r}"
        )
    return round(seconds * fps)


def block_shape(
    config: Any, scale: int, *, rows: int, block_frames: int, height: int, width: int
) -> tuple[int, int, int, int, int]:
    """The shape of a block of latents. scale: pixels of one latent. Raises `PolicyError` or `GeometryError`."""
    for name, number in (("block_frames", block_frames), ("height", height), ("width", width)):
        whole(name, number)
    _, high, wide = config.patch_size
    if height % (high * scale) or width % (wide * scale):
        raise GeometryError(
            f"height and width must be multiples of {high * scale} and {wide * scale} pixels, got {height} x {width}"
        )
    return rows, config.in_channels, block_frames, height // scale, width // scale


def whole(name: str, got: Any) -> None:
    """Raise `PolicyError` unless `got` is a whole number of at least 1."""
    if isinstance(got, bool) or not isinstance(got, int) or got < 1:
        raise PolicyError(f"{name} must be a whole number of at least 1, got {got!r}")


def scales(first: Any, second: Any, *, two: bool) -> tuple[float, float]:
    """The guidance of high and low noise; 1 is none. two: whether a second transformer makes the steps of low noise.

    Raises `PolicyError` for numbers that would guide otherwise than they say.
    """
    for name, got in (("guidance_scale", first), ("guidance_scale_2", second)):
        if got is not None and (not is_finite(got) or got < 0):
            raise PolicyError(f"{name} must be a finite number of at least 0 (guidance is above 1), got {got!r}")
    if second is not None and not two:
        raise PolicyError("guidance_scale_2 is for the steps of a transformer_2, which makes none of this video")
    if second is not None and second > 1 >= first:
        raise PolicyError(
            f"got guidance_scale={first} and guidance_scale_2={second}; guidance is for both or none, so give "
            "guidance_scale more than 1 too"
        )
    return float(first), float(first if second is None else second)


def policies_of(
    policy: str | Path | Policy, layers: int, options: Mapping[str, Any], own: Sequence[str]
) -> Sequence[Policy]:
    """The policy of every layer, if what `stream` does not take itself (it takes `own`) is for it or `CausalWan`."""
    foreign = next((name for name in options if name in _NOT_TAKEN), None)
    if foreign is not None:
        raise PolicyError(f"got {foreign}, but CausalWanPipeline takes none: {_NOT_TAKEN[foreign]}; leave it out")
    taken = {"vae", "transformer", "compressor_network"} & set(options)
    if taken:
        raise PolicyError(
            f"got {', '.join(sorted(taken))}, but the pipeline gives its own parts; set them on the pipeline"
        )
    settings = {name: value for name, value in options.items() if name not in signature(CausalWan).parameters}
    try:
        return resolve(policy, layers=list(range(layers)), **settings)
    except PolicyError as error:
        raise type(error)(f"{error} (stream itself takes {', '.join(own)})") from error


def check_blocks(
    policies: Sequence[Policy], config: Any, shape: Sequence[int], lengths: Sequence[int], *, even: bool
) -> None:
    """Raise what a policy has against blocks of latents of `shape`, or against those of the clip that begins a video.

    config: of the transformer. lengths: latent frames of the clip's blocks.
    """
    _, high, wide = config.patch_size
    geometry = Geometry(
        kv_heads=config.num_attention_heads,
        head_dim=config.attention_head_dim,
        grid=(shape[3] // high, shape[4] // wide),
        steps_per_commit=shape[2],
        even=even,
        causal=False,
    )
    for policy in dict.fromkeys(policies):
        policy.check_budget(geometry)
        for first in lengths[:1]:  # the one that may be shorter; it is compressed unless it is an anchor
            if policy.extended(policy.timeline(geometry), first).sink != first:
                policy.compressor.block_tokens(first, geometry)
