"""Going back: `crop`, assisted decoding, `reset`, forks, and a cache that is saved and goes on exactly."""

import copy
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs the extra 'transformers'")

import torch
from torch import Tensor
from transformers import DynamicCache

import kvtiers
from kvtiers import CropError, GeometryError, PolicyError, SavedCacheError
from kvtiers_transformers import TransformersCache, new_cache, tiered
from kvtiers_transformers.versions import CACHE
from tiny_models import build, distance, feed, given, pad_left, tokens

SMALL: dict[str, Any] = {"sink": 2, "recent": 8, "block_size": 4, "chunk_size": 8}
POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "full-contiguous": ("full", {"realigner": "contiguous"}),
    "kept-in-place": ("archive", {**SMALL, "retriever": "all"}),
    "sliding-window": ("sliding-window", {"recent": 9, "chunk_size": 8}),
    "streaming": ("streaming", SMALL),
    "streaming-incremental": ("streaming", {**SMALL, "realigner": "incremental"}),
    "archive": ("archive", {**SMALL, "top_k": 2}),
    "archive-chunk": ("archive", {**SMALL, "top_k": 2, "refresh": "chunk"}),
    "archive-every-3": ("archive", {**SMALL, "top_k": 2, "refresh": 3}),
    "archive-recency": ("archive", {**SMALL, "top_k": 2, "retriever": "recency"}),
    "packforcing-lm": ("packforcing-lm", {**SMALL, "top_k": 2, "reach": 12}),
    "pooled": ("packforcing-lm", {**SMALL, "top_k": 2, "attend": "compressed", "realigner": "contiguous"}),
    "top_k_compressed": ("packforcing-lm", {**SMALL, "top_k": 2, "top_k_compressed": 2, "realigner": "contiguous"}),
    "snapkv": (
        "archive",
        {**SMALL, "compressor": ("top-tokens", {"keep": 2, "by": "attention"}), "attend": "compressed"},
    ),
    "disk": ("archive", {**SMALL, "top_k": 2, "archive": "disk"}),
}


def continued(model: Any, cache: TransformersCache, seed: int = 11) -> Tensor:
    """The logits of 14 more tokens, read in odd pieces."""
    return feed(model, tokens(14, seed=seed), cache, (1, 2, 3, 9))


# ---------------------------------------------------------------- crop


def _refusal(cache: TransformersCache, back: int) -> str | None:
    try:
        cache.crop(-back)
    except CropError as error:
        return str(error)
    return None


@pytest.mark.parametrize("splits", [(), tuple(range(30, 44)), (40, 41)], ids=["one-shot", "tokens", "pieces"])
@pytest.mark.parametrize("name", POLICIES)
def test_a_crop_is_exact_or_refused(name: str, splits: tuple[int, ...]) -> None:
    """What was cropped goes on as a cache that never saw it; what cannot is refused, and then nothing has changed."""
    policy, changes = POLICIES[name]
    model, ids = build(), tokens(44)
    with tiered(model, policy, **changes) as read:
        feed(model, ids, read, splits)
        untouched = continued(model, read.fork())
        for back in (1, 3, 26):
            cache = read if back == 26 else read.fork()
            refused = _refusal(cache, back)
            if refused is not None:
                assert "fork()" in refused
                assert not name.startswith(("full", "kept"))
                assert cache.get_seq_length() == 44
                assert torch.equal(continued(model, cache), untouched)
                continue
            assert cache.get_seq_length() == 44 - back
            assert back < 8 or name.startswith(("full", "kept"))
            never = new_cache(model, policy, **changes)
            feed(model, ids[:, : 44 - back], never, [s for s in splits if s < 44 - back])
            assert distance(continued(model, cache), continued(model, never)) < 1e-6


@pytest.mark.parametrize("name", ["full", "streaming", "sliding-window", "archive-recency", "archive-chunk"])
def test_a_token_that_was_just_read_can_be_given_back(name: str) -> None:
    policy, changes = POLICIES[name]
    model, ids = build(), tokens(40)
    with tiered(model, policy, **changes) as cache:
        feed(model, ids, cache, tuple(range(20, 40)))
        cache.crop(-1)
        assert cache.get_seq_length() == 39


@pytest.mark.parametrize("name", POLICIES)
def test_a_crop_to_nothing_is_a_new_cache(name: str) -> None:
    policy, changes = POLICIES[name]
    model = build()
    with tiered(model, policy, **changes) as cache:
        feed(model, tokens(40), cache, ())
        cache.crop(-40)
        assert cache.get_seq_length() == 0
        assert torch.equal(continued(model, cache), continued(model, new_cache(model, policy, **changes)))


def test_a_crop_of_nothing_changes_nothing() -> None:
    model = build()
    with tiered(model, "archive", **SMALL) as cache:
        cache.crop(0)
        feed(model, tokens(40), cache, (39,))
        other = cache.fork()
        cache.crop(0)
        assert torch.equal(continued(model, cache), continued(model, other))


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (1, "negative whole number or 0, got 1"),
        (-2.5, "negative whole number or 0, got -2.5"),
        (-41, "cannot remove 41 columns: the cache holds 40"),
    ],
    ids=["a length", "a fraction", "more than there is"],
)
@pytest.mark.usefixtures("_shapes_go_unchecked")
def test_a_crop_that_makes_no_sense_is_refused(number: int, message: str) -> None:
    model = build()
    with tiered(model, "full") as cache:
        with pytest.raises(CropError):
            cache.crop(-1 if number < 0 else 1)
        assert cache.get_seq_length() == 0
        feed(model, tokens(40), cache, ())
        with pytest.raises(CropError, match=message):
            cache.crop(number)
        for repeats in (-1, 1.5, "2"):
            with pytest.raises(GeometryError, match=f"cannot be repeated {repeats!r} times"):
                cache.batch_repeat_interleave(repeats)  # type: ignore[arg-type]
        with pytest.raises(GeometryError, match=r"a tensor of whole numbers, got \[0\]"):
            cache.core.select_rows([0])
        assert cache.get_seq_length() == 40


def test_rows_with_padding_are_cropped_exactly_where_they_have_none() -> None:
    model = build()
    ids, mask = pad_left([tokens(n, seed=n)[0] for n in (20, 9)])
    with tiered(model, "full") as cache, torch.no_grad():
        model(ids, attention_mask=mask, **given(cache))
        untouched = cache.fork()
        model(tokens(5, rows=2), **given(cache))
        with pytest.raises(CropError, match="some rows had padding"):
            cache.crop(-15)
        cropped = cache.fork()
        cropped.crop(-14)
        model(ids[:, -9:], **given(cropped))
        model(tokens(5, rows=2), **given(cropped))
        cropped.crop(-5)
        cache.crop(-5)
        more = tokens(4, rows=2, seed=3)
        wanted = model(more, **given(untouched)).logits
        assert torch.equal(model(more, **given(cache)).logits, wanted)
        assert distance(model(more, **given(cropped)).logits, wanted) < 1e-5, (
            "columns were fed anew, in another forward"
        )


def test_recent_tokens_with_padding_between_them_are_not_rewound() -> None:
    model = build()
    policy = kvtiers.policy("archive", sink=2, recent=200, block_size=4, chunk_size=None)
    first, turn = tokens(20), tokens(3, seed=9)
    mask = torch.tensor([[1] * 20 + [0] * 5 + [1] * 3])
    with tiered(model, policy) as cache, torch.no_grad():
        model(first, **given(cache))
        model(torch.cat((torch.zeros(1, 5, dtype=torch.long), turn), 1), attention_mask=mask, **given(cache))
        untouched = cache.fork()
        with pytest.raises(CropError, match="21 recent tokens cannot be rewound: some rows had padding there"):
            cache.rewind_recent()
        more = tokens(4, seed=3)
        assert torch.equal(model(more, **given(cache)).logits, model(more, **given(untouched)).logits)


def test_recent_tokens_behind_padding_are_rewound_and_fed_again() -> None:
    model = build()
    policy = kvtiers.policy("archive", sink=2, recent=6, block_size=4, chunk_size=None)
    ids, mask = pad_left([tokens(9, seed=4)[0], tokens(14, seed=5)[0]])
    with tiered(model, policy) as cache, torch.no_grad():
        model(ids[:1], attention_mask=mask[:1], **given(cache))
        cache.compact(recent=6)
        untouched, more = cache.fork(), tokens(4, seed=3)
        back = cache.rewind_recent()
        assert back == 6
        model(ids[:1, -back:], **given(cache))
        assert distance(model(more, **given(cache)).logits, model(more, **given(untouched)).logits) < 1e-5


def test_sliding_layers_are_cropped_with_the_others_or_not_at_all() -> None:
    model, ids = build("gemma3"), tokens(30)
    with tiered(model, "full") as cache:
        feed(model, ids[:, :6], cache, ())
        cache.crop(-2)
        assert {layer.get_seq_length() for layer in cache.layers} == {4}
        feed(model, ids[:, 4:], cache, ())
        with pytest.raises(CropError, match="sliding layers are past their window"):
            cache.crop(-2)
        assert {layer.get_seq_length() for layer in cache.layers} == {30}
        cache.activate_past_recording()
        with pytest.raises(CropError, match="sliding layers are past their window"):
            cache.crop(-2)  # recorded from now on, not back then
        untouched = cache.fork()
        feed(model, tokens(3), cache, (1, 2))
        cache.crop(-3)
        assert distance(continued(model, cache), continued(model, untouched)) < 1e-6


# ---------------------------------------------------------------- assisted decoding


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("name", ["full", "full-contiguous", "kept-in-place"])
def test_prompt_lookup_gives_the_same_tokens(name: str, family: str) -> None:
    policy, changes = POLICIES[name]
    model = build(family)
    prompt = tokens(8).repeat(1, 3)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 30, "prompt_lookup_num_tokens": 4}
    wanted = model.generate(prompt, **given(DynamicCache(config=model.config)), **options)
    with tiered(model, policy, **changes) as cache:
        assert torch.equal(model.generate(prompt, **given(cache), **options), wanted)


@pytest.mark.parametrize("name", ["full", "full-contiguous"])
def test_an_assistant_gives_the_same_tokens(name: str) -> None:
    policy, changes = POLICIES[name]
    model, assistant, prompt = build(), build(seed=1), tokens(12)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20}
    wanted = model.generate(prompt, **given(DynamicCache(config=model.config)), **options)
    with tiered(model, policy, **changes) as cache:
        ours = model.generate(prompt, **given(cache), assistant_model=assistant, **options)
    assert torch.equal(ours, wanted)


@pytest.mark.parametrize("name", [n for n in POLICIES if not n.startswith(("full", "kept"))])
def test_assisted_decoding_under_a_policy_that_forgets_is_refused(name: str) -> None:
    """Candidates that fail are given back; where that cannot be exact the error says so, and no text comes out."""
    policy, changes = POLICIES[name]
    model, prompt = build(), tokens(8).repeat(1, 4)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20, "prompt_lookup_num_tokens": 6}
    if CACHE == "cache" and name != "sliding-window":  # transformers asks before it decodes (from 5.24 on)
        refusal: Any = pytest.raises(ValueError, match="requires a cache that can be cropped")
    else:
        refusal = pytest.raises(CropError, match=r"cannot give back \d+ of \d+ steps: .*; fork\(\) the cache")
    with tiered(model, policy, **changes) as cache, refusal:
        model.generate(prompt, **given(cache), **options)


# ---------------------------------------------------------------- reset, fork, save


@pytest.mark.parametrize("name", POLICIES)
def test_a_reset_cache_is_a_new_one(name: str) -> None:
    policy, changes = POLICIES[name]
    model = build()
    with tiered(model, policy, **changes) as cache:
        feed(model, tokens(40, rows=3), cache, ())
        cache.reset()
        assert cache.get_seq_length() == 0
        assert sum(h.bytes for h in cache.memory_usage()) == 0
        assert torch.equal(continued(model, cache), continued(model, new_cache(model, policy, **changes)))


@pytest.mark.parametrize("name", POLICIES)
def test_a_prompt_is_read_once_and_used_many_times(name: str) -> None:
    policy, changes = POLICIES[name]
    model, prompt = build(), tokens(30)
    with tiered(model, policy, **changes) as cache:
        feed(model, prompt, cache, (25, 26))
        first = continued(model, cache.fork(), 1)
        for seed, copied in ((1, TransformersCache.fork), (2, copy.deepcopy)):
            alone = new_cache(model, policy, **changes)
            feed(model, prompt, alone, (25, 26))
            assert torch.equal(continued(model, copied(cache), seed), continued(model, alone, seed))
        assert torch.equal(continued(model, cache, 1), first)


@torch.no_grad()
def test_another_policy_is_named_as_for_a_new_cache() -> None:
    model = build()
    with tiered(model, "archive", **SMALL, top_k=2) as cache:
        feed(model, tokens(30), cache, (30,))
        named, given = cache.fork(), cache.fork()
        named.swap("archive", **SMALL, top_k=1)
        given.swap([kvtiers.policy("archive", **SMALL, top_k=1)] * len(cache.tiered_layers))
        with pytest.raises(PolicyError, match="changes go with one policy, got top_k with a list of"):
            cache.swap(cache.core.policies, top_k=1)
        assert [policy.top_k for policy in (cache.core.policies[0], named.core.policies[0])] == [2, 1]
        narrow = continued(model, named)
        assert torch.equal(narrow, continued(model, given))
        assert distance(narrow, continued(model, cache)) > 1e-4


def test_a_fork_has_the_sliding_layers_too() -> None:
    model = build("gemma3")
    with tiered(model, "streaming", **SMALL) as cache:
        feed(model, tokens(30), cache, ())
        other = cache.fork()
        first = continued(model, other)
        assert torch.equal(continued(model, cache), first)
        assert [layer.get_seq_length() for layer in other.layers] == [44, 44]


@pytest.mark.parametrize("padded", [False, True], ids=["even", "left-padded"])
@pytest.mark.parametrize("name", POLICIES)
def test_a_saved_cache_goes_on_exactly(name: str, padded: bool, tmp_path: Path) -> None:
    policy, changes = POLICIES[name]
    model = build()
    ids, mask = pad_left([tokens(n, seed=n)[0] for n in ((30, 11, 30) if padded else (30, 30, 30))])
    more = tokens(9, rows=3, seed=4)
    with tiered(model, policy, **changes) as cache, torch.no_grad():
        model(ids, attention_mask=mask, **given(cache))
        cache.save(tmp_path / "cache.safetensors")
        loaded = new_cache(model, policy, **changes)
        loaded.load(tmp_path / "cache.safetensors")
        assert loaded.get_seq_length() == 30
        wanted = feed(model, more, cache, (1, 2, 3, 4))
        assert torch.equal(feed(model, more, loaded, (1, 2, 3, 4)), wanted)
        if padded:
            with pytest.raises(CropError, match="padding"):
                loaded.crop(-21)


def test_a_model_with_sliding_layers_of_its_own_is_forked_and_not_saved(tmp_path: Path) -> None:
    model = build("gemma3")
    with tiered(model, "streaming", **SMALL) as cache:
        feed(model, tokens(30), cache, ())
        with pytest.raises(SavedCacheError, match="1 layers of this model keep transformers' own sliding cache"):
            cache.save(tmp_path / "cache.safetensors")
