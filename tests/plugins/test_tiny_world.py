"""The tiny world: seeded, true at every frame, and made so that memory has a job."""

import pytest
import torch

from kvtiers_packforcing.tiny_world import (
    CLIP_BLOCKS,
    COLOURS,
    FRAMES_PER_BLOCK,
    HIDDEN_SECONDS,
    RGB,
    Clips,
    Houses,
    LinearCodec,
    PromptError,
    WalkError,
    Walks,
    embed,
    embed_walks,
    prompts_of,
    psnr,
    render,
    scene_of,
    truth_of,
)

SEEDS = tuple(range(6))


def test_a_frame_is_the_same_whatever_it_is_drawn_with():
    houses, walks = Houses.of_seeds(SEEDS), Walks.of_seeds(SEEDS, 130)
    frames = torch.tensor([3, 70, 64, 1999, 1024]).expand(len(SEEDS), -1)
    together = render(houses, walks, frames)
    alone = render(Houses.of_seeds([4]), Walks.of_seeds([4], 126), torch.tensor([[1999, 3]]))
    assert torch.equal(alone, together[4:5][:, :, [3, 0]])
    assert not torch.equal(together[0], together[1])


def test_a_longer_walk_begins_like_a_shorter_one():
    long, short = Walks.of_seeds(SEEDS, 100), Walks.of_seeds(SEEDS, 30)
    assert torch.equal(long.rooms[:, :30], short.rooms)
    assert torch.equal(long.curtains[:, :30], short.curtains)


def test_what_was_seen_comes_back_after_five_to_sixty_seconds():
    walks = Walks.of_seeds(range(200), 128)
    hidden = [s.hidden_before for row in range(200) for s in walks.segments(row) if s.hidden_before is not None]
    assert min(hidden) == HIDDEN_SECONDS[0]
    assert max(hidden) == HIDDEN_SECONDS[1]
    assert sum(seconds >= 40 for seconds in hidden) > len(hidden) / 10


@pytest.mark.parametrize("hiding", [("attic", 20), ("hall", 20, "closed")], ids=["left", "curtained"])
def test_a_room_comes_back_as_the_same_picture(hiding):
    houses = Houses.of_seeds(["house"])
    walks = Walks.written(("attic", 3), ("hall", 4), hiding, ("hall", 4))
    swept = 8
    first = torch.arange(swept, 4 * FRAMES_PER_BLOCK)[None] + 3 * FRAMES_PER_BLOCK
    before, again = render(houses, walks, first), render(houses, walks, first + 24 * FRAMES_PER_BLOCK)
    assert torch.equal(before, again)
    between = render(houses, walks, first + 10 * FRAMES_PER_BLOCK)
    assert psnr(before, between) < 15
    assert (before[:, :, 1:] - before[:, :, :-1]).abs().amax((0, 1, 3, 4)).min() > 0.1, "something moves in each frame"


def test_truth_agrees_with_pixels():
    """A whole thing has its colour at its centre, unless its form or texture puts something else there."""
    houses, walks = Houses.of_seeds(range(12)), Walks.of_seeds(range(12), 60)
    frames = torch.arange(3, 960, 13).expand(12, -1)
    pixels, seen = render(houses, walks, frames), truth_of(houses, walks, frames)
    rows = torch.arange(12)[:, None].expand_as(frames)
    checked = 0
    for thing in range(2):
        held = [getattr(houses, name)[rows, seen.rooms, thing] for name in ("colour", "form", "texture")]
        plain = seen.whole[..., thing] & (held[1] != 3) & (held[2] == 0)
        at = seen.centres[:, :, thing].floor().long()
        shown = pixels.movedim(1, -1)[rows, torch.arange(frames.shape[1]).expand_as(frames), at[..., 1], at[..., 0]]
        wanted = torch.tensor(RGB)[held[0]] * 2 - 1
        assert torch.allclose(shown[plain], wanted[plain], atol=1e-5)
        checked += int(plain.sum())
        hidden = ~seen.whole[..., thing] & (seen.curtain == 1)
        assert hidden.any()
        assert (shown[hidden] - wanted[hidden]).abs().amax(1).min() > 0.02
    assert checked > 100


def test_a_scene_is_told_in_words():
    scene = scene_of(Houses.of_seeds([0]), Walks.written(("hall", 2), ("attic", 2)), FRAMES_PER_BLOCK * 2 + 9)
    assert scene.room == "attic"
    assert [thing.whole for thing in scene.things] == [True, True]
    assert not scene.door
    assert len({thing.colour for thing in scene.things} | set(scene.ground_colours)) == 4
    assert scene_of(Houses.of_seeds([0]), Walks.written(("hall", 2), ("attic", 2)), FRAMES_PER_BLOCK * 2 + 3).door


def test_a_prompt_names_the_room_and_nothing_in_it():
    walks = Walks.written(("hall", 1), ("attic", 2, "closed"))
    assert prompts_of(walks) == ["hall, curtain open", "attic, curtain closed", "attic, curtain closed"]
    assert torch.equal(embed(prompts_of(walks)), embed_walks(walks)[0])
    houses = Houses.of_seeds(range(400))
    for name in ("colour", "form", "texture", "pattern"):
        held = getattr(houses, name).flatten(2) if getattr(houses, name).dim() > 2 else getattr(houses, name)[..., None]
        for value in range(int(held.max()) + 1):
            share = (held == value).double().mean((0, 2))
            assert (share - share.mean()).abs().max() < 0.11, f"{name} {value} depends on the room's name: {share}"


@pytest.mark.parametrize("length", [CLIP_BLOCKS, 12])
def test_a_clip_with_gaps_holds_a_return_and_what_was_seen_before(length):
    clips = Clips.of_seeds(range(60), length=length)
    moves = clips.walks.entered() | clips.walks.opened() | clips.walks.drawn()
    for row, kind in enumerate(clips.kinds):
        blocks = clips.blocks[row].tolist()
        assert len(blocks) == length
        assert blocks == sorted(set(blocks))
        for before, block in zip([None, *blocks], blocks, strict=False):
            assert before == block - 1 or not moves[row, block], "a run begins with a door that shows another room"
        if kind == "return":
            rooms = clips.walks.rooms[row, blocks].tolist()
            last = next(nth for nth in range(length - 1, 0, -1) if moves[row, blocks[nth]])
            seen = [
                nth
                for nth in range(1, last - 1)
                if rooms[nth] == rooms[last] and not clips.walks.curtains[row, blocks[nth]]
            ]
            assert seen, (blocks, rooms)
            assert blocks[last] == blocks[last - 1] + 1
    assert set(clips.kinds) == {"consecutive", "return", "scattered"}


def test_a_clip_is_what_the_walk_shows_at_its_times():
    clips = Clips.of_seeds([3, 5, 8])
    frames = clips.frames()
    assert frames.shape == (3, FRAMES_PER_BLOCK * CLIP_BLOCKS - 3)
    assert torch.equal(frames[:, 0], clips.blocks[:, 0] * FRAMES_PER_BLOCK + 3)
    assert torch.equal(frames[:, 13::16], clips.blocks[:, 1:] * FRAMES_PER_BLOCK)
    assert torch.equal(clips.pixels()[1], render(clips.houses, clips.walks, frames)[1])
    assert torch.equal(clips.text()[2, 4], embed_walks(clips.walks)[2, clips.blocks[2, 4]])


def test_the_shipped_codec_is_the_one_that_is_fitted_and_keeps_what_matters():
    codec, clips = LinearCodec.load(), Clips.of_seeds(["unseen a", "unseen b"])
    pixels = clips.pixels()
    latents = codec.encode(pixels)
    assert latents.shape == (2, 16, 20, 8, 16)
    assert psnr(codec.decode(latents), pixels) > 24
    assert torch.allclose(codec.encode(codec.decode(latents))[:, :, 1:], latents[:, :, 1:], atol=1e-4)
    first = codec.encode(pixels[:, :, :13])
    assert torch.allclose(first, latents[:, :, :4], atol=1e-5), "a block's latents do not depend on later ones"


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: Walks.written(("hal", 3)), WalkError, "Did you mean 'hall'"),
        (lambda: Walks.written(("hall", 0)), WalkError, "seconds of at least 1"),
        (lambda: Walks.of_seeds([0], 0), WalkError, "at least 1 block"),
        (lambda: embed(["hall, curtain opne"]), PromptError, "Did you mean 'open'"),
        (lambda: embed(["hall, red disc"]), PromptError, "unknown word 'red'"),
        (lambda: embed(["curtain open"]), PromptError, "as in 'hall, curtain open'"),
        (
            lambda: render(Houses.of_seeds([0]), Walks.of_seeds([0], 2), torch.tensor([[32]])),
            WalkError,
            "frames 0 to 31",
        ),
    ],
    ids=["room", "seconds", "blocks", "word", "content", "no room", "frame"],
)
def test_what_the_world_does_not_have_is_refused(make, error, says):
    with pytest.raises(error, match=says):
        make()


def test_colours_can_be_told_apart():
    colours = torch.tensor(RGB)
    apart = torch.cdist(colours, colours) + 9 * torch.eye(len(COLOURS))
    assert apart.min() > 0.35
