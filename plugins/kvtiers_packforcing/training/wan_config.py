"""What stage `distill-wan` is told."""

import re
from pathlib import Path
from typing import Any

import attrs
from attrs import validators as v

from kvtiers_packforcing.tiny_world.vocabulary import BLOCK_FRAMES
from kvtiers_packforcing.training.config import TrainingConfigError, number, text, values, whole, yes_or_no
from kvtiers_packforcing.training.distill_config import DistillConfig, DistillPhase

WAN_1_3B = {
    "num_layers": 30, "num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "in_channels": 16,
    "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "cross_attn_norm": True, "patch_size": (1, 2, 2),
    "eps": 1e-6, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024,
}  # fmt: skip
"""`transformer/config.json` of Wan2.1-T2V-1.3B, to estimate what a run needs where that is not at hand."""
HUB_WAN_1_3B = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LEAST = 64
"""Pixels in height and in width: four tokens of 16, which the compressor makes one of."""


@attrs.frozen(kw_only=True)
class WanDistillConfig(DistillConfig):
    """Of Wan 2.1. Numbers that have a default have the paper's (sections 3 and 4.1).

    base: a folder or hub id in diffusers' layout: the teacher, the critic before its first step, the autoencoder and
    the text encoder. start: a checkpoint of a causal model, as Self-Forcing publishes them, for the generator; none:
    the base. prompts: a text file with one on each line. embeddings: where they are kept once embedded; none: beside
    it. negative_prompt: what guidance goes away from. low_resolution: whether the compressor looks at pixels too.
    compressor_widths: channels between the convolutions of its other branch. normalise: whether the tokens of that
    branch stay about as long as the transformer's own (see `HighResolution`; the paper does not say). height, width: in
    pixels. frames: latent.
    """

    base: str = text()
    start: str | None = attrs.field(default=None, validator=v.optional(v.instance_of(str)))
    prompts: str = text()
    embeddings: str | None = attrs.field(default=None, validator=v.optional(v.instance_of(str)))
    negative_prompt: str = attrs.field(default="", validator=v.instance_of(str))
    guidance: float = number(0.0, default=3.0)
    low_resolution: bool = yes_or_no(default=True)
    compressor_widths: tuple[int, ...] = attrs.field(default=(32, 128, 512, 2048), converter=values)
    normalise: bool = yes_or_no(default=True)
    sink_blocks: int = whole(0, default=2)
    frames: int = whole(BLOCK_FRAMES, default=20)
    height: int = whole(_LEAST, default=480)
    width: int = whole(_LEAST, default=832)

    @compressor_widths.validator
    def _check_widths(self, _: object, value: Any) -> None:
        fine = isinstance(value, tuple) and len(value) == 4 and all(isinstance(each, int) for each in value)
        if not fine or min(value) < 1:
            raise TrainingConfigError(f"compressor_widths must be four whole numbers of at least 1, got {value!r}")

    def __attrs_post_init__(self) -> None:
        DistillConfig.__attrs_post_init__(self)
        if self.frames % BLOCK_FRAMES:
            raise TrainingConfigError(f"frames must be a multiple of {BLOCK_FRAMES} (a block), got {self.frames}")
        for name in ("height", "width"):
            if getattr(self, name) % 16:
                raise TrainingConfigError(f"{name} must be a multiple of 16 pixels, got {getattr(self, name)}")
        if not self.layout.compressed(self.frames // BLOCK_FRAMES):
            raise TrainingConfigError(
                f"frames = {self.frames} are all attended in full with {self.sink_blocks} sink and "
                f"{self.recent_blocks} recent blocks, so the compressor would not be trained; give more frames"
            )

    def check(self) -> None:
        """Raise `TrainingConfigError` for what names no model and no file. Loads nothing."""
        folder = Path(self.base)
        if folder.is_dir():
            for part in ("transformer", "vae"):
                if not (folder / part / "config.json").is_file():
                    raise TrainingConfigError(
                        f"[model]: base: {self.base} holds no {part} (no {part}/config.json); give a folder of "
                        f"diffusers' layout, or a hub id such as {HUB_WAN_1_3B}"
                    )
        elif not _HUB_ID.fullmatch(self.base):
            raise TrainingConfigError(
                f"[model]: base: {self.base!r} is no folder that is there, and no hub id (OWNER/NAME), such as "
                f"{HUB_WAN_1_3B}"
            )
        if self.start is not None and not Path(self.start).exists():
            raise TrainingConfigError(
                f"[model]: start: {self.start} is not there; give a checkpoint of Self-Forcing (a .pt or a "
                ".safetensors), or leave it out to start from the base"
            )


@attrs.frozen(kw_only=True)
class WanDistillPhase(DistillPhase):
    """As of stage `distill`, by distribution matching alone: trajectories need a causal teacher."""

    def __attrs_post_init__(self) -> None:
        DistillPhase.__attrs_post_init__(self)
        if self.loss != "dmd":
            raise TrainingConfigError(
                f"loss must be 'dmd' here, got {self.loss!r}: Wan's teacher is not causal; stage 'distill' has both"
            )
