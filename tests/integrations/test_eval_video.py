"""`kvtiers eval video`: true videos, damaged ones, files, and figures of CLIP and DINO (tiny random models)."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
)

from kvtiers_diffusers import write_video
from kvtiers_packforcing.measures import DAMAGES, SCALES
from kvtiers_packforcing.measures.clip_scores import ClipScores
from kvtiers_packforcing.measures.command import evaluate
from kvtiers_packforcing.measures.results import Results
from kvtiers_packforcing.measures.rows import Row, drawn, measure_rows
from kvtiers_packforcing.tiny_world import Walks, prompts_of

WALK = Walks.written(("hall", 2), ("attic", 5), ("hall", 2))


def run(*arguments: str | Path):
    return CliRunner().invoke(evaluate, ["video", *map(str, arguments)], env={"COLUMNS": "140"})


def filmed(path: Path, walk: Walks = WALK) -> Path:
    pixels = drawn("filmed", walk)
    write_video(path, [(pixels.transpose(1, 2) + 1) / 2])
    return path


def prompts_in(path: Path, walk: Walks = WALK) -> Path:
    path.write_text("\n".join(prompts_of(walk)), encoding="utf-8")
    return path


def test_true_videos_are_shown_beside_what_is_wrong_on_purpose(tmp_path: Path) -> None:
    ran = run("--truth", "--videos", 1, "--seconds", 3, "--json", tmp_path / "figures.json")
    assert ran.exit_code == 0, ran.output
    said = json.loads((tmp_path / "figures.json").read_text())
    rows = {row["name"]: row for row in said["rows"]}
    assert {"codec", "truth"} <= set(rows)
    assert {name.split()[0] for name in rows} - {"codec", "truth"} == set(DAMAGES)
    assert [name for name, row in rows.items() if row["ceiling"]] == ["codec"]
    truth = rows["truth"]["seconds"]["3"]
    assert truth["curtain"] == {"mean": 1.0, "low": None, "high": None, "videos": 1, "events": 3}
    assert truth["identity"]["mean"] is None, "nothing comes back within 3 s"
    assert set(SCALES) <= set(said["measures"])
    for word in ("codec", "truth", "flickering", "dynamic degree"):
        assert word in ran.output


def test_a_file_is_measured_against_its_prompts(tmp_path: Path) -> None:
    film, prompts = filmed(tmp_path / "mine.mp4"), prompts_in(tmp_path / "prompts.txt")
    short = run(film, "--prompts", prompts, "--seconds", 10)
    assert "shorter than 10 s" in " ".join(short.output.split())
    ran = run(film, "--prompts", prompts, "--seconds", "9,30", "--json", tmp_path / "figures.json", "--all")
    assert ran.exit_code == 0, ran.output
    rows = {row["name"]: row["seconds"]["9"] for row in json.loads((tmp_path / "figures.json").read_text())["rows"]}
    assert set(rows) == {"mine", "codec"}
    assert rows["mine"]["identity"]["mean"] == rows["mine"]["prompt"]["mean"] == 1
    assert rows["mine"]["return_psnr"]["mean"] > 25, "H.264 costs something"
    assert "flicker" in ran.output


def test_a_folder_is_one_row_and_each_video_has_its_walk(tmp_path: Path) -> None:
    (tmp_path / "policy").mkdir()
    for seed in ("1", "2"):
        filmed(tmp_path / "policy" / f"{seed}.mp4", Walks.of_seeds([seed], 4))
    ran = run(tmp_path / "policy", "--walk", 1, "--walk", 2, "--seconds", 4, "--json", tmp_path / "figures.json")
    assert ran.exit_code == 0, ran.output
    (row, ceiling) = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert (row["name"], ceiling["name"]) == ("policy", "codec")
    assert row["seconds"]["4"]["curtain"] == ceiling["seconds"]["4"]["curtain"]
    assert row["seconds"]["4"]["curtain"]["videos"] == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "either video files or --truth"),
        (["--truth", "film.mp4"], "either video files or --truth"),
        (["absent.mp4"], "there is no absent.mp4"),
        (["empty"], "holds no .mp4 file"),
        (["notes.txt"], "is no .mp4 file"),
        (["film.mp4"], "either --walk SEED or --prompts FILE"),
        (["film.mp4", "--walk", "1", "--prompts", "prompts.txt"], "either --walk SEED or --prompts FILE"),
        (["film.mp4", "--walk", "1", "--walk", "2"], "got 2 walks for rows of 1 videos"),
        (["film.mp4", "--prompts", "notes.txt"], "unknown word 'dear'"),
        (["film.mp4", "--prompts", "blank.txt"], "has no prompts"),
        (["broken.mp4", "--prompts", "prompts.txt"], "no video that can be read"),
        (["film.mp4", "--walk", "1", "--clip", "empty"], "--clip: empty holds no model of transformers"),
        (["film.mp4", "--walk", "1", "--dino", "empty"], "--dino: empty holds no model of transformers"),
        (["--truth", "--autoencoder", "empty"], "--autoencoder: empty holds no autoencoder"),
        (["--truth", "--json", "absent/figures.json"], "there is no folder absent"),
        (["--truth", "--seconds", "0,5"], "'0,5' are no whole seconds of 1 or more"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_what_cannot_be_measured_is_refused_with_what_to_do(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name, text in (("notes.txt", "dear diary"), ("blank.txt", "\n"), ("film.mp4", ""), ("broken.mp4", "no film")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    prompts_in(tmp_path / "prompts.txt")
    ran = run(*arguments)
    assert ran.exit_code in (1, 2)
    assert says in " ".join(ran.output.split())


def test_any_way_to_make_videos_is_a_row() -> None:
    results, seen = Results(seconds=[2, 4], ceiling="codec"), []

    def make(seed, walk):
        yield from drawn(seed, walk).split(16, 2)

    rows = [Row(name="mine", make=make), Row(name="codec", make=lambda seed, walk: [drawn(seed, walk)])]
    walks = [(seed, Walks.of_seeds([seed], 4)) for seed in range(2)]
    measure_rows(rows, walks, results, done=lambda: seen.append(1))
    assert len(seen) == 4
    assert results.lengths() == [2, 4]
    assert results.summaries("mine", 4)["curtain"].events == 8
    assert results.summaries("mine", 4)["curtain"].mean == 1


def clip_in(folder: Path) -> Path:
    """A tiny random CLIP with a tokenizer of letters."""
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    letters = "abcdefghijklmnopqrstuvwxyz,"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: nth for nth, word in enumerate(words)}
    text = CLIPTextConfig(**size, vocab_size=len(words), bos_token_id=len(words) - 2, eos_token_id=len(words) - 1)
    vision = CLIPVisionConfig(**size, image_size=32, patch_size=16)
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)).save_pretrained(
        folder
    )
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    eyes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**eyes).save_pretrained(folder)
    return folder


def dino_in(folder: Path) -> Path:
    """A tiny random DINOv2."""
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16)
    Dinov2Model(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_clip_and_dino_are_plumbed_in(tmp_path: Path) -> None:
    """Random models say nothing of quality. What is checked: the right frames and prompts reach them."""
    scores = ClipScores(clip=clip_in(tmp_path / "clip"), dino=dino_in(tmp_path / "dino"))
    walk = Walks.of_seeds([1], 21)
    pixels = drawn(1, walk)
    found = scores.figures(pixels, walk)
    assert set(found) == {"clip_score", "clip_drop", "subject_consistency"}
    assert -100 <= found["clip_score"].mean() <= 100
    assert found["clip_score"].weights.tolist() == [21]
    assert found["clip_drop"].weights.tolist() == [1]
    still = scores.figures(pixels[:, :, 20:21].expand_as(pixels), walk)
    assert still["subject_consistency"].mean() == pytest.approx(100, abs=1e-3)
    assert found["subject_consistency"].mean() < 99.99
    short = scores.figures(pixels[:, :, :77], walk)
    assert short["clip_drop"].weights.tolist() == [0]
