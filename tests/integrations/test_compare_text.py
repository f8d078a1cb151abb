"""`kvtiers compare text`: tasks hide what they ask for, results are kept as they come, policies fit a budget."""

import csv
import json
from pathlib import Path

import attrs
import pytest

pytest.importorskip("rich", reason="needs the extra 'cli'")
pytest.importorskip("tokenizers", reason="needs the extra 'demo'")

import torch
from click.testing import CliRunner

import tiny_chat
from kvtiers import Geometry, PolicyError, policy
from kvtiers_transformers.budgets import fitted
from kvtiers_transformers.compare_report import Row, interval, markdown
from kvtiers_transformers.compare_text import text
from kvtiers_transformers.plain_cache import PlainCache
from kvtiers_transformers.reading import read
from kvtiers_transformers.tasks import TASKS, Question, make_task
from tiny_models import build, given, tokens

GEOMETRY = Geometry(kv_heads=2, query_heads=4, head_dim=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat.save(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("name", TASKS)
def test_a_task_hides_its_answers_in_the_text_and_not_in_the_question(name: str) -> None:
    encode, decode = (lambda text: [ord(letter) for letter in text]), lambda ids: "".join(map(chr, ids))
    prose = encode("a quiet day by the sea " * 400)
    task = make_task(name, prose, encode, tokens=4000, seed=1)
    whole = decode(task.document)
    for question in task.questions:
        assert len(task.document) + len(question.ids) + question.tokens <= 4000
        assert len(task.document) > 3500
        for answer in question.answers:
            assert answer in whole
            assert answer not in decode(question.ids)
        assert question.score(f" {', '.join(question.answers)}.") == 1
        assert question.score("nothing of the kind") == 0
    assert make_task(name, prose, encode, tokens=4000, seed=1) == task
    assert make_task(name, prose, encode, tokens=4000, seed=2).questions != task.questions


def test_a_part_of_the_answers_is_a_part_of_the_score() -> None:
    question = Question(ids=[], answers=("12345", "67890"))
    assert question.score("1 2 3 4 5 and 99999") == 0.5


@pytest.mark.parametrize("name", ["sliding-window", "streaming", "archive", "packforcing-lm", "h2o", "token-merging"])
def test_a_policy_is_brought_to_a_number_of_tokens(name: str) -> None:
    for limit in (700, 1100):
        bound = fitted(policy(name), GEOMETRY, tokens=limit).bound(GEOMETRY)
        assert bound is not None
        assert limit - 64 < bound <= limit
    held = fitted(policy(name), GEOMETRY, layer_bytes=2_000_000, length=512)
    assert held.recent is not None
    most = held.bound_bytes(GEOMETRY, 512 // held.block_size)
    assert most is not None
    assert 1_800_000 < most <= 2_000_000
    more = attrs.evolve(held, recent=held.recent + 64).bound_bytes(GEOMETRY, 512 // held.block_size)
    assert more is not None
    assert more > 2_000_000


def test_what_cannot_be_brought_to_a_size_says_so_and_full_stays_as_it_is() -> None:
    for name in ("full", "kivi"):
        assert fitted(policy(name), GEOMETRY, tokens=100) == policy(name)
    with pytest.raises(PolicyError, match="with recent = 16 it still needs more than 100 tokens"):
        fitted(policy("archive"), GEOMETRY, tokens=100)


def test_results_are_kept_as_they_come_and_measured_once(folder: Path, tmp_path: Path) -> None:
    asked = ["--model", str(folder), "--tokens", "1500", "--seeds", "2", "--tasks", "single,chat,again"]
    asked += ["--out", str(tmp_path / "out"), "--budget", "500"]
    first = CliRunner().invoke(text, [*asked, "transformers:dynamic", "full"])
    assert first.exit_code == 0, first.output
    path = tmp_path / "out" / "results.jsonl"
    lines = path.read_text().splitlines()
    assert len(lines) == 2 * 3 * 2
    half = [json.loads(line) for line in lines]
    perplexities = {
        said["row"]["policy"]: said["row"]["score"]
        for said in half
        if said["job"]["task"] == "again" and said["job"]["seed"] == 0
    }
    assert perplexities["full"] == pytest.approx(perplexities["transformers:dynamic"], rel=1e-5)
    path.write_text("\n".join([*lines[:-1], lines[-1][:40]]))  # as if it had been killed while it wrote the last line
    more = CliRunner().invoke(text, [*asked, "transformers:dynamic", "full", "streaming"])
    assert more.exit_code == 0, more.output
    kept = path.read_text().splitlines()
    assert kept[:11] == lines[:-1]
    assert len(kept) == 12 + 1 + 6
    assert sum('"policy": "streaming"' in line for line in kept) == 6
    table = list(csv.reader((tmp_path / "out" / "table.csv").read_text().splitlines()))
    assert table[0][:4] == ["policy", "single", "chat", "again (ppl)"]
    assert [line[0] for line in table[1:]] == ["transformers:dynamic", "full", "streaming"]
    attended = {line[0]: int(line[4].replace(",", "")) for line in table[1:]}
    assert attended["streaming"] <= 500 < 1400 < attended["full"]
    again = CliRunner().invoke(text, [*asked, "streaming"])
    assert path.read_text().splitlines() == kept
    assert again.output.count("| transformers:dynamic |") == 1, "what was measured before is left out"
    assert (tmp_path / "out" / "picture.png").stat().st_size > 1000
    assert "| streaming |" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--tasks", "singl"], "unknown task 'singl'.*Did you mean 'single'"),
        (["--tasks", ","], "no tasks are named"),
        (["--budget", "20kB"], "a number of tokens, as 1024, or of megabytes, as 20MB, got '20kB'"),
        (["--budget", "²"], "a number of tokens, as 1024"),
        (["--budget", "90", "--tokens", "300", "archive"], "none of these policies fits into the budget"),
        (["--tokens", "256", "--tasks", "chat", "full"], "256 tokens have no room for the task 'chat'; give at least"),
        (["nonsense"], "unknown policy 'nonsense'"),
    ],
    ids=["task", "no tasks", "budget", "no digit", "does not fit", "no room", "policy"],
)
def test_what_cannot_be_compared_is_refused(asked: list[str], message: str, folder: Path, tmp_path: Path) -> None:
    command = ["--model", str(folder), "--out", str(tmp_path / "out"), *asked]
    with pytest.raises(PolicyError, match=message):
        CliRunner().invoke(text, command, catch_exceptions=False)


def test_the_models_own_cache_is_asked_as_kvtiers_is() -> None:
    model, ids = build("llama"), tokens(40)
    cache = PlainCache(config=model.config)
    read(model, ids[0].tolist(), cache)
    assert cache.attended() == [40, 40]
    held = cache.memory_usage()[0].bytes
    assert held >= 40 * 2 * GEOMETRY.token_bytes // 4
    other = cache.fork()
    with torch.inference_mode():
        model(ids[:, :1], **given(other))
    assert cache.attended() == [40, 40]
    assert other.attended() == [41, 41]


def test_an_interval_is_students() -> None:
    assert interval([3.0]) == (3.0, None)
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert half == pytest.approx(4.303 / 3**0.5)
    row = Row(
        policy="a", task="single", seed=0, score=0.5, attended=9, device_bytes=10**6, host_bytes=0, read_per_second=7.0,
        seconds_per_token=0.01,
    )  # fmt: skip
    shown = markdown([row, attrs.evolve(row, seed=1, score=1.0)])
    assert "| a | 75 ± 318 | 9 | 1.0 | 0.0 | 7 | 10.0 |" in shown
