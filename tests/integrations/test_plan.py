"""`kvtiers plan` knows models by name, folder and hub id, and says so when it does not."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs the extra 'transformers'")
pytest.importorskip("diffusers", reason="needs the extra 'diffusers'")

from click.testing import CliRunner
from diffusers import AutoencoderKLWan

from kvtiers.cli import main
from tiny_models import build as build_text
from tiny_wan import build as build_video


def planned(*arguments: str) -> tuple[int, str]:
    found = CliRunner(env={"COLUMNS": "120"}).invoke(main, ["plan", *arguments])
    return found.exit_code, found.output + (str(found.exception) if found.exception else "")


def autoencoder(**changes: Any) -> Any:
    """A tiny one, for its configuration."""
    wide = changes.get("z_dim", 16)
    return AutoencoderKLWan(
        base_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True], latents_mean=[0.0] * wide,
        latents_std=[1.0] * wide, **changes,
    )  # fmt: skip


def rows(printed: str) -> dict[str, list[str]]:
    lines = [line.split() for line in printed.splitlines()]
    return {line[0]: line[1:] for line in lines if len(line) == 7}


def test_the_published_figures_are_printed() -> None:
    code, printed = planned("--model", "wan2.1-t2v-1.3b", "--size", "832x480", "--seconds", "120")
    assert code == 0
    found = rows(printed)
    assert found["full"][:3] == ["748,800", "138.02", "172.52"]
    assert found["packforcing"][:2] == ["27,872", "3.99"]
    assert "without the current block" in " ".join(printed.split())
    windows = {"full", "packforcing", "rolling-window", "sink-rolling-window", "memrope", "longlive"}
    published = {"deep-forcing", "infinity-rope", "memflow", "framepack", "rolling-forcing", "fademem"}
    assert set(found) == {*windows, *published, "quant-videogen"}


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


def test_the_autoencoder_beside_a_wan_tells_its_scale(tmp_path: Path) -> None:
    build_video(in_channels=48, out_channels=48).save_config(tmp_path / "transformer")
    options = ["--model", str(tmp_path), "--size", "64x96", "--seconds", "8", "full"]
    code, printed = planned(*options)
    assert code != 0
    assert "48 channels with no vae/config.json beside it" in " ".join(printed.split())
    autoencoder(scale_factor_spatial=16, z_dim=48).save_config(tmp_path / "vae")
    code, printed = planned(*options)
    assert (code, rows(printed)["full"][0]) == (0, f"{32 * 2 * 3}")
    code, printed = planned("--model", str(tmp_path / "transformer"), *options[2:], "--size", "64x80")
    assert "multiples of 32 and 32 pixels, got 64 x 80" in " ".join(printed.split())
    autoencoder(scale_factor_temporal=8).save_config(tmp_path / "vae")
    code, printed = planned(*options)
    assert (code, rows(printed)["full"][0]) == (0, f"{16 * 4 * 6}")
    build_video(patch_size=(1, 4, 4)).save_config(tmp_path / "transformer")
    code, printed = planned(*options)
    assert (code, rows(printed)["full"][0]) == (0, f"{16 * 2 * 3}")
    build_video(patch_size=(2, 2, 2)).save_config(tmp_path / "transformer")
    assert "must belong to one latent frame" in " ".join(planned(*options)[1].split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            ["--model", "/nowhere/wan"],
            "wan2.1-t2v-1.3b, wan2.1-t2v-14b, or a folder. A language model: a hub id",
            id="hub",
        ),
        pytest.param(["--model", "/nowhere/wan"], "no installed plugin knows a model '/nowhere/wan'", id="name"),
        pytest.param(["--model", "wan2.2"], "give wan2.1-t2v-1.3b, wan2.1-t2v-14b, or a folder", id="another Wan"),
        pytest.param(["--model", "wan2.1-t2v-1.3b", "--size", "832"], "such as 832x480, got '832'", id="size"),
        pytest.param(
            ["--model", "wan2.1-t2v-1.3b", "--size", "830x480"], "multiples of 16 and 16 pixels", id="odd size"
        ),
        pytest.param(["--model", "wan2.1-t2v-1.3b", "--seconds", "0.1"], "0.25 s at 16 a second; got 0.1", id="short"),
        pytest.param(["--model", "wan2.1-t2v-1.3b", "--seconds", "nan"], "must be a finite number", id="nan seconds"),
        pytest.param(["--model", "wan2.1-t2v-1.3b", "packforcng"], "Did you mean 'packforcing'", id="policy"),
        pytest.param(["--model", "wan2.1-t2v-1.3b", "full:sink"], "settings are written key=value", id="setting"),
        pytest.param(["--model", "wan2.1-t2v-1.3b", "--block-frames", "1"], "commit longer blocks", id="short blocks"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments: list[str], message: str) -> None:
    code, printed = planned(*arguments)
    assert code != 0
    assert message in " ".join(printed.split())
