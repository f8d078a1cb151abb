"""The long documents that the demo reads and the benchmarks are measured on; none has to be fetched.

They differ in what a token is best told from. Prose (`novel`) is mostly told from the sentences just before. A licence
(`past`) says again what it has said, so whatever was lost shows. Of sentences without order (`entries`) the last ones
say nothing of the next, and nothing announces where in such a text something stands. No preset was tuned on the manual
(`manual`).
"""

import re
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, files
from importlib.resources import files as resources
from pathlib import Path
from pydoc_data.topics import topics
from typing import Final

DOCUMENTS: Final = ("novel", "past", "entries", "manual")
"""The documents by name."""

_GPL_OF_DEBIAN: Final = Path("/usr/share/common-licenses/GPL-3")
_GPL: Final = re.compile(r" +GNU GENERAL PUBLIC LICENSE\n +Version 3, 29 June 2007\n.*?/why-not-lgpl\.html>\.\n", re.S)
_AFTER_A_SENTENCE: Final = re.compile(r"(?<=[.!?\"])(?<!Mr\.)(?<!Mrs\.)\s+(?=[\"A-Z])|\n\n")
_SHORTEST_ENTRY: Final = 40
"""Characters."""


def read_document(name: str = "novel") -> str:
    """The document of that name, or the text in the file of that name.

    novel: chapters 1 to 7 of Jane Austen's *Northanger Abbey*. These are 68,935 characters, 15,950 tokens of SmolLM2.
        One line per paragraph (verse excepted), an empty line between paragraphs. Public domain; `data/README.md` says
        where it is from.
    past: the GNU General Public License, version 3, which numpy's wheels carry in their licence, and Debian in its base
        system. It is read and not shipped. Raises `FileNotFoundError` if neither is there.
    entries: the sentences of the novel that have at least 40 characters, each a paragraph of its own, in the order of
        their hashes, which has no meaning and is the same everywhere.
    manual: what Python says of its own language, `pydoc_data.topics`; the text is that of the Python that runs.
    """
    if name == "novel":
        return (resources(__package__) / "data" / "northanger_abbey.txt").read_text(encoding="utf-8")
    if name == "past":
        return _licence()
    if name == "entries":
        pieces = [piece.strip() for piece in _AFTER_A_SENTENCE.split(read_document())]
        entries = [piece for piece in pieces if len(piece) >= _SHORTEST_ENTRY]
        return "\n\n".join(sorted(entries, key=lambda entry: sha256(entry.encode()).digest())) + "\n"
    if name == "manual":
        return "\n\n".join(topics.values())
    return Path(name).read_text(encoding="utf-8")


def _licence() -> str:
    """The GNU General Public License, found on this machine."""
    try:
        of_numpy = [Path(str(found.locate())) for found in files("numpy") or [] if found.name == "LICENSE.txt"]
    except PackageNotFoundError:
        of_numpy = []
    for path in (*of_numpy, _GPL_OF_DEBIAN):
        found = _GPL.search(path.read_text(encoding="utf-8")) if path.is_file() else None
        if found:
            return found.group()
    raise FileNotFoundError(
        f"the GNU GPL is neither in the licence of numpy's wheel nor at {_GPL_OF_DEBIAN}; save it as a file, from "
        "https://www.gnu.org/licenses/gpl-3.0.txt, and give that file"
    )
