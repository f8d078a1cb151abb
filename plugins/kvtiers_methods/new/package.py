"""A package of one's own to begin with: `kvtiers new compressor NAME`. Its tests pass as it is written."""

import keyword
import re
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from string import Template
from tempfile import TemporaryDirectory

from kvtiers.errors import PolicyError
from kvtiers.plugins import HOOKS, registry

KINDS = {"sink": "sinks"} | {kind: kind for kind in ("compressor", "retriever", "realigner", "archive", "codec")}
"""What can be made, and the field of `kvtiers.Policy` that takes it."""
_TEMPLATES = Path(__file__).parent / "templates"
_LONGEST = 60
_NAME = re.compile("[a-z][a-z0-9]*(-[a-z0-9]+)*")


def write_package(slot: str, name: str, into: Path, *, whole_past: bool = False) -> Path:
    """Write the package `kvtiers-NAME` into the folder `into`, and return its folder.

    whole_past: of a compressor, whether it chooses among all tokens that ever left recent, and not within a block.

    Raises `PolicyError` for a name that cannot be one, or whose folder is there already. Nothing is overwritten.
    """
    class_name, module = "".join(part.capitalize() for part in name.split("-")), f"kvtiers_{name.replace('-', '_')}"
    if not _NAME.fullmatch(name) or len(name) > _LONGEST:
        raise PolicyError(f"a name is small letters, digits and single dashes, as in my-{slot}, got {name[:80]!r}")
    if any(name in registry().names(kind) for kind in HOOKS) or find_spec(module) is not None:
        raise PolicyError(f"{name!r} is the name of something that is installed already; choose another")
    folder = into / f"kvtiers-{name}"
    if folder.exists():
        raise PolicyError(f"{folder} is there already; choose another name, or remove it")
    if whole_past and slot != "compressor":
        raise PolicyError(f"--whole-past is for a compressor, got a {slot}")
    template = "whole_past" if whole_past else KINDS[slot]
    head, code, own_test = (_TEMPLATES / f"{template}.txt").read_text(encoding="utf-8").split("---\n")
    said = dict(line.split(": ", 1) for line in head.splitlines())
    lines = re.findall(r"^(?:from \S+ import|import) (.+)|^class (\w+)", code, re.MULTILINE)
    if keyword.iskeyword(class_name) or class_name in re.findall(r"\w+", str(lines)):
        raise PolicyError(f"{name!r} cannot be the name of a class: {class_name} is taken; choose another")
    words = {
        "slot": slot,
        "kind": KINDS[slot],
        "name": name,
        "distribution": f"kvtiers-{name}",
        "module": module,
        "class_name": class_name,
    }

    filled = partial(_filled, words)
    words |= {"usage": filled(said["usage"]), "own_test": filled(own_test)}
    words["factory"] = f"lambda: {class_name}({said['few']})" if "few" in said else class_name
    words["row"] = name if "few" in said else words["usage"].replace('"', "").replace(", ", ":", 1).replace(" ", "")
    words["torch"] = "import torch\n" if "torch." in own_test else ""
    words["itertools"] = "import itertools\n\n" if "itertools." in own_test else ""
    test = f"tests/test_{module.removeprefix('kvtiers_')}.py"
    files = {f"{module}.py": filled(code)} | {
        path: filled((_TEMPLATES / f"{template}.txt").read_text(encoding="utf-8"))
        for path, template in ((test, "test.py"), ("pyproject.toml", "pyproject.toml"), ("README.md", "README.md"))
    }
    try:
        into.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=into) as beside:  # a package is there whole or not at all
            whole = Path(beside) / folder.name
            for path, text in files.items():
                (whole / path).parent.mkdir(parents=True, exist_ok=True)
                (whole / path).write_text(text, encoding="utf-8")
            whole.rename(folder)
    except OSError as error:
        raise PolicyError(f"{folder} cannot be written: {error.strerror}") from error
    return folder


def _filled(words: Mapping[str, str], text: str) -> str:
    return Template(text).substitute(words)
