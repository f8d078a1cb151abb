"""Compressor `triattention` against its trigonometric series, summed pair by pair and distance by distance."""

import cmath

import attrs
import pytest
import torch

from distances import near
from kvtiers import Geometry, Layer, Moment, policy
from kvtiers.blocks import run_of
from kvtiers.rotary import Rotary
from kvtiers_methods.triattention import TriAttention
from kvtiers_methods.whole_past import Past

WIDTH, TOKENS, STEP, WINDOW = 8, 12, 20, 32
SPEEDS = [1.0, 0.3, 0.1, 0.02]
GEOMETRY = Geometry(kv_heads=1, query_heads=2, head_dim=WIDTH)


def turning(layout, scaling=1.0):
    return Rotary([torch.tensor(SPEEDS)], layout=layout, scaling=scaling, angle_dtype=torch.float64)


def past_and_moment(rotary):
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 1, 1, TOKENS, WIDTH, generator=generator).unbind()
    queries = torch.randn(1, 2, 1, WIDTH, generator=generator) + torch.randn(1, 2, WINDOW, WIDTH, generator=generator)
    where = torch.arange(TOKENS, dtype=torch.float64)[:, None]
    past = Past.of(run_of(keys, values, count=1, positions=where, first=0, span=TOKENS), None)
    said = {"layer": 0, "step": STEP, "geometry": GEOMETRY, "device": torch.device("cpu"), "rotary": rotary}
    return past, Moment(**said | {"keys_rotated": False, "queries": queries})


def pairs(x, layout):
    """A vector as complex numbers, one for each pair of channels."""
    half = len(x) // 2
    both = [(x[f], x[f + half]) if layout == "half" else (x[2 * f], x[2 * f + 1]) for f in range(half)]
    return [complex(float(a), float(b)) for a, b in both]


def reference(past, moment, farthest, sign=1):
    """The score as the paper writes it, in Python's complex numbers. sign: of the distance."""
    layout, largest = moment.rotary.layout, None
    for head in range(2):
        queries = [pairs(query, layout) for query in moment.queries[0, head]]
        found = []
        for at in range(TOKENS):
            key, score = pairs(past.keys[0, 0, at], layout), 0.0
            for f, speed in enumerate(SPEEDS):
                center = sum(query[f] for query in queries) / len(queries)
                size = sum(abs(query[f]) for query in queries) / len(queries)
                distances = [STEP + 2**n - at for n in range(40) if 2**n <= farthest]
                phase = cmath.phase(center) - cmath.phase(key[f])
                series = [cmath.cos(sign * speed * distance + phase).real for distance in distances]
                score += abs(center) * abs(key[f]) * sum(series) / len(series)
                score += (size - abs(center)) * abs(key[f])
            found.append(score)
        scores = torch.tensor(found, dtype=torch.float64)
        scores = (scores - scores.mean()) / scores.std(correction=0)
        largest = scores if largest is None else torch.maximum(largest, scores)
    return largest


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_scores_are_the_trigonometric_series_of_the_paper(layout):
    past, moment = past_and_moment(turning(layout))
    found = TriAttention(window=WINDOW, farthest=100).scores(past, moment)[0, 0]
    due, turned, nearer = (reference(past, moment, *how) for how in ((100,), (100, -1), (1,)))
    near("triattention", *((found - scores).abs().max() for scores in (due, turned, nearer)), apart=0.1)


def test_keys_and_queries_that_are_rotated_already_give_the_same_scores():
    """A rotation that scales, too: what is held rotated is scaled already, once."""
    turn = turning("half", scaling=1.3)
    past, moment = past_and_moment(turn)
    were = torch.arange(STEP - WINDOW, STEP, dtype=torch.float64)[:, None]
    rotated = attrs.evolve(moment, keys_rotated=True, queries=turn.rotate(moment.queries, were))
    method = TriAttention(window=WINDOW, farthest=100)
    wanted = method.scores(past, moment)
    turned = attrs.evolve(past, keys=turn.rotate(past.keys, past.offsets))
    assert torch.allclose(method.scores(turned, rotated), wanted, atol=1e-5)
    assert not torch.allclose(method.scores(past, rotated), wanted, atol=1e-2)


def test_a_layer_keeps_as_many_as_it_says():
    chosen = policy("triattention", most=6, window=8, sink=2, recent=4, block_size=2, chunk_size=4)
    layer = Layer(policy=chosen, geometry=GEOMETRY, rotary=turning("half"))
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        keys, values = torch.randn(2, 1, 1, 1, WIDTH, generator=generator).unbind()
        layer.write(keys, values)
        layer.select(torch.randn(1, 2, 1, WIDTH, generator=generator))
        assert layer.context().keys.shape[2] <= chosen.bound(GEOMETRY)
    assert layer.history.rewritten.keys.shape[3] == 6
