"""Runs of stage `distill`: two optimisers that resume bit for bit, and errors before anything is loaded."""

import json

import pytest

pytest.importorskip("diffusers", reason="needs the extra 'diffusers'")

from safetensors import safe_open
from safetensors.torch import load_file

from kvtiers_packforcing.training import CheckpointError, Trainer, TrainingConfigError, config_of
from kvtiers_packforcing.training.distill import DistillStage
from tiny_student import distill_stage, distill_table, export_student


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return export_student(tmp_path_factory.mktemp("student"))


def run(start, folder, until=None, **changes):
    changes = {"run": {"folder": str(folder), "save_every": 1}, "phase": {"clips": 1}} | changes
    trainer = Trainer(distill_stage(start, **changes))
    trainer.run(until=until)
    return trainer


@pytest.mark.parametrize(
    "shared",
    [pytest.param(False, id="fresh rollouts"), pytest.param(True, id="shared rollouts", marks=pytest.mark.slow)],
)
def test_a_run_that_was_stopped_between_critic_updates_is_the_run_that_was_not(start, tmp_path, shared):
    """Two updates of the critic and one of the generator, in turns."""
    model = {"critic_updates": 2, "timesteps": [1000], "share_rollouts": shared}
    changes = {"model": model, "phase": {"steps": 3, "clips": 1}}
    whole = run(start, tmp_path / "whole", **changes)
    assert {name: learner.updates for name, learner in whole.learners.items()} == {"model": 1, "critic": 2}
    for until in (1, None):
        run(start, tmp_path / "parts", until, **changes)
    first, second = ((tmp_path / name / "checkpoint.safetensors").read_bytes() for name in ("whole", "parts"))
    assert first.replace(b"/whole", b"/parts") == second, "weights, averages or moments differ"
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    names = [set(json.loads(line)) for line in logs[0].splitlines()]
    assert names[:2] == [{"step", "critic_loss", "critic_norm", "critic_rate"}] * 2
    assert names[2] == {"step", "loss", "gap", "off_teacher", "norm", "rate"}
    checkpoint = load_file(tmp_path / "whole" / "checkpoint.safetensors")
    for name in ("critic.model", "critic.first", "critic.second", "model", "average"):
        assert f"{name}.transformer.proj_out.weight" in checkpoint
    assert not any(name.startswith("critic.average") for name in checkpoint), "the critic is averaged"
    with safe_open(tmp_path / "whole" / "checkpoint.safetensors", "pt") as file:
        assert json.loads(file.metadata()["kvtiers"])["updates"] == {"model": 1, "critic": 2}


def test_a_run_does_not_go_on_from_another_teacher(tmp_path):
    """The folder has the name that the configuration says, but other weights than when the run began."""
    start = export_student(tmp_path / "student")
    changes = {"model": {"timesteps": [1000]}, "phase": {"steps": 2, "clips": 1}}
    run(start, tmp_path / "run", 1, **changes)
    before = (tmp_path / "run" / "checkpoint.safetensors").read_bytes()
    export_student(tmp_path / "student", seed=1)
    with pytest.raises(CheckpointError, match="when the folder of start held other files; put those back"):
        run(start, tmp_path / "run", **changes)
    assert (tmp_path / "run" / "checkpoint.safetensors").read_bytes() == before


def test_both_optimisers_have_rates_and_betas_of_their_own(start):
    trainer = Trainer(distill_stage(start, optimiser={"betas": [0.5, 0.9]}, phase={"clips": 1}))
    for name, betas, rate in (("critic", (0.0, 0.999), 2e-3), ("model", (0.5, 0.9), 1e-3)):
        assert trainer.learners[name].optimiser.defaults["betas"] == betas
        assert trainer.stage.peak_rate(name, trainer.config.phases[0]) == rate


@pytest.mark.slow
def test_the_end_of_a_run_exports_what_the_next_one_can_start_from(start, tmp_path):
    phase = {"steps": 1, "clips": 1, "loss": "trajectory", "teacher_steps": 1}
    changes = {"run": {"folder": str(tmp_path), "evaluate_every": 1}, "phase": phase}
    trainer = run(start, tmp_path, **changes)
    again = distill_stage(tmp_path / "export")
    for name, weight in again.model.named_parameters():
        assert (weight == trainer.average.weights[name]).all()
    told = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"off_path", "return", "all", "return_many_steps", "all_many_steps"} <= set(told)
    assert (tmp_path / "step-000001.png").is_file()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": {"start": "nowhere"}}, "start: nowhere holds no transformer .*; give the export folder of a run"),
        ({"model": {"teacher": "nowhere"}}, "teacher: nowhere holds no transformer"),
        ({"model": {"autoencoder": "nowhere"}}, "autoencoder: nowhere holds no autoencoder"),
        ({"model": {"timesteps": [500, 750]}}, r"timesteps: .*fall from at most 1000.*got \[500.*the paper has"),
        ({"model": {"timesteps": [1001, 750]}}, "timesteps: .*fall from at most 1000 to more than 0"),
        ({"model": {"timesteps": []}}, r"timesteps must be an array of numbers, got \(\)"),
        ({"model": {"timesteps": ["many"]}}, "timesteps must be an array of numbers, got .*many"),
        ({"model": {"critic_updates": 0}}, "critic_updates must be a whole number of at least 1, got 0"),
        ({"model": {"critic_betas": [1.0, 0.9]}}, "critic_betas must be two numbers from 0 to below 1"),
        ({"model": {"lowest_sigma": 0.99}}, "lowest_sigma must be below highest_sigma .0.98., got 0.99"),
        ({"model": {"shift": 0}}, "shift must be a number of at least 0.01, got 0"),
        ({"model": {"guidance": -1.0}}, "guidance must be a number of at least 0"),
        ({"phase": {"critic_rate": None}}, "critic_rate is missing, which loss = 'dmd' needs; the paper has 1e-6"),
        ({"phase": {"critic_rate": -1}}, "critic_rate must be a number of at least 0, got -1"),
        ({"phase": {"loss": "dmd2"}}, "loss must be one of 'dmd', 'trajectory', got 'dmd2'. Did you mean 'dmd'"),
        ({"phase": {"history": "none"}}, "history must be one of 'true', 'own', got 'none'"),
        ({"run": {"sharding": "fsdp"}}, "sharding must be one of 'none', 'fsdp2', got 'fsdp'. Did you mean 'fsdp2'"),
    ],
    ids=lambda case: str(next(iter(case.values()))) if isinstance(case, dict) else "",
)
def test_what_cannot_be_distilled_is_refused(start, monkeypatch, changes, says):
    monkeypatch.setattr("kvtiers_packforcing.training.distill.load_student", lambda _: pytest.fail("models are loaded"))
    with pytest.raises(TrainingConfigError, match=says):
        DistillStage(config_of(distill_table(start, **changes), DistillStage.model_config, DistillStage.phase_config))
