"""Distillation along the teacher's trajectories: few steps learn to end where many steps end."""

import pytest

pytest.importorskip("diffusers", reason="needs the extra 'diffusers'")

import torch

from kvtiers_packforcing.training import Trainer
from tiny_student import distill_stage, export_student, moved


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return export_student(tmp_path_factory.mktemp("student"))


def test_few_steps_learn_to_end_where_the_teachers_many_steps_end(start):
    phase = {"loss": "trajectory", "steps": 8, "teacher_steps": 2, "history": "true", "clips": 1, "peak_rate": 3e-3}
    trainer = Trainer(moved(distill_stage(start, phase=phase)))
    assert list(trainer.learners) == ["model"], "a run without dmd trains no critic"
    before = trainer.stage.loss(trainer.config.phases[0], 99, [0])[0]
    figures = [trainer.advance() for _ in range(8)]
    after = trainer.stage.loss(trainer.config.phases[0], 99, [0])[0]
    assert set(figures[0]) == {"loss", "step_1", "step_2", "norm", "rate"}
    assert after < 0.8 * before


def test_the_past_of_a_trajectory_is_true_or_the_generators_own(start):
    losses = []
    for history in ("own", "true"):
        phase = {"loss": "trajectory", "history": history, "teacher_steps": 1, "clips": 1}
        made = moved(distill_stage(start, phase=phase))
        loss, _ = made.backward(made.config.phases[0], 0, [0])
        assert all(weight.grad is not None and weight.grad.any() for weight in made.model.parameters())
        losses.append(float(loss))
    assert losses[0] != losses[1]


def test_a_trajectory_starts_from_the_noise_and_goes_down_the_teachers_flow(start):
    """With one step of the teacher for each of the student's, and the teacher's weights, the first step is a chord."""
    made = distill_stage(start, model={"timesteps": [1000, 750, 500, 250]})
    text, noise = made.text(["a"]), made.noise("trajectory", ["a"])
    history = made.self_rollout(["a"], text, 1).latents
    coarse, fine = (made.trajectory(history, text, noise, each) for each in (1, 8))
    assert len(coarse) == len(fine) == 5
    assert torch.equal(coarse[0], noise)
    assert torch.equal(fine[0], noise)
    with made.generator.packed() as wan:
        flow = made.generator.predict(wan, history, noise[:, None], torch.ones(1, 1, 5), text)[:, 0]
    assert torch.allclose(coarse[1], noise - flow / 16, atol=1e-5)
    assert not torch.allclose(coarse[-1], fine[-1], atol=1e-4)


@torch.no_grad()
def test_a_guided_teacher_goes_away_from_no_prompt_while_its_past_keeps_its_prompts(start):
    made = moved(distill_stage(start, model={"timesteps": [1000, 750, 500, 250], "guidance": 2.0}))
    clips = made._make(["a"], 1)
    noise, levels = made.noise("trajectory", ["a"]), torch.ones(1, 5)
    with made.teacher_clips.packed() as wan:
        flow, bare, forgetful = (
            made.teacher_clips.predict(wan, clips.rollout.latents, noise[:, None], levels[:, None], text)[:, 0]
            for text in (
                clips.text,
                torch.stack((clips.text, torch.zeros_like(clips.text)), 1),
                torch.zeros_like(clips.text),
            )
        )
    guided = flow + 2 * (flow - bare)
    passed = made.trajectory(clips.rollout.latents, clips.text, noise, 1)
    assert torch.allclose(passed[1], noise - guided / 16, atol=1e-5)
    with made.real(clips) as score:
        assert torch.allclose(score(noise, levels), guided, atol=1e-5)
    with made.fake(clips) as score:
        assert not torch.allclose(score(noise, levels), guided, atol=1e-3), "the critic is not guided"
    assert (guided - flow).abs().max() > 1e-3
    assert not torch.allclose(bare, forgetful, atol=1e-4), "the past makes no difference"
