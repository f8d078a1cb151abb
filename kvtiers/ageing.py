"""What blocks become when they leave recent: compressed, checked and archived, dropped, or made part of a new mid.

It moves blocks from a layer's window to its history.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import attrs
import torch
from torch import Tensor

from kvtiers import events
from kvtiers.blocks import Blocks, Extent, Form, run_of
from kvtiers.checks import Sizes, called, check_returned
from kvtiers.errors import SlotError
from kvtiers.history import History
from kvtiers.mid import Fetched, MidTokens
from kvtiers.placed import Placed
from kvtiers.slots import Moment

Tell = Callable[..., None]
"""Called with a kind of event and its fields."""


def age(
    placed: Placed,
    history: History,
    blocks: Sequence[Extent],
    attention: tuple[Tensor | None, Tensor | None],
    moment: Moment,
    tell: Tell,
) -> int:
    """Move `blocks`, the oldest of recent, out of the window and into the history; returns how many steps were dropped.

    attention: what mid and the blocks got, [batch, query_heads, tokens], if it is watched.
    """
    compressor, per_step = history.policy.compressor, moment.geometry.tokens_per_step
    (of_mid, got), done, dropped = attention, 0, 0
    for _, alike in groupby(blocks, key=lambda block: block.start if compressor.given else block.steps):
        run = list(alike)
        size = len(run) * run[0].steps * per_step
        of_run = None if got is None else got[:, :, done : done + size]
        leaving = _leaving(placed, run, of_run, moment, unrotated=not history.policy.leaves_without_keys)
        if compressor.rewrites:
            rewrite(history, leaving, of_mid, moment)
            of_mid = None if history.rewritten is None else history.rewritten.attention
            of_mid = None if of_mid is None else of_mid.flatten(2, 3)
        elif not archived(history, leaving, run[0].start, run[0].steps, moment, tell):
            dropped += len(run) * run[0].steps
        placed.leave(size)
        placed.forget()
        done += size
    return dropped


def _leaving(
    placed: Placed, run: Sequence[Extent], attention: Tensor | None, moment: Moment, *, unrotated: bool
) -> Blocks:
    """The oldest blocks of recent, all of one length."""
    first, span, count = run[0].start, run[0].steps, len(run)
    tokens = count * span * moment.geometry.tokens_per_step
    keys, rotated, values = placed.oldest(tokens, first, unrotated=unrotated)
    return run_of(
        keys,
        values,
        count=count,
        positions=moment.geometry.positions(first, first + count * span, keys.device),
        first=first,
        span=span,
        rotated=rotated,
        attention=attention,
    )


def archived(history: History, blocks: Blocks, first: int, span: int, moment: Moment, tell: Tell) -> bool:
    """Archive blocks of `span` steps from step `first` on, in the forms that the policy wants.

    False if the compressor drops them. Where the compressed form is given, it is one block. On an error nothing is
    archived.
    """
    policy, compressor = history.policy, history.policy.compressor
    starts = [first + number * span for number in range(blocks.count)]
    kept: dict[Form, Blocks] = {"full": blocks} if "full" in policy.forms else {}
    if "compressed" in policy.forms:
        made = blocks if compressor.keeps else None
        if compressor.given:
            made = history.waiting[str(first)]
        elif not compressor.keeps:
            unasked = compressor.attention is None and blocks.attention is not None  # noted for the retriever alone
            made = compressor.age(attrs.evolve(blocks, attention=None) if unasked else blocks, moment)
        if made is not None:
            tokens = compressor.block_tokens(span, moment.geometry)
            check_made(history, made, blocks.count, tokens, "age", moment)
        if not compressor.keeps:
            after = 0 if made is None else made.count * made.tokens
            before = blocks.count * blocks.tokens
            tell(events.Compressed, blocks=blocks.count, tokens_before=before, tokens_after=after)
        if made is None:
            return False
        # `rotated` was of the tokens that these were made of
        kept["compressed"] = made if made is blocks else attrs.evolve(made, rotated=None, starts=blocks.starts)
    digested = kept["compressed"] if policy.retriever.digests == "compressed" else blocks
    sizes = history.add(kept, digested, first, span, moment)
    for form, size in sizes.items():
        tell(events.Archived, blocks=kept[form].count, location=policy.archive.location, bytes=size)
    history.waiting = {start: held for start, held in history.waiting.items() if int(start) not in starts}
    return True


def rewrite(history: History, leaving: Blocks, attention: Tensor | None, moment: Moment) -> None:
    """Let the compressor make all of mid anew. attention: what mid got, [batch, query_heads, tokens], if watched."""
    mid = history.rewritten
    if mid is not None and attention is not None:
        mid = attrs.evolve(mid, attention=attention[:, :, None])
    made = history.policy.compressor.rewrite(leaving, mid, moment)
    if made is not None:
        check_made(
            history,
            made,
            1,
            history.policy.compressor.mid_tokens(moment.geometry),
            "rewrite",
            moment,
            at_most=True,
        )
        keys, values = made.keys.clone(), made.values.clone()  # they may be views of what leaves
        made = attrs.evolve(made, keys=keys, values=values, starts=made.starts.reshape(-1)[:1], rotated=None)
    history.rewritten = made


def rewritten(history: History) -> Fetched | None:
    """All of mid, as a rewriting compressor made it."""
    held = history.rewritten
    if held is None:
        return None
    starts = held.starts.view(1, 1, 1)
    return Fetched(
        keys=held.keys.flatten(2, 3),
        values=held.values.flatten(2, 3),
        bias=None if held.bias is None else held.bias.flatten(2, 3),
        where=MidTokens(offsets=held.offsets.flatten(2, 3), starts=starts, placed=starts),
        spans=torch.full_like(starts, held.span),
        total=held.span,
        attention=None if held.attention is None else held.attention.flatten(2, 3),
    )


def check_made(
    history: History, made: Any, count: int, tokens: int, method: str, moment: Moment, *, at_most: bool = False
) -> None:
    """Raise `SlotError` unless a compressor made what is due. Looks at shapes, dtype and device alone."""
    compressor = history.policy.compressor
    who = called(history.layer, compressor, method)
    if compressor.given:
        who = f"layer {history.layer}: commit(compressed=...) for {type(compressor).__name__}"
    if not isinstance(made, Blocks):
        raise SlotError(f"{who} returned a {type(made).__name__}; due is Blocks, or None where blocks are dropped")
    keys: Any = made.keys
    geometry, device = moment.geometry, moment.device
    declared, most = ("mid_tokens()", "at most ") if at_most else ("compressed_tokens()", "")
    due = f"[batch, kv_heads, blocks, tokens, width], of {most}{tokens} tokens, as {declared} says,"
    fewer = at_most and isinstance(keys, Tensor) and keys.dim() == 5 and keys.shape[3] < tokens
    many = keys.shape[3] if fewer else tokens
    lead = (*history.wide, count)
    for name, part, width in (("keys", keys, geometry.head_dim), ("values", made.values, geometry.value_dim)):
        check_returned(f"{who}, {name},", part, due, (*lead, many, width), dtype=geometry.dtype, device=device)
    span: object = made.span
    if not isinstance(span, int) or span < 1:
        raise SlotError(f"{who} made blocks of span {span!r}; due is a whole number of steps of at least 1")
    some: Sizes = (*((1, n) for n in lead), many)
    may = "where the first three may be 1"
    due = f"[batch, kv_heads, blocks, tokens, axes], {may}, and axes are time and the grid's,"
    axes = 1 + len(geometry.grid)
    check_returned(f"{who}, offsets,", made.offsets, due, (*some, axes), dtype=None, device=device)
    if made.bias is not None:
        due = f"[batch, kv_heads, blocks, tokens], {may},"
        check_returned(f"{who}, bias,", made.bias, due, some, dtype=None, device=device)
    if compressor.alike and (made.bias is not None or not made.alike):
        raise SlotError(
            f"{who} made blocks that have a bias, or whose tokens lie otherwise than in others, and says alike = True; "
            "leave alike as it is (False)"
        )
