"""What the core refuses, each with a message that names what was wrong. Names: test_plugins, test_presets."""

import attrs
import pytest
import torch

from kvtiers import testing
from kvtiers.cache import TieredCache
from kvtiers.errors import (
    BudgetError,
    CropError,
    GeometryError,
    KVTiersError,
    NotFiniteError,
    PolicyError,
    RotaryError,
    SavedCacheError,
    SelectionError,
    SlotError,
)
from kvtiers.geometry import Geometry
from kvtiers.layer import Layer
from kvtiers.presets import policy
from strategies import Setting, copied, feed, rotary

GEOMETRY = Geometry(kv_heads=2, head_dim=4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        pytest.param(
            {"sink": -1}, PolicyError, "sink must be a whole number of at least 0, got -1", id="negative sink"
        ),
        pytest.param({"recent": -1}, PolicyError, "recent must be .* or None, got -1", id="negative recent"),
        pytest.param({"recent": 2.5}, PolicyError, "recent must be a whole number", id="recent of two and a half"),
        pytest.param({"top_k": 0}, PolicyError, "top_k must be a whole number of at least 1, got 0", id="no blocks"),
        pytest.param({"top_k_compressed": -1}, PolicyError, "top_k_compressed must be", id="negative top_k_compressed"),
        pytest.param({"block_size": 0}, PolicyError, "block_size must be", id="empty blocks"),
        pytest.param({"block_size": True}, PolicyError, "block_size must be .* got True", id="a truth value as a size"),
        pytest.param({"chunk_size": 0}, PolicyError, "chunk_size must be .* or None", id="empty chunks"),
        pytest.param({"refresh": 0}, PolicyError, "refresh must be 'block', 'chunk' or a number", id="refresh never"),
        pytest.param({"refresh": "often"}, PolicyError, "refresh must be .* got 'often'", id="refresh in words"),
        pytest.param({"attend": "half"}, PolicyError, "attend", id="an unknown form"),
        pytest.param({"budget": 0}, PolicyError, "budget must be", id="no budget"),
        pytest.param(
            {"sink": 10, "recent": 100, "budget": 50},
            BudgetError,
            r"sink \+ recent = 10 \+ 100 = 110 steps is more than budget = 50",
            id="sink and recent over budget",
        ),
    ],
)
def test_settings_out_of_range_are_refused_by_name(changes, error, message):
    with pytest.raises(error, match=message):
        policy("archive", **changes)


@pytest.mark.parametrize("slot", ["sinks", "compressor", "retriever", "realigner", "archive", "codec"])
def test_a_slot_takes_only_its_kind(slot):
    other = policy("archive").retriever if slot != "retriever" else policy("archive").compressor
    with pytest.raises(SlotError, match=f"slot '{slot}' takes a"):
        attrs.evolve(policy("archive"), **{slot: other})


@pytest.mark.parametrize(
    ("changes", "bound"),
    [
        pytest.param({"budget": 600}, f"up to {policy('archive').bound(GEOMETRY)}", id="too many tokens"),
        pytest.param({"budget": 5000, "retriever": "all"}, "any number of", id="no limit"),
        pytest.param({"budget": 5000, "chunk_size": None}, "any number of", id="forwards of any length"),
    ],
)
def test_a_policy_that_could_exceed_its_budget_is_refused_before_a_token_is_held(changes, bound):
    with pytest.raises(BudgetError, match=f"this policy attends {bound} tokens, more than budget"):
        Layer(policy=policy("archive", **changes), geometry=GEOMETRY)
    with pytest.raises(BudgetError):
        TieredCache(policy("archive", **changes), [GEOMETRY])


def test_a_budget_that_is_kept_is_accepted():
    found = policy("archive")
    Layer(policy=attrs.evolve(found, budget=found.bound(GEOMETRY)), geometry=GEOMETRY)


@pytest.mark.parametrize("realigner", ["contiguous", "incremental"])
def test_a_realigner_needs_a_rotary_embedding(realigner):
    with pytest.raises(
        RotaryError, match=r"layer 3 has no rotary embedding; use a realigner that leaves positions alone"
    ):
        Layer(policy=policy("streaming", realigner=realigner), geometry=GEOMETRY, layer=3)
    Layer(policy=policy("streaming", realigner="original"), geometry=GEOMETRY, layer=3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param(
            {"kv_heads": 0, "head_dim": 4}, "kv_heads must be a whole number of at least 1, got 0", id="no heads"
        ),
        pytest.param({"kv_heads": 2, "head_dim": -4}, "head_dim .* got -4", id="negative width"),
        pytest.param({"kv_heads": 2, "head_dim": 4, "batch": 0}, "batch .* got 0", id="no rows"),
        pytest.param({"kv_heads": 2, "head_dim": 4, "batch": True}, "batch .* got True", id="rows that are no number"),
        pytest.param(
            {"kv_heads": 2, "head_dim": 4, "query_heads": 3}, "a multiple of kv_heads", id="heads that do not divide"
        ),
        pytest.param({"kv_heads": 2, "head_dim": 4, "steps_per_commit": 0}, "commit .* got 0", id="commits of nothing"),
    ],
)
def test_a_geometry_that_cannot_be_is_refused(fields, message):
    with pytest.raises(GeometryError, match=message):
        Geometry(**fields)


def test_one_policy_and_one_rotary_per_layer_are_asked_for():
    with pytest.raises(
        GeometryError, match="one number per layer: got 2 policies, 3 rotaries and 3 numbers for 3 layers"
    ):
        TieredCache([policy("full")] * 2, [GEOMETRY] * 3)


def filled() -> tuple[Layer, Setting]:
    found = policy("archive", sink=1, recent=3, block_size=2, top_k=1, chunk_size=4)
    setting = Setting(policy=found, geometry=GEOMETRY, rotary=rotary(4), seed=0)
    layer = setting.layer(layer=7)
    list(feed(layer, setting.tokens, [4, 4]))
    return layer, setting


def tensors(*, batch=1, heads=2, steps=1, width=4, value_width=4, dtype=torch.float32, value_dtype=None, other=0):
    return (
        torch.zeros(batch, heads, steps, width, dtype=dtype),
        torch.zeros(batch, heads, steps + other, value_width, dtype=value_dtype or dtype),
    )


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        pytest.param({"batch": 2}, "layer 7 holds .* got keys", id="more rows"),
        pytest.param({"heads": 3}, "layer 7 holds", id="other heads"),
        pytest.param({"width": 8}, "layer 7 holds", id="other head size"),
        pytest.param({"value_width": 6}, "layer 7 holds", id="other value size"),
        pytest.param({"dtype": torch.float16}, "layer 7 holds", id="other dtype"),
        pytest.param({"value_dtype": torch.float64}, "layer 7 holds", id="values of another dtype than keys"),
        pytest.param({"steps": 0}, "takes whole steps of 1 tokens, got 0", id="nothing"),
        pytest.param({"steps": 5}, "at most 4 steps at once, got 5 tokens", id="more than a chunk"),
    ],
)
def test_tensors_of_another_model_are_refused_and_nothing_is_stored(shape, message):
    layer, setting = filled()
    before, tier_counts = copied(layer.context()), layer.tier_counts()
    with pytest.raises(GeometryError, match=message):
        layer.write(*tensors(**shape))
    assert layer.tier_counts() == tier_counts
    assert testing.difference(before, layer.context()) is None
    list(feed(layer, setting.tokens, [1, 4], start=8))


def test_keys_on_another_device_are_refused():
    layer, _ = filled()
    keys, values = (x.to("meta") for x in tensors())
    with pytest.raises(GeometryError, match="layer 7 holds tensors on cpu, got keys on meta"):
        layer.write(keys, values)
    with pytest.raises(GeometryError, match="values on meta"):
        layer.write(tensors()[0], values)


@pytest.mark.parametrize("where", ["keys", "values"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_with_checking_on_what_is_not_finite_is_refused_with_the_layer_named(where, value):
    found = policy("streaming", sink=1, recent=3, block_size=2, chunk_size=4)
    setting = Setting(policy=found, geometry=GEOMETRY, rotary=rotary(4), seed=0)
    layer = setting.layer(layer=5, check=True)
    list(feed(layer, setting.tokens, [4, 4]))
    before, tier_counts = copied(layer.context()), layer.tier_counts()
    keys, values = tensors(steps=2)
    (keys if where == "keys" else values)[0, 1, 1, 2] = value
    with pytest.raises(NotFiniteError, match="layer 5 was given keys or values with NaN or infinity at steps 8 to 10"):
        layer.write(keys, values)
    assert layer.tier_counts() == tier_counts
    assert testing.difference(before, layer.context()) is None
    list(feed(layer, setting.tokens, [2], start=8))


def test_without_checking_nothing_is_looked_at():
    layer, _ = filled()
    keys, values = tensors()
    layer.write(keys * float("nan"), values)
    assert layer.num_steps == 9


def test_a_video_layer_takes_whole_steps():
    geometry = Geometry(kv_heads=1, head_dim=4, grid=(2, 3), steps_per_commit=1, causal=False)
    layer = Layer(policy=policy("archive", block_size=1), geometry=geometry)
    with pytest.raises(GeometryError, match="takes whole steps of 6 tokens, got 7 tokens"):
        layer.write(torch.zeros(1, 1, 7, 4), torch.zeros(1, 1, 7, 4))


def test_a_video_layer_takes_no_more_than_one_commit_at_once():
    """Else the context would exceed its bound, which counts one commit."""
    geometry = Geometry(kv_heads=1, head_dim=4, grid=(2,), steps_per_commit=3, causal=False)
    layer = Layer(policy=policy("archive", block_size=3, sink=3, recent=3), geometry=geometry)
    layer.write(torch.zeros(1, 1, 6, 4), torch.zeros(1, 1, 6, 4))
    with pytest.raises(GeometryError, match="at most 3 steps at once, got 12 tokens"):
        layer.write(torch.zeros(1, 1, 12, 4), torch.zeros(1, 1, 12, 4))


def test_reading_or_selecting_before_anything_is_held_says_what_to_do():
    layer = Layer(policy=policy("archive"), geometry=GEOMETRY)
    with pytest.raises(SelectionError, match="holds nothing yet; write keys and values first"):
        layer.context()
    layer.select()
    cache = TieredCache(policy("archive"), [GEOMETRY])
    with pytest.raises(GeometryError, match="or none yet"):
        cache.context(0)
    assert cache.contexts(0) == []
    assert cache.tier_counts() == {}
    cache.crop(0)
    cache.select_rows(torch.tensor([0, 0]))


def test_every_error_is_a_kvtiers_error_and_a_standard_one():
    from kvtiers import errors

    for name in dir(errors):
        found = getattr(errors, name)
        if isinstance(found, type) and found.__module__ == errors.__name__ and found is not KVTiersError:
            assert issubclass(found, KVTiersError)
            assert any(base.__module__ == "builtins" and base is not Exception for base in found.__mro__[1:-3])
            assert found.__doc__.startswith("When ")


@pytest.mark.parametrize("layer", [-1, 2, 99])
@pytest.mark.parametrize("verb", ["context", "contexts", "select", "commit", "tier_counts", "layout"])
def test_a_layer_that_is_not_there_is_named(verb, layer):
    geometry = Geometry(kv_heads=1, head_dim=4)
    cache = TieredCache(policy("sliding-window"), [geometry, geometry])
    message = rf"there is no layer {layer}; a cache of 2 layers has 0 to 1"
    with pytest.raises(GeometryError, match=message):
        getattr(cache, verb)(layer)
    with pytest.raises(GeometryError, match=message):
        cache.write(layer, torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4))


def test_a_row_that_is_not_there_is_named():
    cache = TieredCache(policy("sliding-window"), [GEOMETRY])
    cache.write(0, torch.zeros(2, 2, 1, 4), torch.zeros(2, 2, 1, 4))
    for row in (-1, 2):
        with pytest.raises(GeometryError, match=f"there is no row {row}; layer 0 holds 2 rows"):
            cache.tier_counts(row=row)


@pytest.mark.usefixtures("_shapes_go_unchecked")
@pytest.mark.parametrize(
    ("policies", "geometries", "message"),
    [
        pytest.param(
            "archive", [GEOMETRY], "one Policy, or a list with a Policy for each layer, got 'archive'", id="a name"
        ),
        pytest.param(None, [GEOMETRY], "one Policy, or a list with a Policy for each layer, got None", id="no policy"),
        pytest.param(policy("full"), GEOMETRY, "a list with a Geometry for each layer, got Geometry", id="one shape"),
        pytest.param(policy("full"), [None], r"a list with a Geometry for each layer, got \[None\]", id="no shape"),
    ],
)
def test_a_cache_is_made_of_policies_and_geometries(policies, geometries, message):
    with pytest.raises(GeometryError, match=message):
        TieredCache(policies, geometries)


def test_a_rotary_embedding_of_wider_heads_is_refused():
    with pytest.raises(RotaryError, match="turns 16 channels from 0 on, and its keys have 4"):
        TieredCache(policy("streaming"), [GEOMETRY], rotaries=[rotary(16)])


@pytest.mark.usefixtures("_shapes_go_unchecked")
@pytest.mark.parametrize(
    ("beside", "message"),
    [
        pytest.param({"extra": [1]}, "extra must be a mapping of names to what is kept, got a list", id="a list"),
        pytest.param({"extra": {"loss": float("nan")}}, "extra must be plain data that JSON can hold", id="NaN"),
        pytest.param({"extra": {1: 2}}, "names in extra must be text, got 1", id="a name that is a number"),
        pytest.param({"extra": {None: 2}}, "names in extra must be text, got None", id="None as a name"),
        pytest.param({"beside": {"x": 3}}, r"beside\['x'\] must be a tensor that holds values, got a int", id="3"),
        pytest.param(
            {"beside": {"x": torch.zeros(1, device="meta")}}, "got one on the meta device", id="a tensor without values"
        ),
    ],
)
def test_what_cannot_be_kept_with_a_cache_is_named(beside, message, tmp_path):
    cache = TieredCache(policy("full"), [GEOMETRY])
    with pytest.raises(SavedCacheError, match=message):
        cache.save(tmp_path / "cache", **beside)
    assert not list(tmp_path.iterdir())


def test_where_a_cache_cannot_be_loaded_from_or_to_is_named(tmp_path):
    cache = TieredCache(policy("full"), [GEOMETRY])
    cache.save(tmp_path / "cache")
    with pytest.raises(SavedCacheError, match="a cache cannot be loaded to the device 'nowhere'"):
        cache.load(tmp_path / "cache", device="nowhere")
    with pytest.raises(SavedCacheError, match="is no file; give the path that save"):
        cache.load("a" * 300)


def test_compressed_forms_are_given_for_every_layer_or_none_is_committed():
    geometry = Geometry(kv_heads=1, head_dim=4)
    cache = TieredCache(policy("sliding-window"), [geometry, geometry])
    for layer in (0, 1):
        cache.write(layer, torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4))
    with pytest.raises(GeometryError, match="compressed has 1 entries; due are 2, one per layer"):
        cache.commit(compressed=[None])
    assert cache.committed_steps == 0


@pytest.mark.usefixtures("_shapes_go_unchecked")
@pytest.mark.parametrize("compressed", [5, "ab", {0: None, 1: None}, [5, 5], [None, {}]], ids=str)
def test_only_compressed_forms_are_taken_for_such(compressed):
    geometry = Geometry(kv_heads=1, head_dim=4)
    cache = TieredCache(policy("sliding-window"), [geometry, geometry])
    with pytest.raises(GeometryError, match="compressed"):
        cache.commit(compressed=compressed)


@pytest.mark.usefixtures("_shapes_go_unchecked")
@pytest.mark.parametrize("steps", [1.5, 2.0, "1", None, True])
@pytest.mark.parametrize("verb", ["crop", "crop_by"])
def test_a_cache_is_rolled_back_by_whole_steps(verb, steps):
    cache = TieredCache(policy("full"), [Geometry(kv_heads=1, head_dim=4)])
    cache.write(0, torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4))
    with pytest.raises(CropError, match="a cache is rolled back by whole steps, got"):
        getattr(cache, verb)(steps)
    assert type(cache.num_steps) is int
    assert cache.num_steps == 4


@pytest.mark.usefixtures("_shapes_go_unchecked")
@pytest.mark.parametrize(
    "query",
    [
        torch.zeros(1, 2, 2, 6),
        torch.zeros(1, 3, 2, 4),
        torch.zeros(1, 2, 3, 4),
        torch.zeros(2, 2, 4),
        torch.zeros(1, 2, 2, 4).long(),
        [0.0],
    ],
    ids=["width", "heads", "more than were written", "three axes", "numbers", "list"],
)
def test_queries_that_cannot_be_those_of_the_current_tokens_are_refused(query):
    geometry = Geometry(kv_heads=1, query_heads=2, head_dim=4)
    cache = TieredCache(policy("archive", sink=0, recent=2, block_size=2, chunk_size=2), [geometry])
    for _ in range(4):
        cache.write(0, torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))
    with pytest.raises(GeometryError, match=r"layer 0 takes queries .* = \(1, 2, 2, 4\) of the current tokens"):
        cache.select(0, query)
    cache.select(0, torch.zeros(1, 2, 2, 4))


@pytest.mark.usefixtures("_shapes_go_unchecked")
@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        pytest.param(1, 2, r"layer 0 takes keys \[batch, kv_heads, tokens, width\]; got a int", id="numbers"),
        pytest.param(torch.zeros(1, 1, 4), torch.zeros(1, 1, 1, 4), r"takes keys .* got \(1, 1, 4\)", id="three axes"),
        pytest.param(torch.zeros(1, 1, 1, 4), None, "takes values .* got a NoneType", id="None"),
    ],
)
def test_only_tensors_of_four_axes_are_written(keys, values, message):
    cache = TieredCache(policy("full"), [Geometry(kv_heads=1, head_dim=4)])
    with pytest.raises(GeometryError, match=message):
        cache.write(0, keys, values)
    assert cache.num_steps == 0


@pytest.mark.usefixtures("_shapes_go_unchecked")
@pytest.mark.parametrize("verb", ["save", "load"])
@pytest.mark.parametrize("path", [None, 5, ["a"]])
def test_a_file_has_a_path(verb, path):
    cache = TieredCache(policy("full"), [Geometry(kv_heads=1, head_dim=4)])
    with pytest.raises(SavedCacheError, match="whose path is a text or a Path; got"):
        getattr(cache, verb)(path)


@pytest.mark.usefixtures("_shapes_go_unchecked")
def test_an_observer_can_be_called_and_every_layer_has_a_number():
    geometry = Geometry(kv_heads=1, head_dim=4)
    with pytest.raises(KVTiersError, match="observe is called with every event; got 5"):
        TieredCache(policy("full"), [geometry], observe=5)
    with pytest.raises(GeometryError, match="and 1 numbers for 2 layers"):
        TieredCache(policy("full"), [geometry, geometry], numbers=[0])
