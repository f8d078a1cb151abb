"""examples/tiny_world: the picture it draws."""

import runpy
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "examples" / "tiny_world"


def test_the_world_is_drawn_and_told_in_words(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["look.py", "--out", str(tmp_path / "world.png")])
    runpy.run_path(str(FOLDER / "look.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert (tmp_path / "world.png").stat().st_size > 10_000
    assert "hall, curtain closed" in said
    assert "(hidden)" in said
