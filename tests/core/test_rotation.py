"""Invariant 4: a key in a context is its stored key, rotated once, by however many commits it has lived through."""

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvtiers.geometry import Geometry
from kvtiers.policy import Policy
from kvtiers.presets import build, policy
from kvtiers.rotary import Rotary
from kvtiers.trials import Trial, contents
from strategies import Setting, attend_context, cuts, feed, per_head, policies, rotary, settings_of

in_full = policies(
    realigner=("contiguous", "incremental"), compressor=("keep", "drop", "mean-pool"), attend="full", top_k_compressed=0
)


def turned_by_complex_numbers(keys: Tensor, positions: Tensor, turn: Rotary) -> Tensor:
    """keys: [batch, heads, tokens, head_dim]; positions: [batch, heads, tokens]. In float64, from the definition."""
    rates = torch.cat([f.double() for f in turn.frequencies])
    angle = torch.polar(torch.ones_like(positions)[..., None] * turn.scaling, positions[..., None] * rates)
    out, width = keys.double().clone(), turn.width
    where = slice(0, width)
    if turn.layout == "half":
        pairs = torch.complex(out[..., : width // 2].contiguous(), out[..., width // 2 : width].contiguous()) * angle
        out[..., where] = torch.cat([pairs.real, pairs.imag], -1)
    else:
        pairs = torch.view_as_complex(out[..., where].unflatten(-1, (-1, 2)).contiguous()) * angle
        out[..., where] = torch.view_as_real(pairs).flatten(-2)
    return out


def at_origins(x: Tensor, origins: Tensor) -> Tensor:
    return x.gather(2, origins.long()[..., None].expand(-1, -1, -1, x.shape[-1]))


@given(data=st.data())
def test_every_key_is_the_stored_key_rotated_once_however_often_blocks_moved(data):
    setting = data.draw(settings_of(in_full))
    tokens = setting.tokens
    for _, context in feed(setting.layer(), tokens, data.draw(cuts(setting.policy, most=20))):
        origins, placed = per_head(context.origins, context), per_head(context.placed, context)
        want = turned_by_complex_numbers(at_origins(tokens.keys, origins), placed, setting.rotary)
        assert torch.allclose(context.keys.double(), want, rtol=0, atol=3e-5)
        assert torch.equal(context.values, at_origins(tokens.values, origins))


@given(data=st.data())
def test_the_query_is_placed_where_its_own_key_is(data):
    setting = data.draw(settings_of(policies(realigner=("contiguous", "incremental"))))
    layer = setting.layer()
    for start, context in feed(layer, setting.tokens, data.draw(cuts(setting.policy))):
        now = setting.tokens.part(start, layer.num_steps)
        placed = per_head(context.placed, context)[:1, :1, -context.current :].expand(*now.query.shape[:3])
        want = turned_by_complex_numbers(now.query, placed, setting.rotary)
        assert torch.allclose(layer.place_query(now.query).double(), want, rtol=0, atol=3e-5)


ONCE = ("incremental", {"rotations": "once"})


@given(data=st.data(), rotations=st.sampled_from(["each", "once"]))
def test_contiguous_and_incremental_attend_alike(data, rotations):
    """They differ by a shift of everything, which attention does not see."""
    setting = exact(data.draw(settings_of(policies(realigner="contiguous"))))
    lengths = data.draw(cuts(setting.policy))
    runs = [
        attended(attrs.evolve(setting, policy=policy(setting.policy, realigner=realigner)), lengths)
        for realigner in ("contiguous", ("incremental", {"rotations": rotations}))
    ]
    for one, other in zip(*runs, strict=True):
        assert one.dtype == torch.float64
        assert torch.allclose(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("compressor", ["drop", "keep"])
def test_contiguous_and_incremental_attend_alike_over_200_blocks(compressor):
    found = blocks_of_two("contiguous", compressor)
    setting = exact(
        Setting(policy=found, geometry=Geometry(kv_heads=1, head_dim=4), rotary=rotary(4), seed=3, steps=1000)
    )
    wanted = attended(setting, [2] * 200)
    for realigner in ("incremental", *([ONCE] if compressor == "drop" else [])):
        got = attended(attrs.evolve(setting, policy=policy(found, realigner=realigner)), [2] * 200)
        assert max(float((a - b).abs().max()) for a, b in zip(got, wanted, strict=True)) < 1e-10
    original = attended(attrs.evolve(setting, policy=policy(found, realigner="original")), [2] * 20)
    assert max(float((a - b).abs().max()) for a, b in zip(original, wanted, strict=False)) > 1e-2


def exact(setting):
    """`setting` with numbers in float64; its angles are."""
    return attrs.evolve(setting, geometry=attrs.evolve(setting.geometry, dtype=torch.float64))


def attended(setting, lengths):
    """What the tokens of each forward attend."""
    layer, tokens = setting.layer(), setting.tokens
    return [
        attend_context(layer.place_query(tokens.part(start, layer.num_steps).query), context)
        for start, context in feed(layer, tokens, lengths)
    ]


def blocks_of_two(realigner, compressor):
    """A window of three blocks of two steps, the first of them anchored, with two of the archive if there is one."""
    return Policy(
        sinks=build("sinks", "first"),
        compressor=build("compressor", compressor),
        retriever=build("retriever", "recency"),
        realigner=build("realigner", realigner),
        archive=build("archive", "device"),
        codec=build("codec", "exact"),
        sink=2,
        recent=2,
        top_k=2,
        block_size=2,
        chunk_size=2,
    )


@given(data=st.data())
def test_without_gaps_realigning_equals_leaving_the_models_rotation(data):
    """As long as nothing is left out, a realigned context is the model's own; rotating before or after is the same."""
    found = data.draw(
        policies(compressor="keep", retriever="all", realigner=("contiguous", "incremental"), attend="full")
    )
    setting = data.draw(settings_of(st.just(found)))
    lengths = data.draw(cuts(found))
    plain = attrs.evolve(setting, policy=attrs.evolve(found, realigner=build("realigner", "original")))
    layer, tokens = setting.layer(), setting.tokens
    at = torch.arange(setting.steps)[:, None].double()
    turned = attrs.evolve(
        tokens, query=setting.rotary.rotate(tokens.query, at), keys=setting.rotary.rotate(tokens.keys, at)
    )
    for (start, mine), (_, theirs) in zip(
        feed(layer, tokens, lengths), feed(plain.layer(), turned, lengths), strict=True
    ):
        query = tokens.part(start, layer.num_steps).query
        own = attend_context(layer.place_query(query), mine)
        model = attend_context(turned.part(start, layer.num_steps).query, theirs)
        assert torch.allclose(own, model, rtol=0, atol=3e-5)


def errors_in_bfloat16(realigner, compressor, blocks):
    """The worst error of any key of each context over many blocks, relative to the largest number of the key."""
    found = blocks_of_two(realigner, compressor)
    geometry = Geometry(kv_heads=1, head_dim=4, dtype=torch.bfloat16)
    setting = Setting(policy=found, geometry=geometry, rotary=rotary(4), seed=3, steps=1000)
    tokens, errors = setting.tokens, []
    for _, context in feed(setting.layer(), tokens, [2] * blocks):
        origins, placed = per_head(context.origins, context), per_head(context.placed, context)
        want = turned_by_complex_numbers(at_origins(tokens.keys, origins), placed, setting.rotary)
        errors.append(((context.keys.double() - want).abs() / want.abs().amax(-1, keepdim=True)).max().item())
    return errors


_ONE_ROUNDING = 2**-8


@pytest.mark.parametrize("realigner", ["contiguous", ONCE], ids=["contiguous", "incremental once"])
@pytest.mark.parametrize("compressor", ["drop", "keep"])
def test_error_in_bfloat16_does_not_grow_over_250_blocks(realigner, compressor):
    errors = errors_in_bfloat16(realigner, compressor, 250)
    assert max(errors) < _ONE_ROUNDING
    assert max(errors[-100:]) <= max(errors[:100]) * 1.5


@pytest.mark.parametrize("compressor", ["drop", "keep"])
def test_rotating_anchors_block_by_block_as_the_paper_does_grows_an_error(compressor):
    errors = errors_in_bfloat16("incremental", compressor, 500)
    assert max(errors[:4]) < 2 * _ONE_ROUNDING
    assert max(errors[-100:]) > 4 * _ONE_ROUNDING


@pytest.mark.parametrize("name", ["packforcing-lm", "archive", "streaming"])
@pytest.mark.parametrize("realigner", ["contiguous", "incremental", "bounded"])
@pytest.mark.parametrize("then", ["write", "commit", "compact", "crop", "save"])
def test_tokens_for_which_no_blocks_were_chosen_are_rotated_once_all_the_same(name, realigner, then, tmp_path):
    chosen = policy(name, sink=2, recent=6, block_size=2, chunk_size=4, realigner=realigner)
    trial = Trial.start(chosen, Geometry(kv_heads=2, query_heads=4, head_dim=8), rotary(8), seed=0, steps=60)
    for _ in range(5):
        trial.feed(4)
    now = slice(trial.num_steps, trial.num_steps + 4)
    trial.cache.write(0, trial.keys[:, :, now], trial.values[:, :, now])
    if then == "commit":
        trial.cache.commit()
    elif then == "compact":
        trial.compact(2)
    elif then == "crop":
        trial.cache.crop_by(2)
    elif then == "save":
        trial.cache.save(tmp_path / "cache")
        trial = trial.branch()
        trial.cache.load(tmp_path / "cache")
    for count in (1, 3, 4):
        contents(trial, trial.feed(count))
