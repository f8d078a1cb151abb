"""`kvtiers compare text`: tasks hide what they ask for, results are kept as they come, policies fit a budget."""

import csv
import itertools
import json
import linecache
import re
import shutil
import sys
from importlib import import_module, invalidate_caches
from pathlib import Path

import attrs
import pytest

pytest.importorskip("rich", reason="needs the extra 'cli'")
pytest.importorskip("tokenizers", reason="needs the extra 'demo'")

import torch
from click.testing import CliRunner
from hypothesis import given as given_
from hypothesis import settings
from hypothesis import strategies as st

import tiny_chat
from kvtiers import Blocks, Compressor, Geometry, Moment, PolicyError, policy
from kvtiers_methods.whole_past import WholePast
from kvtiers_models.source_code import code_of
from kvtiers_transformers.budgets import fitted
from kvtiers_transformers.compare_report import Row, interval, markdown
from kvtiers_transformers.compare_text import text
from kvtiers_transformers.plain_cache import PLAIN
from kvtiers_transformers.reading import encoder
from kvtiers_transformers.tasks import ALL_TASKS, ASKS_FOR_THE_KEY, TASKS, Question, make_text, texts
from tiny_models import build, given, tokens

GEOMETRY = Geometry(kv_heads=2, query_heads=4, head_dim=16)


@attrs.frozen(kw_only=True)
class AsItIs(Compressor):
    """Keeps as much of the past whatever the size."""

    rewrites = True

    def age(self, blocks: Blocks, moment: Moment) -> Blocks:
        raise NotImplementedError

    def compressed_tokens(self, tokens: int) -> int:
        return tokens

    def mid_tokens(self, geometry: Geometry) -> int:
        return 700


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat.save(tmp_path_factory.mktemp("tiny"))


def encode(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def decode(ids: list[int]) -> str:
    return "".join(map(chr, ids))


PROSE = encode("a quiet day by the sea " * 400)
SHARED = tuple(name for name in ALL_TASKS if name != "chat")


@pytest.mark.parametrize("names", [("prose",), ("again",), ("prose", "again")], ids=str)
def test_a_text_in_which_nothing_is_hidden_is_the_document(names: tuple[str, ...]) -> None:
    made = make_text(names, PROSE, encode, tokens=4000, seed=1)
    assert decode(made.document) in decode(PROSE)
    assert (made.planted, dict(made.questions)) == ((), {})


@pytest.mark.parametrize("names", [*[(name,) for name in TASKS], SHARED], ids=[*TASKS, "all but chat"])
def test_a_text_hides_the_answers_and_questions_do_not_tell_them(names: tuple[str, ...]) -> None:
    made = make_text(names, PROSE, encode, tokens=4000, seed=1)
    whole = decode(made.document)
    assert set(made.questions) == {name for name in names if name in TASKS}
    for name, questions in made.questions.items():
        for question in questions:
            assert len(made.document) + max(len(question.ids) + question.tokens, len(made.again)) <= 4000
            for answer in question.answers:
                assert answer in whole
                assert answer not in decode(question.ids)
            assert question.score(f" {', '.join(question.answers)}.") == 1
            assert question.score("nothing of the kind") == 0
        other = make_text(names, PROSE, encode, tokens=4000, seed=2)
        assert other.questions[name] != questions
    assert len(made.document) > 3300
    assert made.again == (made.document[:500] if "again" in names else [])
    assert make_text(names, PROSE, encode, tokens=4000, seed=1) == made


def test_what_is_planted_is_known_and_the_rest_is_the_document() -> None:
    made = make_text(SHARED, PROSE, encode, tokens=6000, seed=3)
    own = list(made.document)
    for first, end in reversed(made.planted):
        assert decode(own[first:end]).strip()
        del own[first:end]
    assert decode(own) in decode(PROSE)
    assert len(made.planted) == 1 + 4 + 3 + 3 + 3 + 3


@settings(deadline=None)
@given_(seed=st.integers(0, 10**6))
def test_tasks_of_one_text_ask_for_things_of_their_own_and_variables_come_in_order(seed: int) -> None:
    made = make_text(SHARED, PROSE, encode, tokens=4000, seed=seed)
    whole = decode(made.document)
    asked = [decode(question.ids) for questions in made.questions.values() for question in questions]
    assert len(set(asked)) == len(asked)
    of = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", whole)
    assert [value for _, value in of[1:]] == [name for name, _ in of[:-1]]
    assert of[0][1].isdigit()
    numbers = re.findall(r"The (?:number|price) of the (\w+) is|One of the codes of the (\w+) is", whole)
    named = [first or second for first, second in numbers]
    assert len(set(named)) == 4 + 3 + 1
    assert not {name.lower() for name, _ in of} & set(named)


def test_tasks_of_one_text_are_read_once_and_a_chat_apart() -> None:
    assert texts(["single", "chat", "again"]) == [("single", "again"), ("chat",)]
    assert texts(["chat"]) == [("chat",)]


def test_a_part_of_the_answers_is_a_part_of_the_score() -> None:
    question = Question(ids=[], answers=("12345", "67890"))
    assert question.score("1 2 3 4 5 and 99999") == 0.5


@pytest.mark.parametrize("name", ["sliding-window", "streaming", "archive", "packforcing-lm", "h2o", "token-merging"])
def test_a_policy_is_brought_to_a_number_of_tokens(name: str) -> None:
    for limit in (256, 700, 1100):
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


@pytest.mark.parametrize("name", ["streaming", "archive", "packforcing-lm", "pyramidkv", "adakv", "infllm", "kvzip"])
def test_a_policy_of_half_the_size_keeps_half(name: str) -> None:
    whole, half = policy(name), policy(name).scaled(0.5)
    assert whole.scaled(1.0) == whole
    assert half.recent == (None if whole.recent is None else whole.recent // 2)
    assert half.top_k == max(1, whole.top_k // 2)
    for setting in ("most", "mean"):
        if hasattr(whole.compressor, setting):
            assert getattr(half.compressor, setting) == getattr(whole.compressor, setting) // 2
    assert whole.scaled(0.0).top_k == 1


def test_a_size_keeps_to_what_a_policy_says_itself() -> None:
    assert fitted(policy("archive"), GEOMETRY) == policy("archive"), "without a limit it stays as it is"
    assert fitted(policy("tova", recent=0), GEOMETRY, tokens=512).recent == 0
    budgeted = fitted(policy("h2o", budget=2000), GEOMETRY, tokens=512)
    assert budgeted.budget == 2000
    assert attrs.evolve(budgeted, budget=None) == fitted(policy("h2o"), GEOMETRY, tokens=512)
    assert {fitted(policy(name), GEOMETRY, tokens=512).chunk_size for name in ("streaming", "archive", "h2o")} == {64}
    free = fitted(policy("streaming", chunk_size=None), GEOMETRY, tokens=512, stride=100)
    assert free.chunk_size == 100
    bound = free.bound(GEOMETRY)
    assert bound is not None
    assert 480 < bound <= 512


def test_one_that_reads_twice_has_room_for_a_chunk_and_no_size_in_bytes() -> None:
    kept = fitted(policy("kvzip"), GEOMETRY, tokens=512).compressor.kept_after_reading
    assert kept == 512 - 4 - 64
    with pytest.raises(PolicyError, match="holds the whole text while it reads"):
        fitted(policy("kvzip"), GEOMETRY, layer_bytes=10**6)
    with pytest.raises(PolicyError, match="recent must be None"):
        fitted(policy("kvzip", recent=100), GEOMETRY, tokens=512)


def test_what_cannot_be_brought_to_a_size_says_so_and_full_stays_as_it_is() -> None:
    for name in ("full", "kivi"):
        assert fitted(policy(name), GEOMETRY, tokens=100) == policy(name)
    with pytest.raises(PolicyError, match=r"its smallest size still needs more than 100 tokens.*raise the budget$"):
        fitted(policy("archive"), GEOMETRY, tokens=100)
    with pytest.raises(PolicyError, match=r"or let AsItIs\.scaled\(\) make what it keeps smaller"):
        fitted(policy("h2o", compressor=AsItIs()), GEOMETRY, tokens=512)


@pytest.mark.parametrize("name", ["archive", "packforcing-lm", "h2o", "infllm", "token-merging"])
def test_all_parts_of_a_policy_are_brought_to_a_size_alike(name: str) -> None:
    whole, small = policy(name), fitted(policy(name), GEOMETRY, tokens=512)
    assert whole.recent is not None
    assert small.recent is not None
    assert small.recent / whole.recent == pytest.approx(small.top_k / whole.top_k, abs=0.06)
    if isinstance(whole.compressor, WholePast) and isinstance(small.compressor, WholePast):
        kept = small.compressor.most / whole.compressor.most
        assert small.recent / whole.recent == pytest.approx(kept, abs=0.05)
    with_more_recent = attrs.evolve(small, recent=small.recent + 1).bound(GEOMETRY)
    assert with_more_recent is not None
    assert with_more_recent > 512


def test_results_are_kept_as_they_come_and_measured_once(folder: Path, tmp_path: Path) -> None:
    asked = ["--model", str(folder), "--tokens", "1500", "--seeds", "2", "--tasks", "single,chat,again"]
    asked += ["--out", str(tmp_path / "out"), "--budget", "500"]
    first = CliRunner().invoke(text, [*asked, "transformers:dynamic", "full"])
    assert first.exit_code == 0, first.output
    path = tmp_path / "out" / "results.jsonl"
    lines = path.read_text().splitlines()
    assert len(lines) == 2 * 2 * 2  # policies, texts (a chat is its own), seeds
    first_text = [json.loads(line) for line in lines[:2]]
    perplexities = {
        row["policy"]: row["score"] for said in first_text for row in said["rows"] if row["task"] == "again"
    }
    assert perplexities["full"] == pytest.approx(perplexities["transformers:dynamic"], rel=1e-5)
    path.write_text("\n".join([*lines[:-1], lines[-1][:40]]))  # as if it had been killed while it wrote the last line
    more = CliRunner().invoke(text, [*asked, "transformers:dynamic", "full", "streaming"])
    assert more.exit_code == 0, more.output
    kept = path.read_text().splitlines()
    assert kept[:7] == lines[:-1]
    assert len(kept) == 8 + 1 + 4
    assert sum('"policy": "streaming"' in line for line in kept) == 4
    table = list(csv.DictReader((tmp_path / "out" / "table.csv").read_text().splitlines()))
    names, tasks = ("transformers:dynamic", "full", "streaming"), ("single", "again", "chat")
    assert {(line["size"], line["policy"], line["task"]) for line in table} == {
        ("500", name, task) for name in names for task in tasks
    }
    again = [line for line in table if line["task"] == "again"]
    told = {line["policy"]: [float(line[name]) for name in ("low", "score", "high")] for line in again}
    assert told["full"] == pytest.approx(told["transformers:dynamic"], rel=1e-5)
    assert told["full"] == sorted(told["full"])
    attended = {line["policy"]: int(line["attended"]) for line in table if line["task"] == "chat"}
    assert attended["streaming"] <= 500 < 1400 < attended["full"]
    again = CliRunner().invoke(text, [*asked, "streaming"])
    assert path.read_text().splitlines() == kept
    assert "4 of 4 measurements are there already; --fresh makes them again." in again.output
    assert again.output.count("| transformers:dynamic |") == 1, "what was measured before is left out"
    assert (tmp_path / "out" / "picture.png").stat().st_size > 1000
    assert "| streaming |" in (tmp_path / "out" / "table.md").read_text()


def test_several_sizes_are_several_tables_and_what_attends_everything_is_measured_once(
    folder: Path, tmp_path: Path
) -> None:
    asked = ["--model", str(folder), "--tokens", "700", "--seeds", "1", "--tasks", "single", "--out", str(tmp_path)]
    made = CliRunner().invoke(text, [*asked, "--budget", "400,200", "transformers:dynamic", "streaming"])
    assert made.exit_code == 0, made.output
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(line["job"]["policy"], line["job"]["budget"]) for line in lines] == [
        ("transformers:dynamic", "any"),
        ("streaming", "400"),
        ("streaming", "200"),
    ]
    table = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert [(line["size"], line["policy"]) for line in table] == [
        (size, name) for size in ("400", "200") for name in ("transformers:dynamic", "streaming")
    ]
    assert (tmp_path / "table.md").read_text().count("| streaming |") == 2
    one = CliRunner().invoke(text, [*asked, "--budget", "400", "--fresh", "transformers:dynamic"])
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == len(lines) + 1, "--fresh reads it again"
    assert one.output.count("| streaming |") == 1, "the table of a size has rows of that size"


OWN = """
import attrs
from {package}.helping import NUMBER
from kvtiers_methods.h2o import H2O
@attrs.frozen(kw_only=True)
class Own(H2O):
    "{said}"
"""


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        ({}, False),
        ({"said": "in other words"}, False),
        ({"helping": "# in other words\nNUMBER = 3"}, False),
        ({"helping": "NUMBER = 4"}, True),
        ({"more": "SIGN = -1"}, True),
    ],
    ids=str,
)
def test_results_of_a_policy_are_those_of_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], counts: bool
) -> None:
    monkeypatch.syspath_prepend(tmp_path)

    def code(package: str, *, said: str = "as it is", helping: str = "NUMBER = 3", more: str = "") -> str:
        (tmp_path / package).mkdir()
        (tmp_path / package / "helping.py").write_text(helping)
        (tmp_path / package / "__init__.py").write_text(OWN.format(package=package, said=said) + more)
        invalidate_caches()
        linecache.clearcache()
        found = code_of(policy("h2o", compressor=import_module(package).Own()))
        for name in (package, f"{package}.helping"):
            del sys.modules[name]
        shutil.rmtree(tmp_path / package)
        return found

    before = code("own_policy")
    assert (code("own_policy", **change) != before) == counts
    assert before != code_of(policy("h2o"))


def test_a_policy_whose_code_has_changed_is_measured_anew(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["--model", str(folder), "--tokens", "600", "--seeds", "1", "--tasks", "prose", "--out", str(tmp_path)]
    shown = []
    for code in ("before", "before", "after"):
        monkeypatch.setattr("kvtiers_transformers.compare_text.code_of", lambda _, code=code: code)
        shown.append(CliRunner().invoke(text, [*asked, "streaming"]).output)
    codes = [json.loads(line)["job"]["code"] for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert codes == ["before", "after"]
    assert [one.count("| streaming |") for one in shown] == [1, 1, 1], "of two results the newest counts"


def test_a_thing_that_is_planted_alone_lies_in_the_middle_first_and_then_elsewhere() -> None:
    depths = []
    for seed in range(5):
        made = make_text(["single"], PROSE, encode, tokens=4000, seed=seed)
        depths.append(made.planted[0][0] / len(made.document))
    assert depths[0] == pytest.approx(0.5, abs=0.02)
    assert min(abs(a - b) for a, b in itertools.combinations(depths, 2)) > 0.1


def test_a_method_that_reads_twice_compresses_before_it_is_asked(folder: Path, tmp_path: Path) -> None:
    asked = ["--model", str(folder), "--tokens", "600", "--seeds", "1", "--tasks", "single,prose"]
    made = CliRunner().invoke(
        text, [*asked, "--out", str(tmp_path), "--budget", "200", "transformers:dynamic", "kvzip"]
    )
    assert made.exit_code == 0, made.output
    rows = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[-1])["rows"]
    assert {row["policy"] for row in rows} == {"kvzip"}
    asked_for = len(encoder(tiny_chat.tokenizer())(ASKS_FOR_THE_KEY))
    assert {row["attended"] for row in rows} == {200 - 64 + asked_for + 10}


def test_one_that_fails_is_named_and_the_others_go_on(folder: Path, tmp_path: Path) -> None:
    asked = ["--model", str(folder), "--tokens", "600", "--seeds", "1", "--tasks", "again,single"]
    made = CliRunner().invoke(text, [*asked, "--out", str(tmp_path), "kvzip:recent=100", "streaming"])
    assert made.exit_code == 0, made.output
    assert "kvzip:recent=100 is left out: " in made.output
    assert "| streaming |" in made.output
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["job"]["tasks"] for line in lines] == ["single,again"], "in whichever order they are named"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--tasks", "singl"], "unknown task 'singl'.*Did you mean 'single'"),
        (["--tasks", ","], "no tasks are named"),
        (["--budget", "20kB"], "a number of tokens, as 1024, or of megabytes, as 20MB, got '20kB'"),
        (["--budget", "²"], "a number of tokens, as 1024"),
        (["--budget", ","], "names no size"),
        (["--budget", "90", "--tokens", "300", "archive"], "none of these policies fits into the budget"),
        (["--tokens", "256", "--tasks", "chat", "full"], "256 tokens have no room for chat; give at least"),
        (["nonsense"], "unknown policy 'nonsense'"),
        (["transformers:dynamc"], "unknown cache 'transformers:dynamc'.*Did you mean 'transformers:dynamic'"),
    ],
    ids=[
        "task",
        "no tasks",
        "budget",
        "no digit",
        "no budget",
        "does not fit",
        "no room",
        "policy",
        "cache of transformers",
    ],
)
def test_what_cannot_be_compared_is_refused(asked: list[str], message: str, folder: Path, tmp_path: Path) -> None:
    command = ["--model", str(folder), "--out", str(tmp_path / "out"), *asked]
    with pytest.raises(PolicyError, match=message):
        CliRunner().invoke(text, command, catch_exceptions=False)


BITS = {"transformers:dynamic": (32, 32), "transformers:fp8": (8, 8.1), "transformers:int4": (5, 5.5)}
"""The fewest and the most of one number; every 64 numbers of 4 bits have a scale and a shift in float32."""


@pytest.mark.parametrize("name", PLAIN)
def test_the_models_own_caches_are_asked_as_kvtiers_is(name: str) -> None:
    model, ids = build("llama"), tokens(40)
    try:
        cache = PLAIN[name](model.config)
    except PolicyError as error:
        pytest.skip(str(error))
    with torch.inference_mode():
        model(ids, **given(cache))
    assert cache.attended() == [40, 40]
    held = cache.memory_usage()[0].bytes
    numbers = 2 * 2 * 40 * model.config.num_key_value_heads * model.config.head_dim
    fewest, most = BITS[name]
    assert fewest <= held * 8 / numbers <= most
    forks = [cache.fork(), cache.fork(), cache]
    with torch.inference_mode():
        logits = [model(ids[:, :5], **given(one)).logits for one in forks]
    assert [one.attended() for one in forks] == [[45, 45]] * 3
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_an_interval_is_students_and_that_of_shares_is_wilsons() -> None:
    assert interval([3.0]) == (3.0, 3.0, 3.0)
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2, 2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))
    assert interval([1.0] * 10, shares=True) == pytest.approx((1, 0.7225, 1), abs=1e-4)
    assert interval([1.0, 0.0, 0.0, 0.0], shares=True) == pytest.approx((0.25, 0.0456, 0.6994), abs=1e-4)
    row = Row(
        policy="a", task="single", seed=0, score=0.5, attended=9, device_bytes=10**6, host_bytes=0, read_per_second=7.0,
        seconds_per_token=0.01,
    )  # fmt: skip
    shown = markdown([row, attrs.evolve(row, seed=1, score=1.0)])
    assert "| a | 75 (20 to 97) | 9 | 1.0 | 0.0 | 7 | 10.0 |" in shown
