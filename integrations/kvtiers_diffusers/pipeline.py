"""`CausalWanPipeline`: prompts to video of any length, block by block, each streamed as soon as it is decoded."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import signature
from math import ceil, isfinite
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from kvtiers import GeometryError, Policy, PolicyError, bytes_in, resolve
from kvtiers_diffusers.causal_wan import CausalWan, tiered
from kvtiers_diffusers.schedule import TIMESTEPS, clean, noised, warped
from kvtiers_diffusers.streaming_vae import StreamingDecoder

_PIXEL_FRAMES = 4
"""Frames that a latent frame becomes; the first of a video, which a clip has made, becomes one."""
_WORDS = 512
"""Tokens of a prompt, padded with zeros, that Wan was trained with."""
_KINDS = ("np", "pt", "pil", "latent")
_DISTILLED = (
    "guidance_scale", "guidance_scale_2", "negative_prompt", "negative_prompt_embeds", "num_inference_steps",
)  # fmt: skip
"""Options of `WanPipeline` that distillation has made needless."""


class CausalWanPipeline(WanPipeline):
    """diffusers' `WanPipeline` with a causal model's few-step schedule and a memory that does not grow.

    Takes what `WanPipeline` takes, and as `compressor` trained weights of the policy's compressor (such as
    `kvtiers_packforcing.network.HighResolution`), which are saved, loaded and moved with the rest. tokenizer and
    text_encoder may be none if embeddings are given, and the scheduler is kept for others: a causal model is distilled
    to a schedule of its own, which `stream` is given. The transformer stays diffusers' own and is given back as it was
    when a video ends, however it ends.

    Source: PackForcing (arXiv 2603.25730) section 4.1; the recipe is Self-Forcing's (arXiv 2506.08009).
    """

    _optional_components: ClassVar = ["tokenizer", "text_encoder", "transformer_2", "compressor"]
    transformer: Any
    compressor: Any
    vae: Any
    scheduler: Any
    text_encoder: Any
    tokenizer: Any
    video_processor: Any
    progress_bar: Any
    vae_scale_factor_spatial: int
    _execution_device: Any
    register_modules: Any
    _get_t5_prompt_embeds: Any

    def __init__(
        self,
        vae: Any,
        transformer: Any,
        scheduler: Any,
        tokenizer: Any = None,
        text_encoder: Any = None,
        transformer_2: Any = None,
        compressor: Any = None,
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
        self.register_modules(compressor=compressor)
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

        Raises `PolicyError` or `GeometryError`, before anything runs, for what cannot be made.
        """
        _check_options(policy, len(self.transformer.blocks), changes)
        if output_type not in _KINDS:
            raise PolicyError(f"output_type must be one of {', '.join(_KINDS)}, got {output_type!r}")
        for name, number in (("fps", fps), ("block_frames", block_frames), ("height", height), ("width", width)):
            _check_whole(name, number)
        frames = _length(seconds, num_frames, fps)
        schedule = warped(timesteps, shift)
        prompts = self._prompts(prompt, prompt_embeds)
        rows = _rows(next(iter(prompts.values())))
        if isinstance(generator, list) and len(generator) != rows:
            raise GeometryError(f"give one generator, or a list with one for each of {rows} rows, got {len(generator)}")
        scale, (_, high, wide) = self.vae_scale_factor_spatial, self.transformer.config.patch_size
        if height % (high * scale) or width % (wide * scale):
            raise GeometryError(
                f"height and width must be multiples of {high * scale} and {wide * scale} pixels, "
                f"got {height} x {width}"
            )
        shape = (rows, self.transformer.config.in_channels, block_frames, height // scale, width // scale)
        given = [] if clip is None else self._blocks_of(clip, shape)
        latents = ceil(frames / _PIXEL_FRAMES) if given else 1 + ceil((frames - 1) / _PIXEL_FRAMES)
        return self._stream(
            self._embedded(prompts), schedule, latents, shape, given, frames, fps, generator, callback_on_step_end,
            output_type, dict(policy=policy, block_frames=block_frames, **changes),
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
            tiered(self.transformer, vae=self.vae, compressor_network=self.compressor, **options) as wan,
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

    def _prompts(self, prompt: Any, embeds: Any) -> dict[float, Any]:
        """The prompt, or its embedding, from each second on."""
        if (prompt is None) == (embeds is None):
            raise PolicyError("give prompt or prompt_embeds, one of them")
        given = embeds if prompt is None else prompt
        each = dict(given) if isinstance(given, Mapping) else {0.0: given}
        wrong = [second for second in each if not _is_finite(second) or second < 0]
        if wrong:
            raise PolicyError(f"prompts change at finite numbers of seconds, 0 or more, got {wrong[0]!r}")
        if 0 not in each:
            raise PolicyError(f"a prompt that changes needs one from second 0, got {sorted(each)}")
        check = self._check_prompt if embeds is None else self._check_embeds
        for one in each.values():
            check(one)
        if prompt is not None and (self.text_encoder is None or self.tokenizer is None):
            raise PolicyError("this pipeline has no text encoder; give prompt_embeds, or load it with one")
        rows = {_rows(one) for one in each.values()}
        if len(rows) > 1:
            raise GeometryError(f"prompts of one video are of one batch size, got {sorted(rows)}")
        return {float(second): each[second] for second in sorted(each)}

    @staticmethod
    def _check_prompt(prompt: Any) -> None:
        words = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
            raise PolicyError(f"a prompt is a string, or a list with one for each row, got {prompt!r}")

    def _check_embeds(self, embeds: Any) -> None:
        width = self.transformer.config.text_dim
        if not isinstance(embeds, Tensor) or embeds.dim() != 3 or embeds.shape[2] != width or not embeds.numel():
            raise GeometryError(f"prompt_embeds are [batch, words, {width}], got {_described(embeds)}")

    @torch.no_grad()
    def _embedded(self, prompts: Mapping[float, Any]) -> dict[float, Tensor]:
        """The embeddings of `prompts`, on the device; those that are embeddings are only moved there."""
        device, dtype = self._execution_device, self.transformer.dtype
        return {
            second: one.to(device, dtype)
            if isinstance(one, Tensor)
            else self._get_t5_prompt_embeds(prompt=one, max_sequence_length=_WORDS, device=device, dtype=dtype)
            for second, one in prompts.items()
        }

    def _blocks_of(self, clip: Any, shape: tuple[int, ...]) -> list[Tensor]:
        """The blocks of a clip of whole blocks."""
        if (
            not isinstance(clip, Tensor)
            or clip.dim() != 5
            or (*clip.shape[:2], *clip.shape[3:]) != (*shape[:2], *shape[3:])
            or clip.shape[2] % shape[2]
            or not clip.shape[2]
        ):
            raise GeometryError(
                f"a clip is latents of one or more whole blocks, {(*shape[:2], f'n x {shape[2]}', *shape[3:])}, "
                f"got {_described(clip)}"
            )
        return list(clip.to(self._execution_device, self.transformer.dtype).split(shape[2], 2))


def _check_options(policy: str | Path | Policy, layers: int, options: Mapping[str, Any]) -> None:
    """Check that what `stream` does not take itself is for `CausalWan` or its policy."""
    needless = next((name for name in options if name in _DISTILLED), None)
    if needless is not None:
        raise PolicyError(
            f"got {needless}, but a causal model takes none: it is distilled to work without guidance, in the steps of "
            "timesteps; leave it out"
        )
    taken = {"vae", "transformer", "compressor_network"} & set(options)
    if taken:
        raise PolicyError(
            f"got {', '.join(sorted(taken))}, but the pipeline gives its own parts; set them on the pipeline"
        )
    settings = {name: value for name, value in options.items() if name not in signature(CausalWan).parameters}
    try:
        resolve(policy, layers=list(range(layers)), **settings)
    except PolicyError as error:
        own = [name for name in signature(CausalWanPipeline.stream).parameters if name not in ("self", "changes")]
        raise type(error)(f"{error} (stream itself takes {', '.join(own)})") from error


def _length(seconds: float | int | None, num_frames: int | None, fps: int) -> int:
    """The frames that were asked for."""
    if num_frames is not None and seconds is None:
        _check_whole("num_frames", num_frames)
        return num_frames
    if seconds is None or num_frames is not None:
        raise PolicyError(f"give seconds or num_frames, got seconds={seconds} and num_frames={num_frames}")
    if not _is_finite(seconds) or round(seconds * fps) < 1:
        raise PolicyError(f"seconds must be a finite number, of at least one frame at {fps} a second, got {seconds!r}")
    return round(seconds * fps)


def _check_whole(name: str, got: Any) -> None:
    if isinstance(got, bool) or not isinstance(got, int) or got < 1:
        raise PolicyError(f"{name} must be a whole number of at least 1, got {got!r}")


def _is_finite(got: Any) -> bool:
    return isinstance(got, int | float) and not isinstance(got, bool) and isfinite(got)


def _rows(prompt: str | list[str] | Tensor) -> int:
    """How many videos `prompt` describes."""
    return 1 if isinstance(prompt, str) else len(prompt)


def _described(got: Any) -> str:
    """The shape of a tensor, the type of anything else."""
    return str(tuple(got.shape)) if isinstance(got, Tensor) else f"a {type(got).__name__}"


def _at(texts: Mapping[float, Tensor], second: float) -> Tensor:
    """The text at `second`; the same tensor as long as it does not change."""
    return texts[max(start for start in texts if start <= second + 1e-9)]


def _held(wan: CausalWan) -> str:
    held = wan.memory_usage()
    return f"{max(wan.attended(), default=0):,} tokens, {bytes_in(held, 'device') / 1e9:.2f} GB"
