"""The autoencoder's stage: whole passes equal the chunked ones, and its batches are what the world shows."""

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample

from kvtiers_packforcing.tiny_world import LinearCodec
from kvtiers_packforcing.training import config_of
from kvtiers_packforcing.training.autoencoder import AutoencoderStage
from kvtiers_packforcing.training.whole_sequence import decode_whole, encode_whole, whole_sequence
from tiny_wan import vae as wan_vae

RUN = {"stage": "autoencoder", "folder": "nowhere", "seed": 5}
PHASE = {"steps": 1, "peak_rate": 1e-3, "clips": 2, "frames": 9, "decoder_input": "both"}


def stage(**phase):
    table = {"run": RUN, "model": {"base_dim": 4}, "phases": [PHASE | phase]}
    return AutoencoderStage(config_of(table, AutoencoderStage.model_config, AutoencoderStage.phase_config))


@pytest.mark.parametrize("frames", [1, 5, 17])
@pytest.mark.parametrize("kind", ["wan", "tiny world"])
@torch.no_grad()
def test_a_whole_pass_equals_the_chunked_one(kind, frames):
    vae = wan_vae() if kind == "wan" else stage().model
    pixels = torch.randn(1, 3, frames, 16, 32, generator=torch.Generator().manual_seed(frames))
    latents = vae.encode(pixels).latent_dist.mode()
    assert torch.allclose(encode_whole(vae, pixels), latents, atol=1e-5)
    assert torch.allclose(decode_whole(vae, latents).clamp(-1, 1), vae.decode(latents).sample, atol=1e-5)


def test_an_autoencoder_is_given_back_as_it_was():
    vae = wan_vae()
    with pytest.raises(RuntimeError), whole_sequence(vae):
        raise RuntimeError
    assert {type(module) for module in vae.modules() if isinstance(module, WanResample)} == {WanResample}


def test_a_batch_is_a_crop_of_the_world_and_of_its_latents():
    whole, cropped = stage(), stage(crop_height=32, crop_width=64)
    pixels, latents = whole.batch(whole.config.phases[0], 7, (0, 1))
    assert torch.equal(latents, LinearCodec.load().encode(pixels))
    part, of_part = cropped.batch(cropped.config.phases[0], 7, (0, 1))
    assert part.shape == (2, 3, 9, 32, 64)
    places = [(y, x) for y in range(5) for x in range(9)]
    found = [at for at in places if torch.equal(pixels[..., at[0] * 8 :, at[1] * 8 :][..., :32, :64], part)]
    assert len(found) == 1
    y, x = found[0]
    assert torch.equal(latents[..., y : y + 4, x : x + 8], of_part)
    assert not torch.equal(whole.batch(whole.config.phases[0], 8, (0, 1))[0], pixels)


def test_the_loss_reaches_every_weight_that_decides_the_picture():
    made = stage()
    loss, figures = made.loss(made.config.phases[0], 1, (0, 1))
    loss.backward()
    blind = [name for name, weight in made.model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert blind == []
    assert set(figures) == {"colour", "edges", "fit", "mse"}


def test_several_processes_can_share_a_step():
    """What is drawn for a clip does not depend on the clips beside it."""
    made = stage()
    both, first, second = (made.loss(made.config.phases[0], 3, numbers)[0] for numbers in ((0, 1), (0,), (1,)))
    assert torch.allclose(both, (first + second) / 2, rtol=1e-5)
    assert not torch.allclose(first, second, rtol=1e-3)
