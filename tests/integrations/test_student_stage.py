"""The student's stage: what it is shown, and that its loss teaches the model and the compressor."""

import random
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file

from kvtiers_diffusers import tiered
from kvtiers_packforcing.tiny_world import Clips
from kvtiers_packforcing.tiny_world.sampling import Sampler
from kvtiers_packforcing.tiny_world.weights import SHIPPED
from kvtiers_packforcing.training import Trainer, TrainingConfigError, config_of
from kvtiers_packforcing.training.causal_clips import high_resolution
from kvtiers_packforcing.training.evaluation import returns_beyond_the_sink
from kvtiers_packforcing.training.layout import LAYOUTS, Layout
from kvtiers_packforcing.training.noising import draw_clip, draw_sigmas, draw_starts
from kvtiers_packforcing.training.packed import packed
from kvtiers_packforcing.training.student import StudentStage
from kvtiers_packforcing.training.student_config import StudentConfig

SMALL = {"width": 32, "layers": 2, "heads": 2, "ffn_width": 64}


def stage(run=None, layouts=None, random_ends=True, blocks=5, **model):
    table = {
        "run": {"stage": "student", "folder": "nowhere", "seed": 1} | (run or {}),
        "model": SMALL | model,
        "phases": [
            {"steps": 1, "peak_rate": 1e-3, "clips": 2, "noisy_streams": 2, "layouts": layouts or {"packforcing": 1}}
            | {"clip_blocks": blocks}
        ],
    }
    made = StudentStage(config_of(table, StudentStage.model_config, StudentStage.phase_config))
    torch.manual_seed(0)
    for last in () if not random_ends else (made.transformer.proj_out, made.compressor.layers[-1]):
        torch.nn.init.normal_(last.weight, std=0.1)  # both begin at zero, which lets nothing through
    return made


def test_the_loss_of_a_step_is_the_same_every_time_and_reaches_everything():
    made = stage()
    phase = made.config.phases[0]
    loss, figures = made.loss(phase, 3, range(2))
    loss.backward()
    assert [name for name, weight in made.model.named_parameters() if weight.grad is None] == []
    assert all(weight.grad.any() for weight in made.compressor.parameters())
    assert torch.equal(made.loss(phase, 3, range(2))[0], loss)
    assert not torch.equal(made.loss(phase, 4, range(2))[0], loss)
    assert set(figures) == {"flow", "first_block", "later_blocks"}


@torch.no_grad()
def test_a_rollout_is_what_the_packed_forward_predicts():
    """One step from pure noise through the cache, beside the packed forward over what came out."""
    made = stage()
    clips = Clips.of_seeds(["a", "b"])
    latents, text = made.codec.encode(clips.pixels()), clips.text()
    video = made.rollout(latents[:, :, :16], text, sampler=Sampler(steps=1))
    assert torch.equal(video[:, :, :16], latents[:, :, :16])
    noise = torch.randn(2, 16, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    noisy = torch.cat((latents[:, :, :16], noise), 2)[:, None]
    with packed(made.transformer, Layout()) as wan:
        flow = made.predict(wan, latents, noisy, torch.ones(2, 1, 5), text)
    assert torch.allclose(video[:, :, 16:], noise - flow[:, 0, :, 16:], atol=2e-5)


@torch.no_grad()
def test_both_branches_packed_equal_the_cache(tmp_path):
    """With the true pixels of consecutive blocks, the low-resolution tokens are those of the cache."""
    settings = {
        "base_dim": 4,
        "z_dim": 16,
        "dim_mult": [1, 2, 4],
        "num_res_blocks": 1,
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
    }
    AutoencoderKLWan(**settings, temperal_downsample=[True, True]).save_pretrained(tmp_path)
    made = stage(autoencoder=str(tmp_path))
    clips = Clips.of_seeds(["a", "b"], "consecutive")
    pixels, text = clips.pixels(), clips.text()
    latents, sigmas = made.codec.encode(pixels), torch.full((2, 1, 5), 0.7)
    noisy = latents[:, None] + torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))[:, None]
    with packed(made.transformer, Layout()) as wan:
        low = made.low_resolution(clips, latents, Layout())
        found = made.predict(wan, latents, noisy, sigmas, text, low=low)
        blind = made.predict(wan, latents, noisy, sigmas, text)
    network = made.compressor
    with tiered(made.transformer, "packforcing", sink=4, recent=4, vae=made.vae, compressor_network=network) as wan:
        for block in range(5):
            cut, seen = slice(block * 4, block * 4 + 4), slice(max(0, block * 16 - 3), block * 16 + 13)
            flow = wan.denoise(noisy[:, 0, :, cut], 700.0, text[:, block])
            assert torch.allclose(found[:, 0, :, cut], flow, atol=2e-6)
            wan.commit(latents[:, :, cut], text[:, block], pixels=pixels[:, :, seen])
    assert (found - blind).abs().max() > 1e-4, "the low-resolution branch makes no difference"


def gradients(made):
    made.model.zero_grad()
    loss, _ = made.backward(made.config.phases[0], 3, range(2))
    return loss, {name: weight.grad.clone() for name, weight in made.model.named_parameters()}


def test_layers_that_run_again_give_the_same_gradients():
    loss, wanted = gradients(stage())
    again, found = gradients(stage({"gradient_checkpointing": True}))
    assert torch.equal(loss, again)
    assert all(torch.allclose(wanted[name], found[name], atol=1e-7) for name in wanted)


def test_mixed_precision_rounds_products_alone():
    loss, wanted = gradients(stage())
    rounded, found = gradients(stage({"precision": "bfloat16"}))
    assert 0 < abs(rounded / loss - 1) < 1e-3
    assert all(part.dtype == torch.float32 for part in found.values())
    whole, other = (torch.cat([part.flatten() for part in parts.values()]) for parts in (wanted, found))
    assert 1e-4 < (whole - other).norm() / whole.norm() < 0.05


@pytest.mark.slow
def test_compiled_layers_give_the_same_gradients(tmp_path):
    """In processes of their own: the compiler cannot trace the checks of shapes that run in tests."""
    for name in ("plain", "compiled"):
        settings = "width = 32\nlayers = 2\nheads = 2\nffn_width = 64"
        (tmp_path / f"{name}.toml").write_text(
            f'[run]\nstage = "student"\nfolder = "{tmp_path / name}"\nlog_every = 1\n'
            f"compile = {str(name == 'compiled').lower()}\n[model]\n{settings}\n"
            "[[phases]]\nsteps = 2\npeak_rate = 1e-3\nclips = 2\nnoisy_streams = 2\n"
        )
        command = [sys.executable, "-m", "kvtiers_packforcing.training", str(tmp_path / f"{name}.toml")]
        subprocess.run(command, check=True, timeout=300)
    plain, compiled = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("plain", "compiled"))
    moments = [name for name in plain if name.startswith("first.transformer")]
    assert not all(torch.equal(plain[name], compiled[name]) for name in moments), "nothing was compiled"
    assert all(torch.allclose(plain[name], compiled[name], atol=1e-5, rtol=1e-3) for name in moments)


def muon(folder, until=None):
    table = {
        "run": {"stage": "student", "folder": str(folder), "log_every": 1, "save_every": 1},
        "optimiser": {"matrices": "muon", "matrix_rate": 2.0},
        "model": SMALL,
        "phases": [
            {"steps": 3, "peak_rate": 1e-3, "clips": 1, "noisy_streams": 1, "layouts": {"packforcing": 1}},
        ],
    }
    trainer = Trainer(StudentStage(config_of(table, StudentStage.model_config, StudentStage.phase_config)))
    trainer.run(until=until)
    return trainer


def test_muon_updates_the_matrices_of_layers_and_resumes_bit_for_bit(tmp_path):
    whole = muon(tmp_path / "whole")
    for until in (1, None):
        muon(tmp_path / "parts", until)
    first, second = ((tmp_path / name / "checkpoint.safetensors").read_bytes() for name in ("whole", "parts"))
    assert first.replace(b"/whole", b"/parts") == second, "weights, averages or moments differ"
    learner = whole.learners["model"]
    matrices = {id(weight) for weight in learner.matrices.param_groups[0]["params"]}
    names = {name for name, weight in whole.stage.model.named_parameters() if id(weight) in matrices}
    assert "transformer.blocks.0.attn1.to_q.weight" in names
    assert all(name.startswith("transformer.blocks.") and name.endswith(".weight") for name in names)
    assert len(names) + len(learner.optimiser.param_groups[0]["params"]) == len([*whole.stage.model.parameters()])
    assert learner.matrices.param_groups[0]["lr"] == 2 * learner.optimiser.param_groups[0]["lr"]


@torch.no_grad()
def test_a_stream_without_prompts_is_told_zeros_beside_a_past_that_has_them():
    made = stage()
    clips = Clips.of_seeds(["a"])
    latents, text = made.codec.encode(clips.pixels()), clips.text()
    noisy, sigmas = torch.randn(1, 2, *latents.shape[1:]), torch.full((1, 2, 5), 0.7)
    with packed(made.transformer, Layout()) as wan:
        whole, bare, half = (
            made.predict(wan, latents, noisy, sigmas, text, told=torch.tensor([told]))
            for told in ([True, True], [False, False], [True, False])
        )
        by_stream = torch.stack((text, torch.zeros_like(text)), 1)[:, [0, 0, 1]]
        given = wan(torch.cat((latents[:, None], noisy), 1), torch.cat((sigmas[:, :1] * 0, sigmas), 1), by_stream,
                    reduced=high_resolution(made.compressor, latents, 5, [1, 2]), offsets=made.offsets)  # fmt: skip
        assert torch.equal(whole, made.predict(wan, latents, noisy, sigmas, text))
    assert torch.equal(half[:, 0], whole[:, 0])
    assert torch.allclose(half[:, 1], bare[:, 1], atol=1e-6)
    assert (whole - bare)[:, 1].abs().max() > 1e-4
    assert torch.allclose(given[:, 1:], half, atol=1e-6)


def test_prompts_are_dropped_as_often_as_the_configuration_says():
    told = [draw_clip(str(clip), 4, (16, 20, 8, 16), StudentConfig(prompt_drop_share=0.25))[-1] for clip in range(200)]
    assert 0.7 < torch.stack(told).double().mean() < 0.8
    assert draw_clip("0", 4, (16, 20, 8, 16), StudentConfig())[-1].all()


def test_several_processes_can_share_a_step_of_longer_clips():
    """What is drawn for a clip does not depend on the clips beside it."""
    made = stage(blocks=8)
    both, first, second = (made.loss(made.config.phases[0], 3, numbers)[0] for numbers in ((0, 1), (0,), (1,)))
    assert torch.allclose(both, (first + second) / 2, rtol=1e-5)
    assert not torch.allclose(first, second, rtol=1e-3)


def test_what_is_drawn_for_a_step_covers_what_it_says():
    sigmas = draw_sigmas(512, 5, torch.Generator().manual_seed(0))
    assert 0.005 <= sigmas.min() < 0.05
    assert sigmas.max() <= 1
    settings = StudentConfig(position_gap_share=0.5, position_gap_blocks=4)
    steps = torch.stack([draw_starts(random.Random(seed), 5, settings) for seed in range(400)]).diff(dim=1)
    assert set(steps.flatten().tolist()) == {4, 8, 12, 16, 20}
    assert 0.4 < (steps == 4).all(1).double().mean() < 0.6


def test_a_run_can_begin_with_what_another_one_exported(tmp_path):
    first = stage()
    first.export(tmp_path / "export")
    phase = first.config.phases[0]
    second = stage(start=str(tmp_path / "export"), random_ends=False)
    assert torch.equal(second.loss(phase, 3, range(2))[0], first.loss(phase, 3, range(2))[0])
    assert second.origins == {"start": tmp_path / "export"}
    with pytest.raises(TrainingConfigError, match="is of another size than"):
        stage(start=str(tmp_path / "export"), layers=3)
    with pytest.raises(TrainingConfigError, match=r"start: .*nowhere holds no transformer"):
        stage(start=str(tmp_path / "nowhere"))


def test_layouts_are_drawn_as_often_as_the_phase_says():
    made = stage(layouts={"packforcing": 3, "full": 1, "window": 0})
    drawn = [made._layout(made.config.phases[0], step) for step in range(400)]
    assert 0.7 < drawn.count(LAYOUTS["packforcing"]) / 400 < 0.8
    assert drawn.count(LAYOUTS["full"]) + drawn.count(LAYOUTS["packforcing"]) == 400


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"width": 30, "heads": 4}, "width must be heads times an even number"),
        ({"layouts": {"packforcin": 1}}, "'packforcin' is no layout.*Did you mean 'packforcing'"),
        ({"layouts": {"full": 0}}, "give at least one layout a number above 0"),
        ({"layouts": {"full": -1.0}}, "full must be a number of at least 0, got -1.0"),
        ({"layouts": ["full"]}, "layouts must be a table of numbers by layout"),
        ({"autoencoder": "nowhere"}, "nowhere holds no autoencoder; train one"),
        ({"clean_noise": 1.5}, "clean_noise must be a number from 0 to 1"),
        ({"clean_noise": float("nan")}, "clean_noise must be a number from 0 to 1, got nan"),
        ({"blocks": 33}, "clip_blocks must be a whole number from 5 to 32, got 33"),
    ],
    ids=["width", "layout", "no share", "negative", "no table", "autoencoder", "noise", "no number", "long clip"],
)
def test_a_student_that_cannot_be_is_refused_before_a_model_is_made(changes, says, monkeypatch):
    monkeypatch.setattr(StudentStage, "_made", lambda *_: pytest.fail("a model was made"))
    with pytest.raises(TrainingConfigError, match=says):
        stage(**changes)


def test_tokens_of_a_normalised_compressor_do_not_grow_with_its_layers():
    made = stage()
    assert made.compressor.config.normalise
    latents = torch.randn(2, 16, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    before = made.compressor(latents)
    with torch.no_grad():
        made.compressor.layers[-3].weight.mul_(1000)
        made.compressor.layers[-3].bias.mul_(1000)
    after = made.compressor(latents)
    assert 0.5 < after.norm() / before.norm() < 2
    assert (
        after.norm(dim=1).max() <= torch.linalg.matrix_norm(made.compressor.layers[-1].weight.flatten(1), 2) * 64**0.5
    )


def test_a_run_goes_on_with_the_form_of_the_compressor_that_it_begins_with(tmp_path):
    made = stage()
    for normalise in (False, True):
        made.compressor.register_to_config(normalise=normalise)
        for part in ("transformer", "compressor"):
            getattr(made, part).save_pretrained(tmp_path / part)
        begun = stage(start=str(tmp_path), random_ends=False)
        assert begun.compressor.normalise == begun.compressor.config.normalise == normalise


@torch.no_grad()
def test_the_shipped_weights_know_rooms_by_name_also_from_compressed_blocks():
    weights = {"start": str(SHIPPED), "autoencoder": str(SHIPPED / "autoencoder"), "compressor_width": 32}
    made = stage(random_ends=False, width=192, layers=4, heads=6, ffn_width=768, **weights)
    clips = returns_beyond_the_sink(8)
    remembered, without = made.told(clips, LAYOUTS["packforcing"]), made.told(clips, LAYOUTS["sink_window"])
    misnamed = made.told(clips, LAYOUTS["packforcing"], misnamed=True)
    assert made.told(clips, LAYOUTS["full"])["mismatch"] < 0.05, "keys of whole blocks of a room are not liked more"
    assert remembered["mismatch"] < 0.1, "keys of a room are not liked more than those of others"
    assert remembered["mismatch_compressed"] < 0.1, "compressed keys of a room are not"
    assert remembered["return"] < 0.95 * without["return"]
    assert remembered["return"] < 0.95 * misnamed["return"]
    for layer in made.transformer.blocks[1:]:
        layer.attn1.to_k.weight.zero_()
    nameless = made.told(clips, LAYOUTS["packforcing"])
    assert min(nameless["mismatch"], nameless["mismatch_compressed"]) > 0.9, "the figures notice keys without names"
