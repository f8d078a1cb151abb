"""ShadowKV: codec `low-rank`, retriever `landmarks`, realigner `unrotated`, and all three, against plain code."""

import math

import pytest
import torch

from distances import near
from kvtiers import Geometry, Layer, policy
from kvtiers.blocks import run_of
from kvtiers.slots import Moment
from kvtiers_methods.landmarks import Landmarks
from kvtiers_methods.low_rank import LowRank
from strategies import attend, rotary

KV_HEADS, GROUP, WIDTH, BLOCK, STEPS, RECENT = 2, 2, 8, 6, 59, 5
GEOMETRY = Geometry(kv_heads=KV_HEADS, query_heads=KV_HEADS * GROUP, head_dim=WIDTH)


def stream(seed=0):
    generator = torch.Generator().manual_seed(seed)
    heads = (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)
    return [torch.randn(1, n, STEPS, WIDTH, generator=generator) for n in heads]


def of_rank(keys, rank):
    """`keys` [tokens, width] projected on the eigenvectors of the largest eigenvalues of keys^T keys, in float64."""
    wide = keys.double()
    vectors = torch.linalg.eigh(wide.T @ wide).eigenvectors[:, -rank:]
    return wide @ vectors @ vectors.T


def landmark_scores(query, keys, outliers):
    """One KV head. query: [group, queries, width]; keys: [blocks, tokens, width], rotated. Infinite for an outlier."""
    means = [block.double().mean(0) for block in keys]
    least = [min(float(k @ m / (k.norm() * m.norm())) for k in b.double()) for b, m in zip(keys, means, strict=True)]
    odd = sorted(range(len(keys)), key=lambda block: least[block])[:outliers]
    found = [0.0] * len(keys)
    for of_head in query.double():
        total = [0.0] * len(keys)
        for one in of_head:
            weights = [0.0 if b in odd else math.exp(float(one @ m) / WIDTH**0.5) for b, m in enumerate(means)]
            total = [t + w / sum(weights) for t, w in zip(total, weights, strict=True)]
        found = [max(pair) for pair in zip(found, total, strict=True)]
    return torch.tensor([math.inf if block in odd else score for block, score in enumerate(found)])


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_keys_come_back_as_their_best_approximation(rank):
    _, keys, values = stream()
    keys, values = (x[:, :, :54].unflatten(2, (-1, BLOCK)) for x in (keys, values))
    codec = LowRank(rank=rank)
    parts = codec.encode(keys, values)
    assert parts["key_left"].shape[-1] == rank
    got, same = codec.decode(parts, torch.float32)
    assert torch.equal(same, values)
    own = got.flatten(0, 2)
    due, lower = (
        torch.stack([of_rank(block, other) if other else 0 * block for block in keys.flatten(0, 2)])
        for other in (rank, rank - 1)
    )
    near("low-rank", (own - due).abs().max(), (own - lower).abs().max())


@pytest.mark.parametrize("queries", [1, 3])
def test_landmarks_score_as_declared(queries):
    query, keys, values = stream()
    query, keys = query[:, :, :queries], keys[:, :, :54]
    where = torch.arange(54, dtype=torch.float64)[:, None]
    blocks = run_of(keys, values[:, :, :54], count=9, positions=where, first=0, span=BLOCK, rotated=keys)
    moment = Moment(layer=0, step=54, geometry=GEOMETRY, device=torch.device("cpu"))
    far = []
    for outliers in (2, 1):
        method = Landmarks(outliers=outliers)
        found = method.score(query, method.digest(blocks, moment), 9, moment)[0]
        grouped, off = query[0].unflatten(0, (KV_HEADS, GROUP)), 0.0
        for head in range(KV_HEADS):
            wanted = landmark_scores(grouped[head], keys[0, head].unflatten(0, (9, BLOCK)), 2)
            off = max(
                off, float((found[head] - wanted).nan_to_num(nan=0.0, posinf=math.inf, neginf=math.inf).abs().max())
            )
        far.append(off)
    near("landmarks", *far)


def test_a_layer_attends_what_shadowkv_attends():
    """By hand: which blocks, with which keys. Neither with other outliers nor with keys that were rotated before."""
    query, keys, values = stream()
    turn, top_k, rank = rotary(WIDTH), 3, 2
    sizes = {"sink": 0, "recent": RECENT, "block_size": BLOCK, "chunk_size": 1, "top_k": top_k, "archive": "device"}
    layer = Layer(policy=policy("shadowkv", rank=rank, **sizes), geometry=GEOMETRY, rotary=turn)
    for step in range(STEPS):
        here = slice(step, step + 1)
        layer.write(keys[:, :, here], values[:, :, here])
        layer.select(query[:, :, here])
    context, seen = layer.context(), torch.ones(1, 1, dtype=torch.bool)
    got = attend(
        layer.place_query(query[:, :, -1:]), context.keys, context.values, seen.expand(1, context.keys.shape[2])
    )

    time = torch.arange(STEPS, dtype=torch.float64)[:, None]
    asked, rotated, archived = turn.rotate(query, time)[:, :, -1:], turn.rotate(keys, time), 54 // BLOCK
    assert layer.history.count == archived - 1  # the newest is recent
    stop = (archived - 1) * BLOCK

    def off(outliers, turned_first=False):
        out = []
        for head in range(KV_HEADS):
            mine = asked[:, head * GROUP : (head + 1) * GROUP]
            scores = landmark_scores(mine[0], rotated[0, head, :stop].unflatten(0, (-1, BLOCK)), outliers)
            chosen = scores.topk(top_k + outliers).indices.sort().values
            held = []
            for block in chosen:
                part = slice(int(block) * BLOCK, (int(block) + 1) * BLOCK)
                plain = of_rank((rotated if turned_first else keys)[0, head, part], rank).float()
                held.append(plain if turned_first else turn.rotate(plain, time[part]))
            of_mid = torch.cat([values[0, head, int(block) * BLOCK : (int(block) + 1) * BLOCK] for block in chosen])
            key = torch.cat([*held, rotated[0, head, stop:]])[None, None]
            value = torch.cat([of_mid, values[0, head, stop:]])[None, None]
            out.append(attend(mine, key, value, seen.expand(1, key.shape[2])))
        return (got - torch.cat(out, 1)).abs().max()

    near("shadowkv", off(2), off(1), off(2, turned_first=True))


def test_in_full_rank_everything_that_is_attended_is_exact():
    """And where nothing is left out, that is plain attention: `unrotated` turns every key to where it was."""
    query, keys, values = stream(1)
    turn = rotary(WIDTH)
    chosen = policy("shadowkv", rank=BLOCK, sink=2, recent=RECENT, block_size=BLOCK, chunk_size=1, top_k=99)
    layer = Layer(policy=chosen, geometry=GEOMETRY, rotary=turn)
    for step in range(STEPS):
        here = slice(step, step + 1)
        layer.write(keys[:, :, here], values[:, :, here])
        layer.select(query[:, :, here])
    context, time = layer.context(), torch.arange(STEPS, dtype=torch.float64)[:, None]
    seen = torch.ones(1, STEPS, dtype=torch.bool)
    got = attend(layer.place_query(query[:, :, -1:]), context.keys, context.values, seen)
    wanted = attend(turn.rotate(query, time)[:, :, -1:], turn.rotate(keys, time), values, seen)
    assert (got - wanted).abs().max() < 1e-5
