"""A name for what the code of a policy computes, so that results of other code are not taken for its own."""

import ast
import sys
from collections.abc import Iterator
from hashlib import sha256
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import Any

import attrs

import kvtiers
from kvtiers import Policy
from kvtiers.policy import SLOTS

_PLUGINS = "kvtiers_"
_INTEGRATIONS = ("kvtiers_models", "kvtiers_transformers", "kvtiers_diffusers")


def code_of(policy: Policy) -> str:
    """A hash of the modules that define the choices of `policy`, and of what they import from their package or plugins.

    Docstrings and lines of comments do not count. The version of kvtiers stands for its core and integrations.
    """
    found: dict[str, str] = {}
    waiting = [
        (each.__module__, each.__module__)
        for choice in _choices(policy, SLOTS)
        for each in type(choice).__mro__
        if _package(each.__module__) not in ("kvtiers", *sys.stdlib_module_names)
    ]
    while waiting:
        name, by = waiting.pop()
        other = _package(name) != _package(by)
        if name in found or (other and (not name.startswith(_PLUGINS) or _package(name) in _INTEGRATIONS)):
            continue
        path = _source(name)
        if path is not None:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
            found[name] = _bare(text, tree)
            waiting += [(used, name) for used in _imported(tree, name, is_package=path.name == "__init__.py")]
    whole = "\n".join(f"{name}\n{found[name]}" for name in sorted(found))
    return f"kvtiers {kvtiers.__version__} {sha256(whole.encode()).hexdigest()[:12]}"


def _choices(holder: Any, names: tuple[str, ...]) -> Iterator[Any]:
    """What these fields hold, and what is within it."""
    for name in names:
        choice = getattr(holder, name)
        if attrs.has(type(choice)):
            yield choice
            yield from _choices(choice, tuple(field.name for field in attrs.fields(type(choice))))


def _package(module: str) -> str:
    return module.partition(".")[0]


def _source(module: str) -> Path | None:
    """The file of a module; None if it has none, or there is no such module."""
    try:
        spec = find_spec(module)
    except (ImportError, AttributeError, ValueError):
        return None
    origin = None if spec is None else spec.origin
    return Path(origin) if origin is not None and origin.endswith(".py") and Path(origin).is_file() else None


def _imported(tree: ast.Module, name: str, *, is_package: bool) -> Iterator[str]:
    """The names of modules that are imported anywhere in a module, and of what might be one."""
    package = name if is_package else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module or ""
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _bare(text: str, tree: ast.Module) -> str:
    """The lines of a module without its docstrings, comments of a line of their own, and empty lines."""
    said: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            said |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = [line.rstrip() for number, line in enumerate(text.splitlines(), 1) if number not in said]
    return "\n".join(line for line in lines if line and not line.lstrip().startswith("#"))
