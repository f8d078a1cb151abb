"""Every hook is documented with its exact signature, and has a test of its own (as in Datasette)."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("CONTRIBUTING.md", "README.md")


def hooks(code: str) -> dict[str, str]:
    """The hooks that `code` specifies, by name: each signature on one line, as the documents show it."""
    return {
        node.name: f"def {node.name}({ast.unparse(node.args)}) -> {ast.unparse(node.returns)}"
        for node in ast.parse(code).body
        if isinstance(node, ast.FunctionDef) and node.returns is not None and _is_hook(node)
    }


def _is_hook(node: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator).split("(")[0] == "hookspec" for decorator in node.decorator_list)


@cache
def names_of_tests(folder: Path) -> set[str]:
    """The names of all test functions."""
    return {
        node.name
        for path in folder.rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


HOOKS = hooks((ROOT / "kvtiers" / "hookspecs.py").read_text(encoding="utf-8"))


def test_the_hooks_are_found() -> None:
    from kvtiers import plugins

    assert set(HOOKS) == {*plugins.HOOKS.values(), "kvtiers_observe"}
    assert hooks("@hookspec\ndef a(x: int) -> None: ...\ndef b() -> None: ...") == {"a": "def a(x: int) -> None"}


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hooks_exact_signature_is_documented(hook: str) -> None:
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS]
    assert any(HOOKS[hook] in text for text in texts), f"{HOOKS[hook]!r} is in neither {' nor '.join(DOCUMENTS)}"


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_has_a_test_of_its_own(hook: str) -> None:
    found = [name for name in names_of_tests(ROOT / "tests") if name.startswith(f"test_{hook}_")]
    assert found, f"no test is named test_{hook}_...; tests/core/test_hooks.py is the place"


def test_the_worked_example_is_the_code_that_is_tested() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    code = (ROOT / "examples" / "custom_compressor" / "kvtiers_value_norm.py").read_text(encoding="utf-8")
    assert f"```python\n{code}```" in text, "copy examples/custom_compressor/kvtiers_value_norm.py into CONTRIBUTING.md"
