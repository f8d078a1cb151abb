"""What the house is built like, read from its source: who imports whom, who uses whose private names, what is named."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import kvtiers

CORE = Path(kvtiers.__file__).parent
CHECKOUT = CORE.parent
FOLDERS = [folder for folder in ("kvtiers", "plugins", "integrations") if (CHECKOUT / folder).is_dir()]
MOST_LINES = 350
NO_OTHER_WAY = {"_keep_in_fp32_modules", "_compiled_call_impl", "_version", "_feat_map", "_attn_implementation"}
"""Private names of model libraries, which have no public ones for what these say."""
BELONGS_TO_OTHERS = re.compile(
    r"packforcing|affinity|page-bounds|mean-pool|top-tokens|dual-branch|recency|sliding-window"
    r"|\bwan\d?\b|llama|smollm|transformers|diffusers",
    re.IGNORECASE,
)


def sources(folder: str) -> list[Path]:
    found = sorted((CHECKOUT / folder).rglob("*.py"))
    assert found, f"there is no source in {folder} of {CHECKOUT}"
    return found


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(tree: ast.Module, modules: set[str]) -> set[str]:
    """Which of `modules` of the core a source imports, anywhere: in functions and for type checkers too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & modules if inner & modules else {node.module}
    return {name.removeprefix("kvtiers.") for name in found & modules}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import one another in a circle, or nothing."""
    whole: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        found = [] if name in whole else next(filter(None, (visit(n, [*path, name]) for n in sorted(graph[name]))), [])
        whole.add(name)
        return found

    return next(filter(None, (visit(name, []) for name in sorted(graph))), [])


def test_no_modules_of_the_core_import_one_another_in_a_circle():
    paths = {"kvtiers" if path.stem == "__init__" else path.stem: path for path in sources("kvtiers")}
    modules = {"kvtiers", *(f"kvtiers.{name}" for name in paths)}
    graph = {name: imported(tree_of(path), modules) for name, path in paths.items()}
    assert graph["layer"] >= {"ageing", "history"}, "the graph lacks imports that are there"
    assert circle(graph | {"geometry": {"history"}}), "a circle is not seen"
    assert circle(graph) == []


def private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name != "_"


def strangers(tree: ast.Module) -> Iterator[str]:
    """Uses of private names that the source itself does not define."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    own |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from (f"line {node.lineno}: imports {part}" for part in parts if private(part))
        elif isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in own | NO_OTHER_WAY:
            of = node.value.id if isinstance(node.value, ast.Name) else None
            if of not in ("self", "cls"):
                yield f"line {node.lineno}: uses {ast.unparse(node)}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_module_uses_a_private_name_of_another(folder):
    seen = strangers(ast.parse("from a import _b\nimport a\na._c\n_d = 0\na._d"))
    assert list(seen) == ["line 1: imports _b", "line 3: uses a._c"]
    found = [f"{path.relative_to(CHECKOUT)}, {use}" for path in sources(folder) for use in strangers(tree_of(path))]
    assert found == []


def told(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Names and texts of a source, without docstrings, which may cite a paper or show an example."""
    texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            yield node.lineno, node.value
        for name in (getattr(node, field, None) for field in ("id", "attr", "arg", "name", "module")):
            if isinstance(name, str):
                yield getattr(node, "lineno", 0), name


@pytest.mark.parametrize("path", sources("kvtiers"), ids=lambda path: path.stem)
def test_the_core_names_no_plugin_and_no_model_library(path):
    assert [word for _, word in told(ast.parse("x = 'Llama'")) if BELONGS_TO_OTHERS.search(word)] == ["Llama"]
    assert [f"line {line}: {text}" for line, text in told(tree_of(path)) if BELONGS_TO_OTHERS.search(text)] == []


@pytest.mark.parametrize("path", sources("kvtiers"), ids=lambda path: path.stem)
def test_no_file_of_the_core_is_long(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES
