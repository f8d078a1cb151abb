"""The benchmark of video: what it says is what it ran."""

from typing import Any

import pytest

pytest.importorskip("diffusers", reason="needs the extra 'diffusers'")
pytest.importorskip("matplotlib", reason="needs the extra 'cli'")

import torch
from click.testing import CliRunner

from kvtiers import PolicyError
from kvtiers.cli import main
from kvtiers_diffusers.bench import POLICIES, make
from tiny_wan import build


def test_the_command_runs_every_policy_and_draws_the_times(tmp_path: Any) -> None:
    picture = tmp_path / "video.png"
    small = ["--blocks", "4", "--size", "64x64", "--device", "cpu", "--out", str(picture)]
    shown = CliRunner().invoke(main, ["bench", "video", *small])
    assert shown.exit_code == 0, shown.output
    for spec in POLICIES:
        assert spec.partition(":")[0] in shown.output
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("size", "message"), [("foo", "such as 832x480, got 'foo'"), ("250x160", "multiples of 16 and 16 pixels")]
)
def test_a_size_that_is_none_is_refused(size: str, message: str) -> None:
    found = CliRunner().invoke(main, ["bench", "video", "--size", size])
    assert isinstance(found.exception, PolicyError)
    assert message in str(found.exception)


def test_what_is_measured_is_what_was_attended_and_the_model_is_given_back() -> None:
    model = build()
    own = dict(model.attn_processors)
    made = make(model, "sink-rolling-window:sink=2,recent=2", blocks=5, block_frames=2, latent=(4, 6))
    assert (len(made.seconds), made.attended, made.ended) == (5, 6 * 6, "")
    assert made.overhead is not None
    assert model.attn_processors == own


def test_running_out_of_memory_ends_one_row_and_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = build(), []

    def full(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 9:
            raise torch.OutOfMemoryError("no room")

    handle = model.blocks[0].register_forward_pre_hook(full)
    made = make(model, "full", blocks=5, block_frames=2, latent=(4, 6))
    handle.remove()
    assert (len(made.seconds), made.ended, made.overhead) == (1, "out of memory at block 2", None)
