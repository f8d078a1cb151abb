"""The benchmarks of text: what they say is what they ran."""

from pathlib import Path
from typing import Any

import click
import pytest

pytest.importorskip("rich", reason="needs the extra 'cli'")
pytest.importorskip("tokenizers", reason="needs the extra 'demo'")

import torch
from click.testing import CliRunner

import tiny_chat
from kvtiers import UnknownPolicyError, policy
from kvtiers_transformers.bench_codec import CODECS, codec, errors_of, measure
from kvtiers_transformers.bench_digests import EVERYTHING, ask, digests, share_of, with_digests
from kvtiers_transformers.bench_recall import recall
from kvtiers_transformers.bench_text import OF_BATCH, POLICIES, batch_lengths, speed, text
from kvtiers_transformers.demo import text as demo
from kvtiers_transformers.reading import encoded, encoder, keys_found, needles
from kvtiers_transformers.smollm2 import load_model
from kvtiers_transformers.wrap import tiered
from tiny_models import build, given

SMALL = {"recent": 64, "top_k": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, Any]:
    return load_model(str(folder))


@pytest.mark.parametrize(
    ("command", "given", "rows"),
    [
        (recall, "--tokens 300 --seeds 1 --depths 0.5 --document past full archive:recent=64", ["full", "archive"]),
        (codec, "--tokens 600 --seeds 1 --depths 0.5 --document entries", CODECS),
        (digests, "--tokens 600 --seeds 1 --depths 0.5 1x3 2x4", ["novel", "past", "entries", "all", "1x3", "2x4"]),
        (text, "--contexts 300,600 --tokens 2 --batch 3", [*POLICIES, *OF_BATCH, "200 to 700", "each"]),
    ],
    ids=["recall", "codec", "digests", "text"],
)
def test_a_benchmark_shows_every_row_in_80_columns(
    command: click.Command, given: str, rows: list[str], folder: Path
) -> None:
    shown = CliRunner().invoke(command, ["--model", str(folder), *given.split()], terminal_width=80)
    assert shown.exit_code == 0, shown.output
    for row in rows:
        assert row.partition(":")[0] in shown.output
    assert max(map(len, shown.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--document", "no-such-file"], "give novel, past, entries, manual, or a text file"),
        (["--document", "past", "--tokens", "99999"], "99,999 are needed"),
        (["--depths", "early"], "no list of numbers"),
    ],
    ids=["no-document", "short-document", "no-numbers"],
)
def test_what_cannot_be_read_is_refused(given: list[str], message: str, folder: Path) -> None:
    shown = CliRunner().invoke(recall, ["--model", str(folder), *given])
    assert shown.exit_code == 2
    assert message in " ".join(shown.output.replace("│", " ").split())


def test_the_demo_tells_an_unknown_policy_before_it_loads_a_model() -> None:
    shown = CliRunner().invoke(demo, ["--model", "no-such-model", "--policies", "full, archve"])
    assert isinstance(shown.exception, UnknownPolicyError)
    assert "Did you mean 'archive'?" in str(shown.exception)
    assert "Loading" not in shown.output


def test_an_exact_codec_has_no_error_and_fewer_bits_have_more(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    ids = encoded("novel", tokenizer, least=400)[:400]
    policies = {name: policy("archive", codec=name, archive="host", **SMALL) for name in CODECS}
    exact, int8, int4 = measure(model, tokenizer, policies, ids, [])
    assert exact.errors == (0, 0)
    assert 0 < int8.errors[0] < 0.02 < int4.errors[0] < 0.2
    assert 0 < int8.errors[1] < 0.02 < int4.errors[1] < 0.2
    assert exact.archived > 2 * int8.archived > 2 * int4.archived > 0


def test_the_error_of_a_codec_is_that_of_everything_archived(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    ids = torch.tensor([encoded("novel", tokenizer, least=400)[:400]])
    exact, coarse = policy("archive", **SMALL), policy("archive", codec="int4", **SMALL)
    off, size = 0.0, 0.0
    with tiered(model, exact) as cache, torch.inference_mode():
        model(ids, **given(cache))
        said, _ = errors_of(coarse.codec, cache)
        for layer in cache.core.every_layer():
            for number in range(layer.history.count):
                block = layer.history.block("full", number)
                back, _ = coarse.codec.decode(coarse.codec.encode(block.keys, block.values), block.keys.dtype)
                off, size = off + float((back - block.keys).square().sum()), size + float(block.keys.square().sum())
    assert said == pytest.approx((off / size) ** 0.5, rel=1e-4)


def test_a_codec_is_not_measured_on_nothing(loaded: tuple[Any, Any]) -> None:
    model, _ = loaded
    with tiered(model, "archive") as cache:
        model(torch.tensor([[1, 2, 3]]), **given(cache))
        with pytest.raises(click.UsageError, match="nothing was archived"):
            errors_of(policy("archive", codec="int4").codec, cache)


def test_digests_that_choose_everything_answer_as_if_all_was_attended(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    (task,) = needles(encoded("novel", tokenizer, least=500), encoder(tokenizer), tokens=500, depths=[0.1], seeds=1)
    base = policy("archive", **SMALL)
    chosen = {
        "everything": with_digests(policy(base, top_k=500), "1x1"),
        "1x8": with_digests(base, "1x8"),
        "16x1": with_digests(base, "16x1"),
    }
    told = ask(model, tokenizer, chosen, task)
    assert told["everything"].loss == pytest.approx(told[EVERYTHING].loss, abs=1e-4)
    assert abs(told["1x8"].loss - told[EVERYTHING].loss) > 1e-3
    assert abs(told["1x8"].loss - told["16x1"].loss) > 1e-3


@pytest.mark.parametrize(("kind", "share"), [("2x32", 1 / 4), ("2x4", 17 / 512), ("1x3", 26 / 512)])
def test_digests_weigh_what_is_held(kind: str, share: float) -> None:
    chosen = with_digests(policy("archive", recent=32), kind)
    with tiered(build(head_dim=64), chosen) as cache:
        geometry = cache.core.geometries[0]
        for layer in cache.core.layers:
            keys = torch.randn(1, geometry.kv_heads, 64, geometry.head_dim)
            for group in layer.for_rows(1):
                group.layer.write(keys, keys)
        cache.core.commit()
        history = cache.core.every_layer()[0].history
        held = history.digests.data
    assert share_of(chosen, geometry) == pytest.approx(share)
    assert held is not None
    of_keys_and_values = history.count * chosen.block_size * geometry.token_bytes
    assert held.numel() * held.element_size() == pytest.approx(share * of_keys_and_values)


def test_keys_are_planted_where_they_are_said_to_be(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    prose = encoded("entries", tokenizer, least=1000)
    tasks = needles(prose, encoder(tokenizer), tokens=600, depths=[0.0, 0.9], seeds=2)
    assert [task.depth for task in tasks] == [0.0, 0.0, 0.9, 0.9]
    for task in tasks:
        assert len(task.document) + len(task.question) == 600
        before = tokenizer.decode(task.document).index(task.key)
        assert before / len(task.document) == pytest.approx(task.depth, abs=0.1)
        assert task.found_in(f"is {task.key[:2]} {task.key[2:]}.")
        assert not task.found_in(task.key[:4])
    found, most = keys_found(model, tokenizer, policy("archive", **SMALL), tasks)
    assert list(found) == [0.0, 0.9]
    assert 4 + 64 + 4 * 16 <= most <= 4 + 64 + 5 * 16


def test_both_batches_hold_as_many_tokens() -> None:
    different, even = batch_lengths(16).values()
    assert (different[0], different[-1], len(set(different))) == (200, 700, 16)
    assert sum(different) == pytest.approx(sum(even), abs=16)
    assert set(map(len, batch_lengths(1).values())) == {1}


def test_a_padded_batch_attends_what_its_policy_says(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    ids = encoded("novel", tokenizer, least=400)
    found = speed(model, {"small": policy("archive", **SMALL)}, ids, [150, 300], 3)
    assert found["DynamicCache"].attended == 303
    assert 4 + 64 < found["small"].attended <= 4 + 64 + 16 * 5
    assert "small" in found
