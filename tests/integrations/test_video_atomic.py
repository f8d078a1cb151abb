"""Whatever raises in the middle of a pass over a block, the same call made again gives the same video or is refused."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="needs the extra 'diffusers'")

import torch
from torch import Tensor

from faults import Fault, at_line, points, sweep
from kvtiers import GeometryError
from kvtiers_diffusers import CausalWan, tiered
from kvtiers_diffusers.tensor_identity import TensorIdentity
from kvtiers_packforcing.network import HighResolution
from tiny_wan import blocks, build, prompt

pytestmark = pytest.mark.usefixtures("_shapes_go_unchecked")

CLIPS = {"frames": 2, "high": 8, "wide": 8}  # 4 x 4 tokens a frame, one cell a block
POLICIES: dict[str, dict[str, Any]] = {
    "packforcing": {"sink": 2, "recent": 2, "top_k": 2, "compressor": ("dual-branch", {"branches": "hr"})},
    "sink-rolling-window": {"sink": 2, "recent": 2},
}


def commit(wan: CausalWan, block: Tensor, text: Tensor) -> None:
    """Commit a block, unless it is committed, which the error says."""
    try:
        wan.commit(block, text)
    except GeometryError as error:
        assert "committed already" in str(error)  # noqa: PT017 (any other is one too many)


def verbs(clips: list[Tensor], text: Tensor) -> Iterator[tuple[str, Callable[[CausalWan], object]]]:
    """Denoise each block twice, then commit it."""
    for number, clip in enumerate(clips):
        for timestep in (900.0, 500.0):
            yield f"denoise block {number} at {timestep}", partial(denoise, clip=clip, timestep=timestep, text=text)
        yield f"commit block {number}", partial(commit, block=clip, text=text)


def denoise(wan: CausalWan, *, clip: Tensor, timestep: float, text: Tensor) -> Tensor:
    return wan.denoise(clip, timestep, text)


def outcome(wan: CausalWan, clips: list[Tensor], text: Tensor) -> list[Tensor]:
    """The flows of two more blocks."""
    found = []
    for clip in clips:
        found += [wan.denoise(clip, timestep, text) for timestep in (900.0, 500.0)]
        found.append(wan.commit(clip, text))
    return found


def made(name: str) -> AbstractContextManager[CausalWan]:
    """A model that remembers by one of the policies."""
    torch.manual_seed(0)
    network = HighResolution(channels=16, width=48, widths=(4, 4, 4, 4)) if name == "packforcing" else None
    if network is not None:
        torch.nn.init.normal_(network.layers[-1].weight, std=0.5)
    return tiered(build(), name, compressor_network=network, block_frames=2, **POLICIES[name])


@points(operations=1201, lines=2003, slow_operations=7, slow_lines=29)
@pytest.mark.parametrize("name", POLICIES)
@torch.no_grad()
def test_a_fault_in_a_pass_is_undone_or_the_video_refuses_to_go_on(name: str, how: str, step: int) -> None:
    text, clips = prompt(), blocks(9, **CLIPS)
    with made(name) as wan:
        for clip in clips[:5]:  # anchors, two archived blocks, and recent
            wan.denoise(clip, 900.0, text)
            wan.commit(clip, text)
        tried, _ = sweep(
            list(verbs(clips[5:7], text)),
            wan.fork,
            lambda one: outcome(one, clips[7:], text),
            lambda a, b: all(torch.equal(x, y) for x, y in zip(a, b, strict=True)),
            how=how,
            step=step,
            folders=("kvtiers", "kvtiers_diffusers", "kvtiers_packforcing"),
        )
    assert tried >= 6


@pytest.mark.parametrize("name", POLICIES)
@torch.no_grad()
def test_a_fault_when_a_block_is_noted_lets_it_be_committed_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, clips = prompt(), blocks(7, **CLIPS)
    with made(name) as wan:
        for clip in clips[:5]:
            wan.commit(clip, text)
        other = wan.fork()
        wan.commit(clips[5], text)
        note = TensorIdentity.note

        def failing(identity: TensorIdentity, block: Tensor) -> None:
            note(identity, block)
            if block is clips[5]:  # others are prompts
                raise Fault

        with monkeypatch.context() as patch:
            patch.setattr(TensorIdentity, "note", failing)
            with pytest.raises(Fault):
                other.commit(clips[5], text)
        assert other.sources.frames == other.frames == 10
        other.commit(clips[5], text)
        assert other.sources.frames == other.frames == 12
        flows = [one.denoise(clips[6], 500.0, text) for one in (wan, other)]
        assert torch.equal(*flows)


@pytest.mark.parametrize(
    ("verb", "step"), [("reset", 1), ("load", 31), pytest.param("load", 1, marks=pytest.mark.slow)]
)
@torch.no_grad()
def test_a_fault_leaves_the_video_as_it_was_or_gives_the_other(verb: str, step: int, tmp_path: Path) -> None:
    text, clips, path = prompt(), blocks(5, **CLIPS), tmp_path / "video.safetensors"
    with made("packforcing") as wan:
        wan.commit(clips[0], text)
        wan.save(path)
        for clip in clips[1:4]:
            wan.commit(clip, text)

        def then(one: CausalWan) -> tuple[int, Tensor, int | None]:
            return one.frames, one.denoise(clips[4], 500.0, text), one.sources.frames

        def changed(one: CausalWan) -> None:
            one.load(path) if verb == "load" else one.reset()

        right, number, other = then(wan.fork()), 1, wan.fork()
        changed(other)
        new = then(other)
        while True:
            other = wan.fork()
            try:
                with at_line(number, "kvtiers_diffusers"):
                    changed(other)
            except Fault:
                now = then(other)
                assert any(now[::2] == due[::2] and torch.equal(now[1], due[1]) for due in (right, new))
            else:
                break
            number += step
    assert number > 10 * step
