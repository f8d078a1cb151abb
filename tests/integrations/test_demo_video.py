"""`kvtiers demo video`: options are checked first, files are written whole, and pictures say what came back."""

import math
import threading
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

pytest.importorskip("diffusers", reason="needs the extra 'diffusers'")
pytest.importorskip("matplotlib", reason="needs the extra 'cli'")

import av
import torch
from click.testing import CliRunner
from PIL import Image

from kvtiers.cli import DEMOS, main
from kvtiers.errors import MissingExtraError
from kvtiers_packforcing.demo import command
from kvtiers_packforcing.demo.film import Film
from kvtiers_packforcing.demo.output import OutputError, filled_whole
from kvtiers_packforcing.demo.returns import of_strangers, returns_of, seen_before
from kvtiers_packforcing.demo.sheet import columns
from kvtiers_packforcing.demo.showing import ahead
from kvtiers_packforcing.demo.walk_text import DEFAULT_WALK, read_walk
from kvtiers_packforcing.tiny_world import HIDDEN_SECONDS, Houses, WalkError, Walks, render
from kvtiers_packforcing.tiny_world.weights import SHIPPED, WeightsError, check_weights, load_models
from tiny_videos import save_models, tiny_models


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_models(tiny_models(), tmp_path_factory.mktemp("weights"))


def run(*options):
    return CliRunner().invoke(command.video, [str(option) for option in options])


def film_of(walks, *, houses=("a",)):
    """True frames in 0 to 255, [frames, 3, height, width]; of several houses, each return is of the next one."""
    moves, made, nth = (walks.entered() | walks.opened())[0].tolist(), [], 0
    for block, moving in enumerate(moves):
        nth += moving
        frames = torch.arange(3 if block == 0 else 16 * block, 16 * block + 16)[None]
        made.append(render(Houses.of_seeds([houses[nth % len(houses)]]), walks, frames))
    return ((torch.cat(made, 2)[0].transpose(0, 1) + 1) * 127.5).round().byte()


def test_the_command_writes_a_video_and_two_pictures(weights, tmp_path):
    out = tmp_path / "new" / "out"
    walk = ("--prompt", "hall 1, attic 1, hall 2", "--seconds", 3, "--steps", 1)
    shown = run(*walk, "--policies", "packforcing,rolling-window", "--weights", weights, "--out", out)
    assert shown.exit_code == 0, shown.output
    assert {path.name for path in out.iterdir()} == {"video.mp4", "contact-sheet.png", "memory-and-returns.png"}
    with av.open(str(out / "video.mp4")) as file:
        stream = file.streams.video[0]
        assert (stream.width, stream.height) == Film(names=["a", "b"], walks=read_walk("hall 1")).size
        assert stream.average_rate == 16
        assert sum(1 for _ in file.decode(video=0)) == 3 * 16 - 3
    for name in ("contact-sheet.png", "memory-and-returns.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 300
    for name in ("packforcing", "rolling-window", "video.mp4"):
        assert name in shown.output


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_run_that_breaks_off_leaves_nothing(error, weights, tmp_path, monkeypatch):
    own, calls = Film.block, []

    def breaks(self, number, frames):
        calls.append(number)
        if number == 1:
            raise error
        return own(self, number, frames)

    monkeypatch.setattr(Film, "block", breaks)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "video.mp4").write_text("from before")
    for name in ("new/out", "old"):
        options = ("--prompt", "hall 2", "--steps", 1, "--policies", "rolling-window", "--weights", weights)
        assert run(*options, "--out", tmp_path / name).exit_code == 1
    assert calls == [0, 1, 0, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert [path.read_text() for path in (tmp_path / "old").iterdir()] == ["from before"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policies", "packforcing,roling-window"], "unknown policy 'roling-window'"),
        (["--policies", "packforcin"], "Did you mean 'packforcing'?"),
        (["--policies", ""], "no policies are named"),
        (["--prompt", "hall 4, atic 5"], "no room 'atic'; the rooms are hall, attic"),
        (["--prompt", "hall"], "a visit is a room, its seconds, and 'closed' if its curtain is"),
        (["--prompt", "hall 4 shut"], "'open' or 'closed'), got ('hall', 4, 'shut')"),
        (["--prompt", "hall 0"], "seconds of at least 1"),
        (["--prompt", " "], "a walk has at least one visit"),
        (["--seconds", "0"], "0 seconds were asked for, and this walk has 1 to 120"),
        (["--seconds", "121"], "121 seconds were asked for, and this walk has 1 to 120"),
        (["--prompt", "hall 4", "--seconds", "5"], "this walk has 1 to 4; ask for fewer, or write more visits"),
        (["--seconds", "1.5"], "'1.5' is not a valid integer"),
        (["--steps", "0"], "0 is not in the range x>=1"),
        (["--top-k", "0"], "0 is not in the range x>=1"),
        (["--seed", "-1"], "-1 is not in the range x>=0"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_wrong_options_are_refused_before_anything_is_loaded(options, message, tmp_path):
    shown = run(*options, "--out", tmp_path / "out")
    assert shown.exit_code == 2
    assert message in " ".join(shown.output.split())
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_refused(weights, tmp_path):
    (tmp_path / "file").write_text("")
    shown = run("--weights", weights, "--out", tmp_path / "file" / "out")
    assert isinstance(shown.exception, OutputError)
    assert "cannot be written" in str(shown.exception)


def test_a_missing_extra_is_named(weights, monkeypatch):
    monkeypatch.setattr(command, "_NEEDS", {"no_such_package": "diffusers"})
    shown = run("--weights", weights)
    assert isinstance(shown.exception, MissingExtraError)
    assert "needs no_such_package; pip install 'kvtiers[diffusers]'" in str(shown.exception)


def test_what_was_filled_whole_replaces_what_was_there_and_nothing_else(tmp_path):
    for name in ("kept", "replaced"):
        (tmp_path / name).write_text("old")
    with filled_whole(tmp_path) as folder:
        (folder / "replaced").write_text("new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"kept": "old", "replaced": "new"}


# ---------------------------------------------------------------------- weights


def test_weights_are_read_as_they_were_written(weights):
    models, own = load_models(weights), tiny_models()
    for name in ("transformer", "compressor", "autoencoder"):
        read, written = getattr(models, name).state_dict(), getattr(own, name).state_dict()
        assert read.keys() == written.keys()
        assert all(torch.equal(read[key], written[key].half().float()) for key in read)
        assert not any(weight.requires_grad for weight in getattr(models, name).parameters())


def _remove_config(folder):
    (folder / "transformer" / "config.json").unlink()


def _pickle_instead(folder):
    weights = folder / "compressor" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))


def _change_one_byte(folder):
    path = folder / "autoencoder" / "diffusion_pytorch_model.safetensors"
    held = bytearray(path.read_bytes())
    held[-1] ^= 1
    path.write_bytes(held)


def _forget_one(folder):
    lines = (folder / "sha256").read_text().splitlines(keepends=True)
    (folder / "sha256").write_text("".join(line for line in lines if "transformer/config" not in line))


def _no_safetensors(folder):
    (folder / "compressor" / "diffusion_pytorch_model.safetensors").write_bytes(b"something else")
    (folder / "sha256").unlink()


def _another_size(folder):
    path = folder / "compressor" / "config.json"
    path.write_text(path.read_text().replace('"width": 32', '"width": 48'))
    (folder / "sha256").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_remove_config, "lacks transformer/config.json; write each of autoencoder, transformer, compressor with"),
        (_pickle_instead, "lacks compressor/.*safetensors; diffusion_pytorch_model.bin is not read, since it can run"),
        (_change_one_byte, "autoencoder/.*safetensors is not the file that sha256 was written for"),
        (_forget_one, "sha256 does not list transformer/config.json"),
        (_no_safetensors, "compressor cannot be read as HighResolution"),
        (_another_size, "compressor cannot be read as HighResolution"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_weights_that_are_not_whole_are_refused(spoil, message, tmp_path):
    save_models(tiny_models(), tmp_path)
    spoil(tmp_path)
    with pytest.raises(WeightsError, match=message):
        load_models(tmp_path)


def test_no_weights_are_no_folder(tmp_path, monkeypatch):
    with pytest.raises(WeightsError, match=r"there are no weights in .*nowhere: give a folder that training wrote"):
        check_weights(tmp_path / "nowhere")
    monkeypatch.setattr("kvtiers_packforcing.tiny_world.weights.SHIPPED", tmp_path / "nowhere")
    with pytest.raises(WeightsError, match="they are not part of this checkout"):
        check_weights(tmp_path / "nowhere")


def test_the_shipped_weights_are_whole_and_small():
    check_weights()
    models = load_models()
    assert models.sampler.steps == 8
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) < 15e6


# ---------------------------------------------------------------------- what comes back


def test_the_default_walk_is_one_that_the_model_was_trained_on_and_returns_every_ten_seconds():
    walks = read_walk(DEFAULT_WALK)
    assert walks.blocks == 120
    hidden = [visit.hidden_before for visit in walks.segments() if visit.hidden_before is not None]
    assert all(HIDDEN_SECONDS[0] <= seconds <= HIDDEN_SECONDS[1] for seconds in hidden)
    shown = columns(walks)
    assert [(group[0].room, [column.second for column in group]) for group in shown] == [
        ("hall", [3, 33, 73, 113]),
        ("attic", [13, 43, 53, 83]),
        ("cellar", [23, 63, 93, 103]),
    ]
    for first, *later in shown:
        assert [column.before for column in (first, *later)] == [None, *[first.second] * len(later)]
        assert not any(column.curtained for column in (first, *later))
    assert [column.says() for column in shown[0]] == ["first visit", "0:30 later", "1:10 later", "1:50 later"]


def test_a_column_says_whether_a_room_is_new_returns_or_is_hidden():
    walks = read_walk("hall 4, attic 8, hall 6, attic 2, hall 6 closed, porch 8")
    shown = {column.second: column.says() for group in columns(walks) for column in group}
    assert shown == {3: "first visit", 13: "0:12 later", 23: "curtain", 33: "first visit"}
    longer = read_walk("hall 1, attic 2, hall 10, hall 3 closed, hall 9")
    assert [column.says() for column in columns(longer)[0]] == ["0:03 later", "curtain", "longer stay"]


def test_blocks_of_a_return_know_the_blocks_that_showed_the_same():
    walks = Walks.written(("hall", 2), ("attic", 1), ("hall", 1, "closed"), ("hall", 3), ("attic", 1))
    assert seen_before(walks) == [None, None, None, None, 0, 1, None, 2]


def test_what_comes_back_the_same_is_told_from_what_does_not():
    walks = read_walk("hall 2, attic 2, hall 2, hall 2 closed, hall 1, attic 1")
    kept, lost = film_of(walks), film_of(walks, houses=tuple("abcde"))
    same, other = returns_of(kept, walks), returns_of(lost, walks)
    assert [(one.room, one.start) for one in same] == [("hall", 4), ("hall", 8), ("attic", 9)]
    assert all(one.psnr == 40 for one in same), "a true return is alike up to the cap of the measures"
    assert all(one.psnr < 20 for one in other)
    strangers = of_strangers(kept, walks)
    assert strangers is not None
    assert strangers < 20
    assert of_strangers(kept[: 2 * 16 - 3], read_walk("hall 2")) is None


def test_the_lower_pictures_of_a_return_are_those_of_the_first_visit():
    walks = read_walk("hall 2, attic 1, hall 1")
    frames = film_of(walks)
    film = Film(names=["a"], walks=walks)
    shown = film.block(3, [frames])
    assert shown.shape == (16, 3, *reversed(film.size))
    upper, lower = (shown[8, :, top : top + 192, 16 : 16 + 384].float() for top in (92, 326))
    assert math.isclose(float((upper - lower).abs().max()), 0, abs_tol=2)
    first = film.block(0, [frames])
    assert len(first) == 13
    assert first[8, :, 326 : 326 + 192, 16 : 16 + 384].unique(dim=2).shape[2] == 1, "a first visit has nothing below"


@pytest.mark.parametrize("text", ["hall four", "hall 4 closed now", "4 hall", "hall -1"])
def test_walks_that_cannot_be_read_are_refused(text):
    with pytest.raises(WalkError, match="a visit is"):
        read_walk(text)


def test_the_command_is_where_the_entry_point_says():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    entry = EntryPoint("video", project["entry-points"][DEMOS]["video"], DEMOS)
    assert entry.load() is command.video
    assert "See tiered memory at work" in CliRunner().invoke(main, ["demo", "--help"]).output


def test_blocks_are_made_one_ahead_in_a_thread_of_their_own_which_also_ends_them():
    threads = []

    def made():
        try:
            for _ in range(5):
                threads.append(threading.get_ident())
                yield {}
        finally:
            threads.append(threading.get_ident())

    assert list(ahead(made())) == [{}] * 5
    assert len(threads) == 6
    begun = ahead(made())
    next(begun)
    begun.close()
    assert 8 <= len(threads) <= 9, "more than one block was made ahead, or the rest was not given up"
    assert threading.get_ident() not in threads
    assert len(set(threads[6:])) == 1
