"""`kvtiers bench ranks`: what it says of attention is what the model's own attention says."""

import json
from pathlib import Path
from typing import Any

import click
import pytest

pytest.importorskip("rich", reason="needs the extra 'cli'")
pytest.importorskip("tokenizers", reason="needs the extra 'demo'")

import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

import tiny_chat
from kvtiers import PolicyError, policy
from kvtiers_transformers.bench_ranks import MASS, check, places_of, rank, ranks
from kvtiers_transformers.reading import encoded, encoder, needles
from kvtiers_transformers.smollm2 import load_model

SMALL = {"recent": 64, "top_k": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat.save(tmp_path_factory.mktemp("tiny"))


def test_the_rank_and_the_share_of_attention_are_those_of_the_models_own_attention(folder: Path) -> None:
    model, tokenizer = load_model(str(folder))
    text = encoded("novel", tokenizer, least=500)
    (task,) = needles(text, encoder(tokenizer), tokens=500, depths=[0.3], seeds=1)
    made = policy("archive", **SMALL)
    found = rank(model, tokenizer, {"fine": policy(made, digest_tokens=1, digest_bits=None), "coarse": made}, task)

    eager: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.inference_mode():
        shown = eager(torch.tensor([task.document + task.question]), output_attentions=True).attentions
    size, sink = made.block_size, 4
    mine = sorted({(at - sink) // size for at in places_of(task, encoder(tokenizer))})
    assert len(mine) > 1, "the passage names the key twice"
    archived = sink + size * found[MASS].blocks
    heads, late = eager.config.num_key_value_heads, 500 - 500 // 64 * 64  # of a chunk of 64, which chooses at once
    for layer, weights in enumerate(shown):
        asked = weights[0, :, -late:, sink:archived]
        asked = (asked / asked.sum(-1, keepdim=True)).unflatten(0, (heads, -1)).sum((1, 2))
        by_block = asked.unflatten(-1, (-1, size)).sum(-1)
        share = by_block[:, mine].sum(-1) / by_block.sum(-1)
        assert found[MASS].share[0][layer] == pytest.approx(share.tolist(), rel=1e-3)
        above = (by_block > by_block[:, mine].amax(-1, keepdim=True)).sum(-1)
        assert found[MASS].above[0][layer] == above.tolist()
    assert found["fine"].blocks == found[MASS].blocks > 20
    assert found["fine"].above != found["coarse"].above, "digests of three bits rank as keys do"


def test_it_shows_a_row_for_each_retriever_and_writes_every_rank(folder: Path, tmp_path: Path) -> None:
    given = (
        "--tokens 500 --seeds 1 --depths 0.3 --heads 3 --document entries archive:recent=64 archive:recent=64,top_k=9"
    )
    shown = CliRunner().invoke(ranks, ["--model", str(folder), *given.split(), "--json", str(tmp_path / "r.json")])
    assert shown.exit_code == 0, shown.output
    assert "top_k=9" in "".join(shown.output.split())
    (written,) = json.loads((tmp_path / "r.json").read_text())
    assert list(written) == [MASS, *given.split()[-2:]]
    for ranked in written.values():
        assert len(ranked["above"]) == len(ranked["share"]) == 6, "the question, and five tokens of the key"
        assert {len(layer) for step in ranked["above"] for layer in step} == {2}, "KV heads"
    assert max(map(len, shown.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["streaming"], "streaming ranks no archived blocks of text by a query"),
        (["packforcing"], "packforcing ranks no archived blocks"),
        (["archive", "shadowkv"], "give all policies the same block_size"),
        (["archive", "infllm"], "infllm chooses by the attention that tokens got while the document was read"),
    ],
)
def test_what_ranks_nothing_is_refused(names: list[str], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        check({name: policy(name) for name in names})


def test_a_key_that_was_not_archived_is_told_with_its_depth(folder: Path) -> None:
    model, tokenizer = load_model(str(folder))
    text = encoded("novel", tokenizer, least=500)
    (task,) = needles(text, encoder(tokenizer), tokens=500, depths=[1.0], seeds=1)
    with pytest.raises(click.UsageError, match=r"the key at depth 1\.0 lies outside the archive"):
        rank(model, tokenizer, {"archive": policy("archive", **SMALL)}, task)


def test_a_folder_that_is_not_there_is_told_before_anything_is_read(tmp_path: Path) -> None:
    shown = CliRunner().invoke(ranks, ["--model", "no-such-model", "--json", str(tmp_path / "none" / "r.json")])
    assert shown.exit_code == 2
    assert "there is no folder" in shown.output
