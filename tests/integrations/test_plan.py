"""`kvtiers plan` knows models by name, folder and hub id, and says so when it does not."""

from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the extra 'transformers'")
pytest.importorskip("diffusers", reason="needs the extra 'diffusers'")

from click.testing import CliRunner

from kvtiers.cli import main
from tiny_models import build as build_text
from tiny_wan import build as build_video


def planned(*arguments: str) -> tuple[int, str]:
    found = CliRunner(env={"COLUMNS": "120"}).invoke(main, ["plan", *arguments])
    return found.exit_code, found.output + (str(found.exception) if found.exception else "")


def rows(printed: str) -> dict[str, list[str]]:
    lines = [line.split() for line in printed.splitlines()]
    return {line[0]: line[1:] for line in lines if len(line) == 7}


def test_the_published_figures_are_printed() -> None:
    code, printed = planned("--model", "wan2.1-t2v-1.3b", "--size", "832x480", "--seconds", "120")
    assert code == 0
    found = rows(printed)
    assert found["full"][:2] == ["748,800", "138.02"]
    assert found["packforcing"][:2] == ["27,872", "3.99"]
    assert set(found) == {"full", "packforcing", "rolling-window", "sink-rolling-window"}


def test_a_policy_can_be_changed_on_the_line() -> None:
    _, printed = planned("--model", "wan2.1-t2v-1.3b", "packforcing:top_k=8", "packforcing:sink=0,archive=device")
    found = rows(printed)
    assert found["packforcing:top_k=8"][0] == f"{27_872 - 8 * 182:,}"
    assert found["packforcing:sink=0,archive=device"][3] == "0.00"


def test_a_folder_with_a_configuration_is_enough(tmp_path: Path) -> None:
    build_video(layers=3, heads=2, head_dim=24).save_config(tmp_path / "wan")
    code, printed = planned("--model", str(tmp_path / "wan"), "--size", "64x64", "--seconds", "8", "full")
    assert (code, rows(printed)["full"][0]) == (0, f"{32 * 16}")
    build_text("gemma3").config.save_pretrained(tmp_path / "text")
    code, printed = planned("--model", str(tmp_path / "text"), "--tokens", "9000", "full", "streaming")
    assert code == 0
    assert [row[0] for row in rows(printed).values()] == ["9,000", f"{4 + 988 + 31 + 128:,}"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--model", "/nowhere/wan"], "no installed integration knows a model '/nowhere/wan'", id="name"),
        pytest.param(["--model", "wan2.1-t2v-1.3b", "--size", "832"], "such as 832x480, got '832'", id="size"),
        pytest.param(["--model", "wan2.1-t2v-1.3b", "--size", "830x480"], "multiples of 16 pixels", id="odd size"),
        pytest.param(["--model", "wan2.1-t2v-1.3b", "packforcng"], "Did you mean 'packforcing'", id="policy"),
        pytest.param(["--model", "wan2.1-t2v-1.3b", "full:sink"], "settings are written key=value", id="setting"),
        pytest.param(["--model", "wan2.1-t2v-1.3b", "--block-frames", "1"], "commit longer blocks", id="short blocks"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments: list[str], message: str) -> None:
    code, printed = planned(*arguments)
    assert code != 0
    assert message in " ".join(printed.split())
