"""Codecs: what is read back is as near as they declare, and blocks stay apart."""

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distances import near
from kvtiers.errors import PolicyError
from kvtiers.geometry import Geometry
from kvtiers_methods.kivi import Kivi
from kvtiers_methods.low_rank import LowRank
from kvtiers_policies.exact import Exact
from kvtiers_policies.int4 import Int4
from kvtiers_policies.int8 import Int8
from kvtiers_policies.quantised import Quantised

CODECS = {
    "exact": Exact(),
    "int8": Int8(),
    "int4": Int4(),
    "kivi": Kivi(),
    "low-rank": LowRank(rank=2),
    "int8 in groups of 3": Int8(group=3),
    "int4 in groups of 2": Int4(group=2),
}
codecs = pytest.mark.parametrize("codec", [pytest.param(codec, id=name) for name, codec in CODECS.items()])
quantised = pytest.mark.parametrize(
    "codec", [pytest.param(c, id=name) for name, c in CODECS.items() if isinstance(c, Quantised)]
)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@attrs.frozen(eq=False)
class Written:
    """Keys and values of some blocks, and what a codec makes of them."""

    keys: Tensor
    values: Tensor
    tokens: int

    def encoded(self, codec) -> dict[str, Tensor]:
        return codec.encode(self.keys, self.values)

    def read(self, codec) -> tuple[Tensor, Tensor]:
        return codec.decode(self.encoded(codec), self.keys.dtype)

    def excess(self, codec, keys: Tensor, values: Tensor) -> float:
        """The most by which a number differs more than the codec declares."""
        pairs = zip((keys, values), (self.keys, self.values), codec.tolerance(self.keys, self.values), strict=True)
        return max(float(((a.double() - b.double()).abs() - most.double()).max()) for a, b, most in pairs)


MAGNITUDES = {
    torch.float32: [1e-30, 1e-6, 1.0, 1e4, 1e6, 1e30],
    torch.bfloat16: [1e-30, 1e-6, 1.0, 1e4, 1e6, 1e30],
    torch.float16: [1e-7, 1e-4, 1.0, 1e4, 6e4],
}


@st.composite
def written(draw: st.DrawFn, codec, **fixed) -> Written:
    dtype = fixed.get("dtype") or draw(DTYPES, label="dtype")
    groups = getattr(codec, "group", 1)
    width = groups * draw(st.integers(1, 5), label="key width in groups")
    lead = [draw(st.integers(1, 3), label=name) for name in ("batch", "kv_heads", "blocks", "tokens")]
    shapes = {"keys": (*lead, width), "values": (*lead, draw(st.integers(1, 7), label="value width"))}
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999), label="seed"))
    made = {}
    for name, shape in shapes.items():
        x = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
        kind = draw(st.sampled_from(["plain", "constant channel", "constant", "outlier", "far from 0"]), label=name)
        if kind == "constant channel":
            x[..., 0] = 0.7
        elif kind == "constant":
            x[:] = -0.3
        elif kind == "outlier":
            x.view(-1)[0] = 100.0
        elif kind == "far from 0":
            x += 30
        size = draw(st.sampled_from(MAGNITUDES[dtype]), label=f"the greatest of {name}")
        made[name] = (x / x.abs().max() * size).to(dtype)
    return Written(made["keys"], made["values"], lead[-1])


@codecs
@given(data=st.data())
def test_what_is_read_back_differs_by_no_more_than_the_codec_declares(codec, data):
    blocks = data.draw(written(codec))
    keys, values = blocks.read(codec)
    assert (keys.shape, keys.dtype) == (blocks.keys.shape, blocks.keys.dtype)
    assert (values.shape, values.dtype) == (blocks.values.shape, blocks.values.dtype)
    assert keys.isfinite().all()
    assert values.isfinite().all()
    assert blocks.excess(codec, keys, values) <= 0


@quantised
@given(data=st.data())
def test_what_a_codec_declares_is_little_more_than_half_a_step(codec, data):
    blocks = data.draw(written(codec, dtype=torch.float32))
    of_keys, of_values = codec.tolerance(blocks.keys, blocks.values)
    grouped = [x.unflatten(-1, (-1, codec.group)) for x in (blocks.keys, of_keys)]
    for x, most, axes in ((*grouped, (-3, -1)), (blocks.values, of_values, (-1,))):
        low, high = (f(x.double(), axes, keepdim=True) for f in (torch.amin, torch.amax))
        largest = torch.maximum(low.abs(), high.abs())
        step = (high - low + largest * 2**-6) / (2**codec.bits - 1)
        assert (most <= 0.52 * step + largest * 2**-18 + 1e-40).all()


@pytest.mark.parametrize("part", ["key_scale", "value_scale", "key_low", "value_low"])
@pytest.mark.parametrize("codec", [Int8(), Int4()], ids=["int8", "int4"])
def test_a_scale_or_a_least_value_that_is_off_exceeds_what_is_declared(codec, part):
    g = torch.Generator().manual_seed(0)
    blocks = Written(torch.randn(2, 2, 3, 8, 6, generator=g), torch.randn(2, 2, 3, 8, 5, generator=g), 8)
    parts = blocks.encoded(codec)
    assert blocks.excess(codec, *codec.decode(parts, torch.float32)) <= 0
    shifted = {**parts, part: parts[part] * 1.15}
    assert blocks.excess(codec, *codec.decode(shifted, torch.float32)) > 0


@given(data=st.data())
def test_exact_reads_back_every_bit(data):
    blocks = data.draw(written(Exact()))
    for got, want in zip(blocks.read(Exact()), (blocks.keys, blocks.values), strict=True):
        assert torch.equal(got, want)
    assert not any(most.any() for most in Exact().tolerance(blocks.keys, blocks.values))


@quantised
@given(data=st.data())
def test_a_channel_that_is_constant_in_16_bits_is_read_back_bit_for_bit(codec, data):
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16]))
    value = data.draw(st.floats(-6e4, 6e4))
    blocks = Written(*(torch.full((1, 2, 2, 3, 6), value, dtype=dtype) for _ in range(2)), 3)
    for got, want in zip(blocks.read(codec), (blocks.keys, blocks.values), strict=True):
        assert torch.equal(got, want)


@codecs
@given(data=st.data())
def test_the_bytes_of_a_block_are_those_of_its_parts(codec, data):
    blocks = data.draw(written(codec))
    batch, kv_heads, count = blocks.keys.shape[:3]
    geometry = Geometry(
        kv_heads=kv_heads,
        head_dim=blocks.keys.shape[-1],
        value_dim=blocks.values.shape[-1],
        batch=batch,
        dtype=blocks.keys.dtype,
    )
    parts = blocks.encoded(codec)
    assert all(part.shape[:3] == (batch, kv_heads, count) for part in parts.values())
    assert sum(part.nbytes for part in parts.values()) == count * codec.block_bytes(blocks.tokens, geometry)


@codecs
@given(data=st.data())
def test_blocks_rows_and_heads_are_encoded_apart_from_each_other(codec, data):
    blocks = data.draw(written(codec))
    sizes = blocks.keys.shape[:3]
    at = tuple(slice(data.draw(st.integers(0, size - 1)), size) for size in sizes)
    whole, some = blocks.encoded(codec), codec.encode(blocks.keys[at], blocks.values[at])
    assert whole.keys() == some.keys()
    assert all(torch.equal(whole[name][at], some[name]) for name in whole)


@codecs
@given(data=st.data())
def test_blocks_are_decoded_in_any_order_and_any_number(codec, data):
    blocks = data.draw(written(codec))
    count = blocks.keys.shape[2]
    order = torch.tensor(data.draw(st.lists(st.integers(0, count - 1), max_size=4)), dtype=torch.long)
    parts = blocks.encoded(codec)
    chosen = codec.decode({name: part[:, :, order] for name, part in parts.items()}, blocks.keys.dtype)
    for got, want in zip(chosen, codec.decode(parts, blocks.keys.dtype), strict=True):
        assert torch.equal(got, want[:, :, order])


@pytest.mark.parametrize("width", [1, 3, 5])
def test_an_odd_width_of_values_comes_back_as_it_was_even_for_blocks_of_one_token(width):
    values = torch.arange(float(width)).expand(1, 1, 2, 1, width)
    _, read = Int4().decode(Int4().encode(torch.zeros(1, 1, 2, 1, 3), values), torch.float32)
    assert read.shape == values.shape


def test_numbers_beyond_the_range_of_float16_stay_finite():
    x = torch.tensor([-3e5, 0.0, 1e9]).view(1, 1, 1, 1, 3)
    blocks = Written(x.expand(1, 1, 1, 2, 3), x, 1)
    assert blocks.values.abs().max() > torch.finfo(torch.float16).max
    values = blocks.read(Int4())[1]
    assert values.isfinite().all()
    assert float(values[..., -1]) == pytest.approx(1e9, rel=0.02)


def test_a_group_that_does_not_divide_the_width_is_refused():
    with pytest.raises(PolicyError, match="group = 3 does not divide the width of a key, 4 channels"):
        Int4(group=3).encode(torch.zeros(1, 1, 1, 2, 4), torch.zeros(1, 1, 1, 2, 4))


def test_kivi_rounds_keys_by_channel_and_values_by_token():
    """Numbers from 0 to 3 steps of a channel, or token, above its least value: rounded they come back."""
    generator = torch.Generator().manual_seed(0)
    whole = 3 * torch.rand(2, 1, 2, 3, 8, 8, generator=generator)
    steps, least = (2.0 ** torch.randint(-3, 3, (2, 8), generator=generator) for _ in range(2))
    whole[0, ..., :2, :], whole[1, ..., :2] = torch.tensor([[0.0], [3.0]]), torch.tensor([0.0, 3.0])
    (keys, rounded_keys), (values, rounded_values) = (
        (whole[0] * steps[0] - least[0], whole[0].round() * steps[0] - least[0]),
        (whole[1] * steps[1, :, None] - least[1, :, None], whole[1].round() * steps[1, :, None] - least[1, :, None]),
    )
    for got, other, wanted in zip(
        Kivi().decode(Kivi().encode(keys, values), torch.float32),
        reversed(Kivi().decode(Kivi().encode(values, keys), torch.float32)),
        (rounded_keys, rounded_values),
        strict=True,
    ):
        near("kivi", (got - wanted).abs().max(), (other - wanted).abs().max())
