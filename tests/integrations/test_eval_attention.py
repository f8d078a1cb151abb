"""`kvtiers eval attention`: where nothing is preferred, each tier gets the share of its tokens."""

import pytest

pytest.importorskip("diffusers", reason="needs the extra 'diffusers'")

import torch
from click.testing import CliRunner

from kvtiers_packforcing.measures.attention import OTHERS, RETURNS, attention_mass
from kvtiers_packforcing.measures.command import evaluate
from kvtiers_packforcing.tiny_world import Walks
from kvtiers_packforcing.tiny_world.sampling import Sampler
from kvtiers_packforcing.tiny_world.variants import choose_variants
from tiny_videos import save_models, tiny_models

WALK = Walks.written(("hall", 1), ("attic", 2), ("cellar", 2), ("attic", 2))


def measured(name, *, indifferent):
    models = tiny_models()
    if indifferent:
        for block in models.transformer.blocks:
            block.attn1.to_q.weight.zero_()
            block.attn1.to_q.bias.zero_()
    (variant,) = choose_variants(name)
    return attention_mass(models, variant, WALK, seeds=[0], sampler=Sampler(steps=2))


@pytest.mark.parametrize("name", ["packforcing", "archive", "sink-rolling-window", "full"])
def test_queries_that_prefer_nothing_give_each_tier_the_share_of_its_tokens(name):
    for kind, mass in measured(name, indifferent=True).items():
        attended, tokens = mass.shares()
        assert torch.allclose(attended, tokens, atol=1e-5), kind
        assert torch.allclose(attended.sum(-1), torch.ones(2), atol=1e-5)
        found, there = mass.found()
        assert torch.allclose(found, there if name in ("packforcing", "archive") else torch.zeros(2), rtol=0, atol=1e-5)


def test_queries_that_prefer_something_do_not():
    attended, tokens = measured("packforcing", indifferent=False)[OTHERS].shares()
    assert torch.allclose(attended.sum(-1), torch.ones(2), atol=1e-5)
    assert (attended - tokens).abs().max() > 1e-3


def test_the_blocks_of_mid_that_show_the_room_are_counted():
    """All blocks are chosen. As the attic comes back, mid holds two of it and one of the cellar."""
    found = measured("packforcing", indifferent=True)
    assert found[RETURNS].count == 2  # steps of the only block at which a room comes back
    assert torch.allclose(torch.stack(found[RETURNS].found()), torch.full((2, 2), 2 / 3), rtol=0, atol=1e-5)
    assert found[OTHERS].count == 12


def test_the_command_prints_a_row_for_each_memory(tmp_path):
    weights = save_models(tiny_models(), tmp_path)
    asked = ["attention", "--weights", str(weights), "--walks", "1", "--seconds", "3", "--policies", "packforcing,full"]
    done = CliRunner().invoke(evaluate, asked)
    assert done.exit_code == 0, done.output
    assert "Attention, 1 videos of 3 s" in done.output
    assert done.output.count(OTHERS.split()[0]) == 2
    refused = CliRunner().invoke(evaluate, ["attention", "--policies", "packforcng"])
    assert "Did you mean 'packforcing'" in refused.output
