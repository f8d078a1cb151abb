"""`CausalWanPipeline`: prompts to video of any length, block by block, each streamed as soon as it is decoded."""

from collections.abc import Callable, Generator, Mapping, Sequence
from inspect import signature
from math import inf
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from kvtiers import GeometryError, Policy, PolicyError
from kvtiers_diffusers.asked import KINDS, Asked, block_shape, check_blocks, length, policies_of, scales
from kvtiers_diffusers.beginning import Beginning, beginning
from kvtiers_diffusers.clips import Clips
from kvtiers_diffusers.memories import Memories, remembering
from kvtiers_diffusers.parts import check_complete, check_parts
from kvtiers_diffusers.rates import rate
from kvtiers_diffusers.schedule import TIMESTEPS, clean, noised, warped
from kvtiers_diffusers.steering import Steering, tensor_inputs
from kvtiers_diffusers.streaming_vae import StreamingDecoder
from kvtiers_diffusers.texts import by_second, negative, rows_of, since

_WORDS = 512
"""Tokens of a prompt, padded with zeros, that Wan was trained with."""
_SCALE = (4, 8)
"""Frames and pixels that a latent of Wan 2.1 stands for, where no autoencoder says so."""


class CausalWanPipeline(WanPipeline):
    """diffusers' `WanPipeline` with a causal model's few-step schedule and a memory that does not grow.

    Takes what `WanPipeline` takes, and as `compressor` trained weights of the policy's compressor (such as
    `kvtiers_packforcing.network.HighResolution`), which are saved, loaded and moved with the rest. tokenizer and
    text_encoder may be none if embeddings are given, vae if latents are asked for, and the scheduler is kept for
    others: a causal model is distilled to a schedule of its own, which `stream` is given. With `transformer_2` and
    `boundary_ratio` (Wan 2.2), steps below that noise are the second's; each of the two remembers the clean blocks
    itself. The transformers stay diffusers' own and are given back as they were when a video ends, however it ends.

    Raises `UnsupportedModelError` for parts that cannot make such a video: those of image to video, VACE, and so on.

    Source: PackForcing (arXiv 2603.25730) section 4.1; the recipe is Self-Forcing's (arXiv 2506.08009).
    """

    _optional_components: ClassVar = ["tokenizer", "text_encoder", "transformer_2", "compressor"]
    _callback_tensor_inputs: ClassVar = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    transformer: Any
    transformer_2: Any
    compressor: Any
    vae: Any
    scheduler: Any
    text_encoder: Any
    tokenizer: Any
    config: Any
    video_processor: Any
    progress_bar: Any
    maybe_free_model_hooks: Any
    to: Any
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
        check_parts(transformer=transformer, transformer_2=transformer_2, vae=vae, boundary_ratio=boundary_ratio)
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
        self._guidance_scale, self._num_timesteps = 1.0, 0
        self._attention_kwargs: dict[str, Any] | None = None
        self._current_timestep: float | None = None
        self._interrupt = False

    @classmethod
    def from_pipe(cls, pipeline: Any, **changes: Any) -> "CausalWanPipeline":
        """The parts of another pipeline of Wan, shared with it; changes replace some.

        Every part keeps its dtype (other pipelines' `from_pipe` casts all of them to float32) unless `dtype` is given.
        """
        dtype = changes.pop("dtype", changes.pop("torch_dtype", None))
        held = {**dict(pipeline.config), **pipeline.components}
        names = [name for name in signature(cls.__init__).parameters if name != "self"]
        found = cls(**{**{name: held[name] for name in names if name in held}, **changes})
        return found if dtype is None else found.to(dtype=dtype)

    def __call__(self, *args: Any, return_dict: bool = True, output_type: str = "np", **options: Any) -> Any:
        """A whole video; options as for `stream`. Returns `WanPipelineOutput` with `frames`, or a tuple.

        Its frames do not know their rate, as the clips of `stream` do: give `write_video` the same fps.
        """
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
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | Mapping[float | int, Tensor] | None = None,
        negative_prompt_embeds: Tensor | None = None,
        seconds: float | int | None = None,
        num_frames: int | None = None,
        fps: Any = 16,
        height: int = 480,
        width: int = 832,
        policy: str | Path | Policy = "packforcing",
        block_frames: int = 4,
        timesteps: Sequence[float | int] = TIMESTEPS,
        shift: float = 5.0,
        guidance_scale: float | int = 1.0,
        guidance_scale_2: float | int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        image: Any = None,
        clip: Any = None,
        callback_on_step_end: Callable[[Any, int, float, dict[str, Any]], Mapping[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        output_type: str = "np",
        **changes: Any,
    ) -> Clips:
        """An iterator of clips: the frames of each block as soon as it is decoded. Its `fps` is that of the video.

        prompt (or prompt_embeds, [batch, words, text_dim]): one, or `{second: prompt}` if it changes during the video:
            then each block has the prompt of the second at which it begins, counted from the start of the clip, if one
            is given, and four frames for every latent frame.
        negative_prompt (or negative_prompt_embeds), guidance_scale: for models that are not distilled to do without.
            Above 1, every step runs twice, and a second memory follows the negative prompt (the empty one if none is
            given). guidance_scale_2: for the steps of transformer_2, guidance_scale if it is not given.
        seconds or num_frames: how long; whole blocks are made and the last is cut. height, width: in pixels.
        fps: frames a second: a whole number, a float, a `Fraction`, or "24000/1001".
        policy, changes: what is remembered. timesteps: of the schedule, before the shift.
        image or clip: with what the video begins. An image or 1 + 4n frames of pixels (PIL, arrays or tensors as
            `stream` gives them, of this height and width) are encoded; a clip may also be normalised latents [batch,
            channels, frames, height, width]. It is committed first, and its frames are not yielded. If it is not whole
            blocks, its first block is shorter. One row serves all prompts.
        callback_on_step_end: called as `callback(pipeline, step, timestep, tensors)` after every denoising step.
            `tensors` holds what callback_on_step_end_tensor_inputs names ("latents" is x0, "prompt_embeds",
            "negative_prompt_embeds"), the number of the "block", and the "memories", whose `forget_prompts()` says that
            weights were changed. What it returns under those names of tensors replaces them.
            `pipeline._interrupt = True` ends the video with this block as it is.
        output_type: "np", "pt", "pil" or "latent".

        Raises `PolicyError`, `GeometryError` or `UnsupportedModelError`, before anything runs, for what cannot be made.
        """
        own = [name for name in signature(self.stream).parameters if name != "changes"]
        if output_type not in KINDS:
            raise PolicyError(f"output_type must be one of {', '.join(KINDS)}, got {output_type!r}")
        schedule = warped(timesteps, shift)
        why = None if output_type == "latent" else f"output_type={output_type!r} decodes with it"
        check_complete(transformer=self.transformer, vae=self.vae, why=why)
        transformers, boundary = self._taking_part(schedule)
        policies = policies_of(policy, len(self.transformer.blocks), changes, own)
        speed = rate(fps)
        frames = length(seconds, num_frames, speed)
        config, encoder = self.transformer.config, None not in (self.text_encoder, self.tokenizer)
        prompts = by_second(prompt, prompt_embeds, width=config.text_dim, encoder=encoder)
        rows = rows_of(next(iter(prompts.values())))
        if isinstance(generator, list) and len(generator) != rows:
            raise GeometryError(f"give one generator, or a list with one for each of {rows} rows, got {len(generator)}")
        guidance = scales(guidance_scale, guidance_scale_2, two=self.transformer_2 in transformers)
        against = negative(
            negative_prompt, negative_prompt_embeds, guided=guidance[0] > 1, rows=rows, width=config.text_dim,
            encoder=encoder,
        )  # fmt: skip
        scale = self._scale()
        shape = block_shape(config, scale[1], rows=rows, block_frames=block_frames, height=height, width=width)
        begun = beginning(image, clip, shape, scale)
        if begun is not None and begun.latents is None:
            check_complete(transformer=self.transformer, vae=self.vae, why="pixels are encoded with it")
        if begun is not None and not begun.even and changes.setdefault("even", False):
            raise PolicyError(
                f"a clip of {begun.frames} latent frames is not whole blocks of {block_frames}; leave even=True out, "
                "or cut the clip"
            )
        lengths = [] if begun is None else begun.lengths
        check_blocks(policies, config, shape, lengths, even=changes.get("even", True))
        tensors = tensor_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        asked = Asked(
            frames=frames, fps=speed, shape=shape, schedule=schedule, scale=scale[0],
            before=0 if begun is None else begun.frames,
        )  # fmt: skip
        self._interrupt, self._num_timesteps, self._guidance_scale = False, len(schedule), guidance[0]
        memories = remembering(
            transformers, boundary=boundary, guided=against is not None, networks=[self.compressor] * len(transformers),
            vae=self.vae, policy=policy, block_frames=block_frames, **changes,
        )  # fmt: skip
        made = self._stream(
            asked, memories, prompts, against, guidance, begun, generator, callback_on_step_end, tensors, output_type
        )
        return Clips(made, speed)

    def _stream(
        self,
        asked: Asked,
        memories: Any,
        prompts: Mapping[float, Any],
        against: Any,
        guidance: tuple[float, float],
        begun: Beginning | None,
        generator: Any,
        callback: Any,
        tensors: Sequence[str],
        output_type: str,
    ) -> Generator[Any, None, None]:
        left, latents_left, due = asked.frames, asked.latents, None
        try:
            with memories as held, self.progress_bar(total=asked.blocks * (len(asked.schedule) + 1)) as progress:
                device, dtype = self._execution_device, self.transformer.dtype
                texts = {second: self._embedded(one) for second, one in prompts.items()}
                wanted = output_type != "latent" or held.needs_pixels
                decoder = StreamingDecoder(self.vae) if wanted else None
                steering = Steering(
                    latents=torch.empty(0),
                    prompt_embeds=texts[0.0],
                    negative_prompt_embeds=None if against is None else self._embedded(against),
                    guidance=guidance,
                )
                behind = 0
                for block in [] if begun is None else begun.blocks(self.vae, device, dtype):
                    pixels = None if decoder is None else decoder.decode(block)
                    held.commit(
                        block, texts[since(texts, asked.second(behind))], steering.negative_prompt_embeds, pixels
                    )
                    behind += block.shape[2]
                for number in range(asked.blocks):
                    if self._interrupt:
                        break
                    start = since(texts, asked.second(behind))
                    if start != due:  # a callback's own prompt holds until the next one is due
                        steering.prompt_embeds, due = texts[start], start
                    for _ in self._steps(asked, held, steering, generator, callback, tensors, number):
                        progress.update()
                    block = steering.latents
                    pixels = None if decoder is None else decoder.decode(block)
                    last = number + 1 == asked.blocks or self._interrupt
                    if not last:
                        held.commit(block, steering.prompt_embeds, steering.negative_prompt_embeds, pixels)
                    behind += block.shape[2]
                    progress.update()
                    progress.set_postfix_str(held.describe())
                    if output_type == "latent" or pixels is None:
                        yield block[:, :, :latents_left]
                    else:
                        yield self.video_processor.postprocess_video(pixels[:, :, :left], output_type=output_type)
                        left -= pixels.shape[2]
                    latents_left -= block.shape[2]
                    if last:  # it was not remembered, so nothing can follow it
                        break
        finally:
            self._current_timestep = None
            self.maybe_free_model_hooks()

    def _steps(
        self,
        asked: Asked,
        held: Memories,
        steering: Steering,
        generator: Any,
        callback: Any,
        tensors: Sequence[str],
        number: int,
    ) -> Generator[None, None, None]:
        """Make one block from noise, step by step; it is left in `steering`."""
        device, dtype, schedule = self._execution_device, self.transformer.dtype, asked.schedule
        noisy = randn_tensor(asked.shape, generator=generator, device=device, dtype=torch.float32).to(dtype)
        for step, timestep in enumerate(schedule):
            text, against = steering.prompt_embeds, steering.negative_prompt_embeds
            self._current_timestep = timestep
            flow = held.denoise(noisy, timestep, text, against, steering.scales)
            steering.latents = clean(noisy, flow, timestep)
            if callback is not None:
                # several streams of one pipeline may take turns: what it says is what holds for this one
                self._num_timesteps, self._guidance_scale = len(schedule), steering.guidance[0]
                given = {name: getattr(steering, name) for name in tensors}
                said = callback(self, step, timestep, {**given, "block": number, "memories": held})
                steering.take(said or {})
                steering.guide(self._guidance_scale)
            yield
            if self._interrupt:
                return
            if step + 1 < len(schedule):
                noise = randn_tensor(asked.shape, generator=generator, device=device, dtype=torch.float32)
                noisy = noised(steering.latents, noise, schedule[step + 1])

    def _taking_part(self, schedule: Sequence[float]) -> tuple[list[Any], float]:
        """The transformers that make the steps of `schedule`, and the timestep from which on it is the first."""
        ratio = self.config.boundary_ratio
        check_parts(transformer=self.transformer, transformer_2=self.transformer_2, vae=self.vae, boundary_ratio=ratio)
        if self.transformer_2 is None or ratio is None:
            return [self.transformer], 0.0
        boundary = 1000.0 * ratio
        high, low = (any((t >= boundary) is first for t in schedule) for first in (True, False))
        if low and self.compressor is not None:
            raise PolicyError(
                "a compressor is trained for one transformer, and here two make the steps; load the pipeline without "
                "transformer_2, or without compressor"
            )
        if high and low:
            return [self.transformer, self.transformer_2], boundary
        return ([self.transformer], 0.0) if high else ([self.transformer_2], inf)

    def _scale(self) -> tuple[int, int]:
        """Frames and pixels that one latent stands for."""
        config = None if self.vae is None else self.vae.config
        return _SCALE if config is None else (config.scale_factor_temporal, config.scale_factor_spatial)

    def _embedded(self, prompt: Any) -> Tensor:
        """The embedding of a prompt, on the device; one that is an embedding is only moved there."""
        device, dtype = self._execution_device, self.transformer.dtype
        if isinstance(prompt, Tensor):
            return prompt.to(device, dtype)
        found: Tensor = self._get_t5_prompt_embeds(
            prompt=prompt, max_sequence_length=_WORDS, device=device, dtype=dtype
        )
        return found
