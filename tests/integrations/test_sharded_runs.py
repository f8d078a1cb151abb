"""Weights in shards (FSDP2) over two processes on CPUs: the run of one process, and a checkpoint that any can read."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest

pytest.importorskip("diffusers", reason="needs the extra 'diffusers'")


import torch
from safetensors.torch import load_file

from kvtiers_packforcing.training import Trainer, TrainingConfigError, config_of
from kvtiers_packforcing.training.autoencoder import AutoencoderStage
from kvtiers_packforcing.training.sharing import Share
from tiny_hub import write_base, write_self_forcing
from tiny_student import distill_stage, distill_table, export_student


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def written(table) -> str:
    """Tables as TOML."""
    lines = []
    for name, part in table.items():
        for each in part if isinstance(part, list) else [part]:
            lines.append(f"[[{name}]]" if isinstance(part, list) else f"[{name}]")
            lines += [f"{key} = {json.dumps(value)}" for key, value in each.items()]
    return "\n".join(lines)


def launch(path, *options, processes=2):
    """What torchrun sets."""
    variables = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "kvtiers_packforcing.training", str(path), *options]
    started = [
        subprocess.Popen(command, env={**os.environ, **variables, "RANK": str(rank), "OMP_NUM_THREADS": "1"})
        for rank in range(processes)
    ]
    assert [process.wait(timeout=500) for process in started] == [0] * processes


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["fsdp2", "none"])
def test_two_processes_go_on_from_one_as_one_does_and_one_can_go_on_from_two(tmp_path, sharding):
    """One process makes the critic's first step. From there one and two make a step of the generator and of the critic.

    Without momentum a step of Adam is a rate with a sign, also of gradients that are nothing but rounding. So weights
    are compared where the rate is 0, and gradients, which the first moments are then.
    """
    start = export_student(tmp_path / "student")
    model = {"critic_updates": 1, "timesteps": [1000], "start": str(start)}
    changes = {"model": model, "phase": {"steps": 3, "peak_rate": 0.0}}
    table = distill_table(start, tmp_path / "shared", **changes, run={"sharding": sharding, "save_every": 1})
    (tmp_path / "shared.toml").write_text(written(table))
    alone = Trainer(distill_stage(start, **changes, run={"folder": str(tmp_path / "alone"), "save_every": 1}))
    alone.run(until=1)
    shutil.copytree(tmp_path / "alone", tmp_path / "shared")
    alone.run()
    launch(tmp_path / "shared.toml")
    one, two = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("alone", "shared"))
    assert one.keys() == two.keys()
    assert all(one[name].shape == two[name].shape for name in one)
    for network in ("first.", "critic.first."):
        gradients = [name for name in one if name.startswith(network)]
        assert max(float((one[name] - two[name]).abs().max()) for name in gradients) < 1e-5
        assert max(float(one[name].abs().max()) for name in gradients) > 1e-3
    assert all(torch.equal(one[name], two[name]) for name in one if name.startswith(("model.", "average.")))
    logs = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("alone", "shared")
    ]
    for line, other in zip(*logs, strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-5)
    again = Trainer(distill_stage(start, **changes, run=table["run"]))
    again.load(tmp_path / "shared" / "checkpoint.safetensors")
    assert {name: learner.updates for name, learner in again.learners.items()} == {"model": 1, "critic": 2}
    for name, weight in again.stage.critic.named_parameters():
        assert torch.equal(weight, two[f"critic.model.{name}"])
    exported = load_file(tmp_path / "shared" / "export" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(part, two[f"average.transformer.{name}"]) for name, part in exported.items())


@pytest.mark.slow
def test_a_wan_in_shards_is_evaluated_saved_and_exported(tmp_path):
    """One process makes a second stage for that, while the others wait: it may not wait for them in turn."""
    write_base(tmp_path / "base")
    write_self_forcing(tmp_path / "start.pt")
    (tmp_path / "prompts.txt").write_text("a cat in the snow\n\na dog in the rain\n")
    model = {"base": str(tmp_path / "base"), "start": str(tmp_path / "start.pt"), "height": 64, "width": 64}
    model |= {"prompts": str(tmp_path / "prompts.txt"), "frames": 16, "sink_blocks": 1, "compressor_widths": [8] * 4}
    run = {"stage": "distill-wan", "folder": str(tmp_path / "run"), "sharding": "fsdp2", "evaluate_every": 2}
    table = {
        "run": run | {"log_every": 1, "save_every": 2},
        "model": model | {"timesteps": [1000, 500], "critic_updates": 1, "negative_prompt": "rain"},
        "phases": [{"steps": 2, "peak_rate": 1e-3, "critic_rate": 1e-3, "clips": 2}],
    }
    (tmp_path / "run.toml").write_text(written(table))
    launch(tmp_path / "run.toml")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "latent_std" in lines[-1]
    assert (tmp_path / "run" / "checkpoint.safetensors").exists()
    assert (tmp_path / "run" / "export" / "transformer").is_dir()


def test_a_stage_that_cannot_be_cut_says_so():
    table = {
        "run": {"stage": "autoencoder", "folder": "nowhere", "sharding": "fsdp2"},
        "model": {"base_dim": 4},
        "phases": [{"steps": 1, "peak_rate": 1e-3, "clips": 2, "frames": 5, "decoder_input": "codec"}],
    }
    made = AutoencoderStage(config_of(table, AutoencoderStage.model_config, AutoencoderStage.phase_config))
    with pytest.raises(TrainingConfigError, match="stage 'autoencoder' cannot be cut into shards"):
        Trainer(made, Share(world=2))
