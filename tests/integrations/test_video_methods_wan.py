"""Published methods for video on a tiny Wan of random weights: they run, stay bounded, and are told of the prompt."""

import weakref
from functools import cache
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="needs the extra 'diffusers'")

import torch
from torch import Tensor

from faults import AtOperation, Fault
from kvtiers_diffusers import tiered
from kvtiers_methods.memflow import MemFlow
from tiny_wan import blocks, build, prompt

NAMES = ["deep-forcing", "infinity-rope", "memflow", "framepack", "rolling-forcing", "fademem", "quant-videogen"]
FRAME = 6
"""Tokens of one."""


@torch.no_grad()
def flows(name: str, clips: list[Tensor], text: Tensor, **changes: Any) -> list[Tensor]:
    """The flow of every clean pass; each block is looked at once before."""
    found = []
    with tiered(build(), name, **changes) as wan:
        for clip in clips:
            wan.denoise(clip + 1, 800.0, text)
            found.append(wan.commit(clip, text))
            assert wan.cache is not None
            bound = wan.policies[0].bound(wan.cache.geometries[0])
            assert bound is None or max(wan.attended()) <= bound
    return found


@cache
def everything() -> list[Tensor]:
    return flows("full", blocks(9, frames=3), prompt())


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_runs_on_a_wan_and_forgets_what_it_says_that_it_forgets(name: str) -> None:
    fewer = {"centroids": 2} if name == "quant-videogen" else {}  # than the few tokens of a block here
    got, whole = flows(name, blocks(9, frames=3), prompt(), **fewer), everything()
    assert all(bool(flow.isfinite().all()) for flow in got)
    assert (got[0] - whole[0]).abs().max() < 1e-5, "the first block has no history to forget"
    assert (got[-1] - whole[-1]).abs().max() > 1e-4


@torch.no_grad()
def test_memflow_is_told_the_keys_of_each_layers_cross_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model, told, scores = build(), {}, MemFlow.scores

    def noted(self: MemFlow, past: Any, bank: Tensor, moment: Any) -> Tensor:
        told[moment.layer] = moment.prompt_keys
        return scores(self, past, bank, moment)

    monkeypatch.setattr(MemFlow, "scores", noted)
    first, second = prompt(), prompt(seed=6)
    with tiered(model, "memflow", frames=2) as wan:
        for clip in blocks(7, frames=3):
            wan.commit(clip, first)
        before = dict(told)
        wan.commit(blocks(1, frames=3, seed=9)[0], second)
        after = dict(told)
        wan.commit(blocks(1, frames=3, seed=10)[0], first)
        assert all(torch.equal(told[layer], before[layer]) for layer in told), "a prompt that comes again is not told"
    assert sorted(told) == [0, 1]
    for layer, block in enumerate(model.blocks):
        for text, got in ((first, before[layer]), (second, after[layer])):
            hidden = model.condition_embedder.text_embedder(text)
            due = block.attn2.norm_k(block.attn2.to_k(hidden)).unflatten(2, (2, -1)).transpose(1, 2)
            assert (got - due).abs().max() < 1e-5
        assert (before[layer] - after[layer]).abs().max() > 1e-3


@torch.no_grad()
def test_after_a_first_pass_that_failed_policies_are_told_the_prompt_and_a_cache_keeps_no_keys_alive() -> None:
    clip, text = blocks(1, frames=3)[0], prompt()
    with tiered(build(), "memflow") as wan:
        with pytest.raises(Fault), AtOperation(60):
            wan.commit(clip, text)
        assert wan.cache is None
        wan.commit(clip, text)
        assert wan.cache is not None
        layer = wan.cache.every_layer()[0]
        keys = layer.moment().prompt_keys
        assert keys is not None
        held = weakref.ref(keys)
        del keys
        wan.forget_prompts()
        assert held() is None
        assert layer.moment().prompt_keys is None


def test_which_frames_memflow_keeps_depends_on_the_prompt() -> None:
    clips = blocks(9, frames=3)
    asked = {seed: flows("memflow", clips, prompt(seed=seed)) for seed in (5, 6)}
    assert (asked[5][-1] - asked[6][-1]).abs().max() > 1e-4


@torch.no_grad()
def test_a_kv_flush_on_a_wan_leaves_two_blocks() -> None:
    clips, text = blocks(8, frames=3), prompt()
    with tiered(build(), "infinity-rope", recent=9) as wan:
        for clip in clips[:-1]:
            wan.commit(clip, text)
        assert set(wan.attended()) == {5 * 3 * FRAME}
        wan.compact(recent=1)
        wan.denoise(clips[-1], 500.0, prompt(seed=6))
        assert set(wan.attended()) == {3 * 3 * FRAME}
