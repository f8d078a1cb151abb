"""A chat that runs past its budget: the system prompt as anchors, what was said as history, the newest as working set.

All turns share one cache, so a turn feeds only its own tokens. The first turn states a fact, the turns after it push it
out of the working set, and the last turn asks for it. `packforcing-lm` recalls it from its history; `streaming`, which
may attend as many tokens, has dropped it by then.

    python examples/long_chat.py [--model a/hub-id-or-folder]

Needs kvtiers[transformers,cli]. About a minute with SmolLM2 on 2 cores.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import kvtiers
from kvtiers_transformers import TransformersCache, load_model, tiered

SYSTEM = "You are a helpful assistant. You remember what the user tells you."
TURNS = (
    "Remember this: the code of my locker is 48213.",
    *(f"Tell me about {city}." for city in ("Paris", "Rome", "Tokyo", "Cairo", "Lima")),
    "What is the code of my locker?",
)
console = Console(highlight=False)


class Chat:
    """A conversation on one cache. `ids` is all of it; the model is fed what the cache has not seen yet."""

    def __init__(self, model: Any, tokenizer: Any, cache: TransformersCache, system: str) -> None:
        self.model, self.tokenizer, self.cache = model, tokenizer, cache
        self.messages = [{"role": "system", "content": system}]
        self.ids = torch.empty(1, 0, dtype=torch.long, device=model.device)

    def say(self, text: str, new_tokens: int) -> str:
        """Add a turn of the user and return the answer."""
        self._append(self._opening(text))
        self.messages.append({"role": "user", "content": text})
        length = self.ids.shape[1]
        self.ids = self.model.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            cache=self.cache,
            max_new_tokens=new_tokens,
            do_sample=False,
        )
        if self.ids[0, -1] == self.tokenizer.eos_token_id:
            self.ids = self.ids[:, :-1]  # the model has not been fed it yet, and the template writes it anyhow
        answer: str = self.tokenizer.decode(self.ids[0, length:], skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": answer})
        return answer

    def _opening(self, text: str) -> str:
        """What the chat template writes between the last answer and the next one."""
        user = {"role": "user", "content": text}
        if len(self.messages) == 1:
            return render(self.tokenizer, [*self.messages, user])
        before = render(self.tokenizer, self.messages[:-1])
        return render(self.tokenizer, [*self.messages[:-1], {"role": "assistant", "content": "x"}, user])[
            len(before) + 1 :
        ]

    def _append(self, text: str) -> None:
        new = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        self.ids = torch.cat([self.ids, new.to(self.ids.device)], dim=1)


def render(tokenizer: Any, messages: list[dict[str, str]], *, answer_next: bool = True) -> str:
    """The chat template's text for `messages`."""
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_next)
    return text


def main(model: Any, tokenizer: Any, *, turns: Sequence[str] = TURNS, recent: int = 128, new_tokens: int = 56) -> None:
    """Hold the same conversation under both policies."""
    system = render(tokenizer, [{"role": "system", "content": SYSTEM}], answer_next=False)
    sink = len(tokenizer(system, add_special_tokens=False)["input_ids"])
    tiers = kvtiers.policy("packforcing-lm", sink=sink, recent=recent, top_k=4)
    window = kvtiers.policy("streaming", sink=sink, recent=recent + tiers.top_k * tiers.block_size)
    for name, policy in (("packforcing-lm", tiers), ("streaming", window)):
        console.print()
        console.rule(f"[bold]{name}[/bold]")
        table = Table(
            "turn", "fed", "anchors", "history", "working set", "dropped", "attended", title="Tokens after each turn"
        )
        with tiered(model, policy) as cache:
            chat = Chat(model, tokenizer, cache, SYSTEM)
            for number, text in enumerate(turns, 1):
                before = cache.get_seq_length()
                console.print(f"[bold]{escape(text)}[/bold]")
                with console.status("thinking"):
                    answer = chat.say(text, new_tokens)
                console.print(f"  [green]{escape(' '.join(answer.split()))}[/green]")
                table.add_row(str(number), str(cache.get_seq_length() - before), *map(str, tokens_in(cache)))
        console.print(table)


def tokens_in(cache: TransformersCache) -> tuple[int, int, int, int, int]:
    """Anchors, history, working set, dropped, and what the last step attended. Every layer is alike here."""
    tiers = cache.tier_counts()
    return tiers["sink"], tiers["mid"], tiers["recent"] + tiers["current"], tiers["dropped"], max(cache.attended())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, a hub id or a local folder")
    main(*load_model(parser.parse_args().model))
