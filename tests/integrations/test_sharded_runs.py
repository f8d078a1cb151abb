"""Weights in shards (FSDP2) over two processes on CPUs: the run of one process, and a checkpoint that any can read."""

import json
import os
import socket
import subprocess
import sys

import pytest

pytest.importorskip("diffusers", reason="needs the extra 'diffusers'")

import tomllib

import torch
from safetensors.torch import load_file

from kvtiers_packforcing.training import Trainer, TrainingConfigError, config_of
from kvtiers_packforcing.training.autoencoder import AutoencoderStage
from kvtiers_packforcing.training.sharing import Share
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
def test_two_processes_make_the_run_of_one_and_one_can_go_on(tmp_path, sharding):
    """A step of the critic and one of the generator; then one process goes on from the checkpoint of two.

    At a rate of 0: without momentum a step of Adam is a rate with a sign, and gradients of nothing but rounding have
    signs too. The first moments are the gradients then.
    """
    start, teacher = (export_student(tmp_path / name, seed=nth) for nth, name in enumerate(("student", "teacher")))
    model = {"critic_updates": 1, "timesteps": [1000], "start": str(start), "teacher": str(teacher)}
    changes = {"model": model, "phase": {"steps": 3, "peak_rate": 0.0, "critic_rate": 0.0}}
    tables = {name: distill_table(start, tmp_path / name, **changes) for name in ("alone", "shared")}
    tables["shared"]["run"] |= {"sharding": sharding, "save_every": 1}
    for name, table in tables.items():
        (tmp_path / f"{name}.toml").write_text(written(table))
    alone = Trainer(distill_stage(start, **changes, run={"folder": str(tmp_path / "alone")}))
    alone.run(until=2)
    launch(tmp_path / "shared.toml", "--until", "2")
    one, two = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("alone", "shared"))
    assert one.keys() == two.keys()
    assert all(one[name].shape == two[name].shape for name in one)
    moments = [name for name in one if name.startswith(("first.", "critic.first."))]
    assert max(float((one[name] - two[name]).abs().max()) for name in moments) < 1e-5
    for network in ("first.", "critic.first."):
        assert max(float(one[name].abs().max()) for name in moments if name.startswith(network)) > 1e-2
    logs = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("alone", "shared")
    ]
    for line, other in zip(*logs, strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-5)
    table = tomllib.loads((tmp_path / "shared.toml").read_text())
    again = Trainer(distill_stage(start, **changes, run=table["run"]))
    again.load(tmp_path / "shared" / "checkpoint.safetensors")
    assert again.step == 2
    assert {name: learner.updates for name, learner in again.learners.items()} == {"model": 1, "critic": 1}
    for name, weight in again.stage.model.named_parameters():
        assert torch.equal(weight, two[f"model.{name}"])
    launch(tmp_path / "shared.toml", "--until", "3")  # two go on, and the end exports
    ended = load_file(tmp_path / "shared" / "checkpoint.safetensors")
    assert not torch.equal(
        ended["critic.model.transformer.proj_out.weight"], two["critic.model.transformer.proj_out.weight"]
    )
    exported = load_file(tmp_path / "shared" / "export" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(part, ended[f"average.transformer.{name}"]) for name, part in exported.items())


def test_a_stage_that_cannot_be_cut_says_so():
    table = {
        "run": {"stage": "autoencoder", "folder": "nowhere", "sharding": "fsdp2"},
        "model": {"base_dim": 4},
        "phases": [{"steps": 1, "peak_rate": 1e-3, "clips": 2, "frames": 5, "decoder_input": "codec"}],
    }
    made = AutoencoderStage(config_of(table, AutoencoderStage.model_config, AutoencoderStage.phase_config))
    with pytest.raises(TrainingConfigError, match="stage 'autoencoder' cannot be cut into shards"):
        Trainer(made, Share(world=2))
