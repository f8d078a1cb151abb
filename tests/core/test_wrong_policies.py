"""What a wrong policy returns is loud: the error names plugin class, method, what it gave, and what was due."""

from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

import kvtiers
from kvtiers import testing
from kvtiers.errors import SlotError
from kvtiers.presets import build
from kvtiers.slots import Placement
from kvtiers_policies.affinity import Affinity
from kvtiers_policies.contiguous import Contiguous
from kvtiers_policies.device import DeviceArchive
from kvtiers_policies.exact import Exact
from kvtiers_policies.mean_pool import MeanPool
from strategies import Setting, copied, feed, first_example, rotary, same, unchecked

GEOMETRY = kvtiers.Geometry(kv_heads=2, query_heads=4, head_dim=4, value_dim=6, batch=2)
Change = Callable[[Any], Any]


def changed(base: type, method: str, change: Change) -> Any:
    """A policy whose `method` returns what `change` makes of the right value."""

    def wrong(self: Any, *args: Any, **named: Any) -> Any:
        return change(getattr(base, method)(self, *args, **named))

    return attrs.frozen(kw_only=True)(type(f"Wrong{base.__name__}", (base,), {method: wrong}))()


def blocks(**parts: Change) -> Change:
    """Change some fields of `Blocks`."""
    return lambda made: attrs.evolve(made, **{name: change(getattr(made, name)) for name, change in parts.items()})


def meta(x: Tensor) -> Tensor:
    return x.to("meta")


def longer(axis: int) -> Change:
    return lambda x: torch.cat([x, x.narrow(axis, 0, 1)], axis)


def both(change: Change) -> Change:
    return blocks(keys=change, values=change)


def places(**parts: Any) -> Change:
    return lambda made: Placement(
        **{"sink_shift": made.sink_shift, "mid_starts": made.mid_starts, "recent_shift": made.recent_shift} | parts
    )


SLOT = {
    MeanPool: "compressor",
    Affinity: "retriever",
    Contiguous: "realigner",
    DeviceArchive: "archive",
    Exact: "codec",
}
WRONG = [
    # what a compressor makes
    (MeanPool, "age", lambda made: made.keys, r"returned a Tensor; due is Blocks, or None", "no blocks"),
    (
        MeanPool,
        "age",
        both(longer(2)),
        r"keys, returned \(2, 2, 3, 1, 4\); due is .*of 1 tokens.*= \(2, 2, 2, 1, 4\)",
        "a block more",
    ),
    (MeanPool, "age", both(lambda x: x[:1]), r"keys, returned \(1, 2, 2, 1, 4\); due is", "a row too few"),
    (
        MeanPool,
        "age",
        both(longer(3)),
        r"keys, returned \(2, 2, 2, 2, 4\); due is .*of 1 tokens, as compressed_tokens",
        "more tokens",
    ),
    (MeanPool, "age", blocks(values=longer(3)), r"values, returned \(2, 2, 2, 2, 6\); due is", "more values than keys"),
    (
        MeanPool,
        "age",
        both(longer(4)),
        r"keys, returned \(2, 2, 2, 1, 5\); due is .*= \(2, 2, 2, 1, 4\)",
        "another width",
    ),
    (MeanPool, "age", both(Tensor.double), r"keys, returned torch.float64; due is torch.float32", "another dtype"),
    (MeanPool, "age", both(meta), r"keys, returned a tensor on meta; due is cpu", "another device"),
    (MeanPool, "age", blocks(keys=lambda x: x[0]), r"keys, returned \(2, 2, 1, 4\); due is", "an axis too few"),
    (
        MeanPool,
        "age",
        blocks(offsets=longer(3)),
        r"offsets, returned \(1, 1, 1, 2, 1\); due is",
        "offsets of more tokens",
    ),
    (MeanPool, "age", blocks(offsets=meta), r"offsets, returned a tensor on meta; due is cpu", "offsets elsewhere"),
    (
        MeanPool,
        "age",
        blocks(offsets=longer(4)),
        r"offsets, returned \(1, 1, 1, 1, 2\); due is .*axes are time",
        "offsets along another axis",
    ),
    (
        MeanPool,
        "age",
        blocks(bias=lambda _: torch.zeros(2, 2, 2, 3)),
        r"bias, returned \(2, 2, 2, 3\); due is",
        "a bias too long",
    ),
    (
        MeanPool,
        "age",
        blocks(bias=lambda _: torch.zeros(1, 1, 1, 1).int()),
        r"bias, returned torch.int32; due is",
        "a whole bias",
    ),
    (MeanPool, "age", blocks(span=lambda _: 0), r"made blocks of span 0; due is", "a span of nothing"),
    (MeanPool, "age", blocks(span=lambda _: 1.5), r"made blocks of span 1.5; due is", "a span of a part"),
    # what a retriever makes
    (Affinity, "digest", lambda made: None, r"returned a NoneType; due is a tensor", "no digests"),
    (
        Affinity,
        "digest",
        lambda made: made[:, :, :, 0],
        r"returned \(2, 2, 2, 4\); due is .*digests, width\]",
        "an axis less",
    ),
    (Affinity, "digest", longer(2), r"returned \(2, 2, 3, 1, 4\); due is .*= \(2, 2, 2, any, any\)", "a block more"),
    (Affinity, "digest", meta, r"returned a tensor on meta; due is cpu", "digests elsewhere"),
    (Affinity, "score", lambda made: made.tolist(), r"returned a list; due is a tensor", "a list of scores"),
    (Affinity, "score", longer(2), r"returned \(2, 1, 3\); due is .*may be 1, = \(2, 2, 2\)", "a score more"),
    (
        Affinity,
        "score",
        longer(0),
        r"returned \(3, 1, 2\); due is .*may be 1, = \(2, 2, 2\)",
        "scores of a row that is not there",
    ),
    (Affinity, "score", lambda made: made[0], r"returned \(1, 2\); due is", "an axis of scores too few"),
    (Affinity, "score", lambda made: made > 0, r"returned torch.bool; due is a floating dtype", "scores that say yes"),
    (Affinity, "score", meta, r"returned a tensor on meta; due is cpu, as Moment.device says", "scores elsewhere"),
    # what a realigner makes
    (
        Contiguous,
        "place",
        lambda made: (0, made.mid_starts, 0),
        r"returned a tuple; due is a Placement",
        "no placement",
    ),
    (Contiguous, "place", places(mid_starts=None), r"returned a NoneType; due is a tensor mid_starts", "no starts"),
    (
        Contiguous,
        "place",
        places(mid_starts=torch.zeros(7, 7, 7)),
        r"returned \(7, 7, 7\); due is mid_starts",
        "other starts",
    ),
    (
        Contiguous,
        "place",
        lambda made: places(mid_starts=made.mid_starts.long())(made),
        r"due is a floating",
        "whole starts",
    ),
    (
        Contiguous,
        "place",
        lambda made: places(mid_starts=meta(made.mid_starts))(made),
        r"on meta; due is cpu",
        "elsewhere",
    ),
    (
        Contiguous,
        "place",
        places(recent_shift=0.5),
        r"gave recent_shift as a float; due is a whole number",
        "half a step",
    ),
    (Contiguous, "place", places(sink_shift=torch.tensor(0)), r"gave sink_shift as a Tensor", "a shift on a device"),
    # what an archive and a codec make
    (DeviceArchive, "open", lambda made: None, r"returned a NoneType; due is a BlockStore", "no store"),
    (Exact, "encode", lambda made: None, r"returned a NoneType; due are tensors by name", "nothing encoded"),
    (Exact, "encode", lambda made: {"keys": 3}, r"made 'keys' a int; due is", "a number encoded"),
    (
        Exact,
        "encode",
        lambda made: made | {"values": made["values"][:, :, :1]},
        r"made 'values' \(2, 2, 1, ",
        "less encoded",
    ),
    (Exact, "decode", lambda made: made[0], r"returned a Tensor; due are keys and values", "keys alone"),
    (
        Exact,
        "decode",
        lambda made: (made[0].double(), made[1]),
        r"torch.float64; due is torch.float32",
        "wider decoded",
    ),
    (
        Exact,
        "decode",
        lambda made: (made[0][..., :3], made[1]),
        r"returned \(2, 2, 1, \d, 3\); due is",
        "narrower decoded",
    ),
    (Exact, "decode", lambda made: (made[0], meta(made[1])), r"on meta; due is cpu", "decoded elsewhere"),
]


@pytest.mark.parametrize(
    ("base", "method", "change", "message"), [pytest.param(*case, id=f"{case[1]}: {name}") for *case, name in WRONG]
)
def test_what_a_policy_returns_wrongly_is_said_with_class_method_and_what_was_due(base, method, change, message):
    slots = {"compressor": ("mean-pool", {"ratio": 2}), "retriever": "affinity", "realigner": "contiguous"}
    right = kvtiers.policy(
        "archive", **slots, attend="compressed", sink=1, recent=2, block_size=2, top_k=1, chunk_size=4
    )
    wrong = attrs.evolve(right, **{SLOT[base]: changed(base, method, change)})
    layer = Setting(policy=wrong, geometry=GEOMETRY, rotary=rotary(4), seed=0).layer(layer=5)
    tokens = Setting(policy=right, geometry=GEOMETRY, rotary=rotary(4), seed=0).tokens
    with pytest.raises(SlotError, match=rf"(?s)layer 5: [\w.]+\.Wrong{base.__name__}\.{method}\(\).*{message}"):
        list(feed(layer, tokens, [4, 4, 4]))


@pytest.mark.parametrize(
    ("base", "method", "change"),
    [pytest.param(base, method, change, id=f"{method}: {name}") for base, method, change, _, name in WRONG],
)
def test_the_conformance_kit_tells_the_author_of_a_wrong_policy_the_same(base, method, change):
    wrong = changed(base, method, change)
    with pytest.raises(AssertionError, match=rf"Wrong{base.__name__}\.{method}\(\)"), first_example():
        getattr(testing, f"check_{SLOT[base]}")(lambda: wrong, examples=40)


def test_a_wrong_policy_leaves_the_layer_as_it_was():
    """And the layer goes on when the policy does what is due."""
    broken = [True]
    wrong = changed(MeanPool, "age", lambda made: attrs.evolve(made, span=0) if broken[0] else made)
    found = kvtiers.policy("archive", retriever="recency", sink=1, recent=2, block_size=2, top_k=1, chunk_size=4)
    found = attrs.evolve(found, compressor=wrong, attend="compressed")
    setting = Setting(policy=found, geometry=GEOMETRY, rotary=rotary(4), seed=0)
    layer, calm = setting.layer(), attrs.evolve(setting, policy=attrs.evolve(found, compressor=MeanPool())).layer()
    list(feed(layer, setting.tokens, [4, 4]))
    before, now = copied(layer.context()), setting.tokens.part(8, 12)
    with pytest.raises(SlotError):
        layer.write(now.keys, now.values)
    assert same(before, layer.context())
    broken[0] = False
    list(feed(calm, setting.tokens, [4, 4]))
    for (_, one), (_, other) in zip(
        feed(layer, setting.tokens, [4, 4, 1], start=8), feed(calm, setting.tokens, [4, 4, 1], start=8), strict=True
    ):
        assert same(one, other)


def test_where_blocks_start_is_known_whatever_a_compressor_says_of_it():
    found = kvtiers.policy("packforcing-lm", sink=1, recent=2, block_size=4, top_k=1, chunk_size=4, archive="device")
    found = attrs.evolve(
        found, attend="compressed", retriever=attrs.evolve(found.retriever, form="compressed"), realigner=Contiguous()
    )
    wrong = changed(MeanPool, "age", blocks(starts=lambda starts: starts + 3))
    both_ways = []
    for compressor in (MeanPool(), wrong):
        setting = Setting(
            policy=attrs.evolve(found, compressor=compressor), geometry=GEOMETRY, rotary=rotary(4), seed=0
        )
        both_ways.append([copied(context) for _, context in feed(setting.layer(), setting.tokens, [4] * 8)])
    assert all(same(one, other) for one, other in zip(*both_ways, strict=True))


def test_digests_must_stay_of_one_dtype_and_width():
    for change, message in (
        (Tensor.double, "returned torch.float64; due is torch.float32"),
        (longer(4), r"returned \(2, 2, 2, 1, 5\); due is .*any, 4\)"),
    ):
        calls: list[int] = []

        def later(made: Tensor, change: Change = change, calls: list[int] = calls) -> Tensor:
            calls.append(1)
            return made if len(calls) < 2 else change(made)

        found = kvtiers.policy("archive", sink=1, recent=2, block_size=2, top_k=1, chunk_size=4)
        found = attrs.evolve(found, retriever=changed(Affinity, "digest", later))
        setting = Setting(policy=found, geometry=GEOMETRY, rotary=rotary(4), seed=0)
        with pytest.raises(SlotError, match=message):
            list(feed(setting.layer(), setting.tokens, [4, 4, 4, 4]))


def test_the_policies_that_are_right_pass():
    for base, slot in SLOT.items():
        for method in {method for of, method, *_ in WRONG if of is base}:
            found = kvtiers.policy(
                "archive", sink=1, recent=2, block_size=2, top_k=1, chunk_size=4, attend="compressed"
            )
            found = attrs.evolve(found, realigner=build("realigner", "contiguous"), compressor=MeanPool(ratio=2))
            found = attrs.evolve(found, **{slot: changed(base, method, lambda made: made)})
            setting = Setting(policy=found, geometry=GEOMETRY, rotary=rotary(4), seed=0)
            assert len(list(feed(setting.layer(), setting.tokens, [4, 4, 4]))) == 3


@pytest.mark.parametrize(
    ("slot", "base", "method"),
    [
        ("compressor", MeanPool, "compressed_tokens"),
        ("retriever", Affinity, "most"),
        ("retriever", Affinity, "digest_bytes"),
    ],
)
def test_a_number_that_is_none_is_refused_before_the_first_token(slot, base, method):
    wrong = changed(base, method, lambda said: said / 3)
    found = kvtiers.policy("packforcing-lm", top_k_compressed=1, **{slot: wrong})
    named = "block_tokens" if slot == "compressor" else method
    said = rf"^layer 0: .*\.Wrong{base.__name__}\.{named}\(\) says [\d.]+; due is a whole number"
    with pytest.raises(SlotError, match=said), unchecked():
        kvtiers.TieredCache(found, [GEOMETRY], rotaries=[rotary(4)]).new_layer(0, 2)


def test_a_message_names_the_package_of_a_plugin():
    wrong = changed(MeanPool, "age", lambda made: made.keys)
    wrong = attrs.frozen(kw_only=True)(type("Theirs", (type(wrong),), {"__module__": "their_package.pools"}))()
    found = kvtiers.policy("archive", compressor=wrong, attend="compressed", sink=1, recent=2, block_size=2, top_k=1)
    setting = Setting(policy=found, geometry=GEOMETRY, rotary=rotary(4), seed=0)
    with pytest.raises(SlotError, match=r"^layer 0: their_package\.pools\.Theirs\.age\(\) returned a Tensor"):
        list(feed(setting.layer(), setting.tokens, [4, 4, 4]))
