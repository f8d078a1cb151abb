"""The loop of training: deterministic, resumed bit for bit, and told what it does before anything is loaded."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from kvtiers_packforcing.training import (
    CheckpointError,
    Trainer,
    TrainingConfigError,
    config_of,
    load_config,
    make_stage,
    precision,
)
from kvtiers_packforcing.training.command import train
from kvtiers_packforcing.training.config import shipped
from kvtiers_packforcing.training.sharing import Share
from kvtiers_packforcing.training.student_config import StudentConfig, StudentPhase

TINY = """
[run]
stage = "autoencoder"
folder = "{folder}"
seed = 3
log_every = 1
save_every = 2
evaluate_every = 0

[optimiser]
warmup_steps = 1

[model]
base_dim = 4

[[phases]]
steps = 3
peak_rate = 2e-3
clips = 1
frames = 5
crop_height = 16
crop_width = 16
decoder_input = "codec"

[[phases]]
steps = 3
peak_rate = 1e-3
clips = 1
frames = 9
crop_height = 16
crop_width = 16
decoder_input = "both"
"""


@pytest.fixture
def config(tmp_path):
    def write(folder="run", *changes: tuple[str, str]) -> Path:
        text = TINY.format(folder=tmp_path / folder)
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / f"{folder}.toml"
        path.write_text(text)
        return path

    return write


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def trained(path: Path, until: int | None = None) -> Trainer:
    trainer = Trainer(make_stage(load_config(path)))
    trainer.run(until=until)
    return trainer


def test_a_run_that_was_stopped_twice_is_the_run_that_was_not(config, tmp_path):
    whole = trained(config("whole"))
    path = config("parts")
    for until in (2, 4, None):
        parts = trained(path, until)
    assert parts.step == whole.step == 6
    first, second = ((tmp_path / name / "checkpoint.safetensors").read_bytes() for name in ("whole", "parts"))
    assert first.replace(b"/whole", b"/parts") == second, "weights, averages or moments differ"
    log = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts")]
    assert log[0] == log[1]
    assert [json.loads(line)["step"] for line in log[0].splitlines()] == [1, 2, 3, 4, 5, 6]


def test_a_run_goes_on_from_any_checkpoint_that_was_kept(config, tmp_path):
    path, folder = config("kept", ("save_every = 2", "save_every = 2\nkeep_every = 2")), tmp_path / "kept"
    last, log = folder / "checkpoint.safetensors", folder / "metrics.jsonl"
    trained(path)
    whole = last.read_bytes(), log.read_text()
    (folder / "checkpoint-2.safetensors").replace(last)
    assert trained(path, 3).step == 3
    trained(path)
    assert (last.read_bytes(), log.read_text()) == whole


def test_another_seed_gives_another_run(config):
    one = trained(config("one"), 1)
    two = trained(config("two", ("seed = 3", "seed = 4")), 1)
    weights = zip(one.stage.model.parameters(), two.stage.model.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in weights)


def test_a_step_that_was_logged_but_not_saved_is_logged_once(config, tmp_path):
    path = config("killed")
    trained(path, 2)
    log = tmp_path / "killed" / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 3, "loss": 9.0}\n{"step": 4, "lo')
    trained(path, 3)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[-1]["loss"] != 9


def test_the_averaged_weights_of_a_run_can_be_had_before_it_ends(config, tmp_path):
    from diffusers import AutoencoderKLWan

    trainer = trained(config("ended"), 5)
    done = CliRunner().invoke(train, [str(tmp_path / "ended.toml"), "--export"])
    assert "after 5 steps" in done.output, done.output
    exported = AutoencoderKLWan.from_pretrained(tmp_path / "ended" / "export")
    for name, weight in exported.named_parameters():
        assert torch.equal(weight, trainer.average.weights[name])
        assert torch.isfinite(weight).all()
    trained(tmp_path / "ended.toml")
    ended = AutoencoderKLWan.from_pretrained(tmp_path / "ended" / "export")
    assert not torch.equal(ended.quant_conv.weight, exported.quant_conv.weight), "the end of a run exports nothing"


def test_an_export_that_fails_leaves_the_one_before(config, tmp_path, monkeypatch):
    trainer = trained(config("exported"), 1)
    trainer.export()
    folder = tmp_path / "exported"
    before = {path.name: path.read_bytes() for path in (folder / "export").iterdir()}
    whole = type(trainer.stage).export

    def fails(stage, into):
        whole(stage, into)
        raise OSError("the disk is full")

    monkeypatch.setattr(type(trainer.stage), "export", fails)
    trainer.advance()
    with pytest.raises(OSError, match="the disk is full"):
        trainer.export()
    assert {path.name: path.read_bytes() for path in (folder / "export").iterdir()} == before
    monkeypatch.undo()
    trainer.export()
    assert {path.name: path.read_bytes() for path in (folder / "export").iterdir()} != before
    assert not [path.name for path in folder.iterdir() if path.name.startswith("export.")]


def test_the_rate_depends_on_the_step_alone(config):
    said = load_config(config())
    rates = [said.rate_at(step) for step in range(6)]
    assert rates[0] == pytest.approx(1e-3)
    assert rates[1] == pytest.approx(2e-3 * (0.03 + 0.97 * 0.75))
    assert rates[3] == pytest.approx(0.5e-3)
    assert rates == [said.rate_at(step) for step in range(6)]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("seed = 3", "sed = 3"), r"\[run\] has no field 'sed'.*Did you mean 'seed'"),
        (("steps = 3", "step = 3"), r"\[\[phases\]\] number 1 has no field 'step'.*Did you mean 'steps'"),
        (("peak_rate = 2e-3\n", ""), r"\[\[phases\]\] number 1 lacks peak_rate"),
        (("frames = 9", "frames = 8"), r"number 2: frames must be 1 more than a multiple of 4, got 8"),
        (("crop_width = 16", "crop_width = 12"), "crop_width must be a multiple of 8, at most 128, got 12"),
        (
            ('"both"', '"bth"'),
            "decoder_input must be one of 'codec', 'encoder', 'both', got 'bth'. Did you mean 'both'",
        ),
        (('"autoencoder"', '"autoencoders"'), r"stage must be one of .* Did you mean 'autoencoder'"),
        (("seed = 3", "seed = true"), "seed must be a whole number of at least 0, got True"),
        (("seed = 3", "compile = 1"), "compile must be true or false, got 1"),
        (("seed = 3", 'precision = "float16"'), "precision must be one of 'float32', 'bfloat16', got 'float16'"),
        (("warmup_steps = 1", "betas = [0.9]"), "betas must be two numbers"),
        (("save_every = 2", "save_every = 3\nlog_every = 2"), "no TOML"),
        (("save_every = 2", "save_every = 0"), "save_every must be a whole number of at least 1"),
        (("[model]", "[models]"), "the file has no field 'models'.*Did you mean 'model'"),
    ],
    ids=lambda case: case[1] if isinstance(case, tuple) else None,
)
def test_a_wrong_field_is_refused_before_anything_is_made(config, tmp_path, change, says):
    path = config("wrong", change)
    with pytest.raises(TrainingConfigError, match=says):
        load_config(path)
    done = CliRunner().invoke(train, [str(path)])
    assert done.exit_code == 1
    assert done.output.startswith("Error: ")
    assert not (tmp_path / "wrong").exists()


def test_configurations_that_come_with_the_package_are_found_by_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    stages = {name: load_config(name).run.stage for name in shipped()}
    assert stages == {
        "tiny-world": "student",
        "tiny-world-autoencoder": "autoencoder",
        "tiny-world-distill": "distill",
        "wan2.1-1.3b": "distill-wan",
    }
    assert all(name in train.help for name in stages)
    with pytest.raises(
        TrainingConfigError, match=r"cannot read tiny-word: .*tiny-world-distill.*Did you mean 'tiny-wor"
    ):
        load_config("tiny-word")
    (tmp_path / "tiny-world").write_text("a file of the user's own is meant first")
    with pytest.raises(TrainingConfigError, match="is no TOML"):
        load_config("tiny-world")


def test_a_stop_between_two_lines_of_the_log_is_refused(config, tmp_path):
    path = config("between", ("log_every = 1", "log_every = 2"))
    with pytest.raises(TrainingConfigError, match=r"after a multiple of log_every \(2\) steps, got 3"):
        trained(path, 3)
    assert not (tmp_path / "between").exists()


def test_a_checkpoint_of_another_run_is_refused(config, tmp_path):
    trained(config("mine"), 1)
    with pytest.raises(CheckpointError, match=r"another configuration \(optimiser.warmup_steps\)"):
        trained(config("mine", ("warmup_steps = 1", "warmup_steps = 2")))
    (tmp_path / "mine" / "checkpoint.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="no checkpoint that can be read"):
        trained(config("mine"))


@pytest.mark.slow
def test_two_processes_make_the_run_of_one(config, tmp_path):
    """Both take a clip of each step, and gradients are averaged. Nothing differs but the order of a sum."""
    two_clips = ("clips = 1", "clips = 2")
    trained(config("alone", two_clips), 1)
    path = config("shared", two_clips)
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "kvtiers_packforcing.training", str(path), "--until", "1"]
    processes = [subprocess.Popen(command, env={**os.environ, **variables, "RANK": str(rank)}) for rank in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    alone, shared = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("alone", "shared"))
    gradients = [
        name for name in alone if name.startswith("first.")
    ]  # a tenth of them; weights also move with rounding
    assert max((alone[name] - shared[name]).abs().max() for name in gradients) < 1e-6
    assert max(alone[name].abs().max() for name in gradients) > 1e-2
    logs = [json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0]) for name in ("alone", "shared")]
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)


def test_clips_that_cannot_be_shared_are_refused(config):
    with pytest.raises(TrainingConfigError, match="number 1: 2 processes cannot share 1 clips evenly"):
        Trainer(make_stage(load_config(config())), Share(world=2))


def test_a_dry_run_says_what_it_costs_and_writes_nothing(config, tmp_path):
    done = CliRunner().invoke(train, [str(config("dry")), "--dry-run"])
    assert done.exit_code == 0, done.output
    for word in ("6 steps", "parameters", "phase 2: 3 steps of", "memory", "h of one core)"):
        assert word in done.output
    assert not (tmp_path / "dry").exists()


@pytest.mark.parametrize(
    ("run", "optimiser", "times", "says"),
    [
        ({"precision": "bfloat16"}, {"matrices": "muon"}, 60.0, "60 times.*float32; precision.*and matrices"),
        ({}, {"matrices": "muon"}, 2.5, 'float32; matrices = "adamw"'),
        ({"precision": "bfloat16"}, {}, 1.5, None),
        ({}, {}, 60.0, None),
    ],
    ids=["both", "muon", "quick", "float32"],
)
def test_a_cpu_that_only_imitates_bfloat16_is_told(monkeypatch, run, optimiser, times, says):
    monkeypatch.setattr(precision, "_bfloat16_times", lambda: times)
    table = {"run": {"stage": "student", "folder": "nowhere"} | run, "optimiser": optimiser}
    table["phases"] = [{"steps": 1, "peak_rate": 1e-3, "clips": 1}]
    said = config_of(table, StudentConfig, StudentPhase)
    advice = precision.slow_bfloat16(said, torch.device("cpu"))
    assert (advice is None) if says is None else re.search(says, advice)
    assert precision.slow_bfloat16(said, torch.device("meta")) is None
