"""Guidance and the two transformers of Wan 2.2, against loops by hand with a memory for each."""

from contextlib import ExitStack
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="needs the extra 'diffusers'")

import torch
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

import tiny_chat
from kvtiers import PolicyError
from kvtiers_diffusers import CausalWan, StreamingDecoder, tiered
from kvtiers_diffusers.schedule import clean, noised, warped
from kvtiers_packforcing.network import HighResolution
from tiny_pipeline import SMALL, pipeline, seeded
from tiny_wan import build, prompt, vae

LATENT: dict[str, Any] = {**SMALL, "output_type": "latent"}
PACKED: dict[str, Any] = {"policy": "packforcing", "compressor": ("dual-branch", {"branches": "lr"}), "top_k": 2}
TEXT, AGAINST = prompt(seed=1), prompt(seed=2)


@torch.no_grad()
def by_hand(
    models: list[Any],
    *,
    boundary: float = 0.0,
    scales: tuple[float, ...] = (1.0,),
    times: tuple[float, ...] = (1000, 500),
    blocks: int = 3,
    against: Tensor = AGAINST,
    pixels: bool = False,
    share: bool = False,
    **options: Any,
) -> Tensor:
    """The latents of a rollout. models, scales: of high noise, then of low noise, or of all.

    share: one memory serves both transformers, both prompts (a negative control).
    """
    settings = options or {"policy": "sink-rolling-window", "sink": 2, "recent": 2}
    random, schedule, found = seeded(), warped(times, 5.0), []
    decoder = StreamingDecoder(vae())
    with ExitStack() as stack:

        def memory(model: Any) -> CausalWan:
            return stack.enter_context(tiered(model, vae=vae(), **settings))

        pairs = [(memory(model), memory(model)) for model in models]
        for _ in range(blocks):
            noisy = torch.randn(1, 16, 2, 8, 8, generator=random)
            for step, timestep in enumerate(schedule):
                low = len(models) > 1 and timestep < boundary
                (wan, other), scale = pairs[low], scales[low % len(scales)]
                flow = wan.denoise(noisy, timestep, TEXT)
                if scale > 1:
                    without = (wan if share else other).denoise(noisy, timestep, against)
                    flow = (1 - scale) * without + scale * flow
                block = clean(noisy, flow, timestep)
                if step + 1 < len(schedule):
                    noise = torch.randn(1, 16, 2, 8, 8, generator=random)
                    noisy = noised(block, noise, schedule[step + 1])
            seen = decoder.decode(block) if pixels else None
            for wan, other in pairs:
                wan.commit(block, TEXT, seen)
                other.commit(block, against, seen)
            found.append(block)
    return torch.cat(found, 2)


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_guidance_is_a_loop_with_a_memory_for_each_prompt(packed: bool) -> None:
    options = {**LATENT, "num_frames": 45 if packed else 21, "prompt_embeds": TEXT, "negative_prompt_embeds": AGAINST}
    settings = {**PACKED, "sink": 2, "recent": 2} if packed else {}
    given: dict[str, Any] = {"pixels": packed, "blocks": 6 if packed else 3, **settings}
    model, made = build(), pipeline()
    found = made(guidance_scale=4.0, generator=seeded(), **{**options, **settings}).frames
    assert torch.allclose(found, by_hand([model], scales=(4.0,), **given), atol=1e-5)
    assert not torch.allclose(found, by_hand([model], scales=(4.0,), share=True, **given), atol=1e-3), (
        "the oracle does not notice a memory of the wrong prompt"
    )
    del options["negative_prompt_embeds"]
    plain = made(generator=seeded(), **{**options, **settings}).frames
    assert torch.allclose(plain, by_hand([model], **given), atol=1e-5)
    assert not any(type(p).__module__.startswith("kvtiers") for p in made.transformer.attn_processors.values())


@pytest.mark.parametrize(
    ("times", "scales"),
    [
        pytest.param((1000, 500, 250), (1.0, 1.0), id="no guidance"),
        pytest.param((1000, 500, 250), (4.0, 3.0), id="guidance of two scales"),
        pytest.param((1000, 900), (4.0, 4.0), id="high noise alone"),
        pytest.param((300, 100), (4.0, 4.0), id="low noise alone"),
    ],
)
def test_low_noise_is_the_second_transformers_and_each_remembers_by_itself(
    times: tuple[float, ...], scales: tuple[float, ...]
) -> None:
    models = [build(), build(seed=1)]
    made = pipeline(transformer=models[0], transformer_2=models[1], boundary_ratio=0.9)
    options: dict[str, Any] = {**LATENT, "num_frames": 21, "prompt_embeds": TEXT, "timesteps": times}
    if scales[0] > 1:
        options |= {"guidance_scale": scales[0], "negative_prompt_embeds": AGAINST}
    if scales[0] != scales[1]:
        options["guidance_scale_2"] = scales[1]
    found = made(generator=seeded(), **options).frames
    given: dict[str, Any] = {"boundary": 900.0, "scales": scales, "times": times}
    assert torch.allclose(found, by_hand(models, **given), atol=1e-5)
    if scales[0] > 1:
        return
    assert not torch.allclose(found, by_hand(models, **{**given, "boundary": 800.0}), atol=1e-3)
    without = pipeline(transformer=models[0], transformer_2=models[1])  # as in diffusers: no boundary, one transformer
    alone = without(generator=seeded(), **options).frames
    assert torch.allclose(alone, by_hand(models[:1], times=times), atol=1e-5)


def test_a_compressor_is_not_lent_to_a_second_transformer() -> None:
    network = HighResolution(channels=16, width=48, widths=(4, 4, 4, 4))
    made = pipeline(transformer_2=build(seed=1), boundary_ratio=0.9, compressor=network)
    with pytest.raises(PolicyError, match="a compressor is trained for one transformer, and here two make the steps"):
        made.stream(prompt_embeds=TEXT, num_frames=5, **LATENT)
    assert made(prompt_embeds=TEXT, num_frames=5, **{**LATENT, "timesteps": (1000, 900)}).frames.shape[2] == 2


def test_a_callback_may_end_guidance() -> None:
    options = {**LATENT, "num_frames": 13, "prompt_embeds": TEXT, "negative_prompt_embeds": AGAINST}

    def callback(pipe: Any, *_: Any) -> None:
        pipe._guidance_scale = 0.0

    found = pipeline()(guidance_scale=4.0, generator=seeded(), callback_on_step_end=callback, **options).frames
    guided = pipeline()(guidance_scale=4.0, generator=seeded(), **options).frames
    assert not torch.allclose(found, guided, atol=1e-3)
    once = {**options, "timesteps": (1000,), "num_frames": 5}
    found = pipeline()(guidance_scale=4.0, generator=seeded(), callback_on_step_end=callback, **once).frames
    assert torch.equal(found, pipeline()(guidance_scale=4.0, generator=seeded(), **once).frames)


@pytest.mark.parametrize(
    ("scale", "said"),
    [(float("nan"), "finite number, got nan"), (None, "finite number, got None"), (4.0, "was begun without; begin it")],
    ids=str,
)
def test_a_callback_cannot_begin_guidance_or_set_it_to_nonsense(scale: Any, said: str) -> None:
    def callback(pipe: Any, *_: Any) -> None:
        pipe._guidance_scale = scale

    options = {**LATENT, "num_frames": 5, "prompt_embeds": TEXT}
    with pytest.raises(PolicyError, match=said):
        pipeline()(generator=seeded(), callback_on_step_end=callback, **options)


def test_the_negative_prompt_is_the_empty_one_unless_another_is_given() -> None:
    torch.manual_seed(0)
    words = tiny_chat.tokenizer()
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 4}
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(words), **sizes)).eval()
    made = pipeline(tokenizer=words, text_encoder=encoder)
    options = {**LATENT, "num_frames": 5, "guidance_scale": 5.0}
    found = {
        said: made(["a ship", "a lamp"], negative_prompt=said, generator=seeded(), **options).frames
        for said in (None, "", "blur")
    }
    each = made(["a ship", "a lamp"], negative_prompt=["blur", ""], generator=seeded(), **options).frames
    assert torch.equal(found[None], found[""])
    assert torch.allclose(each[0], found["blur"][0], atol=1e-5)
    assert torch.allclose(each[1], found[""][1], atol=1e-5)
    assert not torch.allclose(each[1], found["blur"][1], atol=1e-3)
