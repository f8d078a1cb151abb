"""The table of situations in tests/README.md: every row names a test that exists."""

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROW = re.compile(r"^\|(?P<situation>[^|]+)\|(?P<model>[^|]+)\|(?P<outcome>[^|]+)\|(?P<tests>[^|]+)\|$")
NAMED = re.compile(r"`?tests/(?P<file>[\w/]+\.py)::(?P<name>test_\w+)`?")


def rows() -> list[re.Match[str]]:
    text = (HERE / "README.md").read_text(encoding="utf-8")
    section = text[text.index("\n## Situations") :]
    lines = [
        line for line in section.splitlines() if line.startswith("|") and not line.startswith(("| situation", "| ---"))
    ]
    return [found for line in lines if (found := ROW.match(line)) or pytest.fail(f"no row of four cells: {line}")]


def test_the_table_has_rows_and_each_says_that_it_works_or_is_refused() -> None:
    outcomes = [row["outcome"].strip() for row in rows()]
    assert len(outcomes) > 100
    assert not [said for said in outcomes if not said.startswith(("works", "refused"))]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row["situation"].strip()[:60])
def test_every_situation_names_a_test_that_exists(row: re.Match[str]) -> None:
    named = NAMED.findall(row["tests"])
    assert named
    for file, name in named:
        assert re.search(rf"^def {name}\(", (HERE / file).read_text(encoding="utf-8"), re.MULTILINE), (file, name)
