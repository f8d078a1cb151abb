"""`kvtiers new`: a package is written whose own tests pass."""

import subprocess
import sys
import tomllib

import pytest
from click.testing import CliRunner

from kvtiers.cli import main
from kvtiers.errors import PolicyError
from kvtiers_methods.new.package import KINDS, write_package


@pytest.mark.parametrize(
    ("slot", "more"),
    [
        ("compressor", ["--whole-past"]),
        *(pytest.param(slot, [], marks=pytest.mark.slow) for slot in KINDS),
    ],
)
def test_the_tests_of_a_new_package_pass_as_it_is_written(slot, more, tmp_path):
    done = CliRunner().invoke(main, ["new", slot, f"my-own-{slot}", "--into", str(tmp_path), *more])
    assert done.exit_code == 0, done.output
    folder = tmp_path / f"kvtiers-my-own-{slot}"
    assert str(folder) in done.output
    said = tomllib.loads((folder / "pyproject.toml").read_text())
    assert said["project"]["entry-points"]["kvtiers"] == {f"my-own-{slot}": f"kvtiers_my_own_{slot}"}
    checked = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"], cwd=folder, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "3 passed" in checked.stdout
    style = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "E,F,I,W", "--line-length", "120"]
    assert subprocess.run(style, cwd=folder, capture_output=True, text=True).stdout.strip() == "All checks passed!"


@pytest.mark.slow
def test_a_new_package_that_is_wrong_fails_its_own_tests(tmp_path):
    folder = write_package("compressor", "wrong", tmp_path)
    path = folder / "kvtiers_wrong.py"
    path.write_text(path.read_text().replace("return -(-tokens // self.every)", "return tokens"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    checked = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert "2 failed" in checked.stdout


@pytest.mark.parametrize("name", ["", "My", "a_b", "-a", "a--b", "a" * 99, "../a"])
def test_a_name_that_cannot_be_one_is_refused(name, tmp_path):
    with pytest.raises(PolicyError, match="a name is small letters, digits and single dashes"):
        write_package("codec", name, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("keep", "installed already"),
        ("policies", "installed already"),
        ("true", "cannot be the name of a class"),
        ("mapping", "Mapping is taken"),
    ],
)
def test_a_name_that_would_hide_another_is_refused(name, message, tmp_path):
    with pytest.raises(PolicyError, match=message):
        write_package("compressor", name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PolicyError, match="cannot be written"):
        write_package("codec", "mine", tmp_path / "file" / "within")


def test_only_a_compressor_chooses_among_the_whole_past(tmp_path):
    with pytest.raises(PolicyError, match="--whole-past is for a compressor, got a codec"):
        write_package("codec", "mine", tmp_path, whole_past=True)


def test_nothing_is_overwritten(tmp_path):
    write_package("codec", "mine", tmp_path)
    with pytest.raises(PolicyError, match="is there already; choose another name"):
        write_package("retriever", "mine", tmp_path)
