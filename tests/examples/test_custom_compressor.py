"""examples/custom_compressor: a stranger's package, installed into a fresh environment and used by name."""

import ast
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from kvtiers.plugins import registry

PACKAGE = Path(__file__).parents[2] / "examples" / "custom_compressor"
USE = """
import json, sys, torch, kvtiers, kvtiers_value_norm
policy = kvtiers.policy("archive", compressor="value-norm", attend="compressed", recent=32, top_k=2)
layer = kvtiers.Layer(policy, kvtiers.Geometry(kv_heads=2, head_dim=4))
for _ in range(4):
    x = torch.randn(1, 2, 64, 4)
    layer.write(x, x)
    layer.select(x)
print(json.dumps({
    "file": kvtiers_value_norm.__file__,
    "compressor": type(policy.compressor).__module__,
    "preset": type(kvtiers.policy("value-norm-archive").compressor).__name__,
    "attended": layer.context().keys.shape[2],
    "tier_counts": layer.tier_counts(),
}))
"""


class Environment:
    """A fresh virtual environment that sees this one's packages, and into which only the example is installed."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False)
        self.folder = folder
        self.bin = folder / ("Scripts" if os.name == "nt" else "bin")
        (site,) = (path for path in folder.rglob("site-packages") if path.is_dir())
        ours = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        # addsitedir, not a bare path: it reads the .pth files there, which is how an editable kvtiers is found
        lines = [f"import site; site.addsitedir({path!r})\n" for path in ours]
        (site / "outer.pth").write_text("".join(lines), encoding="utf-8")

    def run(self, *arguments: str, cwd: Path) -> str:
        outside = {"PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME"}
        environment = {key: value for key, value in os.environ.items() if key not in outside}
        command = [str(self.bin / "python"), *arguments]
        ran = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Environment, Path]:
    """The environment with the example in it, and a folder to work in that holds nothing to import."""
    for needed in ("pip", "hatchling"):
        if find_spec(needed) is None:
            pytest.skip(f"installing a package from its source without a network needs {needed} (extra 'dev')")
    home = tmp_path_factory.mktemp("stranger")
    source = home / "source"
    shutil.copytree(PACKAGE, source, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    environment = Environment(home / "environment")
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet")
    environment.run("-m", "pip", "install", *offline, str(source), cwd=home)
    (home / "work").mkdir()
    return environment, home / "work"


def test_the_installed_package_is_used_by_name(installed: tuple[Environment, Path]) -> None:
    environment, work = installed
    used = json.loads(environment.run("-c", USE, cwd=work))
    assert Path(used["file"]).is_relative_to(environment.folder)
    assert used["compressor"] == "kvtiers_value_norm"
    assert used["preset"] == "ValueNorm"
    assert used["tier_counts"]["dropped"] == 0
    assert used["attended"] == 4 + 2 * 8 + used["tier_counts"]["recent"] + used["tier_counts"]["current"]


def test_the_command_line_lists_it_with_its_distribution(installed: tuple[Environment, Path]) -> None:
    environment, work = installed
    listed = json.loads(environment.run("-m", "kvtiers", "policies", "--json", cwd=work))
    (choice,) = (row for row in listed["slots"] if row["name"] == "value-norm")
    assert (choice["slot"], choice["distribution"]) == ("compressor", "kvtiers-value-norm")
    (preset,) = (row for row in listed["policies"] if row["name"] == "value-norm-archive")
    assert preset["distribution"] == "kvtiers-value-norm"
    assert preset["settings"]["compressor"] == {"name": "value-norm", "keep": 8}


def test_its_own_tests_pass_where_it_is_installed(installed: tuple[Environment, Path], tmp_path: Path) -> None:
    environment, _ = installed
    shutil.copytree(PACKAGE / "tests", tmp_path / "tests")
    shutil.copy(PACKAGE / "pyproject.toml", tmp_path)
    said = environment.run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path), cwd=tmp_path)
    assert "passed" in said
    assert "skipped" not in said


def test_this_environment_is_left_as_it_was(installed: tuple[Environment, Path]) -> None:
    environment, _ = installed
    spec = find_spec("kvtiers_value_norm")
    assert spec is None or not Path(str(spec.origin)).is_relative_to(environment.folder)
    assert not {"build", "dist"} & {path.name for path in PACKAGE.iterdir()}


def test_the_compressor_is_under_60_lines_of_code() -> None:
    text = (PACKAGE / "kvtiers_value_norm.py").read_text(encoding="utf-8")
    assert sum(bool(line.strip()) for line in text.splitlines()) < 60
    assert ast.parse(text)


def test_the_comparison_shows_every_installed_compressor_of_keys_and_values(
    example: Callable[[str], dict[str, Any]], tiny: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = tiny
    before = model.config._attn_implementation
    errors = example("custom_compressor/compare.py")["main"](model, tokenizer, tokens=512)
    printed = capsys.readouterr().out
    assert set(errors) == set(registry().names("compressor")) - {"dual-branch"}
    assert all(f"│ {name} " in printed for name in errors)
    assert errors["keep"] < 1e-5 < errors["mean-pool"]
    assert model.config._attn_implementation == before
