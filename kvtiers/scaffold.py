"""A package of one's own to begin with: `kvtiers new compressor NAME`. Its tests pass as it is written."""

import keyword
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from string import Template

from kvtiers.errors import PolicyError

KINDS = {"sink": "sinks"} | {kind: kind for kind in ("compressor", "retriever", "realigner", "archive", "codec")}
"""What can be made, and the field of `kvtiers.Policy` that takes it."""
_TEMPLATES = Path(__file__).parent / "templates"
_NAME = re.compile("[a-z][a-z0-9]*(-[a-z0-9]+)*")


def write_package(slot: str, name: str, into: Path) -> Path:
    """Write the package `kvtiers-NAME` into the folder `into`, and return its folder.

    Raises `PolicyError` for a name that cannot be one, or whose folder is there already. Nothing is overwritten.
    """
    if not _NAME.fullmatch(name) or keyword.iskeyword(name):
        raise PolicyError(f"a name is small letters, digits and single dashes, as in my-{slot}, got {name!r}")
    folder = into / f"kvtiers-{name}"
    if folder.exists():
        raise PolicyError(f"{folder} is there already; choose another name, or remove it")
    usage, code, own_test = (_TEMPLATES / f"{KINDS[slot]}.txt").read_text(encoding="utf-8").split("---\n")
    words = {
        "slot": slot,
        "kind": KINDS[slot],
        "name": name,
        "distribution": f"kvtiers-{name}",
        "module": f"kvtiers_{name.replace('-', '_')}",
        "class_name": "".join(part.capitalize() for part in name.split("-")),
    }

    filled = partial(_filled, words)
    words |= {"usage": filled(usage.removeprefix("usage: ").strip()), "own_test": filled(own_test)}
    words["torch"] = "import torch\n" if "torch." in own_test else ""
    module, test = f"{words['module']}.py", f"tests/test_{words['module'].removeprefix('kvtiers_')}.py"
    files = {module: filled(code)} | {
        path: filled((_TEMPLATES / f"{template}.txt").read_text(encoding="utf-8"))
        for path, template in ((test, "test.py"), ("pyproject.toml", "pyproject.toml"), ("README.md", "README.md"))
    }
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    return folder


def _filled(words: Mapping[str, str], text: str) -> str:
    return Template(text).substitute(words)
