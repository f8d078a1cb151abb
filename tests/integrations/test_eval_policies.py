"""`kvtiers eval policies`: what it measures is what the memories made, and what it cannot do is said at once."""

import json
import re

import pytest

pytest.importorskip("diffusers", reason="needs the extra 'diffusers'")

import torch
from click.testing import CliRunner

from kvtiers_packforcing.measures.command import evaluate
from kvtiers_packforcing.measures.measuring import measure_video
from kvtiers_packforcing.tiny_world import Walks
from kvtiers_packforcing.tiny_world.making import make_videos
from kvtiers_packforcing.tiny_world.sampling import Sampler
from kvtiers_packforcing.tiny_world.variants import choose_variants
from kvtiers_packforcing.tiny_world.weights import load_models
from tiny_videos import save_models, tiny_models


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_models(tiny_models(), tmp_path_factory.mktemp("weights"))


def ask(*words):
    return CliRunner().invoke(evaluate, ["policies", *map(str, words)])


def test_the_table_is_what_the_memories_made(weights, tmp_path):
    out, shape = tmp_path / "figures.json", ("--walks", 1, "--seeds", 2, "--seconds", "2,4", "--steps", 1)
    names = "packforcing,rolling-window"
    done = ask("--weights", weights, *shape, "--policies", names, "--decoder", "codec", "--json", out, "--all")
    assert done.exit_code == 0, done.output
    assert "4 s, 2 videos a row" in done.output
    rows = {row["name"]: row["seconds"] for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["codec", "packforcing", "rolling-window"]
    walks = Walks.of_seeds(["evaluation walk 0"] * 2, 4)
    chosen = choose_variants(names)
    made = [*make_videos(load_models(weights), chosen, walks, sampler=Sampler(steps=1), decoder="codec")]
    for variant in chosen:
        blocks = [block[variant.name] for block in made]
        video = torch.cat([block.pixels.half().float() for block in blocks], 2)
        found, wanted = rows[variant.name]["4"], measure_video(video, walks).figures()
        for name in ("flicker", "prompt", "drift_contrast"):
            assert found[name]["mean"] == pytest.approx(wanted[name].mean(), rel=1e-4), name
        assert found["flicker"]["videos"] == 2
        assert found["device_mb"]["mean"] == pytest.approx(blocks[-1].device_bytes / 2e6)
        assert found["host_mb"]["mean"] == pytest.approx(blocks[-1].host_bytes / 2e6)
        assert rows[variant.name]["2"]["device_mb"]["mean"] == pytest.approx(blocks[1].device_bytes / 2e6)
        assert found["block_seconds"]["mean"] > 0


@pytest.mark.parametrize(("width", "paper"), [(80, False), (120, True)])
def test_in_a_narrow_terminal_memories_stand_side_by_side_without_the_papers_column(weights, monkeypatch, width, paper):
    monkeypatch.setenv("COLUMNS", str(width))
    shape = ("--weights", weights, "--walks", 1, "--seeds", 1, "--seconds", 2, "--steps", 1, "--decoder", "codec")
    shown = ask(*shape, "--policies", "full,rolling-window").output
    (head,) = [line for line in shown.splitlines() if line.split()[:1] == ["measure"]]
    assert ("in the paper" in head) == paper
    assert head.split()[-3:] == ["codec", "full", "rolling-window"]
    assert max(map(len, shown.splitlines())) <= width


def test_what_was_kept_is_not_made_again(weights, tmp_path, monkeypatch):
    shape = ("--weights", weights, "--seeds", 1, "--seconds", "2,4", "--decoder", "codec")
    kept, tables = tmp_path / "kept.jsonl", [tmp_path / f"{name}.json" for name in "abc"]

    def made(table, policies, *words):
        done = ask(*shape, "--policies", policies, "--json", table, "--keep", kept, *words)
        assert done.exit_code == 0, done.output
        lines = [json.loads(line) for line in kept.read_text().splitlines()]
        return [(line["of"]["row"], line["of"]["walk"], line["of"]["sampler"]["steps"]) for line in lines]

    one = ("--walks", 1, "--steps", 1)
    assert made(tables[0], "full", *one) == [("full", 0, 1)]
    assert made(tables[1], "full,rolling-window", "--walks", 2, "--steps", 1) == [
        ("full", 0, 1), ("rolling-window", 0, 1), ("full", 1, 1), ("rolling-window", 1, 1),
    ]  # fmt: skip
    text = kept.read_text()
    made(tables[2], "full,rolling-window", "--walks", 2, "--steps", 1)
    assert kept.read_text() == text, "something was made again"
    assert tables[2].read_text() == tables[1].read_text(), "times of making included"
    assert ("full", 0, 2) in made(tables[0], "full", "--walks", 1, "--steps", 2), "other settings are not the same"
    made(tables[0], "full", *one, "--sampling", "multistep", "--shift", 3)
    last = json.loads(kept.read_text().splitlines()[-1])["of"]["sampler"]
    assert last == {"steps": 1, "shift": 3.0, "kind": "multistep", "guidance": 0.0}
    with monkeypatch.context() as patch:
        patch.setattr("kvtiers_packforcing.measures.policies.code_of", lambda policy: "another code")
        assert made(tables[0], "full", *one)[-1] == ("full", 0, 1), "figures of other code counted"
    kept.write_text(text[:-20])
    again = ask(*shape, "--policies", "full,rolling-window", "--keep", kept, "--walks", 2, "--steps", 1)
    assert again.exit_code == 0, again.output
    assert [json.loads(line)["of"]["walk"] for line in kept.read_text().splitlines()[4:]] == [1], "a torn line was lost"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--policies", "packforcng"), "unknown policy 'packforcng'.*Did you mean 'packforcing'"),
        (("--seconds", "5,x"), "are no whole seconds of 1 or more"),
        (("--weights", "nowhere"), "there are no weights in nowhere"),
        (("--json", "nowhere/figures.json"), "there is no folder nowhere"),
        (("--walks", 0), "0 is not in the range"),
        (("--shift", "nan"), "nan is no finite number"),
        (("--sampling", "heun"), "'heun' is not one of 'euler', 'multistep', 'renoise'"),
    ],
    ids=["policy", "seconds", "weights", "folder", "walks", "shift", "sampling"],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_loaded(words, says):
    done = ask(*words)
    assert done.exit_code != 0
    assert re.search(says, " ".join(done.output.split())), done.output
