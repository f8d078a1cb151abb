"""`CausalWanPipeline`: prompts to video of any length, block by block, each streamed as soon as it is decoded."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from kvtiers import GeometryError, Policy, PolicyError, bytes_in
from kvtiers_diffusers.causal_wan import CausalWan, tiered
from kvtiers_diffusers.schedule import TIMESTEPS, clean, noised, warped
from kvtiers_diffusers.streaming_vae import StreamingDecoder

_PIXEL_FRAMES = 4
"""Frames that a latent frame becomes; the first of a video, which a clip has made, becomes one."""
_WORDS = 512
"""Tokens of a prompt, padded with zeros, that Wan was trained with."""


class CausalWanPipeline(WanPipeline):
    """diffusers' `WanPipeline` with a causal model's few-step schedule and a memory that does not grow.

    Takes what `WanPipeline` takes; tokenizer and text_encoder may be none if embeddings are given, and the scheduler is
    kept for others: a causal model is distilled to a schedule of its own, which `stream` is given. The transformer
    stays diffusers' own and is given back as it was when a video ends, however it ends.

    Source: PackForcing (arXiv 2603.25730) section 4.1; the recipe is Self-Forcing's (arXiv 2506.08009).
    """

    _optional_components: ClassVar = ["tokenizer", "text_encoder", "transformer_2"]
    transformer: Any
    vae: Any
    scheduler: Any
    text_encoder: Any
    tokenizer: Any
    video_processor: Any
    progress_bar: Any
    vae_scale_factor_spatial: int
    _execution_device: Any
    _get_t5_prompt_embeds: Any

    def __init__(
        self,
        vae: Any,
        transformer: Any,
        scheduler: Any,
        tokenizer: Any = None,
        text_encoder: Any = None,
        transformer_2: Any = None,
        boundary_ratio: float | None = None,
        expand_timesteps: bool = False,
    ) -> None:
        super().__init__(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            scheduler=scheduler,
            transformer=transformer,
            transformer_2=transformer_2,
            boundary_ratio=boundary_ratio,
            expand_timesteps=expand_timesteps,
        )
        if transformer_2 is not None:
            raise PolicyError("a causal model is one transformer; this one has a second for low noise (Wan 2.2)")

    @torch.no_grad()
    def __call__(self, *args: Any, return_dict: bool = True, output_type: str = "np", **options: Any) -> Any:
        """A whole video; options as for `stream`. Returns `WanPipelineOutput` with `frames`, or a tuple."""
        clips = list(self.stream(*args, output_type=output_type, **options))
        if isinstance(clips[0], Tensor):
            frames: Any = torch.cat(clips, 2 if output_type == "latent" else 1)
        elif output_type == "np":
            import numpy as np

            frames = np.concatenate(clips, 1)
        else:
            frames = [[frame for clip in clips for frame in clip[row]] for row in range(len(clips[0]))]
        return WanPipelineOutput(frames=frames) if return_dict else (frames,)

    def stream(
        self,
        prompt: str | list[str] | Mapping[float | int, str | list[str]] | None = None,
        *,
        prompt_embeds: Tensor | Mapping[float | int, Tensor] | None = None,
        seconds: float | int | None = None,
        num_frames: int | None = None,
        fps: int = 16,
        height: int = 480,
        width: int = 832,
        policy: str | Path | Policy = "packforcing",
        block_frames: int = 4,
        timesteps: Sequence[float | int] = TIMESTEPS,
        shift: float = 5.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        clip: Tensor | None = None,
        callback_on_step_end: Callable[[Any, int, float, dict[str, Any]], dict[str, Any] | None] | None = None,
        output_type: str = "np",
        **changes: Any,
    ) -> Iterator[Any]:
        """Yield the frames of each block as soon as it is decoded.

        prompt (or prompt_embeds, [batch, words, text_dim]): one, or `{second: prompt}` if it changes during the video:
            then each block has the prompt of the second at which it begins, counted from the start of the clip, if one
            is given, and four frames for every latent frame.
        seconds or num_frames: how long; whole blocks are made and the last is cut. height, width: in pixels.
        policy, changes: what is remembered. timesteps: of the schedule, before the shift.
        clip: normalised latents [batch, channels, frames, height, width] of whole blocks, with which the video begins;
            they are committed first, and their frames are not yielded.
        callback_on_step_end: called as `callback(pipeline, step, timestep, {"latents": x0, "block": number})` after
            every denoising step; what it returns under "latents" replaces x0.
        output_type: "np", "pt", "pil" or "latent".
        """
        frames = self._length(seconds, num_frames, fps)
        texts = self._texts(prompt, prompt_embeds)
        schedule = warped(timesteps, shift)
        latents = ceil(frames / _PIXEL_FRAMES) if clip is not None else 1 + ceil((frames - 1) / _PIXEL_FRAMES)
        rows = next(iter(texts.values())).shape[0]
        scale = self.vae_scale_factor_spatial
        if height % (2 * scale) or width % (2 * scale):
            raise GeometryError(f"height and width must be multiples of {2 * scale} pixels, got {height} x {width}")
        shape = (rows, self.transformer.config.in_channels, block_frames, height // scale, width // scale)
        given = [] if clip is None else self._blocks_of(clip, shape)
        return self._stream(
            texts, schedule, latents, shape, given, frames, fps, generator, callback_on_step_end, output_type,
            dict(policy=policy, block_frames=block_frames, **changes),
        )  # fmt: skip

    @torch.no_grad()
    def _stream(
        self,
        texts: Mapping[float, Tensor],
        schedule: Sequence[float | int],
        latents: int,
        shape: tuple[int, ...],
        given: Sequence[Tensor],
        frames: int,
        fps: int,
        generator: Any,
        callback: Any,
        output_type: str,
        options: dict[str, Any],
    ) -> Iterator[Any]:
        device, dtype = self._execution_device, self.transformer.dtype
        decoder, left, latents_left = StreamingDecoder(self.vae), frames, latents
        made, blocks = len(given), ceil(latents / shape[2])
        with (
            tiered(self.transformer, vae=self.vae, **options) as wan,
            self.progress_bar(total=blocks * (len(schedule) + 1)) as progress,
        ):
            for number, block in enumerate(given):
                pixels = None if output_type == "latent" and not wan.needs_pixels else decoder.decode(block)
                wan.commit(block, _at(texts, number * shape[2] * _PIXEL_FRAMES / fps), pixels)
            for number in range(blocks):
                text = _at(texts, (made + number) * shape[2] * _PIXEL_FRAMES / fps)
                block = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)
                for step, timestep in enumerate(schedule):
                    block = clean(block, wan.denoise(block, timestep, text), timestep)
                    if callback is not None:
                        said = callback(self, step, timestep, {"latents": block, "block": number}) or {}
                        block = said.get("latents", block)
                    if step + 1 < len(schedule):
                        noise = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
                        block = noised(block, noise, schedule[step + 1])
                    progress.update()
                pixels = None if output_type == "latent" and not wan.needs_pixels else decoder.decode(block)
                if number + 1 < blocks:
                    wan.commit(block, text, pixels)
                progress.update()
                progress.set_postfix_str(_held(wan))
                if output_type == "latent" or pixels is None:
                    yield block[:, :, :latents_left]
                else:
                    yield self.video_processor.postprocess_video(pixels[:, :, :left], output_type=output_type)
                    left -= pixels.shape[2]
                latents_left -= shape[2]

    @staticmethod
    def _length(seconds: float | int | None, num_frames: int | None, fps: int) -> int:
        """The frames that were asked for."""
        if (seconds is None) == (num_frames is None):
            raise PolicyError(f"give seconds or num_frames, got seconds={seconds} and num_frames={num_frames}")
        frames = num_frames if num_frames is not None else round((seconds or 0) * fps)
        if frames < 1:
            raise PolicyError(f"a video has at least one frame, got seconds={seconds}, num_frames={num_frames}")
        return frames

    @torch.no_grad()
    def _texts(self, prompt: Any, embeds: Any) -> dict[float, Tensor]:
        """The prompt's embedding from each second on."""
        if (prompt is None) == (embeds is None):
            raise PolicyError("give prompt or prompt_embeds, one of them")
        given = embeds if prompt is None else prompt
        each = dict(given) if isinstance(given, Mapping) else {0.0: given}
        if 0 not in each:
            raise PolicyError(f"a prompt that changes needs one from second 0, got {sorted(each)}")
        if prompt is not None and (self.text_encoder is None or self.tokenizer is None):
            raise PolicyError("this pipeline has no text encoder; give prompt_embeds, or load it with one")
        device, dtype = self._execution_device, self.transformer.dtype
        if prompt is None:
            texts = {float(second): text.to(device, dtype) for second, text in sorted(each.items())}
        else:
            texts = {
                float(second): self._get_t5_prompt_embeds(
                    prompt=text, max_sequence_length=_WORDS, device=device, dtype=dtype
                )
                for second, text in sorted(each.items())
            }
        rows = {text.shape[0] for text in texts.values()}
        if len(rows) > 1:
            raise GeometryError(f"prompts of one video are of one batch size, got {sorted(rows)}")
        return texts

    def _blocks_of(self, clip: Tensor, shape: tuple[int, ...]) -> list[Tensor]:
        """The blocks of a clip of whole blocks."""
        if (
            clip.dim() != 5
            or (*clip.shape[:2], *clip.shape[3:]) != (*shape[:2], *shape[3:])
            or clip.shape[2] % shape[2]
        ):
            raise GeometryError(
                f"a clip is latents of whole blocks, {(*shape[:2], f'n x {shape[2]}', *shape[3:])}, "
                f"got {tuple(clip.shape)}"
            )
        return list(clip.to(self._execution_device, self.transformer.dtype).split(shape[2], 2))


def _at(texts: Mapping[float, Tensor], second: float) -> Tensor:
    """The text at `second`; the same tensor as long as it does not change."""
    return texts[max(start for start in texts if start <= second + 1e-9)]


def _held(wan: CausalWan) -> str:
    held = wan.held()
    return f"{max(wan.attended(), default=0):,} tokens, {bytes_in(held, 'device') / 1e9:.2f} GB"
