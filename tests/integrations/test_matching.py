"""First weights that tell prompts apart: what they change, and what they leave."""

import pytest
import torch

from kvtiers_packforcing.tiny_world import Clips, Houses, Walks, text_table
from kvtiers_packforcing.tiny_world.vocabulary import BLOCK_FRAMES, ROOMS
from kvtiers_packforcing.training import TrainingConfigError, config_of
from kvtiers_packforcing.training.layout import LAYOUTS
from kvtiers_packforcing.training.matching import mismatch
from kvtiers_packforcing.training.student import StudentStage

NAMES = len(ROOMS)


def stage(match_prompts, **model):
    table = {
        "run": {"stage": "student", "folder": "nowhere", "seed": 3},
        "model": {"width": 48, "layers": 3, "heads": 2, "ffn_width": 64, "match_prompts": match_prompts} | model,
        "phases": [{"steps": 1, "peak_rate": 1e-3, "clips": 1}],
    }
    return StudentStage(config_of(table, StudentStage.model_config, StudentStage.phase_config))


def transformer(match_prompts, **model):
    return stage(match_prompts, **model).transformer


@pytest.fixture(scope="module")
def both():
    return transformer(match_prompts=False), transformer(match_prompts=True)


def logits_of_names(made, layer):
    """How much the tokens of a block, told one name, attend the same tokens told another, without their positions."""
    given = []
    made.blocks[layer].attn1.register_forward_pre_hook(
        lambda _, args, named: given.append(args[0] if args else named["hidden_states"]), with_kwargs=True
    )
    latents = torch.randn(1, 16, BLOCK_FRAMES, 8, 16, generator=torch.Generator().manual_seed(4))
    for name in range(NAMES):
        words = text_table()[[name, NAMES, NAMES + 1]][None]
        made(latents, torch.zeros(1), words)
    attention, tokens = made.blocks[layer].attn1, torch.cat(given)
    query = attention.norm_q(attention.to_q(tokens))
    key = attention.norm_k(attention.to_k(tokens))
    return torch.einsum("atc,btc->ab", query, key) / tokens.shape[1] / (24**0.5 * 2)


@torch.no_grad()
def test_every_name_has_a_direction_of_its_own_and_other_words_stay(both):
    before, after = (made.condition_embedder.text_embedder(text_table()) for made in both)
    assert torch.allclose(before[NAMES:], after[NAMES:], atol=1e-4)
    apart = after[:NAMES] - after[:NAMES].mean(0)
    cosines = torch.nn.functional.cosine_similarity(apart[:, None], apart[None], dim=2)
    assert torch.allclose(cosines, torch.eye(NAMES) * 1.2 - 0.2, atol=1e-3), "six corners of a simplex"
    assert apart.norm(dim=1).min() > 3


@torch.no_grad()
@pytest.mark.parametrize("layer", [1, 2])
def test_blocks_attend_what_was_told_the_same_name_more(both, layer):
    plain, matched = (logits_of_names(made, layer) for made in both)
    same, other = torch.eye(NAMES).bool(), ~torch.eye(NAMES).bool()
    assert matched[same].mean() > matched[other].mean() + 0.6
    assert matched[same].min() > matched[other].mean() + 0.3
    assert abs(plain[same].mean() - plain[other].mean()) < 0.1


def test_it_is_the_same_every_time(both):
    again = transformer(match_prompts=True)
    assert all(torch.equal(one, other) for one, other in zip(both[1].parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("size", [{"layers": 1}, {"heads": 8}])
def test_a_model_that_is_too_small_is_refused_first(size):
    with pytest.raises(
        TrainingConfigError, match="match_prompts needs at least 2 layers and heads of 12 channels, got"
    ):
        transformer(match_prompts=True, **size)


def one_clip(*visits):
    walk = Walks.written(*visits)
    return Clips(
        houses=Houses.of_seeds(["a"]), walks=walk, blocks=torch.arange(walk.blocks)[None], kinds=("consecutive",)
    )


def test_blocks_are_to_like_their_own_room_by_a_margin():
    """By hand: hall, attic, hall. Only the last block has an earlier one of its room and one of another."""
    clips = one_clip(("hall", 1), ("attic", 1), ("hall", 1))
    logits = torch.zeros(2, 1, 1, 3, 3)
    logits[:, :, :, 2] = torch.tensor([1.0, 0.5, 9.0])
    assert torch.allclose(mismatch(logits, clips), torch.tensor((2.5 / 3) ** 2))
    logits[:, :, :, 2, 0] = 3.5
    assert mismatch(logits, clips) == 0
    logits[1, :, :, 2, 1] = 3.5
    assert torch.allclose(mismatch(logits, clips), torch.tensor(1 / 2)), "the mean of two layers"


def test_only_the_blocks_that_are_named_are_compared():
    clips = one_clip(("hall", 1), ("attic", 1), ("hall", 2))
    logits = torch.zeros(1, 1, 1, 4, 4)
    logits[..., 3, :] = torch.tensor([1.0, 0.0, 9.0, 0.0])
    forms = LAYOUTS["packforcing"].forms(4)
    assert forms.nonzero().tolist() == [[3, 1]], "sink and recent are whole"
    assert mismatch(logits, clips, forms) == 0, "blocks of one room alone"
    both = torch.zeros(4, 4, dtype=torch.bool)
    both[3, :2] = True
    assert torch.allclose(mismatch(logits, clips, both), torch.tensor((2 / 3) ** 2))


def test_what_a_curtain_hides_does_not_count_nor_a_clip_of_one_room():
    logits = torch.randn(1, 1, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    assert mismatch(logits, one_clip(("hall", 1, "closed"), ("attic", 1), ("hall", 1))) == 0
    assert mismatch(logits, one_clip(("hall", 3))) == 0


def test_the_loss_reaches_what_carries_names():
    made = stage(match_prompts=True, match_weight=0.5)
    loss, figures = made.loss(made.config.phases[0], 2, range(1))
    assert torch.allclose(loss, figures["flow"] + 0.5 * figures["mismatch"])
    assert figures["mismatch"] > 0
    loss.backward()
    carriers = (
        made.transformer.condition_embedder.text_embedder.linear_2,
        made.transformer.blocks[0].attn2.to_v,
        made.transformer.blocks[2].attn1.to_k,
    )
    assert all(carrier.weight.grad.norm() > 0 for carrier in carriers), "the flow cannot: its last layer begins at zero"


def test_a_single_layer_cannot_be_asked_to_match():
    with pytest.raises(TrainingConfigError, match="match_weight needs at least 2 layers, got 1"):
        stage(match_prompts=False, match_weight=0.1, layers=1)
