"""The documents that the demo and the benchmarks read: all there, and nothing in them that is not theirs."""

from itertools import pairwise
from pathlib import Path

from kvtiers_transformers.document import read_document


def test_the_novel_is_whole_and_nothing_but_the_book() -> None:
    text = read_document()
    assert text.startswith("CHAPTER 1\n\nNo one who had ever seen Catherine Morland")
    assert text.endswith("already engaged for the evening.\n")
    assert [f"CHAPTER {n}" in text for n in range(1, 9)] == [True] * 7 + [False]
    assert "Gutenberg" not in text
    assert text.isascii()
    assert not any(line != line.strip() for line in text.splitlines())


def test_the_licence_is_whole_and_nothing_else() -> None:
    text = read_document("past")
    assert text.split()[:3] == ["GNU", "GENERAL", "PUBLIC"]
    assert text.endswith("<https://www.gnu.org/licenses/why-not-lgpl.html>.\n")
    assert len(text) == 35_149


def test_entries_are_sentences_of_the_novel_without_its_order() -> None:
    novel, entries = read_document(), read_document("entries").strip().split("\n\n")
    assert len(entries) == len(set(entries)) == 407
    at = [novel.index(entry) for entry in entries]
    neighbours = sum(0 < then - now < 500 for now, then in pairwise(at))
    assert neighbours < 10


def test_the_manual_is_all_that_python_says_of_its_language() -> None:
    text = read_document("manual")
    assert 'The "assert" statement' in text
    assert len(text) > 200_000


def test_a_file_is_read_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("é\n", encoding="utf-8")
    assert read_document(str(tmp_path / "own.txt")) == "é\n"
