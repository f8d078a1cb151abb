"""Methods that decide over the whole past, or weigh tokens, against references that know nothing of kvtiers.

The references run the unmodified model with its own cache and a mask for every layer and KV head, or plain attention.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d
from transformers import DynamicCache

import kvtiers
from distances import near
from kvtiers_methods.adakv import AdaKV
from kvtiers_methods.duo_attention import DuoAttention
from kvtiers_methods.h2o import H2O
from kvtiers_methods.kvzip import KVzip, reconstruct
from kvtiers_methods.pyramidkv import PyramidKV
from kvtiers_methods.snapkv import SnapKV
from kvtiers_methods.token_merging import TokenMerging
from kvtiers_methods.tova import TOVA
from kvtiers_methods.whole_past import WholePast
from kvtiers_transformers import tiered
from kvtiers_transformers.versions import CACHE
from strategies import attend, rotary
from tiny_models import attentions, build, distance, feed, given, masked, plain, tokens

PROMPT, TOKENS, RECENT, MOST = 40, 72, 8, 12
LAYERS, KV_HEADS, GROUP = 2, 2, 2
CLOSE = 1e-5


def policy(compressor: Any, **changes: Any) -> kvtiers.Policy:
    settings = {"sink": 0, "recent": RECENT, "block_size": 1, "chunk_size": None, "attend": "compressed"}
    return kvtiers.policy("archive", compressor=compressor, retriever="recency", **settings | changes)


def ours(model: Any, ids: Tensor, chosen: kvtiers.Policy) -> Tensor:
    with tiered(model, chosen) as cache:
        return feed(model, ids, cache, [PROMPT, *range(PROMPT + 1, TOKENS)])


@contextmanager
def watched(model: Any, mask_of: Callable[[int, int, int], Tensor]) -> Iterator[dict[int, Tensor]]:
    """Run `model` under `mask_of(layer, queries, tokens)`, [KV heads, tokens]; gives the attention of each layer."""
    seen: dict[int, Tensor] = {}
    handles = []

    def before(layer: int) -> Callable[..., Any]:
        def hook(_module: Any, args: Any, kwargs: Any) -> Any:
            queries, past = kwargs["hidden_states"].shape[1], kwargs[CACHE].get_seq_length(layer)
            order = torch.ones(queries, past + queries, dtype=torch.bool).tril(past)
            allowed = order & mask_of(layer, queries, past + queries).repeat_interleave(GROUP, 0)[None, :, None]
            lowest = torch.finfo(torch.float32).min
            return args, {**kwargs, "attention_mask": torch.zeros(allowed.shape).masked_fill(~allowed, lowest)}

        return hook

    def after(layer: int) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, _kwargs: Any, out: Any) -> None:
            seen[layer] = out[1][0].unflatten(0, (KV_HEADS, GROUP)).sum(1)

        return hook

    for module in attentions(model):
        handles.append(module.register_forward_pre_hook(before(module.layer_idx), with_kwargs=True))
        handles.append(module.register_forward_hook(after(module.layer_idx), with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def evicting(model: Any, ids: Tensor, kind: str) -> Tensor:
    """Tokens older than recent are evicted before every forward, per layer and KV head, by what attention they got."""
    live = torch.ones(LAYERS, KV_HEADS, TOKENS, dtype=torch.bool)
    mass = torch.zeros(LAYERS, KV_HEADS, TOKENS)
    cache, logits = DynamicCache(config=model.config), []
    with torch.no_grad(), watched(model, lambda layer, _, n: live[layer, :, :n]) as seen:
        for start, stop in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, TOKENS))]:
            for layer in range(LAYERS):
                _evict(live[layer], mass[layer], start - RECENT, kind)
            logits.append(model(ids[:, start:stop], **given(cache)).logits)
            for layer, got in seen.items():
                if kind == "tova":
                    mass[layer, :, :stop] = got[:, -1]
                else:
                    mass[layer, :, :stop] += got.sum(1)
    return torch.cat(logits, 1)


def _evict(live: Tensor, mass: Tensor, old: int, kind: str) -> None:
    old = max(0, old)
    score = mass[:, :old].masked_fill(~live[:, :old], -torch.inf)
    if kind == "adakv":
        kept = score.flatten().topk(min(24, int(live[:, :old].sum()))).indices
        live[:, :old] = torch.zeros(score.numel(), dtype=torch.bool).scatter(0, kept, True).view_as(score)
        return
    score = score.mean(0, keepdim=True).expand_as(score) if kind == "tova" else score
    kept = score.topk(min(MOST, int(live[0, :old].sum())), -1).indices
    live[:, :old] = torch.zeros_like(live[:, :old]).scatter(-1, kept, True)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("kind", "compressor"),
    [("h2o", H2O(most=MOST)), ("tova", TOVA(most=MOST)), ("adakv", AdaKV(mean=12, most=64))],
    ids=["H2O", "TOVA", "a budget shared by heads"],
)
def test_eviction_over_the_whole_past_is_that_of_a_reference(kind: str, compressor: WholePast, attention: str) -> None:
    model, ids = build("llama"), tokens(TOKENS)
    wanted = evicting(model, ids, kind)
    got = ours(build("llama", attention=attention), ids, policy(compressor))
    others = {"h2o": "tova", "tova": "h2o", "adakv": "h2o"}
    near(kind, distance(got, wanted), distance(evicting(model, ids, others[kind]), wanted))


@pytest.mark.parametrize("cut", [None, 16, 7])
def test_snapkv_compresses_a_prompt_of_any_length_once_it_is_read(cut: int | None) -> None:
    """The prompt is read whole or in chunks; then everything but the last `window` tokens is compacted."""
    model, ids, window = build("llama"), tokens(TOKENS), 16
    masks = _snapkv_masks(model, ids, window)
    chosen = policy(SnapKV(most=MOST, window=window), recent=None, chunk_size=cut)
    with tiered(model, chosen) as cache:
        first = feed(model, ids[:, :PROMPT], cache, ())
        cache.compact(recent=window)
        rest = feed(model, ids[:, PROMPT:], cache, range(1, TOKENS - PROMPT))
        assert max(cache.attended()) == MOST + window + TOKENS - PROMPT
    wanted = masked(model, ids, masks)
    near("snapkv", distance(torch.cat([first, rest], 1), wanted), distance(plain(model, ids), wanted))


def test_pyramidkv_is_snapkv_with_a_budget_for_each_layer() -> None:
    model, ids, window = build("llama"), tokens(TOKENS), 16
    method = PyramidKV(most=MOST, window=window, layers=LAYERS, beta=3)
    assert [method.budget(layer) for layer in range(LAYERS)] == [20, 4]
    assert [PyramidKV(most=100, layers=5, beta=20).budget(layer) for layer in range(5)] == [195, 148, 100, 52, 5]
    with tiered(model, policy(method, recent=None, chunk_size=None)) as cache:
        first = feed(model, ids[:, :PROMPT], cache, ())
        cache.compact(recent=window)
        rest = feed(model, ids[:, PROMPT:], cache, range(1, TOKENS - PROMPT))
    wanted = masked(model, ids, _snapkv_masks(model, ids, window, [20, 4]))
    same = masked(model, ids, _snapkv_masks(model, ids, window))  # for every layer
    near("pyramidkv", distance(torch.cat([first, rest], 1), wanted), distance(same, wanted))


def _snapkv_masks(model: Any, ids: Tensor, window: int, budgets: Sequence[int] = (MOST,) * LAYERS) -> dict[int, Tensor]:
    order = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    masks = {}
    with torch.no_grad(), watched(model, lambda _, __, n: torch.ones(KV_HEADS, n, dtype=torch.bool)) as seen:
        model(ids[:, :PROMPT], **given(DynamicCache(config=model.config)))
    for layer, got in seen.items():
        mass = got[:, -window:, : PROMPT - window].sum(1)
        best = avg_pool1d(mass[None], 5, 1, 2)[0].topk(budgets[layer], -1).indices
        keep = torch.zeros(KV_HEADS, TOKENS, dtype=torch.bool).scatter(-1, best, True)
        keep[:, PROMPT - window :] = True
        mask = order.expand(1, KV_HEADS * GROUP, -1, -1).clone()
        mask[:, :, PROMPT:] &= keep.repeat_interleave(GROUP, 0)[:, None]
        masks[layer] = mask
    return masks


@pytest.mark.parametrize(("chunk", "block"), [(2048, 1), (2048, 16), (25, 16)], ids=["1", "16", "parts"])
def test_kvzip_keeps_what_the_model_attends_when_it_repeats_the_context(chunk: int, block: int) -> None:
    model, ids, prompt = build("llama"), tokens(TOKENS), tokens(3, seed=1)
    chosen = policy(KVzip(most=MOST), recent=None, chunk_size=7, block_size=block)
    with tiered(model, chosen) as cache:
        first = feed(model, ids[:, :PROMPT], cache, ())
        reconstruct(cache, lambda more: feed(model, more, cache, ()), ids[:, :PROMPT], prompt, chunk=chunk)
        assert cache.tier_counts()["recent"] == 0
        rest = feed(model, ids[:, PROMPT:], cache, range(1, TOKENS - PROMPT))
        assert max(cache.attended()) == MOST + TOKENS - PROMPT
    got = torch.cat([first, rest], 1)
    wanted, unrepeated = (masked(model, ids, _kvzip_masks(model, ids, asked, chunk)) for asked in (prompt, None))
    near("kvzip", distance(got, wanted), distance(unrepeated, got))


@torch.no_grad()
def _kvzip_masks(model: Any, ids: Tensor, prompt: Tensor | None, chunk: int) -> dict[int, Tensor]:
    """prompt: what the repetition begins with; without one, it is the first reading that counts."""
    context, order = ids[:, :PROMPT], torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    most = torch.zeros(LAYERS, KV_HEADS, PROMPT)
    for start in range(0, PROMPT, chunk):
        cache = DynamicCache(config=model.config)
        out = model(context, output_attentions=True, **given(cache))
        if prompt is not None:
            lead = context[:, max(0, start - 8) : start]
            asked = torch.cat([prompt, lead, context[:, start : start + chunk]], 1)
            out = model(asked, output_attentions=True, **given(cache))
        seen = torch.stack(out.attentions)[:, 0, :, :, :PROMPT].unflatten(1, (KV_HEADS, GROUP))
        most = torch.maximum(most, seen.amax((2, 3)))
    most[..., -1] = torch.inf
    keep = torch.zeros(LAYERS, KV_HEADS, TOKENS, dtype=torch.bool).scatter(-1, most.topk(MOST, -1).indices, True)
    keep[..., PROMPT:] = True
    masks = {}
    for layer in range(LAYERS):
        masks[layer] = order.expand(1, KV_HEADS * GROUP, -1, -1).clone()
        masks[layer][:, :, PROMPT:] &= keep[layer].repeat_interleave(GROUP, 0)[:, None]
    return masks


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_head_may_attend_no_mid_at_all(attention: str) -> None:
    model, ids = build("llama"), tokens(TOKENS)
    steps = torch.arange(TOKENS)
    recent = steps[None] >= torch.where(steps < PROMPT, 0, steps - RECENT)[:, None]
    order = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    mask = torch.stack([order, order & recent]).repeat_interleave(GROUP, 0)[None]
    got = ours(build("llama", attention=attention), ids, policy(DuoAttention(retrieval_heads=(0,))))
    near("duo-attention", distance(got, masked(model, ids, mask)), distance(got, plain(model, ids)))


@pytest.mark.parametrize("realigner", ["original", "contiguous"])
def test_a_rewritten_mid_is_placed_and_rotated_once(realigner: str) -> None:
    """H2O on one layer, replayed by hand: which tokens stay, where they are placed, and what attention gives."""
    g, turn = torch.Generator().manual_seed(1), rotary(8)
    query, keys, values = (torch.randn(1, heads, 40, 8, generator=g) for heads in (4, 2, 2))
    geometry = kvtiers.Geometry(kv_heads=2, query_heads=4, head_dim=8)
    close_up = realigner == "contiguous"
    chosen = policy(H2O(most=6, close_up=close_up), recent=4, realigner=realigner, sink=2)
    layer = kvtiers.Layer(policy=chosen, geometry=geometry, rotary=turn)
    held = [list(range(2)) for _ in range(2)]  # per head: sink, then mid
    mid: list[list[int]] = [[], []]
    mass = torch.zeros(2, 40)
    for now in range(40):
        here = slice(now, now + 1)
        for head in range(2):
            if now - 4 > 2:  # at the commit of the token before, one step leaves recent
                mid[head].append(now - 5)
                mid[head] = sorted(sorted(mid[head], key=lambda step: -float(mass[head, step]))[:6])
        layer.write(keys[:, :, here], values[:, :, here])
        layer.select(query[:, :, here])
        context = layer.context()
        first = max(2, now - 4)
        out = []
        for head in range(2):
            steps = [*held[head][: now + 1], *mid[head], *range(min(first, now + 1), now + 1)]
            steps = sorted(set(steps))
            places = torch.tensor(steps, dtype=torch.float64)
            if close_up:
                places = torch.arange(len(steps), dtype=torch.float64)
            key, value = keys[:, head : head + 1, steps], values[:, head : head + 1, steps]
            asked, place = query[:, 2 * head : 2 * head + 2, here], places[-1:]
            if close_up:
                key, asked = turn.rotate(key, places[:, None]), turn.rotate(asked, place[:, None])
            logits = asked.double() @ key.double().mT / 8**0.5
            mass[head, steps] += logits.softmax(-1).sum((0, 1, 2)).float()
            out.append(attend(asked, key, value, torch.ones(1, len(steps), dtype=torch.bool)))
        seen = torch.ones(1, context.keys.shape[2], dtype=torch.bool)
        got = attend(layer.place_query(query[:, :, here]), context.keys, context.values, seen)
        assert (got - torch.cat(out, 1)).abs().max() < CLOSE, f"step {now}"


@pytest.mark.parametrize("name", ["h2o", "expected-attention", "triattention"])
def test_a_whole_past_of_which_all_stays_is_placed_where_it_was(name: str) -> None:
    """Behind a sink, too: mid begins where the sink ends."""
    model, ids = build("llama"), tokens(TOKENS)
    sizes = {"sink": 4, "recent": RECENT, "block_size": 2, "chunk_size": 4, "most": TOKENS}
    with tiered(model, name, realigner="contiguous", **sizes) as cache:
        assert distance(feed(model, ids, cache, ()), plain(model, ids)) < CLOSE


@pytest.mark.parametrize("family", ["llama", "glm"])
def test_triattention_is_told_how_a_model_rotates_that_rotates_keys_by_itself(family: str) -> None:
    """Under `original`, too; it had taken rotated queries for queries before rotation."""
    model, ids = build(family), tokens(TOKENS)
    sizes = {"sink": 0, "recent": RECENT, "block_size": 2, "chunk_size": 4, "most": MOST, "window": 16}
    kept = []
    for realigner in ("original", "unrotated"):
        with tiered(model, "triattention", realigner=realigner, **sizes) as cache:
            feed(model, ids, cache, ())
            kept.append([layer.history.rewritten.offsets for layer in cache.core.every_layer()])
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


def test_a_policy_that_rotates_keys_itself_is_refused_where_nobody_can_tell_how_the_model_does() -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = build("llama", rope_parameters=scaling)
    with pytest.raises(kvtiers.RotaryError, match=r"rotates keys itself, and the rotary.*choose others"):
        tiered(model, "triattention").__enter__()
    model = build("gpt2")  # there is nothing to tell
    with tiered(model, "triattention", recent=RECENT, most=MOST, sink=0, block_size=2) as cache:
        feed(model, tokens(TOKENS), cache, ())


def test_log_n_brings_merged_tokens_nearer_to_what_they_were() -> None:
    """A merged token that stands for n counts n times; without that the error is larger. Exact where all are equal."""
    g = torch.Generator().manual_seed(0)
    geometry = kvtiers.Geometry(kv_heads=2, query_heads=4, head_dim=8)
    base = torch.randn(1, 2, 8, 8, generator=g)
    for noise in (0.0, 0.3):
        keys = base.repeat_interleave(4, 2) + noise * torch.randn(1, 2, 32, 8, generator=g)
        values = torch.randn(1, 2, 8, 8, generator=g).repeat_interleave(4, 2)
        keys, values = (torch.cat([x, torch.randn(1, 2, 4, 8, generator=g)], 2) for x in (keys, values))
        query = torch.randn(1, 4, 1, 8, generator=g)
        wanted = attend(query, keys, values, torch.ones(1, 36, dtype=torch.bool))
        errors = []
        for proportional in (True, False):
            chosen = policy(TokenMerging(ratio=4, proportional=proportional), recent=3, block_size=4, top_k=100)
            layer = kvtiers.Layer(policy=chosen, geometry=geometry)
            for step in range(36):
                layer.write(keys[:, :, step : step + 1], values[:, :, step : step + 1])
            layer.select(query)
            context = layer.context()
            logits = query.double() @ context.keys.double().repeat_interleave(2, 1).mT / 8**0.5
            if context.bias is not None:
                logits = logits + context.bias.double().repeat_interleave(2, 1)[:, :, None]
            got = logits.softmax(-1) @ context.values.double().repeat_interleave(2, 1)
            errors.append(float((got - wanted).abs().max()))
        assert errors[0] < errors[1]
        if not noise:
            near("token-merging", *errors)


def test_what_a_compressor_looked_at_cannot_be_rolled_back() -> None:
    model, ids = build("llama"), tokens(TOKENS)
    with tiered(model, policy(H2O(most=MOST))) as cache:
        feed(model, ids, cache, [PROMPT])
        with pytest.raises(kvtiers.CropError, match="H2O has already looked at the later queries"):
            cache.crop(-1)


def test_kvzip_compresses_a_cache_once() -> None:
    model, ids = build("llama"), tokens(TOKENS)
    with tiered(model, policy(KVzip(most=MOST), recent=None)) as cache:
        feed(model, ids[:, :PROMPT], cache, ())
        reconstruct(cache, lambda more: feed(model, more, cache, ()), ids[:, :PROMPT], tokens(3, seed=1))
        before = cache.tier_counts()
        with pytest.raises(kvtiers.PolicyError, match="was compressed before; begin a new one"):
            reconstruct(cache, lambda more: feed(model, more, cache, ()), ids[:, :PROMPT], tokens(3, seed=1))
        assert cache.tier_counts() == before


def test_kvzip_refuses_a_context_that_is_longer_than_it_says() -> None:
    model, ids = build("llama"), tokens(TOKENS)
    with tiered(model, policy(KVzip(most=MOST, longest=20), recent=None)) as cache:
        feed(model, ids, cache, ())
        with pytest.raises(kvtiers.PolicyError, match="a context of 71 tokens is more than longest = 20"):
            cache.compact(recent=1)
