"""The measures: perfect on true videos, and worse the more a video is damaged in the way that they are to notice."""

import math
from itertools import pairwise

import attrs
import pytest
import torch

from kvtiers_packforcing.measures import (
    DAMAGES,
    SCALES,
    Figure,
    MeasureError,
    Measures,
    Sightings,
    agreement,
    drift,
    flicker,
    ground,
    identity,
    jumps,
    measure_lengths,
    measure_video,
    motion,
    prompt,
    recognise,
    summarise,
    visits_of,
)
from kvtiers_packforcing.tiny_world import (
    FIRST_FRAME,
    FRAMES_PER_BLOCK,
    ROOMS,
    Houses,
    LinearCodec,
    Walks,
    render,
    truth_of,
)

WALK = Walks.written(
    ("hall", 3), ("attic", 3), ("cellar", 3), ("hall", 2), ("attic", 2), ("attic", 9, "closed"), ("attic", 2),
    ("cellar", 2), ("hall", 2),
)  # fmt: skip
"""Returns after 5, 6, 9, 15 and 15 s."""

NOTICED_FROM = {("collapsed", "prompt"): 0.2}
"""From which strength on a figure must notice a damage, if not from the weakest: `prompt` counts whole blocks, and with
a little noise rooms are still told apart."""

BY_MEASURE = {
    **dict.fromkeys(
        ("identity", "identity_net", "identity_5_15", "identity_15_60", "recognised", "elsewhere"), identity
    ),
    **dict.fromkeys(("return_psnr", "return_ssim"), agreement),
    **dict.fromkeys(("ground_return", "ground_stay"), ground),
    **dict.fromkeys(("dynamic_degree", "motion"), motion),
    **dict.fromkeys(("prompt", "prompt_drop", "curtain", "room"), prompt),
    **dict.fromkeys(("drift", "drift_brightness", "drift_contrast", "drift_saturation", "drift_detail"), drift),
    "border_jump": jumps,
    "flicker": flicker,
}


def drawn(walk=WALK, seed="measured"):
    return render(Houses.of_seeds([seed]), walk, torch.arange(FIRST_FRAME, walk.blocks * FRAMES_PER_BLOCK)[None])


@pytest.fixture(scope="module")
def truth():
    return drawn()


def test_a_true_video_is_perfect(truth):
    found = measure_video(truth, WALK)
    assert found.seconds == 28
    for name, figure in found.figures().items():
        scale = SCALES[name]
        slack = {"drift": 1.5, "motion": 1.0, "border_jump": 0.1}.get(name, 1.0 if name.startswith("drift") else 0.0)
        assert figure.mean() == pytest.approx(scale.truth, abs=max(slack, 0.011)), name
    assert found.identity.weights.tolist() == [10], "two things in each of five returns"


def test_the_codec_costs_little_of_what_counts(truth):
    codec = LinearCodec.load()
    found = measure_video(codec.decode(codec.encode(truth)), WALK)
    for name in ("identity", "recognised", "place", "ground_return", "dynamic_degree", "prompt", "room"):
        assert found.figures()[name].mean() > 0.89, name
    assert found.flicker.mean() < 2


@pytest.mark.parametrize(
    ("damage", "figure", "sign"),
    [
        ("invented", "identity", -1),
        ("invented", "ground_return", -1),
        ("invented", "room", -1),
        ("wrong-rooms", "identity_net", -1),
        ("wrong-rooms", "elsewhere", 1),
        ("wrong-rooms", "room", -1),
        ("wrong-curtains", "curtain", -1),
        ("wrong-curtains", "prompt", -1),
        ("curtains-lost", "prompt_drop", 1),
        ("blurred", "recognised", -1),
        ("noisier", "return_psnr", -1),
        ("blurred", "identity_5_15", -1),
        ("blurred", "identity_15_60", -1),
        ("noisier", "ground_stay", -1),
        ("noisier", "flicker", 1),
        ("noisier", "drift", 1),
        ("noisier", "drift_detail", 1),
        ("collapsed", "identity", -1),
        ("collapsed", "prompt", -1),
        ("collapsed", "drift", 1),
        ("frozen", "dynamic_degree", -1),
        ("frozen", "motion", -1),
        ("one-picture", "elsewhere", 1),
        ("one-picture", "prompt", -1),
        ("brighter", "drift_brightness", 1),
        ("greyer", "drift_contrast", -1),
        ("greyer", "drift_saturation", -1),
        ("greyer", "drift_detail", -1),
        ("greyer", "return_ssim", -1),
        ("jumping", "border_jump", 1),
        ("flickering", "flicker", 1),
    ],
)
def test_the_stronger_a_damage_the_worse_the_figure(truth, damage, figure, sign):
    make, strengths = DAMAGES[damage]
    least = NOTICED_FROM.get((damage, figure), 0.0)
    videos = (truth, *(make(truth, WALK, max(strength, least)) for strength in strengths))
    found = [BY_MEASURE[figure](video, WALK)[figure].mean() for video in videos]
    worse = [sign * (after - before) for before, after in pairwise(found)]
    assert worse[0] > 0, f"the weakest is not noticed: {found}"
    assert min(worse) >= 0, found
    assert abs(found[-1] - found[0]) > 0.1 * max(1, abs(found[0])), found


def test_every_damage_is_noticed_above_and_every_figure_notices_one():
    marks = test_the_stronger_a_damage_the_worse_the_figure.pytestmark
    cases = [case for mark in marks for case in mark.args[1]]
    assert {damage for damage, _, _ in cases} == set(DAMAGES)
    assert {figure for _, figure, _ in cases} == set(BY_MEASURE)


def test_what_cannot_be_named_counts_as_lost_and_is_not_left_out(truth):
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    found = identity(noise, WALK)
    assert found["recognised"].mean() == 0
    assert found["identity"].mean() == found["identity_net"].mean() == 0
    assert found["identity"].weights.tolist() == [10]


def test_a_picture_that_never_changes_agrees_with_itself_and_is_caught(truth):
    still = truth[:, :, 20:21].expand_as(truth)
    same = identity(still, WALK)
    assert same["identity"].mean() == same["elsewhere"].mean() == 1
    assert same["identity_net"].mean() == 0
    assert motion(still, WALK)["motion"].mean() == motion(still, WALK)["dynamic_degree"].mean() == 0
    assert prompt(still, WALK)["room"].mean() == 0


def test_grey_is_no_memory(truth):
    grey = torch.zeros_like(truth)
    assert agreement(grey, WALK)["return_psnr"].mean() == 40, "which is why it is read beside the others"
    assert identity(grey, WALK)["recognised"].mean() == 0
    assert ground(grey, WALK)["ground_return"].mean() == 0
    assert prompt(grey, WALK)["room"].mean() == 0


def test_returns_are_told_apart_by_how_long_they_were_away(truth):
    other, changed = drawn(seed="another"), truth.clone()
    changed[:, :, 24 * FRAMES_PER_BLOCK - FIRST_FRAME :] = other[:, :, 24 * FRAMES_PER_BLOCK - FIRST_FRAME :]
    found = identity(changed, WALK)
    assert found["identity_5_15"].mean() == 1
    assert found["identity_15_60"].mean() == 0
    assert found["identity_5_15"].weights + found["identity_15_60"].weights == found["identity"].weights
    assert [visit.hidden for visit in visits_of(WALK, 0, 28)] == [None, None, None, 6, 5, 9, 15, 15]


def test_the_same_things_in_other_places_are_not_in_the_same_place(truth):
    moved = truth.clone()
    back = 9 * FRAMES_PER_BLOCK - FIRST_FRAME
    moved[:, :, back:] = truth[:, :, back:].roll(9, 3)
    found = identity(moved, WALK)
    assert found["place"].mean() < 0.5
    assert found["colour"].mean() == 1


def test_a_room_that_is_swept_away_while_in_sight_has_no_steady_ground(truth):
    rolled = torch.stack([frame.roll(nth // 2, 2) for nth, frame in enumerate(truth[0].unbind(1))], 1)[None]
    assert ground(rolled, WALK)["ground_stay"].mean() < 0.7


def test_names_are_right():
    """Of 96 things each: on true frames, and on what the linear codec leaves of them."""
    count, codec = 12, LinearCodec.load()
    walk = Walks.written(*((room, 1) for room in ROOMS[:4]))
    walks = Walks(rooms=walk.rooms.expand(count, -1), curtains=walk.curtains.expand(count, -1))
    houses, frames = Houses.of_seeds([f"named {n}" for n in range(count)]), torch.arange(3, 64).expand(count, -1)
    pixels, seen, at = render(houses, walks, frames), truth_of(houses, walks, frames), torch.arange(9, 61, 16)
    rows, rooms = torch.arange(count)[:, None].expand(-1, 4), seen.rooms[:, at]
    right = torch.stack([getattr(houses, name)[rows, rooms] for name in ("colour", "form", "texture")], -1)
    for shown, least in ((pixels, 0.97), (codec.decode(codec.encode(pixels)), 0.93)):
        found = recognise(shown[:, :, at].transpose(1, 2).flatten(0, 1))
        share = (found.thing_names() == right.flatten(0, 1)).all(-1).float().mean()
        assert share >= least
        assert found.recognised().float().mean() >= least
        assert (found.centres - seen.centres[:, at].flatten(0, 1)).norm(dim=-1).quantile(0.95) < 3


def test_nothing_is_recognised_in_noise_and_behind_curtains():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(32, 3, 64, 128, generator=generator) * torch.linspace(0.1, 2, 32)[:, None, None, None]
    patches = torch.nn.functional.interpolate(2 * torch.randn(32, 3, 8, 16, generator=generator), scale_factor=8)
    closed = drawn(Walks.written(("hall", 1, "closed")))[0].transpose(0, 1)
    for frames in (noise, patches, closed):
        assert recognise(frames).recognised().float().mean() < 0.02


def test_a_length_is_measured_as_the_shorter_video_would_be(truth):
    found = measure_lengths(truth, WALK, (5, 11, 60))
    assert list(found) == [5, 11]
    alone = measure_video(truth[:, :, : 11 * FRAMES_PER_BLOCK - FIRST_FRAME], WALK)
    for name, figure in found[11].figures().items():
        assert torch.allclose(figure.values, alone.figures()[name].values, equal_nan=True), name
    assert found[5].identity.weights.tolist() == [0]
    assert math.isnan(found[5].identity.mean()), "nothing comes back within 5 s, so nothing is said"


def test_videos_of_a_batch_do_not_influence_each_other(truth):
    two = Walks(rooms=WALK.rooms.expand(2, -1), curtains=WALK.curtains.expand(2, -1))
    other = drawn(seed="another")
    both = measure_video(torch.cat((truth, other))[:, :, :189], two)
    joined = Measures.join([measure_video(one[:, :, :189], WALK) for one in (truth, other)])
    for name, figure in both.figures().items():
        assert torch.allclose(figure.values, joined.figures()[name].values, atol=1e-4, equal_nan=True), name


def test_an_interval_is_over_videos_and_narrows_with_their_number():
    def of(values):
        return Figure(values=torch.tensor(values), weights=torch.full((len(values),), 4.0))

    few, many = summarise(of([0.0, 1.0] * 4)), summarise(of([0.0, 1.0] * 64))
    assert few.mean == many.mean == 0.5
    assert few.low < few.mean < few.high
    assert many.high - many.low < (few.high - few.low) / 2
    assert (few.videos, few.events) == (8, 32)
    assert summarise(of([0.0, 1.0] * 4)) == few, "it is seeded"
    assert math.isnan(summarise(of([1.0])).low)
    silent = Figure(values=torch.tensor([1.0, torch.nan]), weights=torch.tensor([2.0, 0.0]))
    assert (summarise(silent).mean, summarise(silent).videos) == (1.0, 1)


def test_videos_of_one_group_are_no_independent_witnesses():
    """Ten walks of four videos each, which differ by walk alone, say no more than ten videos do."""
    values = torch.linspace(0, 1, 10)
    alone = summarise([Figure(values=value[None], weights=torch.ones(1)) for value in values])
    many = [Figure(values=value[None], weights=torch.ones(1), group=nth) for nth, value in enumerate(values)] * 4
    grouped = summarise(many)
    assert (grouped.low, grouped.high) == pytest.approx((alone.low, alone.high))
    assert (grouped.videos, grouped.mean) == (40, pytest.approx(alone.mean))
    free = summarise([attrs.evolve(figure, group=None) for figure in many])
    assert free.high - free.low < 0.7 * (grouped.high - grouped.low)


def test_many_events_weigh_more_than_few():
    figure = Figure.of_events([[1.0, 1.0, 1.0], [0.0], []])
    assert figure.mean() == 0.75


@pytest.mark.parametrize(
    ("shape", "walk", "says"),
    [
        ((1, 3, 14, 64, 128), WALK, "leave out the last 1"),
        ((1, 3, 13, 60, 104), WALK, "64 x 128 pixels, got 60 x 104"),
        ((2, 3, 13, 64, 128), WALK, "2 videos of 1 s and 1 walks of 28 s"),
        ((1, 3, 29, 64, 128), Walks.written(("hall", 1)), "at least as long as it is"),
    ],
    ids=["frames", "size", "batch", "walk"],
)
def test_a_video_that_its_walk_cannot_show_is_refused(shape, walk, says):
    with pytest.raises(MeasureError, match=says):
        measure_video(torch.zeros(shape), walk)


def test_readings_are_used_if_they_are_given(truth):
    nothing = Sightings(
        present=torch.zeros(1, 112, 2), centres=torch.zeros(1, 112, 2, 2), names=torch.zeros(1, 112, 2, 15)
    )
    assert identity(truth, WALK, seen=nothing)["recognised"].mean() == 0
