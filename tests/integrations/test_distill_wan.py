"""Stage `distill-wan` with a tiny Wan in the hub's layout: real loaders, real text encoder, real checkpoint format."""

from pathlib import Path

import pytest

pytest.importorskip("diffusers", reason="needs the extra 'diffusers'")
pytest.importorskip("transformers", reason="needs the extra 'transformers'")

import torch
from click.testing import CliRunner

from kvtiers_packforcing.training import Trainer, TrainingConfigError, config_of, load_config, make_stage
from kvtiers_packforcing.training.command import train
from kvtiers_packforcing.training.distillation import Generated, whole_score
from kvtiers_packforcing.training.embeddings import read_prompts
from kvtiers_packforcing.training.sampling import Rollout
from kvtiers_packforcing.training.wan import WanDistillStage
from tiny_hub import write_base, write_self_forcing
from tiny_wan import golden

CONFIG = "wan2.1-1.3b"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    write_base(folder / "base")
    write_self_forcing(folder / "self_forcing_dmd.pt")
    (folder / "prompts.txt").write_text("a cat in the snow\n\na dog in the rain\n")
    return folder


def table(hub, **changes):
    model = {"base": str(hub / "base"), "start": str(hub / "self_forcing_dmd.pt"), "prompts": str(hub / "prompts.txt")}
    model |= {"height": 64, "width": 64, "frames": 16, "sink_blocks": 1, "compressor_widths": [8, 8, 8, 8]}
    model |= {"timesteps": [1000, 500], "critic_updates": 1, "negative_prompt": "rain"}
    phase = {"steps": 2, "peak_rate": 1e-3, "critic_rate": 1e-3, "clips": 1}
    run = {"stage": "distill-wan", "folder": "nowhere", "log_every": 1}
    return {"run": run, "model": model | changes.get("model", {}), "phases": [phase | changes.get("phase", {})]}


def config(hub, **changes):
    return config_of(table(hub, **changes), WanDistillStage.model_config, WanDistillStage.phase_config)


def test_a_self_forcing_checkpoint_and_a_wan_are_distilled(hub, monkeypatch):
    made = WanDistillStage(config(hub))
    wanted = golden("full").model.state_dict()
    assert all(torch.equal(part, wanted[name]) for name, part in made.generator.transformer.state_dict().items())
    teacher, critic = (part.get_submodule("transformer") for part in (made.teacher, made.critic))
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), critic.parameters(), strict=True))
    assert not torch.equal(teacher.proj_out.weight, made.generator.transformer.proj_out.weight)
    with torch.no_grad():
        torch.nn.init.normal_(made.generator.compressor.layers[-1].weight, std=0.1)
        clips = made._make(["a"], 2)
        assert clips.low is not None
        with made.generator.packed() as wan:
            assert torch.allclose(made.exit_step(wan, clips), clips.rollout.latents, atol=5e-5)
    trainer = Trainer(made)
    figures = [trainer.advance() for _ in range(2)]
    assert set(figures[0]) == {"critic_loss", "critic_norm", "critic_rate"}
    assert figures[1]["norm"] > 0
    assert made.model.get_submodule("compressor").layers[0].weight.grad.any(), "the loss does not reach the compressor"
    # the embeddings are there now, and the text encoder is not read again
    monkeypatch.setattr("kvtiers_packforcing.training.wan.encoder_of", lambda *_: pytest.fail("the encoder is read"))
    assert made.generator.compressor.normalise
    made = WanDistillStage(config(hub, model={"normalise": False}))
    assert not made.generator.compressor.normalise
    texts = made.text([f"clip {nth}" for nth in range(8)])
    assert texts.shape == (8, 4, 512, 32)
    assert len({text.sum().item() for text in texts}) == 2
    assert made._negative[0].any(-1).sum() == 1, "the negative prompt has one word"
    with pytest.raises(TrainingConfigError, match="holds those of other prompts or of another model; delete it"):
        WanDistillStage(config(hub, model={"negative_prompt": "snow"}))


@torch.no_grad()
def test_the_teacher_is_guided_away_from_the_negative_prompt():
    model = golden("full").model
    generator = torch.Generator().manual_seed(0)
    text, negative = torch.randn(2, 4, 6, 32, generator=generator), torch.randn(1, 6, 32, generator=generator)
    noisy = torch.randn(2, 16, 8, 4, 6, generator=generator)
    made = Generated(text=text, rollout=Rollout(latents=noisy, inputs=noisy, sigma=1.0), low=None)
    times = torch.full((2, 4), 0.5)
    flows = [
        model(noisy, times[:, 0] * 1000, words, return_dict=False)[0]
        for words in (text[:, 0], negative.expand(2, -1, -1))
    ]
    for guidance in (0.0, 3.0):
        with whole_score(model, made, negative, guidance) as score:
            assert torch.allclose(score(noisy, times), flows[0] + guidance * (flows[0] - flows[1]), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": {"base": "nowhere"}}, r"base: 'nowhere' is no folder that is there, and no hub id \(OWNER/NAME\)"),
        ({"model": {"base": "a/b/c"}}, "base: 'a/b/c' is no folder that is there"),
        ({"model": {"base": str(Path(__file__).parent)}}, r"holds no transformer \(no transformer/config.json\)"),
        ({"model": {"start": "nowhere.pt"}}, "start: nowhere.pt is not there; give a checkpoint of Self-Forcing"),
        ({"model": {"prompts": "nowhere.txt"}}, "prompts: nowhere.txt cannot be read: .*a prompt on each line"),
        ({"model": {"guidance": -0.5}}, "guidance must be a number of at least 0, got -0.5"),
        ({"model": {"timesteps": [1000, 1200]}}, "timesteps: .*fall from at most 1000"),
        ({"model": {"frames": 18}}, r"frames must be a multiple of 4 \(a block\), got 18"),
        ({"model": {"frames": 12}}, "the compressor would not be trained; give more frames"),
        ({"model": {"height": 72}}, "height must be a multiple of 16 pixels, got 72"),
        ({"model": {"compressor_widths": [8, 8]}}, "compressor_widths must be four whole numbers"),
        ({"phase": {"loss": "trajectory"}}, "loss must be 'dmd' here, got 'trajectory'"),
    ],
    ids=lambda case: str(next(iter(case.values()))) if isinstance(case, dict) else "",
)
def test_what_is_wrong_is_said_before_anything_is_loaded(hub, monkeypatch, changes, says):
    monkeypatch.setattr("kvtiers_packforcing.training.wan._transformer", lambda _: pytest.fail("a model is loaded"))
    with pytest.raises(TrainingConfigError, match=says):
        WanDistillStage(config(hub, **changes))


def test_prompts_that_are_none_are_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(TrainingConfigError, match="has no prompts; write one on each line"):
        read_prompts(str(tmp_path / "empty.txt"))


def test_the_papers_configuration_is_estimated_without_weights():
    said = load_config(CONFIG)
    assert said.model.sigmas() == pytest.approx([1, 15 / 16, 5 / 6, 5 / 8])
    assert (said.phases[0].peak_rate, said.phases[0].critic_rate, said.phases[0].clips) == (2e-6, 1e-6, 8)
    done = CliRunner().invoke(train, [CONFIG, "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "stage distill-wan: 3,600 steps" in done.output
    assert "teacher: 1,418,996,800 parameters" in done.output
    assert "time per step: not measured, since prompts.txt is not here" in done.output
    with pytest.raises(TrainingConfigError, match=r"start: self_forcing_dmd.pt is not there"):
        make_stage(said)
