"""Invariants 2 and 3: `full` is plain attention, and a policy that only drops is plain attention with those
tokens masked.

The oracle works out, one step, head and block at a time, what each query may see. It reads nothing of a layer, and its
negative controls show that one index or position that is off by one is noticed.
"""

import attrs
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from kvtiers.geometry import Geometry
from kvtiers.policy import Policy
from kvtiers.presets import policy
from strategies import Setting, Stream, allowed, attend, attend_context, cuts, extents, feed, policies, settings_of

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@attrs.frozen(kw_only=True)
class Oracle:
    """What a policy lets a query see, in the words of its settings."""

    sink: int
    recent: int | None
    block: int
    drops: bool
    newest: int | None
    """How many archived blocks are attended, newest first; none: all."""
    keep: int | None = None
    """How many tokens of an archived block are left, chosen per head; none: all."""
    by: str = "key-norm"
    window: int = 1

    def visible(self, tokens: Stream, step: int, chunk_start: int, head: int, row: int) -> set[int]:
        """The steps that the query of `step` sees in a forward (or chunk) that begins at `chunk_start`."""
        seen = set(range(min(self.sink, step + 1)))
        if self.recent is None:
            return set(range(step + 1))
        since = step if self.drops else chunk_start
        archived = []
        start = self.sink
        while start <= step:
            block = range(start, start + self.block)
            if start + self.block <= since - self.recent:
                archived.append(block)
            else:
                seen |= set(block)
            start += self.block
        if not self.drops:
            chosen = archived if self.newest is None else archived[len(archived) - min(self.newest, len(archived)) :]
            for block in chosen:
                seen |= self.kept(tokens, block, head, row)
        return {s for s in seen if s <= step}

    def kept(self, tokens: Stream, block: range, head: int, row: int) -> set[int]:
        if self.keep is None or self.keep >= len(block):
            return set(block)
        keys = tokens.keys[row, head].double()
        if self.by == "key-norm":
            score = {s: -float(keys[s].norm()) for s in block}
        else:
            unit = {s: keys[s] / keys[s].norm() for s in block}
            mean = sum(unit.values()) / len(block)
            score = {s: -float(unit[s] @ mean / mean.norm()) for s in block}
        return set(sorted(block, key=lambda s: (score[s], s))[-self.keep :])

    def mask(self, tokens: Stream, start: int, stop: int) -> Tensor:
        """[batch, query_heads, queries, steps so far]"""
        batch, heads = tokens.keys.shape[:2]
        mask = torch.zeros(batch, heads, stop - start, stop, dtype=torch.bool)
        for row in range(batch):
            for head in range(heads):
                for step in range(start, stop):
                    for s in self.visible(tokens, step, start, head, row):
                        mask[row, head, step - start, s] = True
        return mask.repeat_interleave(tokens.query.shape[1] // heads, 1)


def oracle_of(found: Policy) -> Oracle:
    retriever = type(found.retriever).__name__
    extra = found.top_k_compressed
    newest = {"NoBlocks": 0, "Recency": found.top_k + extra}.get(retriever)
    compressor = found.compressor
    top = type(compressor).__name__ == "TopTokens" and found.attend == "compressed"
    return Oracle(
        sink=found.sink_steps,
        recent=found.recent,
        block=found.block_size,
        drops=compressor.drops,
        newest=newest,
        keep=compressor.keep if top else None,
        by=compressor.by if top else "key-norm",
    )


def disagreement(setting: Setting, lengths: list[int], oracle: Oracle) -> float:
    """How far the layer's attention is from the oracle's, at the worst step."""
    tokens, worst = setting.tokens, 0.0
    for start, context in feed(setting.layer(), tokens, lengths):
        stop = start + context.current
        now, past = tokens.part(start, stop), tokens.part(0, stop)
        want = attend(now.query, past.keys, past.values, oracle.mask(tokens, start, stop))
        worst = max(worst, float((attend_context(now.query, context) - want).abs().max()))
    return worst


only_dropping = policies(compressor="drop", realigner="original")
whole_blocks = policies(
    compressor=("keep", "mean-pool"),
    retriever=("all", "none", "recency"),
    realigner="original",
    attend="full",
    top_k_compressed=0,
)
kept_with_compressed = policies(compressor="keep", retriever=("all", "recency"), realigner="original")


@st.composite
def some_tokens(draw: st.DrawFn) -> Policy:
    found = draw(
        policies(compressor="top-tokens", retriever=("all", "recency"), realigner="original", top_k_compressed=0)
    )
    # Two keys are equally like their mean, so rounding alone would choose between them.
    by = "key-norm" if found.block_size == 2 else draw(st.sampled_from(["key-norm", "key-similarity"]))
    return attrs.evolve(found, compressor=attrs.evolve(found.compressor, by=by), attend="compressed")


@given(data=st.data())
@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param(only_dropping, id="drop"),
        pytest.param(whole_blocks, id="whole blocks"),
        pytest.param(kept_with_compressed, id="keep with compressed"),
        pytest.param(some_tokens(), id="top-tokens"),
    ],
)
def test_what_a_policy_does_not_attend_is_as_if_it_were_masked(chosen, data):
    setting = data.draw(settings_of(chosen))
    lengths = data.draw(cuts(setting.policy))
    assert disagreement(setting, lengths, oracle_of(setting.policy)) < 1e-5


@given(window=st.integers(1, 12), data=st.data())
def test_a_sliding_window_is_a_window_however_the_tokens_are_cut(window, data):
    found = policy("sliding-window", recent=window - 1, chunk_size=None)
    setting = data.draw(settings_of(st.just(found)))
    tokens = setting.tokens
    for start, context in feed(setting.layer(), tokens, data.draw(cuts(found))):
        stop = start + context.current
        step = torch.arange(stop)
        within = (step <= step[start:, None]) & (step > step[start:, None] - window)
        now, past = tokens.part(start, stop), tokens.part(0, stop)
        want = attend(now.query, past.keys, past.values, within)
        assert torch.allclose(attend_context(now.query, context), want, **CLOSE)


@given(data=st.data())
def test_full_holds_what_was_appended_bit_for_bit_and_attends_it_plainly(data):
    setting = data.draw(settings_of(st.just(policy("full"))))
    tokens = setting.tokens
    for start, context in feed(setting.layer(), tokens, data.draw(cuts(setting.policy))):
        stop = start + context.current
        now, past = tokens.part(start, stop), tokens.part(0, stop)
        assert torch.equal(context.keys, past.keys)
        assert torch.equal(context.values, past.values)
        causal = torch.ones(stop, stop, dtype=torch.bool).tril()[start:]
        assert torch.equal(allowed(context), causal)
        assert torch.equal(attend_context(now.query, context), attend(now.query, past.keys, past.values, causal))


@given(data=st.data())
def test_whoever_keeps_and_attends_everything_equals_full(data):
    found = data.draw(policies(compressor="keep", retriever="all", realigner="original"))
    setting = data.draw(settings_of(st.just(found)))
    full = attrs.evolve(setting, policy=policy("full"))
    lengths = data.draw(cuts(found))
    contexts = zip(
        feed(setting.layer(), setting.tokens, lengths), feed(full.layer(), full.tokens, lengths), strict=True
    )
    for (_, mine), (_, theirs) in contexts:
        assert torch.equal(mine.keys, theirs.keys)
        assert torch.equal(mine.values, theirs.values)
        assert torch.equal(allowed(mine), allowed(theirs))


@given(data=st.data())
def test_a_long_forward_equals_its_chunks_bit_for_bit(data):
    """`chunks` cuts on an absolute grid, so prefill in one go and in pieces on that grid are the same."""
    found = data.draw(policies(chunk_size=data.draw(st.integers(1, 6))))
    setting = data.draw(settings_of(st.just(found)))
    tokens, size = setting.tokens, found.chunk_size
    steps = data.draw(st.integers(1, 40))
    whole, pieces = setting.cache(), setting.cache()
    everything = tokens.part(0, steps)
    chunks = whole.layers[0].chunks(everything.query, everything.keys, everything.values)
    at_once = [attend_context(chunk.query, chunk.context) for chunk in chunks]
    in_pieces = []
    for start, stop in extents([min(size, steps - a) for a in range(0, steps, size)]):
        part = tokens.part(start, stop)
        chunks = pieces.layers[0].chunks(part.query, part.keys, part.values)
        in_pieces += [attend_context(chunk.query, chunk.context) for chunk in chunks]
    assert torch.equal(torch.cat(at_once, 2), torch.cat(in_pieces, 2))


# ---------------------------------------------------------------------- negative controls

CONTROL = Setting(
    policy=policy("full"),
    geometry=Geometry(kv_heads=2, head_dim=4, query_heads=4, batch=2),
    rotary=Setting.plain_rotary(4),
    seed=5,
)
DROPPING = policy("streaming", realigner="original", sink=2, recent=5, block_size=2, chunk_size=7)
NEWEST = policy("archive", retriever="recency", sink=2, recent=5, block_size=2, top_k=2, chunk_size=7)
SOME = policy(
    "archive",
    compressor=("top-tokens", {"keep": 2}),
    attend="compressed",
    retriever="all",
    sink=2,
    recent=3,
    block_size=4,
    chunk_size=7,
)


@pytest.mark.parametrize(
    ("found", "field", "off"),
    [
        pytest.param(DROPPING, "sink", 3, id="sink too long"),
        pytest.param(DROPPING, "sink", 1, id="sink too short"),
        pytest.param(DROPPING, "recent", 6, id="recent too long"),
        pytest.param(DROPPING, "recent", 4, id="recent too short"),
        pytest.param(DROPPING, "block", 3, id="another block"),
        pytest.param(NEWEST, "newest", 3, id="a block too many"),
        pytest.param(NEWEST, "newest", 1, id="a block too few"),
        pytest.param(NEWEST, "recent", 6, id="archived too late"),
        pytest.param(SOME, "keep", 3, id="a token too many"),
        pytest.param(SOME, "keep", 1, id="a token too few"),
        pytest.param(SOME, "by", "key-similarity", id="other tokens"),
    ],
)
def test_the_oracle_notices_one_setting_that_is_off_by_one(found, field, off):
    setting = attrs.evolve(CONTROL, policy=found)
    lengths = [7, 7, 1, 1, 5, 1]
    right = oracle_of(found)
    assert disagreement(setting, lengths, right) < 1e-5
    assert disagreement(setting, lengths, attrs.evolve(right, **{field: off})) > 1e-2


@pytest.mark.parametrize("head", [0, 1])
@pytest.mark.parametrize("row", [0, 1])
def test_the_oracle_notices_one_key_of_one_head_that_moved_by_one(row, head):
    setting = attrs.evolve(CONTROL, policy=DROPPING)
    tokens, layer = setting.tokens, setting.layer()
    list(feed(layer, tokens, [7, 7]))
    context = layer.context()
    rolled = context.keys.clone()
    rolled[row, head, 2:9] = rolled[row, head, 2:9].roll(1, 0)
    now = tokens.part(7, 14)
    good, bad = attend_context(now.query, context), attend_context(now.query, attrs.evolve(context, keys=rolled))
    assert float((good - bad).abs().max()) > 1e-2
    assert torch.equal(good[1 - row], bad[1 - row])


@example(rotate=True)
@example(rotate=False)
@given(rotate=st.booleans())
def test_the_comparison_notices_keys_rotated_one_step_too_far(rotate):
    """Placing only some keys one step off changes attention; placing all of them off does not."""
    rotary = Setting.plain_rotary(4)
    tokens = CONTROL.tokens.part(0, 9)
    at = torch.arange(9.0)[:, None]
    query = rotary.rotate(tokens.query, at)
    shifted = at + 1 if rotate else at.clone()
    shifted[:3] = at[:3]
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    good = attend(query, rotary.rotate(tokens.keys, at), tokens.values, causal)
    other = attend(query, rotary.rotate(tokens.keys, shifted), tokens.values, causal)
    assert (float((good - other).abs().max()) > 1e-2) == rotate
