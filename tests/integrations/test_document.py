"""The document that the demo reads: all there, and nothing in it that is not the author's."""

from kvtiers_transformers.document import read_document


def test_the_document_is_whole_and_nothing_but_the_book() -> None:
    text = read_document()
    assert text.startswith("CHAPTER 1\n\nNo one who had ever seen Catherine Morland")
    assert text.endswith("already engaged for the evening.\n")
    assert [f"CHAPTER {n}" in text for n in range(1, 9)] == [True] * 7 + [False]
    assert "Gutenberg" not in text
    assert text.isascii()
    assert not any(line != line.strip() for line in text.splitlines())
