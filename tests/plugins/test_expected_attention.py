"""Compressor `expected-attention` against the expectation itself, taken over drawn queries and rotated one by one."""

import attrs
import pytest
import torch

from distances import near
from kvtiers import Geometry, Layer, Moment, PolicyError, policy
from kvtiers.blocks import run_of
from kvtiers_methods.expected_attention import ExpectedAttention
from kvtiers_methods.whole_past import Past
from strategies import rotary

WIDTH, TOKENS, STEP = 8, 12, 20
GEOMETRY = Geometry(kv_heads=1, query_heads=2, head_dim=WIDTH)


def past_and_moment(**changes):
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 1, 1, TOKENS, WIDTH, generator=generator).unbind()
    queries = 0.5 + torch.randn(1, 2, 64, WIDTH, generator=generator)
    where = torch.arange(TOKENS, dtype=torch.float64)[:, None]
    leaving = run_of(keys, values, count=1, positions=where, first=0, span=TOKENS)
    said = {"layer": 0, "step": STEP, "geometry": GEOMETRY, "device": torch.device("cpu"), "rotary": rotary(WIDTH)}
    return Past.of(leaving, None), Moment(**said | {"keys_rotated": False, "queries": queries} | changes)


def reference(past, moment, future):
    """In float64: the mean rotation as a matrix, and the moments of the rotated queries."""
    turn, channels = rotary(WIDTH, angle=torch.float64), torch.eye(WIDTH, dtype=torch.float64)
    turns = [turn.rotate(channels, torch.full((WIDTH, 1), float(STEP + nth))) for nth in range(future)]
    mean_turn = torch.stack(turns).mean(0)  # a row vector times it is that vector, rotated
    keys = turn.rotate(past.keys[0, 0].double(), torch.arange(TOKENS, dtype=torch.float64)[:, None])
    shares = []
    for head in range(2):
        queries = moment.queries[0, head].double() @ mean_turn
        mean, covariance = queries.mean(0), queries.T.cov(correction=0)
        exponent = keys @ mean / WIDTH**0.5 + ((keys @ covariance) * keys).sum(-1) / (2 * WIDTH)
        shares.append(exponent.softmax(0))
    return torch.stack(shares).mean(0) * past.values[0, 0].double().norm(dim=-1)


def test_scores_are_the_expectation_over_queries_to_come():
    past, moment = past_and_moment()
    found = ExpectedAttention(future=7, window=64).scores(past, moment)[0, 0]
    near("expected-attention", *((found - reference(past, moment, future)).abs().max() for future in (7, 200)))


def test_keys_and_queries_that_are_rotated_already_give_the_same_scores():
    past, moment = past_and_moment()
    turn = rotary(WIDTH)
    keys = turn.rotate(past.keys, past.offsets)
    were = torch.arange(STEP - 64, STEP, dtype=torch.float64)[:, None]
    rotated = attrs.evolve(moment, keys_rotated=True, queries=turn.rotate(moment.queries, were))
    method = ExpectedAttention(future=7, window=64)
    found = method.scores(attrs.evolve(past, keys=keys), rotated)
    assert torch.allclose(found, method.scores(past, moment), atol=1e-6)


def test_a_method_without_queries_says_what_it_lacks():
    past, moment = past_and_moment(queries=None)
    with pytest.raises(PolicyError, match="a compressor says in `window_queries` how many it needs"):
        ExpectedAttention().scores(past, moment)


def test_a_layer_keeps_as_many_as_it_says():
    chosen = policy("expected-attention", most=6, window=8, sink=2, recent=4, block_size=2, chunk_size=4)
    layer = Layer(policy=chosen, geometry=GEOMETRY, rotary=rotary(WIDTH))
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        keys, values = torch.randn(2, 1, 1, 1, WIDTH, generator=generator).unbind()
        layer.write(keys, values)
        layer.select(torch.randn(1, 2, 1, WIDTH, generator=generator))
        assert layer.context().keys.shape[2] <= chosen.bound(GEOMETRY)
    assert layer.history.rewritten.keys.shape[3] == 6
