"""A chat that runs past its budget: the system prompt as anchors, what was said as history, the newest as working set.

All turns share one cache, so a turn feeds only its own tokens. The first turn states a fact, the turns after it push it
out of the working set, the last turn asks for it: `packforcing-lm` recalls it from the archive, `streaming`, which
attends as many tokens, has dropped it.

    python examples/long_chat.py [--model a/hub-id-or-folder]

Needs kvtiers[transformers,cli]. About a minute with SmolLM2 on 2 cores.
"""

import argparse
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import kvtiers
from kvtiers_transformers import TransformersCache, load_model, tiered
from kvtiers_transformers.document import read_document

SYSTEM = "You are a careful assistant. You answer in one short sentence, and you remember what the user tells you."
FACT = "My name is Ada and my locker code is 48213. Please remember it."
QUESTION = "What is my locker code?"


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
            past_key_values=self.cache,
            max_new_tokens=new_tokens,
            do_sample=False,
        )
        if self.ids[0, -1] == self.tokenizer.eos_token_id:  # the last token is not in the cache yet, so it can go;
            self.ids = self.ids[:, :-1]  # the template closes the turn, as it does for an answer that was cut short
        answer: str = self.tokenizer.decode(self.ids[0, length:], skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": answer})
        return answer

    def _opening(self, text: str) -> str:
        """What the chat template writes between the last answer and the next one."""
        user = {"role": "user", "content": text}
        if len(self.messages) == 1:
            return render(self.tokenizer, [*self.messages, user])
        before = render(self.tokenizer, self.messages[:-1])
        return render(self.tokenizer, [*self.messages[:-1], {"role": "assistant", "content": "x"}, user])[len(before) + 1 :]

    def _append(self, text: str) -> None:
        new = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        self.ids = torch.cat([self.ids, new.to(self.ids.device)], dim=1)


def render(tokenizer: Any, messages: list[dict[str, str]], *, answer_next: bool = True) -> str:
    """The chat template's text for `messages`."""
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_next)
    return text


def turns(count: int, characters: int) -> list[str]:
    """The fact, passages of a novel to talk about, and the question."""
    story = read_document()
    passages = [story[i * characters : (i + 1) * characters] for i in range(count)]
    return [FACT, *(f"Here is a part of a novel:\n\n{p}\n\nWho is it about?" for p in passages), QUESTION]


def main(model: Any, tokenizer: Any, *, passages: int = 4, characters: int = 1500, new_tokens: int = 24) -> None:
    """Hold the same conversation under both policies."""
    console = Console()
    system = render(tokenizer, [{"role": "system", "content": SYSTEM}], answer_next=False)
    sink = len(tokenizer(system, add_special_tokens=False)["input_ids"])
    tiers = kvtiers.policy("packforcing-lm", sink=sink, recent=256, top_k=8)
    window = kvtiers.policy("streaming", sink=sink, recent=256 + 8 * tiers.block_size)  # attends as many tokens
    for name, policy in (("packforcing-lm", tiers), ("streaming", window)):
        console.rule(f"[bold]{name}[/bold]: {sink} tokens of system prompt as anchors, {policy.recent} recent")
        table = Table("turn", "fed", "anchors", "history", "recent", "forgotten", "attended", title="tokens after each turn")
        with tiered(model, policy) as cache:
            chat = Chat(model, tokenizer, cache, SYSTEM)
            for number, text in enumerate(turns(passages, characters), 1):
                before = cache.get_seq_length()
                with console.status("thinking"):
                    answer = chat.say(text, new_tokens)
                first = text if len(text) < 80 else text[:30].replace("\n", " ") + " ... " + text.splitlines()[-1]
                console.print(f"[bold]user[/bold]       {escape(first)}")
                console.print(f"[bold]assistant[/bold]  [green]{escape(' '.join(answer.split()))}[/green]")
                tokens = cache.core.census()
                table.add_row(
                    str(number),
                    str(cache.get_seq_length() - before),
                    *(str(tokens[tier]) for tier in ("sink", "mid")),
                    str(tokens["recent"] + tokens["current"]),
                    str(tokens["dropped"]),
                    str(cache.core.context(0).keys.shape[2]),
                )
        console.print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, a hub id or a local folder")
    main(*load_model(parser.parse_args().model))
