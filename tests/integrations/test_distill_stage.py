"""Stage `distill`: what it rolls out is what it trains, and gradients go where they are to go and nowhere else."""

import attrs
import pytest

pytest.importorskip("diffusers", reason="needs the extra 'diffusers'")

import torch
from diffusers import AutoencoderKLWan

from kvtiers_packforcing.training.dmd import generator_loss
from kvtiers_packforcing.training.packed import PackedAttention
from tiny_student import distill_stage, export_student, moved


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return export_student(tmp_path_factory.mktemp("student"))


def step_of(made, network):
    return next(step for step in range(9) if made.turn(step) == network)


@pytest.mark.parametrize("exits", [1, 4])
@torch.no_grad()
def test_the_packed_exit_step_is_what_the_rollout_made_through_the_cache(start, exits):
    made = distill_stage(start, model={"timesteps": [1000, 750, 500, 250]})
    clips = made._make(["a", "b"], exits)
    assert clips.rollout.sigma == pytest.approx([1, 15 / 16, 5 / 6, 5 / 8][exits - 1])
    with made.generator.packed(detach_history=True) as wan:
        assert torch.allclose(made.exit_step(wan, clips), clips.rollout.latents, atol=2e-5)
        swapped = attrs.evolve(clips, text=clips.text.flip(1))
        assert not torch.allclose(made.exit_step(wan, swapped), clips.rollout.latents, atol=1e-3)


@torch.no_grad()
def test_both_branches_are_those_of_the_cache(start, tmp_path):
    """The low-resolution tokens too, which pool the pixels of generated latents."""
    settings = {"base_dim": 4, "z_dim": 16, "dim_mult": [1, 2, 4], "num_res_blocks": 1, "patch_size": 2}
    settings |= {"in_channels": 12, "out_channels": 12, "temperal_downsample": [True, True]}
    AutoencoderKLWan(**settings).save_pretrained(tmp_path)
    made = distill_stage(start, model={"autoencoder": str(tmp_path)})
    clips = made._make(["a", "b"], 2)
    with made.generator.packed() as wan:
        assert torch.allclose(made.exit_step(wan, clips), clips.rollout.latents, atol=2e-5)
        blind = made.exit_step(wan, attrs.evolve(clips, low=None))
    assert (blind - clips.rollout.latents).abs().max() > 1e-4, "the low-resolution branch makes no difference"


def gradients(made, network):
    for weight in [*made.model.parameters(), *made.critic.parameters()]:
        weight.grad = None
    loss, figures = made.backward(made.config.phases[0], step_of(made, network), range(2))
    return loss, figures


@pytest.mark.parametrize("network", ["model", "critic"])
def test_a_step_reaches_all_of_its_network_and_nothing_of_the_others(start, network):
    made = moved(distill_stage(start))
    loss, _ = gradients(made, network)
    assert loss.isfinite()
    for name, weights in made.networks.items():
        reached = [weight.grad is not None and bool(weight.grad.any()) for weight in weights.parameters()]
        assert all(reached) if name == network else not any(reached)
    assert all(weight.grad is None for weight in made.teacher.parameters())
    again, _ = gradients(made, network)
    assert torch.equal(loss, again)


def test_the_generator_moves_by_the_difference_of_the_scores(start):
    """Nothing moves it where critic and teacher agree."""
    made = distill_stage(start)
    loss, figures = gradients(made, "model")
    assert loss == 0
    assert figures["gap"] == 0
    assert figures["off_teacher"] > 0
    assert not any(weight.grad.any() for weight in made.model.parameters())
    loss, figures = gradients(moved(distill_stage(start)), "model")
    assert loss > 0
    assert figures["gap"] > 0


def test_every_few_step_is_an_exit_step_and_about_as_often(start, monkeypatch):
    made, exits = distill_stage(start, model={"timesteps": [1000, 750, 500, 250]}), []
    first = made.generated(0, [0])
    monkeypatch.setattr(made, "_make", lambda names, steps: exits.append(steps) or first)
    for step in range(1, 201):
        made.generated(step, [0])
    assert sorted(set(exits)) == [1, 2, 3, 4]
    assert min(exits.count(step) for step in (1, 2, 3, 4)) > 30


def test_the_critic_makes_five_steps_for_one_of_the_generator_unless_it_is_told_otherwise(start):
    fields = attrs.fields_dict(type(distill_stage(start).config.model))
    made = distill_stage(start, model={"critic_updates": fields["critic_updates"].default}, phase={"steps": 12})
    turns = [made.turn(step) for step in range(12)]
    assert turns == (["critic"] * 5 + ["model"]) * 2


def block_gradients(made, block, *, detach):
    """Of x0 of one block, in the noisy inputs and in the generated past."""
    clips = made._make(["a"], 2)
    latents, inputs = (part.clone().requires_grad_() for part in (clips.rollout.latents, clips.rollout.inputs))
    clips = attrs.evolve(clips, rollout=attrs.evolve(clips.rollout, latents=latents, inputs=inputs))
    with made.generator.packed(detach_history=detach) as wan:
        made.exit_step(wan, clips)[:, :, block * 4 : block * 4 + 4].square().sum().backward()
    return [part.grad.unflatten(2, (5, 4)).abs().amax((0, 1, 3, 4, 5)) for part in (latents, inputs)]


def test_no_gradient_leaks_into_blocks_that_are_attended_in_full(start):
    """Of the last block's past, 0 and 3 are attended in full, 1 and 2 as the compressor's tokens."""
    made = distill_stage(start)
    past, own = block_gradients(made, 4, detach=True)
    assert (past > 0).tolist() == [False, True, True, False, False]
    assert (own > 0).tolist() == [False, False, False, False, True]
    leaking, _ = block_gradients(made, 4, detach=False)
    assert (leaking > 0).tolist() == [True, True, True, True, False], "the control sees no leak either"


def test_the_compressors_dmd_gradient_through_mid_is_right_by_finite_differences(start, monkeypatch):
    """In float64, with what a cache holds of the past as constants: recorded once, and played back for every probe."""
    cast = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else cast(x))
    made = moved(distill_stage(start))
    clips = made._make(["a"], 2)
    for networks in (made.model, made.critic, made.teacher):
        networks.double()
    double = {name: getattr(clips.rollout, name).double() for name in ("latents", "inputs")}
    clips = attrs.evolve(clips, text=clips.text.double(), rollout=attrs.evolve(clips.rollout, **double))
    weights = list(made.generator.compressor.parameters())
    held, playing = [], []

    def past(self, full):
        if not playing:
            held.append(full.detach())
            return held[-1]
        playing.append(None)
        return held[len(playing) - 2]

    def x0(*, detach=True):
        with made.generator.packed(detach_history=detach) as wan:
            return made.exit_step(wan, clips)

    sigmas, noise = torch.full((1, 5), 0.6, dtype=torch.float64), made.noise("score", ["a"]).double()

    def slopes(made_of):
        with made.real(clips) as real, made.fake(clips) as fake:
            loss, _ = generator_loss(made_of, sigmas, noise, real=real, fake=fake, alone=True)
        return torch.autograd.grad(loss, [*weights, made_of])

    leaking = slopes(x0(detach=False))
    *own, way = slopes(x0())
    with monkeypatch.context() as patch:
        patch.setattr(PackedAttention, "_past", past)
        x0()
        for nth, (weight, slope) in enumerate(zip(weights, own, strict=True)):
            along, around = slope / slope.norm(), []
            with torch.no_grad():
                for step in (1e-4, -2e-4):
                    weight.add_(along, alpha=step)
                    playing[:] = [None]
                    around.append((x0() * way).sum())
                weight.add_(along, alpha=1e-4)
            found = (around[0] - around[1]) / 2e-4
            assert slope.norm() > 1e-6
            assert torch.allclose(slope.norm(), found, rtol=1e-6)
            assert not torch.allclose(leaking[nth], slope, rtol=1e-3), "the control does not leak"


def test_clips_that_are_shared_by_a_cycle_are_made_once_and_again_after_the_generator_moved(start):
    made = distill_stage(start, model={"share_rollouts": True})
    assert [made.turn(step) for step in range(6)] == ["critic", "critic", "model"] * 2
    first = made.generated(0, range(2))
    assert made.generated(2, range(2)) is first
    assert torch.equal(made._levels(0, [0])[0], made._levels(0, [0])[0])
    assert not torch.equal(made._levels(0, [0])[0], made._levels(1, [0])[0]), "noise is shared too"
    assert made.generated(3, range(2)) is not first
    made.generated(0, range(2))
    with torch.no_grad():
        next(made.model.parameters()).add_(1)
    assert not torch.equal(made.generated(0, range(2)).rollout.latents, first.rollout.latents)
    fresh = distill_stage(start)
    assert not torch.equal(fresh.generated(0, [0]).rollout.inputs, fresh.generated(1, [0]).rollout.inputs)


def test_several_processes_can_share_a_step(start):
    """What is made for a clip does not depend on the clips beside it."""
    made = moved(distill_stage(start))
    for step in (step_of(made, "critic"), step_of(made, "model")):
        both, one, two = (made.loss(made.config.phases[0], step, numbers)[0] for numbers in ((0, 1), (0,), (1,)))
        assert torch.allclose(both, (one + two) / 2, rtol=1e-5)
        assert not torch.allclose(one, two, rtol=1e-3)


@pytest.mark.slow
def test_mixed_precision_and_layers_that_run_again_train_the_same(start, tmp_path):
    """With the low-resolution branch, whose embedding is read without a gradient and then with one."""
    settings = {"base_dim": 4, "z_dim": 16, "dim_mult": [1, 2, 4], "num_res_blocks": 1, "patch_size": 2}
    settings |= {"in_channels": 12, "out_channels": 12, "temperal_downsample": [True, True]}
    AutoencoderKLWan(**settings).save_pretrained(tmp_path)
    found = []
    for run in ({}, {"gradient_checkpointing": True}, {"precision": "bfloat16"}):
        made = moved(distill_stage(start, run=run, model={"autoencoder": str(tmp_path), "timesteps": [1000]}))
        gradients(made, "critic")
        found.append({name: weight.grad for name, weight in made.critic.named_parameters()})
    plain, again, rounded = found
    assert all(torch.allclose(plain[name], again[name], atol=1e-6) for name in plain)
    assert all(part is not None and part.any() for part in rounded.values())
    whole, other = (torch.cat([part.flatten() for part in parts.values()]) for parts in (plain, rounded))
    assert 1e-4 < (whole - other).norm() / whole.norm() < 0.05
