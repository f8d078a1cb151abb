"""The picture of `kvtiers bench recall`: every policy is a point with a label beside it that can be read."""

import struct
import sys
from itertools import combinations
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="needs the extra 'cli'")
pytest.importorskip("tokenizers", reason="needs the extra 'demo'")

from click.testing import CliRunner

import tiny_chat
from kvtiers import MissingExtraError
from kvtiers_transformers.bench_recall import recall
from kvtiers_transformers.recall_picture import Point, apart, draw, picture

MADE_UP = [
    Point(label="full", attended=4104, perplexity=36.4, found=9),
    Point(label="sliding-window", attended=1151, perplexity=54.8, found=3),
    Point(label="streaming", attended=1120, perplexity=36.9, found=3),
    Point(label="archive:digest_bits=3,digest_tokens=1", attended=992, perplexity=36.7, found=9),
    Point(label="packforcing-lm", attended=992, perplexity=36.7, found=9),
]


def test_points_stand_where_the_results_say() -> None:
    perplexity, keys = picture(MADE_UP, asked=9, title="made up").axes
    drawn = [[tuple(dot.get_offsets()[0]) for dot in panel.collections] for panel in (perplexity, keys)]
    assert drawn[0] == [(point.attended, point.perplexity) for point in MADE_UP]
    assert drawn[1] == [(point.attended, point.found) for point in MADE_UP]
    assert [text.get_text() for text in keys.texts[:2]] == ["sliding-window  3 of 9", "streaming  3 of 9"]


def test_a_point_that_covers_another_is_smaller() -> None:
    _, keys = picture(MADE_UP, asked=9, title="made up").axes
    below, above = (dot.get_sizes()[0] for dot in keys.collections[-2:])
    assert below > 2 * above


@pytest.mark.parametrize("points", [MADE_UP, MADE_UP[:1], [*MADE_UP, *MADE_UP[1:]]], ids=["five", "one", "nine"])
def test_labels_lie_inside_the_panel_and_not_on_one_another(points: list[Point]) -> None:
    figure = picture(points, asked=9, title="made up")
    figure.draw_without_rendering()
    for panel in figure.axes:
        boxes = [text.get_tightbbox() for text in panel.texts]
        assert len(boxes) == len(points)
        inside = panel.get_window_extent()
        assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 for box in boxes)
        assert all(inside.y0 <= box.y0 and box.y1 <= inside.y1 for box in boxes)
        words = [super(type(text), text).get_window_extent() for text in panel.texts]  # without the line to the point
        assert not any(one.overlaps(other) for one, other in combinations(words, 2))


def test_heights_stay_where_there_is_room_and_in_order_where_there_is_none() -> None:
    assert apart([0.9, 0.1, 0.5], [0.1, 0.1, 0.2]) == [0.9, 0.1, 0.5]
    close = apart([0.52, 0.5, 0.51, 1.0], [0.1, 0.2, 0.1, 0.1])
    assert close == pytest.approx([0.75, 0.5, 0.65, 0.95])


def test_it_is_written_as_png_with_one_panel_if_no_key_was_asked_for(tmp_path: Path) -> None:
    widths = []
    for asked in (9, 0):
        draw(MADE_UP, asked=asked, title="made up", out=tmp_path / "recall.png")
        data = (tmp_path / "recall.png").read_bytes()
        assert data.startswith(b"\x89PNG")
        widths.append(struct.unpack(">I", data[16:20])[0])
    assert widths[0] > 1.5 * widths[1] > 500


def test_the_benchmark_draws_what_it_measured(tmp_path: Path) -> None:
    model, out = tiny_chat.save(tmp_path), tmp_path / "recall.png"
    given = f"--model {model} --tokens 300 --seeds 1 --depths 0.5 --document past full --picture {out}"
    shown = CliRunner().invoke(recall, given.split())
    assert shown.exit_code == 0, shown.output
    assert out.read_bytes().startswith(b"\x89PNG")


def test_what_could_not_be_drawn_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--model", "there is none", "--picture"]
    shown = CliRunner().invoke(recall, [*given, str(tmp_path / "absent" / "recall.png")])
    assert shown.exit_code == 2
    assert "there is no folder" in shown.output
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    shown = CliRunner().invoke(recall, [*given, str(tmp_path / "recall.png")])
    assert isinstance(shown.exception, MissingExtraError)
    assert "pip install 'kvtiers[cli]'" in str(shown.exception)
