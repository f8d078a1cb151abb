"""The pipeline keeps diffusers' conventions: callbacks, interruption, hooks, parts of the wrong kind, `from_pipe`."""

from typing import Any

import pytest

pytest.importorskip("diffusers", reason="needs the extra 'diffusers'")

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanVACETransformer3DModel,
)
from diffusers.callbacks import PipelineCallback

from kvtiers import GeometryError, PolicyError, UnsupportedModelError
from kvtiers_diffusers import CausalWanPipeline, tiered
from kvtiers_diffusers.schedule import clean, noised, warped
from strategies import unchecked
from tiny_pipeline import SMALL, pipeline, seeded
from tiny_wan import build, prompt, vae

LATENT: dict[str, Any] = {**SMALL, "output_type": "latent"}


def test_a_callback_reads_what_diffusers_offers_and_is_given_the_tensors_it_names() -> None:
    made, texts, seen = pipeline(), prompt(rows=2), []

    def callback(pipe: Any, step: int, timestep: float, held: dict[str, Any]) -> dict[str, Any]:
        seen.append((pipe.num_timesteps, pipe.current_timestep, pipe.guidance_scale, pipe.interrupt))
        assert pipe.do_classifier_free_guidance
        assert pipe.attention_kwargs is None
        assert torch.equal(held["prompt_embeds"], texts)
        assert held["negative_prompt_embeds"].shape == (1, 6, 32)
        assert set(held) == {"prompt_embeds", "negative_prompt_embeds", "block", "memories"}
        return {}

    names = ["prompt_embeds", "negative_prompt_embeds"]
    options = {"guidance_scale": 2.0, "negative_prompt_embeds": prompt(seed=1)}
    options |= {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names}
    made(prompt_embeds=texts, num_frames=13, generator=seeded(), **options, **LATENT)
    wanted = [(2, 1000.0, 2.0, False), (2, pytest.approx(2500 / 3), 2.0, False)]
    assert seen == wanted * 2
    assert made.current_timestep is None


def test_a_callback_may_be_one_of_diffusers_and_may_change_the_prompt() -> None:
    class Switch(PipelineCallback):
        """Another prompt from the second block on."""

        tensor_inputs = ("latents", "prompt_embeds")

        def callback_fn(self, _: Any, step: int, __: Any, held: dict[str, Any]) -> dict[str, Any]:
            if held["block"] == 0 and step == 1:
                held["prompt_embeds"] = prompt(seed=2)
            return held

    first, second = prompt(seed=1), prompt(seed=2)
    options: dict[str, Any] = {"num_frames": 13, "callback_on_step_end": Switch(), **LATENT}
    found = pipeline()(prompt_embeds=first, generator=seeded(), **options).frames
    timed = pipeline()(prompt_embeds={0: first, 0.3: first}, generator=seeded(), **options).frames
    for video, later in ((found, second), (timed, first)):  # it holds until the next one that is due
        made, random, blocks = pipeline(), seeded(), []
        with torch.no_grad(), tiered(made.transformer, "sink-rolling-window", sink=2, recent=2) as wan:
            for text, clean_text in ((first, second), (later, later)):
                noises = [torch.randn(1, 16, 2, 8, 8, generator=random) for _ in range(2)]
                block = clean(noises[0], wan.denoise(noises[0], 1000.0, text), 1000.0)
                timestep = warped([500], 5.0)[0]
                noisy = noised(block, noises[1], timestep)
                blocks.append(clean(noisy, wan.denoise(noisy, timestep, text), timestep))
                wan.commit(blocks[-1], clean_text)
        assert torch.allclose(video, torch.cat(blocks, 2), atol=1e-5)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"latents": torch.zeros(1, 16, 1, 8, 8)}, r"latents of \(1, 16, 1, 8, 8\), and this block is \(1, 16, 2"),
        ({"prompt_embeds": torch.zeros(6, 32)}, r"prompt_embeds are \[batch, words, 32\], got \(6, 32\)"),
        ({"prompt_embeds": prompt(rows=3)}, "prompt_embeds of .3, 6, 32., and this video has 1 rows"),
        ({"negative_prompt_embeds": prompt()}, "this video has 1 rows and no negative prompt"),
    ],
)
def test_what_a_callback_returns_has_to_fit(said: dict[str, Any], message: str) -> None:
    with pytest.raises(GeometryError, match=message):
        pipeline()(prompt_embeds=prompt(), num_frames=5, callback_on_step_end=lambda *_: said, **LATENT)


@torch.no_grad()
def test_a_callback_that_changes_weights_says_so() -> None:
    """Written past autograd and beside the diagonal, what is changed does not show; it is as if it did."""
    options = {"prompt_embeds": prompt(), "num_frames": 13, **LATENT}

    def film(*, say: bool) -> torch.Tensor:
        made = pipeline()

        def callback(_: Any, step: int, __: float, held: dict[str, Any]) -> None:
            if (held["block"], step) == (0, 1):
                for block in made.transformer.blocks:
                    weight = block.attn2.to_v.weight
                    changed = 3 * weight - 2 * weight.diagonal().diag()
                    weight.data.copy_(changed) if say else weight.copy_(changed)
                if say:
                    held["memories"].forget_prompts()

        found: torch.Tensor = made(generator=seeded(), callback_on_step_end=callback, **options).frames
        return found

    told, seen = film(say=True), film(say=False)
    assert torch.equal(told, seen)
    assert not torch.allclose(told[:, :, 2:], pipeline()(generator=seeded(), **options).frames[:, :, 2:], atol=1e-3)


@pytest.mark.parametrize(("when", "frames"), [((0, 0), 5), ((1, 0), 13), ((1, 1), 13)])
def test_an_interrupted_video_ends_with_the_block_that_was_being_made(when: tuple[int, int], frames: int) -> None:
    made, steps = pipeline(), []

    def callback(pipe: Any, step: int, _: float, held: dict[str, Any]) -> None:
        steps.append((held["block"], step))
        pipe._interrupt = steps[-1] == when

    options = {"prompt_embeds": prompt(), "num_frames": 45, **SMALL}
    found = made(generator=seeded(), callback_on_step_end=callback, output_type="pt", **options).frames
    assert found.shape[1] == frames
    assert steps[-1] == when
    assert made.interrupt
    assert made(generator=seeded(), **{**options, "num_frames": 13}).frames.shape[1] == 13  # another begins anew
    clips = made.stream(generator=seeded(), **options)
    next(clips)
    made._interrupt = True
    assert list(clips) == []


def test_a_video_that_was_interrupted_does_not_go_on_from_what_it_did_not_remember() -> None:
    made = pipeline()

    def callback(pipe: Any, step: int, _: float, held: dict[str, Any]) -> None:
        pipe._interrupt = (held["block"], step) == (1, 1)

    options = {"prompt_embeds": prompt(), "num_frames": 29, **SMALL}
    clips = made.stream(generator=seeded(), callback_on_step_end=callback, **options)
    found = [next(clips), next(clips)]
    made._interrupt = False
    assert len(found) == 2
    assert list(clips) == []


class Counting(CausalWanPipeline):
    """Counts how often diffusers is asked to free the hooks of models that are kept elsewhere."""

    freed = 0

    def maybe_free_model_hooks(self) -> None:
        self.freed += 1
        assert not any(type(p).__module__.startswith("kvtiers") for p in self.transformer.attn_processors.values())
        super().maybe_free_model_hooks()


@pytest.mark.parametrize("end", ["whole", "closed", "failed", "given up"])
def test_models_kept_elsewhere_are_sent_back_however_a_video_ends(end: str) -> None:
    made = Counting(vae=vae(), transformer=build(), scheduler=FlowMatchEulerDiscreteScheduler())
    made.set_progress_bar_config(disable=True)

    def callback(*_: Any) -> None:
        if end == "failed":
            raise MemoryError

    clips = made.stream(prompt_embeds=prompt(), num_frames=13, callback_on_step_end=callback, **SMALL)
    assert made.freed == 0
    if end == "failed":
        with pytest.raises(MemoryError):
            next(clips)
    elif end == "whole":
        list(clips)
    else:
        next(clips)
        if end == "closed":
            clips.close()
        else:
            del clips
    assert made.freed == 1


def test_two_streams_of_one_pipeline_take_turns_without_touching_one_another() -> None:
    made, against = pipeline(), prompt(seed=1)
    options = {"prompt_embeds": prompt(), "num_frames": 13, "negative_prompt_embeds": against, **LATENT}
    options["callback_on_step_end"] = lambda *_: None
    alone = [made(generator=seeded(), guidance_scale=scale, **options).frames for scale in (2.0, 6.0)]
    streams = [made.stream(generator=seeded(), guidance_scale=scale, **options) for scale in (2.0, 6.0)]
    clips = list(zip(*streams, strict=True))
    for wanted, parts in zip(alone, zip(*clips, strict=True), strict=True):
        assert torch.allclose(torch.cat(parts, 2), wanted, atol=1e-5)


# ---------------------------------------------------------------- parts


def wide(**changes: Any) -> Any:
    return build(in_channels=36, **changes)


def vace() -> Any:
    return WanVACETransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, text_dim=32, freq_dim=32, ffn_dim=96, num_layers=2,
        vace_layers=[0], vace_in_channels=96,
    )  # fmt: skip


def images() -> Any:
    return AutoencoderKL(block_out_channels=(4,), latent_channels=16, norm_num_groups=2)


@pytest.mark.parametrize(
    ("part", "make", "message"),
    [
        pytest.param("transformer", wide, "transformer takes 36 channels and makes 16: .*image to video", id="36"),
        pytest.param("transformer", vace, "transformer is a WanVACETransformer3DModel", id="vace"),
        pytest.param("transformer", lambda: build(image_dim=8, added_kv_proj_dim=48), "attends an image", id="i2v"),
        pytest.param("transformer", lambda: build(in_channels=4, out_channels=4), "of 16 .* takes 4", id="channels"),
        pytest.param("transformer_2", wide, "transformer_2 takes 36 channels", id="second"),
        pytest.param("transformer_2", lambda: build(text_dim=16), "differ in text_dim: 32 and 16", id="second's text"),
        pytest.param("vae", images, "vae is a AutoencoderKL; .* AutoencoderKLWan", id="image autoencoder"),
    ],
)
def test_parts_of_another_kind_are_refused_when_they_are_given_and_when_they_are_put_in(
    part: str, make: Any, message: str
) -> None:
    wrong = make()
    with pytest.raises(UnsupportedModelError, match=message):
        pipeline(**{part: wrong})
    made = pipeline()
    setattr(made, part, wrong)
    with pytest.raises(UnsupportedModelError, match=message):
        made.stream(prompt_embeds=prompt(), num_frames=5, **SMALL)


def test_without_an_autoencoder_there_are_latents_and_nothing_that_needs_pixels() -> None:
    made, whole, options = pipeline(vae=None), pipeline(), {"prompt_embeds": prompt(), "num_frames": 5}
    found = made(generator=seeded(), **options, **LATENT).frames
    assert torch.equal(found, whole(generator=seeded(), **options, **LATENT).frames)
    with pytest.raises(UnsupportedModelError, match=r"no autoencoder .* output_type='np' decodes with it; load"):
        made.stream(**options, **SMALL)
    with pytest.raises(UnsupportedModelError, match=r"no autoencoder .* pixels are encoded with it"):
        made.stream(image=torch.zeros(3, 64, 64), **options, **LATENT)
    with pytest.raises(PolicyError, match="autoencoder"):
        made(**options, **{**LATENT, "policy": "packforcing", "recent": 4})
    with pytest.raises(UnsupportedModelError, match="no transformer"):
        pipeline(transformer=None).stream(**options, **SMALL)
    with pytest.raises(UnsupportedModelError, match=r"boundary_ratio=0.9 gives low noise to a transformer_2"):
        pipeline(boundary_ratio=0.9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "are of latents, prompt_embeds, .* got 'noise'"),
        ({"attention_kwargs": {"scale": 0.5}}, r"got attention_kwargs, .* set_adapters\(\)"),
        ({"latents": torch.zeros(1)}, "got latents, .* noise of the generator"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number .* got nan"),
        ({"guidance_scale": 5.0}, "no text encoder; give negative_prompt_embeds"),
        ({"guidance_scale": 5.0, "guidance_scale_2": 3.0}, "guidance_scale_2 is for the steps of a transformer_2"),
        ({"guidance_scale": 1.0, "negative_prompt_embeds": prompt()}, "acts only with a guidance_scale of more than 1"),
        ({"guidance_scale": 2.0, "negative_prompt_embeds": prompt(rows=2)}, "1 prompts and 2 negative ones"),
        ({"guidance_scale": 2.0, "negative_prompt_embeds": prompt()[0]}, "negative_prompt_embeds are .batch, words"),
        ({"guidance_scale": 2.0, "negative_prompt_embeds": prompt(), "negative_prompt": ""}, "one of them"),
    ],
)
def test_options_that_would_do_nothing_or_something_else_are_refused(options: dict[str, Any], message: str) -> None:
    with unchecked(), pytest.raises((PolicyError, GeometryError), match=message):
        pipeline().stream(**{"prompt_embeds": prompt(), "num_frames": 5, **LATENT, **options})


def test_it_is_made_of_another_pipeline_whose_parts_and_dtypes_it_shares() -> None:
    other = WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=build().bfloat16(), transformer_2=build(seed=1).bfloat16(), boundary_ratio=0.9,
    )  # fmt: skip
    made = CausalWanPipeline.from_pipe(other)
    assert made.transformer is other.transformer
    assert made.transformer_2 is other.transformer_2
    assert (made.vae, made.scheduler, made.config.boundary_ratio) == (other.vae, other.scheduler, 0.9)
    assert (made.transformer.dtype, made.vae.dtype) == (torch.bfloat16, torch.float32)
    found = CausalWanPipeline.from_pipe(other, transformer=build(), transformer_2=None, boundary_ratio=None)
    found.set_progress_bar_config(disable=True)
    options = {"prompt_embeds": prompt(), "num_frames": 5, **LATENT}
    assert torch.equal(found(generator=seeded(), **options).frames, pipeline()(generator=seeded(), **options).frames)
    assert CausalWanPipeline.from_pipe(made, dtype=torch.float32).transformer.dtype == torch.float32
    wrong = WanPipeline(tokenizer=None, text_encoder=None, vae=vae(), scheduler=other.scheduler, transformer=wide())
    with pytest.raises(UnsupportedModelError, match="takes 36 channels"):
        CausalWanPipeline.from_pipe(wrong)
