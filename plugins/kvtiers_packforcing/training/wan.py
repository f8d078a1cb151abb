"""Stage `distill-wan`: PackForcing for Wan 2.1, from a Self-Forcing checkpoint and a bidirectional teacher.

Source: PackForcing (arXiv 2603.25730) section 4.1. The generator starts from a Self-Forcing checkpoint (arXiv
2506.08009), the compressor from its low-resolution branch alone. Teacher and critic are Wan itself, which looks at all
frames of a clip at one noise level; the teacher is guided away from a negative prompt, the critic is not guided.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn

from kvtiers_diffusers.checkpoints import load_causal_checkpoint
from kvtiers_diffusers.streaming_vae import StreamingDecoder
from kvtiers_packforcing.network import HighResolution
from kvtiers_packforcing.seeding import seed_of
from kvtiers_packforcing.tiny_world import contact_sheet
from kvtiers_packforcing.tiny_world.vocabulary import BLOCK_FRAMES
from kvtiers_packforcing.training.causal_clips import CausalClips
from kvtiers_packforcing.training.config import TrainingConfig
from kvtiers_packforcing.training.distillation import Distillation, Generated, whole_score
from kvtiers_packforcing.training.dmd import Score
from kvtiers_packforcing.training.embeddings import Embeddings, encoder_of, read_prompts
from kvtiers_packforcing.training.estimate import Outline, absent_model, outline_of
from kvtiers_packforcing.training.precision import prepare
from kvtiers_packforcing.training.wan_config import WanDistillConfig, WanDistillPhase

_SCALE = 8
"""Pixels in height and width of a latent."""
_SHOWN = 8
"""Frames from one to the next in the picture of an evaluation."""


class WanDistillStage(Distillation):
    """A few-step causal Wan and its compressor."""

    name = "distill-wan"
    model_config = WanDistillConfig
    phase_config = WanDistillPhase
    alone = False

    def __init__(self, config: TrainingConfig) -> None:
        settings: WanDistillConfig = config.model
        self.preparation(config)()  # nothing is left to do where `make_stage` was asked for this stage
        self.embeddings = embeddings_of(settings)
        super().__init__(config)
        self._negative = self.embeddings.of([len(self.embeddings.prompts) - 1]).to(self.device)
        read: Any = AutoencoderKLWan.from_pretrained(settings.base, subfolder="vae", torch_dtype=torch.float32)
        self.autoencoder = read.eval().requires_grad_(False).to(self.device)
        self.teacher, self.critic = (
            nn.ModuleDict({"transformer": _transformer(settings.base)}).to(self.device) for _ in range(2)
        )
        self.teacher.eval().requires_grad_(False)
        for networks in (self.model, self.teacher, self.critic):
            prepare(networks.get_submodule("transformer"), config.run)
        self._generator = CausalClips(
            transformer=self.model.get_submodule("transformer"),
            compressor=self.model.get_submodule("compressor"),
            layout=settings.layout,
        )
        self._decoder = StreamingDecoder(self.autoencoder)

    @classmethod
    def preparation(cls, config: TrainingConfig) -> Callable[[], object]:
        """Embed the prompts, unless that was done."""
        settings: WanDistillConfig = config.model
        settings.check()
        embeddings = embeddings_of(settings)
        known = embeddings.is_there

        def embed() -> None:
            if not known:
                embeddings.write(encoder_of(settings.base, cls.place()))

        return embed

    def make_model(self, settings: WanDistillConfig) -> nn.Module:
        transformer = _transformer(settings.base)
        if settings.start is not None:
            load_causal_checkpoint(transformer, settings.start)
        width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        compressor = HighResolution(
            transformer.config.in_channels, width, settings.compressor_widths, normalise=settings.normalise
        )
        return nn.ModuleDict({"transformer": transformer, "compressor": compressor})

    @classmethod
    def outline(cls, config: TrainingConfig) -> Outline | None:
        settings: WanDistillConfig = config.model
        lacks = absent_model(settings.base)
        if settings.start is not None and not Path(settings.start).exists():
            lacks = settings.start
        if not Path(settings.prompts).exists():
            lacks = settings.prompts
        return None if lacks is None else outline_of(config, lacks)

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {"model": self.model, "critic": self.critic}

    @property
    def others(self) -> Sequence[nn.Module]:
        return self.teacher, self.critic

    @property
    def generator(self) -> CausalClips:
        return self._generator

    @property
    def shape(self) -> tuple[int, int, int, int]:
        settings = self.config.model
        channels = self.generator.transformer.config.in_channels
        return channels, settings.frames, settings.height // _SCALE, settings.width // _SCALE

    @property
    def vae(self) -> Any:
        return self.autoencoder if self.config.model.low_resolution else None

    def text(self, names: Sequence[str]) -> Tensor:
        prompts = len(self.embeddings.prompts) - 1  # the last one is the negative one
        found = self.embeddings.of([seed_of("prompt", name) % prompts for name in names])
        return found[:, None].expand(-1, self.shape[1] // BLOCK_FRAMES, -1, -1)

    def pixels(self, latents: Tensor, first: bool) -> Tensor | None:
        if self.vae is None:
            return None
        if first:
            self._decoder.reset()
        return self._decoder.decode(latents)

    def real(self, made: Generated) -> AbstractContextManager[Score]:
        transformer = self.teacher.get_submodule("transformer")
        return whole_score(transformer, made, self._negative, self.config.model.guidance)

    def fake(self, made: Generated) -> AbstractContextManager[Score]:
        return whole_score(self.critic.get_submodule("transformer"), made)

    @torch.no_grad()
    def evaluate(self, folder: Path, step: int) -> Mapping[str, float]:
        """Draw two clips, and say how far their latents spread: a generator that collapses spreads less."""
        names = ["evaluation a", "evaluation b"]
        made = self.self_rollout(names, self.text(names).to(self.device), len(self.sigmas)).latents
        self._decoder.reset()
        shown = self._decoder.decode(made)[:, :, ::_SHOWN].clamp(-1, 1).cpu()
        contact_sheet(shown, folder / f"step-{step:06d}.png")
        return {"latent_std": float(made.std())}


def embeddings_of(settings: WanDistillConfig) -> Embeddings:
    """Where the embeddings of the prompts are, and at the end that of the negative prompt."""
    path = Path(settings.embeddings or f"{settings.prompts}.safetensors")
    prompts = (*read_prompts(settings.prompts), settings.negative_prompt)
    return Embeddings(path=path, prompts=prompts, base=settings.base)


def _transformer(base: str) -> Any:
    """Wan's transformer in float32."""
    return WanTransformer3DModel.from_pretrained(base, subfolder="transformer", torch_dtype=torch.float32)
