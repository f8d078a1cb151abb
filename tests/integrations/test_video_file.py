"""Video files: every kind of frame, every rate, and what stays in the file when making a video breaks off."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers", reason="needs the extra 'diffusers'")

import av
import torch
from torch import Tensor

from kvtiers import GeometryError, InterruptedForwardError, NotFiniteError, PolicyError
from kvtiers_diffusers import Clips, write_video
from tiny_pipeline import SMALL, pipeline, seeded
from tiny_wan import prompt


def grey(level: float, *, frames: int = 2, rows: int = 1, side: int = 16) -> Tensor:
    """A clip as a tensor, [rows, frames, 3, side, side]."""
    return torch.full((rows, frames, 3, side, side), level)


def read(path: Path) -> tuple[list[float], Fraction]:
    """The mean level of each frame in a file, 0 to 255, and its frames a second."""
    with av.open(str(path)) as file:
        levels = [float(frame.to_ndarray(format="rgb24").mean()) for frame in file.decode(video=0)]
        return levels, Fraction(file.streams.video[0].average_rate or 0)


@pytest.mark.parametrize(
    "clip",
    [
        pytest.param(grey(0.25), id="float"),
        pytest.param(grey(0.25).bfloat16(), id="bfloat16"),
        pytest.param((grey(0.25) * 255).round().byte(), id="bytes"),
        pytest.param(np.full((1, 2, 16, 16, 3), 64, dtype=np.uint8), id="array of bytes"),
        pytest.param(np.full((1, 2, 16, 16, 3), 0.25), id="array of double"),
    ],
)
def test_frames_of_every_kind_are_as_bright_as_they_were(clip: Any, tmp_path: Path) -> None:
    assert write_video(tmp_path / "video.mp4", [clip, clip], fps=8) == 4
    levels, _ = read(tmp_path / "video.mp4")
    assert len(levels) == 4
    assert all(abs(level - 64) < 4 for level in levels)


@pytest.mark.parametrize(
    ("clip", "error", "message"),
    [
        pytest.param(grey(torch.nan), NotFiniteError, "clip .. hold NaN or infinity", id="nan"),
        pytest.param(grey(torch.inf), NotFiniteError, "clip .. hold NaN or infinity", id="infinity"),
        pytest.param(grey(64.0), GeometryError, "0 to 1, or uint8 .* from 64 to 64", id="0 to 255"),
        pytest.param(grey(-0.5), GeometryError, "0 to 1, or uint8 .* from -0.5 to -0.5; scale", id="-1 to 1"),
        pytest.param(grey(1).long(), GeometryError, "as uint8, got torch.int64", id="long"),
        pytest.param(np.zeros((1, 2, 16, 16, 3), dtype=np.int64), GeometryError, "as uint8, got int64", id="array"),
        pytest.param(grey(0.5, side=32), GeometryError, r"of one size, \(16, 16\) so far, got \(32, 32\)", id="size"),
        pytest.param(grey(0.5, rows=0), GeometryError, "row 0 was asked for, and clip . has 0 rows", id="rows"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_other_frames_are_refused_and_those_before_stay_in_the_file(
    clip: Any, error: type[Exception], message: str, first: bool, tmp_path: Path
) -> None:
    path, before = tmp_path / "video.mp4", [] if first else [grey(0.25)]
    if first and "of one size" in message:
        before = [grey(0.25, frames=0)]
    with pytest.raises(error, match=message):
        write_video(path, [*before, clip], fps=8)
    assert path.exists() == (not first)
    if not first:
        assert len(read(path)[0]) == 2


@pytest.mark.parametrize(("row", "error"), [(2, GeometryError), (5, GeometryError), (-1, PolicyError)])
def test_a_row_that_is_not_there_is_refused_before_anything_is_written(
    row: int, error: type[Exception], tmp_path: Path
) -> None:
    with pytest.raises(error, match=f"ow.* {row}"):
        write_video(tmp_path / "video.mp4", [grey(0.25, rows=2)], row=row)
    assert not (tmp_path / "video.mp4").exists()
    both = torch.cat([grey(0.25), grey(0.75)])
    write_video(tmp_path / "video.mp4", [both], row=1)
    assert abs(read(tmp_path / "video.mp4")[0][0] - 191) < 4


@pytest.mark.parametrize(
    ("fps", "wanted"),
    [
        (24, Fraction(24)),
        (23.976, Fraction(2997, 125)),
        (24000 / 1001, Fraction(24000, 1001)),
        ("24000/1001", Fraction(24000, 1001)),
        (Fraction(30000, 1001), Fraction(30000, 1001)),
        (np.float32(12.5), Fraction(25, 2)),
        (0.5, Fraction(1, 2)),
    ],
)
def test_a_file_runs_at_every_rate_that_can_be_written(fps: Any, wanted: Fraction, tmp_path: Path) -> None:
    write_video(tmp_path / "video.mp4", [grey(0.25, frames=9)], fps=fps)
    levels, found = read(tmp_path / "video.mp4")
    assert (len(levels), found) == (9, wanted)


@pytest.mark.parametrize("fps", [0, -1, 0.0, float("nan"), float("inf"), "fast", "1/0", True, 1e-12, 70000])
def test_other_rates_are_refused(fps: Any, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"fps must be 0.001 to 1000 frames a second"):
        write_video(tmp_path / "video.mp4", [grey(0.25)], fps=fps)
    with pytest.raises(PolicyError, match=r"fps must be 0.001 to 1000 frames a second"):
        pipeline().stream(prompt_embeds=prompt(), num_frames=5, fps=fps, **SMALL)
    assert not (tmp_path / "video.mp4").exists()


def film(levels: list[float], fps: Any) -> Clips:
    """Clips that are made as a stream makes them."""
    return Clips((grey(level) for level in levels), Fraction(fps))


def test_clips_carry_their_rate_and_another_is_refused(tmp_path: Path) -> None:
    made = pipeline().stream(prompt_embeds=prompt(), seconds=0.25, fps="24000/1001", generator=seeded(), **SMALL)
    assert made.fps == Fraction(24000, 1001)
    write_video(tmp_path / "video.mp4", made)
    levels, fps = read(tmp_path / "video.mp4")
    assert (len(levels), fps) == (6, Fraction(24000, 1001))
    with pytest.raises(PolicyError, match="made for 24 frames a second, got fps=16"):
        write_video(tmp_path / "other.mp4", film([0.5], 24), fps=16)
    assert not (tmp_path / "other.mp4").exists()
    write_video(tmp_path / "other.mp4", film([0.5] * 5, 24), fps=24.0)
    write_video(tmp_path / "plain.mp4", [grey(0.5)] * 5)
    assert [read(tmp_path / f"{name}.mp4")[1] for name in ("other", "plain")] == [24, 16]


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_what_was_made_before_a_break_can_be_played(error: type[BaseException], tmp_path: Path) -> None:
    def clips() -> Iterator[Tensor]:
        yield grey(0.25, frames=30)
        yield grey(0.75, frames=30)
        raise error

    with pytest.raises(error):
        write_video(tmp_path / "video.mp4", clips())
    levels, fps = read(tmp_path / "video.mp4")
    assert [round(level / 64) for level in levels] == [1] * 30 + [3] * 30
    assert fps == 16


def test_a_stream_that_failed_does_not_look_like_one_that_ended(tmp_path: Path) -> None:
    def callback(_: Any, step: int, __: float, held: dict[str, Any]) -> None:
        if held["block"] == 1:
            raise MemoryError

    options = {"prompt_embeds": prompt(), "num_frames": 13, "callback_on_step_end": callback, **SMALL}
    clips = pipeline().stream(generator=seeded(), **options)
    with pytest.raises(MemoryError):
        write_video(tmp_path / "video.mp4", clips)
    assert len(read(tmp_path / "video.mp4")[0]) == 5
    for _ in range(2):
        with pytest.raises(InterruptedForwardError, match=r"failed \(MemoryError\) and cannot go on; begin another"):
            next(clips)
