"""What every plugin should test: it does what it says, it keeps kvtiers' invariants, and it is found by name."""
# ruff: noqa: D103, S101 - tests: their names are their docstrings, and assert is how they speak

from importlib.metadata import entry_points

import torch
from kvtiers_value_norm import ValueNorm

import kvtiers
from kvtiers.blocks import run_of

GEOMETRY = kvtiers.Geometry(kv_heads=1, head_dim=1)
MOMENT = kvtiers.Moment(layer=0, step=0, geometry=GEOMETRY, device=torch.device("cpu"))


def blocks(values: torch.Tensor) -> kvtiers.Blocks:
    """One block per row of `values`, whose keys say where their token was."""
    count, tokens = values.shape
    where = torch.arange(count * tokens, dtype=torch.float64)[:, None]
    flat = values.reshape(1, 1, -1, 1)
    return run_of(where[None, None].float(), flat, count=count, positions=where, first=0, span=tokens)


def test_the_largest_values_stay_in_order_of_origin() -> None:
    found = ValueNorm(keep=2).age(blocks(torch.tensor([[1.0, -9.0, 2.0, 5.0], [8.0, 0.0, 7.0, 1.0]])), MOMENT)
    assert found.keys.flatten().tolist() == [1, 3, 4, 6]
    assert found.values.flatten().tolist() == [-9, 5, 8, 7]
    assert found.offsets.flatten().tolist() == [1, 3, 0, 2]


def test_a_block_that_is_small_enough_stays_as_it_is() -> None:
    given = blocks(torch.rand(2, 4))
    assert ValueNorm(keep=4).age(given, MOMENT) is given
    assert ValueNorm(keep=9).compressed_tokens(4) == 4


def test_the_invariants_hold() -> None:
    from kvtiers import testing  # the conformance kit; it needs Hypothesis

    testing.check_compressor(lambda: ValueNorm(keep=2))


def test_it_is_found_by_name() -> None:
    assert "value-norm" in entry_points(group="kvtiers").names
    policy = kvtiers.policy("archive", compressor={"name": "value-norm", "keep": 3}, attend="compressed")
    assert policy.compressor == ValueNorm(keep=3)
    assert kvtiers.policy("value-norm-archive").compressor == ValueNorm()
