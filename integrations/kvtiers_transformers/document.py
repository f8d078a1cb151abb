"""The long document that the demo reads and the benchmarks are measured on."""

from importlib.resources import files


def read_document() -> str:
    """Chapters 1 to 7 of Jane Austen's *Northanger Abbey*: 68,935 characters, 15,950 tokens of SmolLM2.

    One line per paragraph (verse excepted), an empty line between paragraphs. Public domain; `data/README.md` says
    where it is from.
    """
    return (files(__package__) / "data" / "northanger_abbey.txt").read_text(encoding="utf-8")
