"""Retriever `infllm` in a layer, against representatives and relevance worked out by hand, token by token."""

import pytest
import torch

from distances import near
from kvtiers import CropError, Geometry, Layer, PolicyError, SwapError, TieredCache, policy
from kvtiers.blocks import run_of
from kvtiers.slots import Moment
from kvtiers_methods.h2o import H2O
from kvtiers_methods.infllm import InfLLM
from kvtiers_policies.top_tokens import TopTokens
from strategies import rotary

KV_HEADS, GROUP, WIDTH, BLOCK, STEPS, RECENT, TOP_K = 2, 2, 8, 4, 45, 6, 3
GEOMETRY = Geometry(kv_heads=KV_HEADS, query_heads=KV_HEADS * GROUP, head_dim=WIDTH)
SIZES = {"sink": 0, "recent": RECENT, "block_size": BLOCK, "chunk_size": 1, "top_k": TOP_K, "archive": "device"}


def stream():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, n, STEPS, WIDTH, generator=generator) for n in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)]


def reference(query, keys, representatives, distance, *, first_ones=False):
    """The layer by hand: at every step, which blocks are attended by all heads, and how the last query scores them.

    first_ones: take the first tokens of a block, whatever was attended.
    """
    turn, time = rotary(WIDTH), torch.arange(STEPS, dtype=torch.float64)[:, None]
    asked, rotated = turn.rotate(query, time)[0].double(), turn.rotate(keys, time)[0].double()
    seen = torch.zeros(KV_HEADS * GROUP, STEPS, dtype=torch.float64)
    known, chosen, scores = [], [], torch.empty(0)
    for now in range(STEPS):
        while (len(known) + 1) * BLOCK + RECENT <= now:  # a block leaves recent once the tokens before are history
            start, of_heads = len(known) * BLOCK, []
            for head in range(KV_HEADS * GROUP):
                mass = seen[head, start : start + BLOCK]
                best = range(representatives) if first_ones else mass.topk(representatives).indices.tolist()
                of_heads.append([start + at for at in best])
            known.append(of_heads)
        if known:
            scores = torch.zeros(len(known), dtype=torch.float64)
            for block, of_heads in enumerate(known):
                for head, tokens in enumerate(of_heads):
                    for token in tokens:
                        if distance is None:
                            one, key = asked[head, now], rotated[head // GROUP, token]
                        else:
                            one = turn.rotate(query[0, head, now][None], torch.tensor([[float(distance)]]))[0].double()
                            key = keys[0, head // GROUP, token].double()
                        scores[block] += one @ key
            chosen = sorted(scores.topk(min(TOP_K, len(known))).indices.tolist())
        context = [step for block in chosen for step in range(block * BLOCK, (block + 1) * BLOCK)]
        context += range(len(known) * BLOCK, now + 1)
        for head in range(KV_HEADS * GROUP):
            logits = rotated[head // GROUP, context] @ asked[head, now] / WIDTH**0.5
            seen[head, context] += logits.softmax(0)
    return scores, chosen


def read(chosen):
    """A layer that has read the stream, as a model gives it under a realigner that does not rotate."""
    turn, time = rotary(WIDTH), torch.arange(STEPS, dtype=torch.float64)[:, None]
    query, keys, values = stream()
    query, keys = (turn.rotate(x, time) for x in (query, keys))
    layer = Layer(policy=chosen, geometry=GEOMETRY, rotary=turn)
    for step in range(STEPS):
        here = slice(step, step + 1)
        layer.write(keys[:, :, here], values[:, :, here])
        layer.select(query[:, :, here])
    return layer


@pytest.mark.parametrize("distance", [None, 6])
def test_a_layer_attends_the_blocks_whose_representatives_the_query_matches(distance):
    query, keys, _ = stream()
    method = InfLLM(representatives=2, distance=distance)
    layer = read(policy("infllm", retriever=method, refresh=1, **SIZES))
    count, moment = layer.history.count, layer.moment()
    last = rotary(WIDTH).rotate(query[:, :, -1:], torch.tensor([[STEPS - 1.0]]))
    found = method.score(last, layer.history.digests.data[:, :, :count], count, moment)
    scores, chosen = reference(query, keys, 2, distance)
    assert layer.history.selection.chosen.unique().tolist() == chosen
    wrong = (
        reference(query, keys, 1, distance),
        reference(query, keys, 2, distance, first_ones=True),
        reference(query, keys, 2, 9 if distance is None else None),
    )
    off = [(found[0, 0] - due).abs().max() for due in (scores, *(others for others, _ in wrong))]
    near("infllm", *off, close=1e-4, apart=0.1)


def test_attention_is_noted_as_for_a_compressor_and_a_compressor_that_wants_none_gets_none():
    """And it takes its bytes: one number a token and query head, in the window."""
    chosen = policy("infllm", compressor="token-merging", attend="compressed", representatives=1, **SIZES)
    assert chosen.attention == "sum"
    layer = read(chosen)
    assert layer.window.planes["attention"].shape[1] == KV_HEADS * GROUP
    without = policy("archive", compressor="token-merging", attend="compressed", **SIZES)
    more = chosen.bound_bytes(GEOMETRY) - without.bound_bytes(GEOMETRY)
    assert more == 4 * KV_HEADS * GROUP * (chosen.slots(GEOMETRY) + chosen.bound(GEOMETRY))


def test_a_compressor_that_wants_other_attention_is_refused():
    with pytest.raises(PolicyError, match="TopTokens asks for the 'latest' of attention and InfLLM for the 'sum'"):
        policy("infllm", compressor=TopTokens(by="attention"), attend="compressed")
    assert policy("infllm", compressor=H2O(), attend="compressed").attention == "sum"


def test_a_filled_cache_that_has_noted_no_attention_cannot_go_on_with_it_nor_be_rolled_back():
    query, keys, values = stream()
    cache = TieredCache(policy("archive", **SIZES), [GEOMETRY])
    cache.write(0, keys[:, :, :1], values[:, :, :1])
    with pytest.raises(SwapError, match="noted no attention for Affinity, and InfLLM would need to have seen"):
        cache.swap(policy("infllm", **SIZES))
    cache = TieredCache(policy("infllm", **SIZES), [GEOMETRY])
    for step in range(STEPS):
        cache.write(0, keys[:, :, step : step + 1], values[:, :, step : step + 1])
        cache.select(0, query[:, :, step : step + 1])
    with pytest.raises(SwapError, match="has noted sum attention for InfLLM, and Affinity"):
        cache.swap(policy("archive", **SIZES))
    with pytest.raises(CropError, match="InfLLM has already looked at the later queries"):
        cache.crop(STEPS - 1)


def test_a_retriever_without_a_layer_says_what_it_lacks():
    _, keys, values = stream()
    where = torch.arange(STEPS, dtype=torch.float64)[:, None]
    blocks = run_of(keys, values, count=9, positions=where, first=0, span=5, rotated=keys)
    with pytest.raises(PolicyError, match="no attention was noted"):
        InfLLM().digest(blocks, Moment(layer=0, step=STEPS, geometry=GEOMETRY, device=torch.device("cpu")))
