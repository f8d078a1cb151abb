"""Rotary embedding against complex multiplication in float64, both layouts, partial, several axes, scaled."""

import cmath

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvtiers.errors import RotaryError
from kvtiers.rotary import Rotary

layouts = st.sampled_from(["half", "interleaved"])
positions_of = st.lists(st.integers(-300, 3000), min_size=1, max_size=5)
CLOSE = {"rtol": 0, "atol": 2e-6}


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_complex_numbers(
    x: Tensor, positions: Tensor, frequencies: list[Tensor], *, layout: str, scaling: float
) -> Tensor:
    """The definition (RoFormer, equation 15), one pair at a time: (a + bi) e^(i position frequency)."""
    axes = [axis for axis, each in enumerate(frequencies) for _ in each]
    rates = [float(rate) for each in frequencies for rate in each]
    out = x.clone()
    for token in range(x.shape[-2]):
        for pair, (axis, rate) in enumerate(zip(axes, rates, strict=True)):
            a, b = (pair, pair + len(rates)) if layout == "half" else (2 * pair, 2 * pair + 1)
            turn = cmath.rect(scaling, float(positions[token, axis]) * rate)
            for row in range(x.shape[0]):
                turned = complex(x[row, token, a], x[row, token, b]) * turn
                out[row, token, a], out[row, token, b] = turned.real, turned.imag
    return out


@given(
    layout=layouts,
    pairs=st.integers(1, 3),
    rest=st.integers(0, 3),
    first=st.integers(0, 2),
    scaling=st.sampled_from([1.0, 0.7, 1.3]),
    positions=positions_of,
    seed=st.integers(0, 999),
)
def test_one_rotation_is_one_complex_multiplication(layout, pairs, rest, first, scaling, positions, seed):
    frequencies = [random(seed + 1, pairs).abs()]
    rotary = Rotary(frequencies, layout=layout, scaling=scaling, first=first, angle_dtype=torch.float64)
    x, stop = random(seed, 2, len(positions), first + 2 * pairs + rest), first + 2 * pairs
    at = torch.tensor(positions, dtype=torch.float64)[:, None]
    want = by_complex_numbers(x[..., first:], at, frequencies, layout=layout, scaling=scaling)
    got = rotary.rotate(x, at)
    assert torch.allclose(got[..., first:], want, **CLOSE)
    assert torch.equal(got[..., :first], x[..., :first])
    assert torch.equal(got[..., stop:], x[..., stop:])


@given(grid=st.tuples(st.integers(1, 3), st.integers(1, 3)), start=st.integers(0, 50), steps=st.integers(1, 3))
def test_every_axis_of_a_video_turns_its_own_channels(grid, start, steps):
    frequencies = [torch.tensor([0.9, 0.1]), torch.tensor([0.5]), torch.tensor([0.3])]
    rotary = Rotary(frequencies, layout="interleaved", angle_dtype=torch.float64)
    places = [(t, h, w) for t in range(start, start + steps) for h in range(grid[0]) for w in range(grid[1])]
    at = torch.tensor(places, dtype=torch.float64)
    x = random(steps, 1, len(places), rotary.width + 1)
    want = by_complex_numbers(x, at, frequencies, layout="interleaved", scaling=1.0)
    assert torch.allclose(rotary.rotate(x, at), want, **CLOSE)
    assert torch.equal(rotary.apply(x, rotary.run(start, steps, grid, x.device, x.dtype)), rotary.rotate(x, at))


@given(layout=layouts, first=st.integers(-200, 200), second=st.integers(-200, 200), seed=st.integers(0, 999))
def test_two_rotations_are_one_by_their_sum_and_one_back_is_none(layout, first, second, seed):
    rotary = Rotary([torch.tensor([1.0, 0.2])], layout=layout, angle_dtype=torch.float64)
    x = random(seed, 1, 3, 4)
    twice = rotary.rotate(rotary.rotate(x, torch.full((3, 1), float(first))), torch.full((3, 1), float(second)))
    assert torch.allclose(twice, rotary.rotate(x, torch.full((3, 1), float(first + second))), **CLOSE)
    back = rotary.rotate(rotary.rotate(x, torch.full((3, 1), float(first))), torch.full((3, 1), float(-first)))
    assert torch.allclose(back, x, **CLOSE)
    assert torch.equal(rotary.rotate(x.float(), torch.zeros(3, 1)), x.float())


@given(layout=layouts, first=st.integers(0, 200), further=st.integers(-200, 200), scaling=st.sampled_from([1.0, 1.3]))
def test_what_is_rotated_already_can_be_moved_on_and_is_not_scaled_again(layout, first, further, scaling):
    rotary = Rotary([torch.tensor([1.0, 0.2])], layout=layout, scaling=scaling, angle_dtype=torch.float64)
    x = random(first, 1, 3, 5)
    at = torch.full((3, 1), float(first))
    assert torch.allclose(rotary.advance(rotary.rotate(x, at), further), rotary.rotate(x, at + further), **CLOSE)


@given(layout=layouts, shift=st.integers(-500, 500), distance=st.integers(0, 50), seed=st.integers(0, 999))
def test_a_score_depends_on_the_distance_only(layout, shift, distance, seed):
    rotary = Rotary([torch.tensor([0.7, 0.05])], layout=layout, angle_dtype=torch.float64)
    query, key = random(seed, 1, 1, 4), random(seed + 1, 1, 1, 4)

    def score(at: int) -> float:
        place = torch.tensor([[float(at)]])
        return float((rotary.rotate(query, place + distance) * rotary.rotate(key, place)).sum())

    assert score(shift) == pytest.approx(score(0), abs=1e-5)


@given(layout=layouts, start=st.integers(0, 5000), steps=st.integers(1, 6))
def test_a_run_of_steps_equals_the_table_of_their_positions(layout, start, steps):
    rotary = Rotary([torch.tensor([0.7, 0.05])], layout=layout)
    x = random(start, 2, 3, steps, 4, dtype=torch.float32)
    at = torch.arange(start, start + steps, dtype=torch.float64)[:, None]
    for _ in range(2):  # the second time from memory
        assert torch.equal(rotary.apply(x, rotary.run(start, steps, (), x.device)), rotary.rotate(x, at))


def test_a_table_of_shapes_alone_spoils_no_later_one():
    turn = Rotary([torch.tensor([1.0, 0.1])])
    wanted = turn.table(torch.zeros(3, 1, dtype=torch.float64))
    assert turn.table(torch.zeros(3, 1, dtype=torch.float64, device="meta"))[0].is_meta
    assert torch.equal(turn.table(torch.zeros(3, 1, dtype=torch.float64))[0], wanted[0])


def test_a_low_precision_key_is_rotated_in_float32_and_rounded_once():
    rotary = Rotary([torch.tensor([0.7, 0.05])])
    x = random(0, 1, 6, 4, dtype=torch.bfloat16)
    at = torch.arange(100.0, 106.0)[:, None]
    assert torch.equal(rotary.rotate(x, at), rotary.rotate(x.float(), at).to(torch.bfloat16))


def test_positions_may_be_fractions_and_differ_by_row_and_head():
    rotary = Rotary([torch.tensor([0.7, 0.05])], angle_dtype=torch.float64)
    x = random(0, 2, 3, 4, 4)
    at = random(1, 2, 3, 4, 1) * 10
    whole = rotary.rotate(x, at)
    for row in range(2):
        for head in range(3):
            assert torch.allclose(whole[row, head], rotary.rotate(x[row, head], at[row, head]), **CLOSE)


def test_frequencies_are_a_copy():
    frequencies = torch.tensor([0.7, 0.05])
    rotary = Rotary([frequencies])
    frequencies.zero_()
    assert torch.equal(rotary.frequencies[0], torch.tensor([0.7, 0.05]))


def test_several_axes_in_the_layout_of_one_are_refused():
    with pytest.raises(RotaryError, match="layout 'half' rotates one axis, got 2"):
        Rotary([torch.tensor([1.0]), torch.tensor([1.0])], layout="half")
