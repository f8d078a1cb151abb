"""Whatever raises in the middle of a forward, the same call made again gives the same text or the cache refuses it."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs the extra 'transformers'")

import attrs
import torch
from torch import Tensor

import kvtiers
from faults import Fault, at, points, sweep
from kvtiers import InterruptedForwardError, Policy
from kvtiers_transformers import new_cache, tiered
from kvtiers_transformers.cache import TransformersCache
from tiny_models import attentions, build, given, pad_left, tokens

pytestmark = pytest.mark.usefixtures("_shapes_go_unchecked")

LENGTHS = (9, 1, 4, 1, 1)
MORE = 3
"""Tokens that are decoded after the fault, to see whether anything is wrong."""
SMALL = {"sink": 2, "recent": 3, "block_size": 2, "top_k": 2, "chunk_size": 4}
CODE = ("kvtiers", "kvtiers_transformers", "kvtiers_policies", "kvtiers_methods")


def policies() -> dict[str, Policy]:
    named = {
        "full": {},
        "streaming": {},
        "archive": {},
        "archive on disk": {"archive": "disk", "codec": "int8"},
        "packforcing-lm": {"reach": 4},
        "tova": {"compressor": ("tova", {"most": 4})},
    }
    found = {}
    for name, changes in named.items():
        preset = kvtiers.policy(name.partition(" ")[0], **changes)
        sizes = {key: value for key, value in SMALL.items() if getattr(preset, key) is not None}
        found[name] = attrs.evolve(preset, **sizes)
    return found


def forwards(ids: Tensor, mask: Tensor, lengths: tuple[int, ...], start: int = 0) -> Iterator[tuple[slice, Tensor]]:
    """The columns of each forward, and the mask that it is given."""
    for length in lengths:
        yield slice(start, start + length), mask[:, : start + length]
        start += length


def forward(cache: TransformersCache, *, model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    logits: Tensor = model(ids, attention_mask=mask, **given(cache)).logits
    return logits


def verbs(model: Any, ids: Tensor, mask: Tensor) -> Iterator[tuple[str, Callable[[TransformersCache], object]]]:
    """Forwards of several and of single tokens, and then rows that change places."""
    for columns, seen in forwards(ids, mask, LENGTHS):
        yield f"forward of {columns}", partial(forward, model=model, ids=ids[:, columns], mask=seen)
    yield "reorder", lambda cache: cache.reorder_cache(torch.tensor([1, 0]))


def outcome(cache: TransformersCache, model: Any, ids: Tensor, mask: Tensor) -> list[Tensor]:
    ids, mask = ids.flip(0), mask.flip(0)
    more = forwards(ids, mask, (1,) * MORE, sum(LENGTHS))
    return [forward(cache, model=model, ids=ids[:, columns], mask=seen) for columns, seen in more]


def taken(said: str, before: TransformersCache, after: TransformersCache) -> bool:
    """Whether a forward that failed in its last lines has taken its tokens in every layer."""
    return said.startswith("forward") and after.get_seq_length() > before.get_seq_length()


@points(operations=797, lines=3001, slow_operations=29, slow_lines=101)
@pytest.mark.parametrize("name", policies())
@pytest.mark.parametrize("rows", ["padded", pytest.param("even", marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_fault_in_a_forward_is_undone_or_the_cache_refuses_to_go_on(
    rows: str, name: str, how: str, step: int
) -> None:
    model, count = build(attention="sdpa"), sum(LENGTHS) + MORE
    both = tokens(count, rows=2)
    ids, mask = pad_left([both[0], both[1][3:] if rows == "padded" else both[1]])
    before = [module.config for module in attentions(model)]
    with tiered(model, policies()[name]) as cache:
        tried, _ = sweep(
            list(verbs(model, ids, mask)),
            cache.fork,
            lambda one: outcome(one, model, ids, mask),
            lambda a, b: all(torch.equal(x, y) for x, y in zip(a, b, strict=True)),
            how=how,
            step=step,
            folders=CODE,
            done=taken,
        )
    assert [module.config for module in attentions(model)] == before, "the model is not as it was"
    assert tried >= 2


@points(operations=7, lines=37, slow_operations=1, slow_lines=1)
@pytest.mark.parametrize(
    ("name", "said", "verb"),
    [
        pytest.param("full", "crop", lambda cache: cache.crop(-3), id="crop"),
        pytest.param("archive", "rewind", lambda cache: cache.rewind_recent(), id="rewind_recent"),
        pytest.param("archive", "repeat", lambda cache: cache.batch_repeat_interleave(2), id="batch_repeat_interleave"),
    ],
)
@torch.no_grad()
def test_a_fault_while_tokens_or_rows_change_is_undone_or_the_cache_refuses_to_go_on(
    name: str, said: str, verb: Callable[[TransformersCache], object], how: str, step: int
) -> None:
    model, ids = build(attention="sdpa"), tokens(sum(LENGTHS) + MORE)

    def rest(cache: TransformersCache) -> list[Tensor]:
        rows = cache.core.layers[0].batch or 1
        return [model(ids[:, cache.get_seq_length() :].expand(rows, -1), **given(cache)).logits]

    def carried_out(_: str, before: TransformersCache, after: TransformersCache) -> bool:
        held = [(one.get_seq_length(), one.core.layers[-1].batch) for one in (before, after)]
        return held[0] != held[1]

    with tiered(model, policies()[name]) as cache:
        for columns, _ in forwards(ids, ids, LENGTHS):
            model(ids[:, columns], **given(cache))
        sweep(
            [(said, verb)],
            cache.fork,
            rest,
            lambda a, b: a[0].shape == b[0].shape and torch.equal(a[0], b[0]),
            how=how,
            step=step,
            folders=CODE,
            done=carried_out,
        )


@torch.no_grad()
def test_a_cache_whose_reset_was_interrupted_is_whole_or_empty_or_refuses_to_go_on() -> None:
    model, ids, chosen = build(attention="sdpa"), tokens(13), policies()["archive"]
    with tiered(model, chosen) as cache:
        model(ids[:, :12], **given(cache))
        whole, empty = (model(ids[:, 12:], **given(one)).logits for one in (cache.fork(), new_cache(model, chosen)))
        refused, number = 0, 1
        while True:
            other = cache.fork()
            try:
                with at("line", number, *CODE):
                    other.reset()
            except Fault:
                number += 1
            else:
                break
            try:
                got = model(ids[:, 12:], **given(other)).logits
                assert torch.equal(got, whole) or torch.equal(got, empty), f"silently wrong after line {number}"
            except InterruptedForwardError:
                refused += 1
                other.reset()
                assert torch.equal(model(ids[:, 12:], **given(other)).logits, empty)
    assert refused > 3
