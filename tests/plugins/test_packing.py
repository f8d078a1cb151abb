"""Digests of few bits against their declared form, one row, byte and channel at a time."""

import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtiers_policies import packing
from kvtiers_policies.digests import absent
from kvtiers_policies.packing import Packing, turned, turned_back

bits = st.sampled_from([1, 2, 3, 4, 8])
channels = st.sampled_from([1, 2, 3, 4, 5, 8, 12, 20, 64, 80])
seeds = st.integers(0, 9_999)


def vectors(seed, *shape, outlier=1.0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x[..., 0] *= outlier
    return x


def read(row, width, count):
    """What one row stands for, still turned, by the docstring of `Packing`; and its step."""
    raw = bytes(row.tolist())
    step = struct.unpack("<f", b"\0\0" + raw[:2])[0]
    numbers = []
    for channel in range(count):
        code, first, low = 0, 2, 0
        for part in (2, 1) if width == 3 else (width,):
            size = math.ceil(count * part / 8)
            plane, byte = divmod(channel, size)
            code += (raw[first + byte] >> plane * part & 2**part - 1) << low
            first, low = first + size, low + part
        numbers.append((code - (2**width - 1) / 2) * step)
    return torch.tensor(numbers, dtype=torch.float64), step


@given(seed=seeds, width=bits, count=channels)
def test_a_row_is_a_step_and_codes_and_holds_every_channel_to_half_a_step(seed, width, count):
    x, packing = vectors(seed, 3, count, outlier=20.0), Packing(width)
    rows = packing.pack(x)
    assert rows.dtype == torch.uint8
    assert rows.shape == (3, packing.width(count))
    assert rows.shape[1] in (2 + math.ceil(count * width / 8), 2 + math.ceil(count * 2 / 8) + math.ceil(count / 8))
    for row, vector in zip(rows, turned(x).double(), strict=True):
        numbers, step = read(row, width, count)
        clipped = vector.abs() >= 2 ** (width - 1) * step
        assert ((numbers - vector).abs()[~clipped] <= step * (0.5 + 1e-4)).all()
        assert torch.allclose(numbers[clipped], vector.sign()[clipped] * (2**width - 1) / 2 * step)


@given(seed=seeds, width=bits, count=channels, queries=st.integers(1, 4), rows=st.integers(1, 9))
def test_products_are_those_with_what_the_rows_stand_for(seed, width, count, queries, rows):
    packing = Packing(width)
    packed = packing.pack(vectors(seed, 2, 3, rows, count))
    query = vectors(seed + 1, 2, 3, queries, count)
    got = packing.products(query, packed)
    assert torch.allclose(got, query @ packing.unpack(packed, count).mT, atol=1e-4)
    for q in range(queries):
        for r in range(rows):
            numbers, _ = read(packed[1, 2, r], width, count)
            assert float(got[1, 2, q, r]) == pytest.approx(float(turned(query).double()[1, 2, q] @ numbers), abs=1e-4)


@given(seed=seeds, count=channels)
def test_turning_keeps_products_and_is_undone_by_turning_back(seed, count):
    x, y = vectors(seed, 5, count), vectors(seed + 1, 5, count)
    assert torch.allclose(turned(x) @ turned(y).mT, x @ y.mT, atol=1e-4)
    assert torch.allclose(turned_back(turned(x)), x, atol=1e-5)


def test_turning_spreads_an_outlier_over_all_channels():
    x = torch.zeros(64)
    x[7] = 8.0
    assert torch.equal(turned(x).abs(), torch.ones(64))
    assert turned(torch.ones(64)).abs().max() < 4  # without signs, the Hadamard matrix makes one channel of 8 of it


@given(seed=seeds, width=bits, count=channels)
def test_a_row_does_not_depend_on_the_rows_beside_it(seed, width, count):
    x, packing = vectors(seed, 2, 3, 7, count), Packing(width)
    rows = packing.pack(x)
    for at in [(0, 0, 0), (1, 2, 6)]:
        assert torch.equal(rows[at], packing.pack(x[at].clone()))


@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
def test_a_vector_of_zeros_is_a_row_of_zeros_which_is_no_digest(width):
    x = vectors(0, 1, 1, 2, 3, 12)
    x[..., 1, :] = 0
    rows = Packing(width).pack(x)
    assert torch.equal(absent(rows), torch.tensor([False, True, False]).expand(1, 1, 2, 3))
    assert torch.equal(Packing(width).unpack(rows, 12)[..., 1, :], torch.zeros(1, 1, 2, 12))


def test_more_bits_leave_less_error():
    x = vectors(0, 1_000, 64)
    errors = [
        float((Packing(width).unpack(Packing(width).pack(x), 64) - x).square().mean()) for width in (1, 2, 3, 4, 8)
    ]
    assert errors == pytest.approx([0.363, 0.119, 0.0374, 0.0115, 0.0001], rel=0.2)


def test_products_are_the_same_however_many_rows_are_unpacked_at_a_time(monkeypatch):
    two_bits, query = Packing(2), vectors(1, 2, 3, 4, 64)
    rows = two_bits.pack(vectors(0, 2, 3, 50, 64))
    whole = two_bits.products(query, rows)
    for numbers in (1, 2_000, 7_000):
        monkeypatch.setattr(packing, "_UNPACKED_AT_ONCE", numbers)
        assert torch.allclose(two_bits.products(query, rows), whole, atol=1e-5)


def test_packing_takes_bfloat16_keys_and_far_larger_or_smaller_ones():
    x = vectors(0, 4, 64)
    assert torch.equal(Packing(2).pack(x.bfloat16()), Packing(2).pack(x.bfloat16().float()))
    for size in (1e-15, 1e15):
        assert torch.allclose(Packing(8).unpack(Packing(8).pack(x * size), 64) / size, x, atol=0.06)


def test_bits_that_do_not_fill_a_byte_are_refused_by_name():
    with pytest.raises(ValueError, match="bits"):
        Packing(5)


@pytest.mark.parametrize(("width", "count"), [(3, 72), (3, 8), (2, 12)])
def test_one_row_of_an_odd_number_of_bytes_can_be_read(width, count):
    packing, vector = Packing(width), vectors(1, 1, 1, 1, count)
    row = packing.pack(vector)
    assert packing.width(count) % 2 == 1
    assert torch.allclose(packing.products(vector, row), vector @ packing.unpack(row, count).mT, atol=1e-4)
