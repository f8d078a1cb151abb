"""The benchmark of drift: it measures what is there."""

import pytest
import torch
from click.testing import CliRunner

from kvtiers.cli import main
from kvtiers_packforcing.drift import REALIGNERS, errors


def test_anchors_that_are_rotated_again_drift_and_others_do_not():
    curves = {label: errors(realigner, 40, torch.bfloat16) for label, realigner in REALIGNERS.items()}
    again = curves.pop("incremental")
    assert again[0] < 0.003
    assert again[-1] > 8 * again[0]
    assert again[-1] == pytest.approx(again[19] * 2, rel=0.3)
    for curve in curves.values():
        assert max(curve) < 0.002
        assert max(curve) < 1.2 * min(curve)


def test_in_float32_nothing_drifts_that_anybody_would_see():
    assert max(errors("incremental", 40, torch.float32)) < 1e-5


def test_the_command_prints_a_table_and_draws_the_curve(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra 'cli'")
    picture = tmp_path / "drift.png"
    shown = CliRunner().invoke(main, ["bench", "drift", "--blocks", "20", "--out", str(picture)])
    assert shown.exit_code == 0, shown.output
    assert "incremental, once" in shown.output
    assert picture.read_bytes().startswith(b"\x89PNG")
