"""A name for what the code of a policy computes, so that results of other code are not taken for its own."""

import ast
import inspect
import sys
from hashlib import sha256
from types import ModuleType

import transformers

import kvtiers
from kvtiers import Policy
from kvtiers.policy import SLOTS

_NOT_LOOKED_INTO = ("kvtiers", "builtins", "abc", "typing", "torch", "attr", "attrs")
"""Packages that versions stand for."""


def code_of(policy: Policy | None) -> str:
    """A hash of the modules that define the choices of `policy`, and of those of their packages that they use.

    Comments and docstrings do not count. The version of kvtiers stands for its core. A cache of transformers (None) is
    named by the version of transformers.
    """
    if policy is None:
        return f"transformers {transformers.__version__}"
    found: dict[str, str] = {}
    choices = [type(getattr(policy, slot)) for slot in SLOTS]
    waiting = [each.__module__ for choice in choices for each in choice.__mro__]
    while waiting:
        name = waiting.pop()
        if name in found or _package(name) in _NOT_LOOKED_INTO or name not in sys.modules:
            continue
        module = sys.modules[name]
        found[name] = _bare(module)
        for value in vars(module).values():
            used = value if isinstance(value, ModuleType) else inspect.getmodule(value)
            if used is not None and _package(used.__name__) == _package(name):
                waiting.append(used.__name__)
    whole = "\n".join(f"{name}\n{found[name]}" for name in sorted(found))
    return f"kvtiers {kvtiers.__version__} {sha256(whole.encode()).hexdigest()[:12]}"


def _package(module: str) -> str:
    return module.partition(".")[0]


def _bare(module: ModuleType) -> str:
    """The source without comments and docstrings; nothing where there is no source."""
    try:
        tree = ast.parse(inspect.getsource(module))
    except (OSError, TypeError, SyntaxError):
        return ""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            said = [part for part in node.body if not _is_text(part)]
            node.body = said or [ast.Pass()]
    return ast.unparse(tree)


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
