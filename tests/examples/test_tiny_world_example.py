"""examples/tiny_world: the picture it draws, and the configurations that lie beside it."""

import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "tiny_world"


def test_the_world_is_drawn_and_told_in_words(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["look.py", "--out", str(tmp_path / "world.png")])
    runpy.run_path(str(FOLDER / "look.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert (tmp_path / "world.png").stat().st_size > 10_000
    assert "hall, curtain closed" in said
    assert "(hidden)" in said


@pytest.mark.parametrize("path", sorted(FOLDER.glob("configs/*.toml")), ids=lambda path: path.stem)
def test_every_configuration_can_be_read(path):
    from kvtiers_packforcing.training import load_config

    assert load_config(path).run.stage == path.stem
