"""The losses of distribution matching distillation against their formulas, written out for scores that are known."""

import pytest

pytest.importorskip("diffusers", reason="needs the extra 'diffusers'")

import torch

from kvtiers_packforcing.training.averaging import Average
from kvtiers_packforcing.training.dmd import critic_loss, generator_loss

SHAPE = (2, 3, 4, 2, 2)
"""Two clips of two blocks of two frames."""


def drawn(seed):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def score_of(x0):
    """The flow that a network gives that takes every noisy clip for `x0`, whatever it looks at."""

    def score(noisy, sigmas):
        return (noisy - x0) / sigmas.repeat_interleave(2, 1)[:, None, :, None, None]

    return score


@pytest.mark.parametrize("alone", [True, False], ids=["blocks", "clips"])
def test_the_generators_gradient_leads_from_the_fake_score_to_the_real_one(alone):
    """DMD equations 7 and 8: (fake x0 - real x0) / mean |x - real x0|, the mean over a block or over a clip."""
    clips, noise, real, fake = (drawn(seed) for seed in range(4))
    sigmas = torch.tensor([[0.3, 0.7], [0.5, 0.9]], dtype=torch.float64)
    clips.requires_grad_()
    loss, figures = generator_loss(clips, sigmas, noise, real=score_of(real), fake=score_of(fake), alone=alone)
    (slope,) = torch.autograd.grad(loss, clips)
    wanted = torch.empty(SHAPE, dtype=torch.float64)
    with torch.no_grad():
        for row in range(2):
            for block in (slice(0, 2), slice(2, 4)):
                where = block if alone else slice(None)
                scale = (clips[row, :, where] - real[row, :, where]).abs().mean()
                wanted[row, :, block] = (fake - real)[row, :, block] / scale
        assert torch.allclose(slope * clips.numel(), wanted, rtol=1e-9)
    assert float(figures["gap"]) == pytest.approx(float(wanted.abs().mean()))


def test_the_critics_loss_is_the_error_of_its_flow():
    """Flow matching: from clean to noise. A critic that knows the clip makes no error, one of the other sign does."""
    clips, noise = drawn(0), drawn(1)
    sigmas = torch.tensor([[0.3, 0.7], [0.5, 0.9]], dtype=torch.float64)
    assert float(critic_loss(clips, sigmas, noise, fake=score_of(clips))) < 1e-20
    assert float(critic_loss(clips, sigmas, noise, fake=lambda *_: clips - noise)) > 1
    seen = []
    critic_loss(clips, sigmas, noise, fake=lambda noisy, _: seen.append(noisy) or noisy)
    assert torch.allclose(seen[0][1, :, 2:], 0.1 * clips[1, :, 2:] + 0.9 * noise[1, :, 2:])


def test_the_average_of_weights_forgets_as_its_decay_says():
    """EMA. Of the first steps quickly: after n steps the decay is at most (1 + n) / (10 + n)."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 1.0)
    average, wanted = Average(model, 0.3), 1.0
    for step, value in enumerate([5.0, -2.0, 4.0, 7.0, 1.0, 3.0], 1):
        torch.nn.init.constant_(model.weight, value)
        average.update(model, step)
        decay = min(0.3, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * value
        assert float(average.weights["weight"]) == pytest.approx(wanted, rel=1e-6)
    with average.put_in(model):
        assert float(model.weight.detach()) == pytest.approx(wanted, rel=1e-6)
    assert float(model.weight.detach()) == 3.0
