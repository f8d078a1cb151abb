"""What holds for `packforcing` with weights in its HR branch: steps, rollbacks, rows, positions, archives, ties."""

import atexit
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="needs the extra 'diffusers'")

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import kvtiers
from kvtiers import Blocks, CropError, Geometry, Layer, bytes_in
from kvtiers.events import Event, Recalled, Selected
from kvtiers.plugins import registry
from kvtiers.window import Window
from kvtiers_diffusers import CausalWan, tiered
from kvtiers_packforcing import DualBranch
from kvtiers_packforcing.network import HighResolution
from tiny_wan import blocks, build, prompt

FRAMES = {"frames": 4, "high": 16, "wide": 24}  # 8 x 12 tokens a frame, 2 x 2 x 3 cells a block
CELLS, OWN = 12, 4 * 96
BYTES = CELLS * 24 * 4
"""Of the reduced keys, or values, of one block and head."""


@cache
def weights() -> str:
    """A folder with a narrow HR branch whose last layer is not zero."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    torch.manual_seed(0)
    network = HighResolution(channels=16, width=48, widths=(8, 8, 8, 8))
    for part in (network.layers[-1].weight, network.layers[-1].bias):
        torch.nn.init.normal_(part, std=0.5)
    network.save_pretrained(folder.name)
    return folder.name


def small(**changes: Any) -> dict[str, Any]:
    """An anchor block, a recent one, two of those between; the HR branch with weights."""
    compressor = ("dual-branch", {"branches": "hr", "weights": weights()})
    return {"compressor": compressor, "sink": 4, "recent": 4, "top_k": 2, **changes}


def video(wan: CausalWan, clips: list[Tensor], text: Tensor) -> list[Tensor]:
    """Denoise each block twice and commit it; the flow of every pass."""
    flows = []
    for clip in clips:
        flows += [wan.denoise(clip + step, 900.0 - 300 * step, text) for step in range(2)]
        flows.append(wan.commit(clip, text))
    return flows


def layers(wan: CausalWan) -> list[Layer]:
    assert wan.cache is not None
    return wan.cache.every_layer()


def windows(layer: Layer) -> list[Window]:
    """What attention reads, and unrotated keys if there are any."""
    return layer.placed.windows()


def stored(wan: CausalWan) -> list[Tensor]:
    """Every history tensor of every layer: of the tiers, the archive, and the reduced tokens that wait for it."""
    found = []
    for layer in layers(wan):
        for window in windows(layer):
            history = slice(window.head, window.tail - layer.current)
            anchors = slice(window.sink_slot, window.sink_slot + window.sink)
            found += [plane[:, :, where].clone() for plane in window.planes.values() for where in (history, anchors)]
        found += [part.clone() for store in layer.history.stores.values() for part in store.parts().values()]
        found += [part.clone() for block in layer.history.waiting.values() for part in (block.keys, block.values)]
        assert layer.history.digests.data is not None
        found.append(layer.history.digests.data.clone())
    return found


# ---------------------------------------------------------------- steps, rollbacks, rows


@pytest.mark.parametrize("realigner", ["original", "contiguous", "incremental"])
@torch.no_grad()
def test_a_denoise_step_changes_nothing_that_is_stored_and_repeats_itself(realigner: str) -> None:
    model, text, clips = build(), prompt(), blocks(7, **FRAMES)
    with tiered(model, "packforcing", **small(realigner=realigner)) as wan:
        video(wan, clips[:5], text)
        first = wan.denoise(clips[5], 500.0, text)
        before = stored(wan)
        for timestep in (900.0, 100.0):
            assert not torch.equal(wan.denoise(clips[6], timestep, text), first)
            assert all(torch.equal(a, b) for a, b in zip(stored(wan), before, strict=True))
        assert torch.equal(wan.denoise(clips[5], 500.0, text), first)
        assert wan.frames == 20
        wan.commit(clips[5], text)
        assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(stored(wan), before, strict=True))


@torch.no_grad()
def test_a_video_rolls_back_to_the_end_of_a_block() -> None:
    """Blocks of recent with their reduced tokens too, as long as none of them has been archived since."""
    model, text, clips, others = build(), prompt(), blocks(9, **FRAMES), blocks(2, **FRAMES, seed=9)
    with tiered(model, "packforcing", **small(recent=12)) as wan:
        wanted = video(wan, clips, text)[9:]
        assert layers(wan)[0].history.count == 5
    with tiered(model, "packforcing", **small(recent=12)) as wan:
        video(wan, clips[:2], text)
        video(wan, others, text)
        assert wan.cache is not None
        assert set(layers(wan)[0].history.waiting) == {"4", "8", "12"}
        with pytest.raises(CropError, match="step 6 is inside a block"):
            wan.cache.crop(6)
        wan.cache.crop(8)
        assert set(layers(wan)[0].history.waiting) == {"4"}
        assert wan.frames == 8
        wan.commit(clips[2], text)
        assert all(torch.equal(a, b) for a, b in zip(video(wan, clips[3:], text), wanted, strict=True))


@torch.no_grad()
def test_a_video_goes_back_by_a_fork_once_blocks_were_archived_and_a_draft_is_undone_without() -> None:
    model, text, clips, (other,) = build(), prompt(), blocks(8, **FRAMES), blocks(1, **FRAMES, seed=9)
    with tiered(model, "packforcing", **small()) as wan:
        wanted = video(wan, clips, text)[18:]
    with tiered(model, "packforcing", **small()) as wan:
        video(wan, clips[:6], text)
        wan.denoise(other, 500.0, text)
        assert wan.cache is not None
        wan.cache.crop(24)
        fork, before = wan.cache.fork(), stored(wan)
        video(wan, [other], text)
        with pytest.raises(CropError, match="have left recent since then"):
            wan.cache.crop(24)
        wan.cache = fork
        assert all(torch.equal(a, b) for a, b in zip(stored(wan), before, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(video(wan, clips[6:], text), wanted, strict=True))


@pytest.mark.parametrize("archive", ["host", "disk"])  # on the device it is the same store
@torch.no_grad()
def test_rows_do_not_mind_each_other_and_may_have_prompts_of_their_own(archive: str) -> None:
    model, clips, texts = build(), blocks(8, **FRAMES, rows=2), [prompt(seed=1), prompt(seed=2)]
    with tiered(model, "packforcing", **small(archive=archive)) as wan:
        together = video(wan, clips, torch.cat(texts))
        chosen = [layer.history.selection.chosen for layer in layers(wan) if layer.history.selection is not None]
    assert any(not torch.equal(*rows[:, 0]) for rows in chosen)  # or one row could have chosen for both
    for row, text in enumerate(texts):
        with tiered(model, "packforcing", **small(archive=archive)) as wan:
            alone = video(wan, [clip[row : row + 1].clone() for clip in clips], text)
        assert all((a[row] - b[0]).abs().max() < 1e-5 for a, b in zip(together, alone, strict=True))


@torch.no_grad()
def test_rows_can_be_exchanged_and_take_their_reduced_tokens_along() -> None:
    model, clips, text = build(), blocks(8, **FRAMES, rows=2), prompt(rows=2)
    with tiered(model, "packforcing", **small(top_k=9)) as wan:
        video(wan, clips[:5], text)
        assert wan.cache is not None
        fork = wan.cache.fork()
        wanted = video(wan, clips[5:], text)
        wan.cache = fork
        fork.select_rows(torch.tensor([1, 0]))
        turned = video(wan, [clip.flip(0) for clip in clips[5:]], text.flip(0))
    assert all(torch.allclose(a.flip(0), b, atol=1e-6) for a, b in zip(turned, wanted, strict=True))


# ---------------------------------------------------------------- keys are rotated once, where they belong


class Heard:
    """What each layer's self-attention made of the last pass: queries, keys and values before any rotation, and what
    they attended.
    """

    def __init__(self, model: Any) -> None:
        self.parts: list[dict[str, Tensor]] = []
        for block in model.blocks:
            attn, found = block.attn1, {}
            self.parts.append(found)
            for name, module in (("query", attn.norm_q), ("key", attn.norm_k), ("value", attn.to_v)):
                module.register_forward_hook(lambda _m, _a, out, name=name, found=found: found.update({name: out}))
            attn.to_out[0].register_forward_pre_hook(lambda _m, args, found=found: found.update({"out": args[0]}))

    def reduced(self, layer: int, name: str) -> Tensor:
        """Of the reduced tokens, [batch, heads, tokens, head_dim]."""
        return self.parts[layer][name][:, OWN:].unflatten(2, (2, -1)).transpose(1, 2).clone()


def cells(start: int) -> Tensor:
    """The middles of the cells of a block that begins at frame `start`, [12, 3]."""
    middles = [(start + t, h, w) for t in (0.5, 2.5) for h in (1.5, 5.5) for w in (1.5, 5.5, 9.5)]
    return torch.tensor(middles, dtype=torch.float64)


@pytest.mark.parametrize("index", [0, 1])
@torch.no_grad()
def test_under_original_the_mid_keys_attended_are_those_of_the_model_rotated_once_to_where_they_were(
    index: int,
) -> None:
    model, text, clips = build(), prompt(), blocks(8, **FRAMES)
    heard, made = Heard(model), []
    with tiered(model, "packforcing", **small(realigner="original")) as wan:
        for clip in clips[:7]:
            wan.commit(clip, text)
            made.append((heard.reduced(index, "key"), heard.reduced(index, "value")))
        wan.denoise(clips[7], 500.0, text)
        layer = layers(wan)[index]
        assert wan.cache is not None
        assert layer.history.selection is not None
        context, mid = wan.cache.context(index), slice(OWN, OWN + 2 * CELLS)
        keys, values = (part[:, :, mid].unflatten(2, (2, CELLS)) for part in (context.keys, context.values))
        chosen = layer.history.selection.chosen[0, 0].tolist()
        for slot, number in enumerate(chosen):
            plain, value = made[number + 1]  # the first block is an anchor
            start = 4 * (number + 1)
            assert torch.equal(values[:, :, slot], value)
            assert (keys[:, :, slot] - wan.rotary.rotate(plain, cells(start))).abs().max() < 1e-5
            for off in (plain, *(wan.rotary.rotate(plain, cells(start + by)) for by in (-1, 1, 4))):
                assert (keys[:, :, slot] - off).abs().max() > 1e-2
            twice = wan.rotary.rotate(wan.rotary.rotate(plain, cells(start)), cells(start))
            assert (keys[:, :, slot] - twice).abs().max() > 1e-2


@pytest.mark.parametrize("realigner", ["original", "contiguous", "incremental"])
@torch.no_grad()
def test_reduced_tokens_attend_history_and_one_another_from_their_own_positions(realigner: str) -> None:
    model, text, clips = build(), prompt(), blocks(8, **FRAMES)
    heard = Heard(model)
    with tiered(model, "packforcing", **small(realigner=realigner)) as wan:
        for clip in clips[:7]:
            wan.commit(clip, text)
        wan.denoise(clips[7], 500.0, text)
        contexts = [wan.cache.context(layer) for layer in (0, 1)]  # type: ignore[union-attr]
        history = [(context.keys[:, :, :-OWN].clone(), context.values[:, :, :-OWN].clone()) for context in contexts]
        start = {"contiguous": 4 + 2 * 4 + 4}.get(realigner, 28)
        wan.commit(clips[7], text)
        for layer, (keys, values) in enumerate(history):
            query, key, value = (heard.reduced(layer, name) for name in ("query", "key", "value"))

            def attended(by: int, parts: Any = (query, key, value, keys, values)) -> Tensor:
                query, key, value, keys, values = parts
                at = cells(start + by)
                seen = torch.cat([keys, wan.rotary.rotate(key, at)], 2), torch.cat([values, value], 2)
                return scaled_dot_product_attention(wan.rotary.rotate(query, at), *seen)

            got = heard.reduced(layer, "out")
            assert (got - attended(0)).abs().max() < 1e-5
            assert (got - attended(1)).abs().max() > 1e-4


# ---------------------------------------------------------------- an archive elsewhere


@pytest.fixture
def events() -> Iterator[list[Event]]:
    """What the hook `kvtiers_observe` is told."""
    told: list[Event] = []

    class Listener:
        @kvtiers.hookimpl
        def kvtiers_observe(self, event: Event) -> None:
            told.append(event)

    with registry().registered(Listener()):
        yield told


@pytest.mark.parametrize("realigner", ["original", "contiguous"])
@pytest.mark.parametrize("archive", ["host", "disk"])
@torch.no_grad()
def test_of_an_archive_elsewhere_the_selected_blocks_come_back_once_a_block_and_are_counted(
    archive: str, realigner: str, events: list[Event]
) -> None:
    model, text, clips = build(), prompt(rows=2), blocks(9, **FRAMES, rows=2)
    with tiered(model, "packforcing", **small(realigner=realigner)) as wan:
        wanted = video(wan, clips, text)
    events.clear()
    with tiered(model, "packforcing", **small(realigner=realigner, archive=archive)) as wan:
        for number, clip in enumerate(clips):
            flows = video(wan, [clip], text)
            assert all(torch.equal(a, b) for a, b in zip(flows, wanted[3 * number : 3 * number + 3], strict=True))
            archived, recalled = max(0, number - 2), [event for event in events if isinstance(event, Recalled)]
            count = min(2, archived)  # of each row and head
            want = {(layer, count, 2 * 2 * 2 * count * BYTES, archive): 1 for layer in (0, 1) if count}
            assert Counter((event.layer, event.blocks, event.bytes, event.location) for event in recalled) == want
            chosen = [event.chosen for event in events if isinstance(event, Selected)]
            selections = [layer.history.selection for layer in layers(wan) if layer.history.selection is not None]
            assert len(chosen) == len(selections) == (2 if archived else 0)
            assert all(torch.equal(a, b.chosen) for a, b in zip(chosen, selections, strict=True))
            events.clear()
        held = wan.memory_usage()
        everything = 2 * 7 * 2 * 2 * 2 * BYTES  # layers, blocks, rows, heads, keys and values
        assert everything <= bytes_in(held, archive) < 2.5 * everything  # type: ignore[arg-type]
        wan.denoise(clips[0], 500.0, text)
        here = {part.tier: part.bytes for part in wan.memory_usage() if part.location == "device"}
        assert here["mid"] == 2 * 2 * 2 * 2 * 2 * BYTES  # layers, blocks, rows, heads, keys and values as attended


@torch.no_grad()
def test_what_is_not_selected_is_not_looked_at() -> None:
    """Archived blocks that were not chosen may be lost: nothing of them is attended."""
    model, text, clips = build(), prompt(), blocks(9, **FRAMES)
    with tiered(model, "packforcing", **small(archive="host")) as wan:
        video(wan, clips[:8], text)
        assert wan.cache is not None
        fork = wan.cache.fork()
        wanted = wan.denoise(clips[8], 500.0, text)
        selections = [layer.history.selection for layer in layers(wan) if layer.history.selection is not None]
        chosen = [selection.chosen[0, 0].tolist() for selection in selections]
        assert sorted(map(len, chosen)) == [2, 2]
        for lost, same in (("others", True), ("chosen", False)):
            wan.cache = fork.fork()
            for layer, kept in zip(layers(wan), chosen, strict=True):
                for name in ("keys", "values"):
                    part = layer.history.stores["compressed"].parts()[name]
                    assert part.shape[2] == 6
                    for number in range(6):
                        if (number in kept) == (lost == "chosen"):
                            part[:, :, number] = torch.nan
            assert torch.equal(wan.denoise(clips[8], 500.0, text), wanted) == same


# ---------------------------------------------------------------- equal scores


@pytest.mark.parametrize(
    ("likes", "top_k", "chosen"),
    [
        pytest.param([1, 1, 1, 1, 1], 2, [3, 4], id="all equal"),
        pytest.param([0, 0, 0], 2, [1, 2], id="all zero"),
        pytest.param([-1, -1, -1, -1], 3, [1, 2, 3], id="all disliked"),
        pytest.param([3, 1, 1, 3, 1, 1], 3, [0, 3, 5], id="equal for the last place"),
        pytest.param([2, 1, 2, 1, 2], 2, [2, 4], id="equal for every place"),
        pytest.param([1, 2, 3, 2], 2, [2, 3], id="the best, and the newer of the second"),
        pytest.param([2, 1, 1, 1], 4, [0, 1, 2, 3], id="room for all"),
        pytest.param([2] + [1] * 40, 3, [0, 39, 40], id="many"),
    ],
)
@pytest.mark.parametrize("rows", [1, 2])
def test_of_blocks_that_score_exactly_alike_the_newer_is_chosen(
    likes: list[int], top_k: int, chosen: list[int], rows: int
) -> None:
    """Whole numbers, whose sums and products float32 holds exactly; keys differ, and only their sums are alike."""
    frames, grid, width = 4, (8, 8), 16
    geometry = Geometry(kv_heads=2, head_dim=width, grid=grid, steps_per_commit=frames, causal=False, batch=rows)
    rotary = kvtiers.Rotary([torch.ones(4), torch.ones(2), torch.ones(2)], layout="interleaved")
    changes = {"retriever": ("affinity", {"form": "compressed"}), "realigner": "original"}
    found = kvtiers.policy("packforcing", **small(sink=0, top_k=top_k, **changes))
    layer = Layer(policy=found, geometry=geometry, rotary=rotary)
    random = torch.Generator().manual_seed(0)
    offsets = DualBranch(branches="hr").offsets(frames, grid)
    full = torch.zeros(rows, 2, frames * 64, width)
    query = torch.randint(-3, 4, full.shape, generator=random).float()
    direction = query[:, :1].sum(2).sign()  # of the first half of the heads, which choose
    for like in [*likes, 0]:  # the last one is recent
        layer.write(full, full, replace=True)
        layer.select(query)
        keys = torch.randint(-3, 4, (rows, 2, len(offsets), width), generator=random).float()
        keys[:, :1, -1] = like * direction - keys[:, :1, :-1].sum(2)
        layer.commit(
            Blocks(
                keys=keys[:, :, None],
                values=torch.zeros_like(keys)[:, :, None],
                offsets=offsets[None, None, None],
                starts=torch.tensor([layer.committed_steps]),
                span=frames,
            )
        )
    layer.write(full, full, replace=True)
    layer.select(query)
    assert layer.history.count == len(likes)
    assert layer.history.selection is not None
    assert layer.history.selection.chosen.tolist() == [[chosen] * 2] * rows
