"""Tasks that tell memories apart: a long text with something in it, and questions that are not known while it is read.

They follow RULER (arXiv 2404.06654, section 3: single and multi-key needles, multi-value, multi-query, variable
tracking, common words) and SCBench (arXiv 2412.10319: what is asked after many turns). Deviations: numbers have five
digits, and the text around them is the user's document. All that is drawn depends on the task's name and the seed.
"""

import random
from collections.abc import Callable, Mapping, Sequence

import attrs

from kvtiers import PolicyError

Encode = Callable[[str], list[int]]
"""Text to token ids, without special tokens."""
_THINGS = (
    "apple", "bridge", "candle", "desert", "engine", "forest", "garden", "hammer", "island", "jacket", "kettle",
    "ladder", "mirror", "needle", "orange", "pencil", "ribbon", "saddle", "temple", "violin", "window", "wallet",
)  # fmt: skip
_SHOWN = 18
"""Passages that the user shows in a chat: with what was told before and what is asked after it has twenty turns."""
_LEAST_ROOM = 100
"""Tokens of the document, so that there is something to look through."""


@attrs.frozen(kw_only=True)
class Question:
    """What is asked after the text, as token ids, and what the answer must hold: the share that it holds is the score.

    tokens: how many are decoded.
    """

    ids: list[int]
    answers: tuple[str, ...]
    tokens: int = 10

    def score(self, said: str) -> float:
        """The share of answers in what was said, spaces aside."""
        flat = "".join(said.split()).lower()
        return sum(answer.lower() in flat for answer in self.answers) / len(self.answers)


@attrs.frozen(kw_only=True)
class Task:
    """A text as token ids, and questions about it. Each question is asked of the text alone."""

    name: str
    document: list[int]
    questions: tuple[Question, ...]


def make_task(name: str, prose: Sequence[int], encode: Encode, *, tokens: int, seed: int) -> Task:
    """The task `name`, one of `TASKS`, of at most `tokens` tokens, questions included.

    prose: token ids of the document that fills it; at least `tokens` of them.
    """
    plants, questions = TASKS[name](random.Random(f"{name} {seed}"), encode)
    dice = random.Random(f"passage {seed}")
    planted = [encode(text) for text in plants]
    if name == "chat":
        planted += [encode("\nUser: Here is a passage. "), encode("\nAssistant: I have read it.\n")] * _SHOWN
    room = tokens - sum(map(len, planted)) - max(len(question.ids) + question.tokens for question in questions)
    if room < _LEAST_ROOM:
        raise PolicyError(
            f"{tokens} tokens have no room for the task {name!r}; give at least {tokens + _LEAST_ROOM - room}"
        )
    first = dice.randrange(max(1, len(prose) - room))
    passage = list(prose[first : first + room])
    if name == "chat":
        return Task(name=name, document=_chat(planted, passage), questions=questions)
    depths = sorted(dice.uniform(0.02, 0.98) for _ in planted)
    document: list[int] = []
    for before, depth, plant in zip((0.0, *depths), depths, planted, strict=False):
        document += passage[int(before * len(passage)) : int(depth * len(passage))] + plant
    return Task(name=name, document=document + passage[int(depths[-1] * len(passage)) :], questions=questions)


Made = tuple[list[str], tuple[Question, ...]]


def _number(dice: random.Random) -> str:
    return str(dice.randint(10_000, 99_999))


def _said(thing: str, number: str) -> str:
    return f"\n\nThe secret number of the {thing} is {number}. Remember: the {thing} has the number {number}.\n\n"


def _asked(thing: str, encode: Encode) -> list[int]:
    return encode(
        f"\n\nQuestion: What is the secret number of the {thing} mentioned in the text?\nAnswer: The secret number of "
        f"the {thing} is"
    )


def _single(dice: random.Random, encode: Encode) -> Made:
    """One number, asked for."""
    thing, number = dice.choice(_THINGS), _number(dice)
    return [_said(thing, number)], (Question(ids=_asked(thing, encode), answers=(number,)),)


def _multi_key(dice: random.Random, encode: Encode) -> Made:
    """The numbers of eight things, of which one is asked for."""
    numbers = {thing: _number(dice) for thing in dice.sample(_THINGS, 8)}
    wanted = dice.choice(list(numbers))
    return [_said(*pair) for pair in numbers.items()], (
        Question(ids=_asked(wanted, encode), answers=(numbers[wanted],)),
    )


def _multi_query(dice: random.Random, encode: Encode) -> Made:
    """The numbers of four things, each asked for."""
    numbers = {thing: _number(dice) for thing in dice.sample(_THINGS, 4)}
    questions = tuple(Question(ids=_asked(thing, encode), answers=(number,)) for thing, number in numbers.items())
    return [_said(*pair) for pair in numbers.items()], questions


def _multi_value(dice: random.Random, encode: Encode) -> Made:
    """Three numbers of one thing, all asked for."""
    thing, numbers = dice.choice(_THINGS), tuple(_number(dice) for _ in range(3))
    plants = [f"\n\nOne of the secret numbers of the {thing} is {number}.\n\n" for number in numbers]
    ids = encode(
        f"\n\nQuestion: What are all the secret numbers of the {thing} mentioned in the text?\nAnswer: The secret "
        f"numbers of the {thing} are"
    )
    return plants, (Question(ids=ids, answers=numbers, tokens=32),)


def _variables(dice: random.Random, encode: Encode) -> Made:
    """A number, and two names that each stand for the one before."""
    first, second, third = (name.upper() for name in dice.sample(_THINGS, 3))
    number = _number(dice)
    plants = [f"\n\nVAR {first} = {number}.\n\n", f"\n\nVAR {second} = VAR {first}.\n\n"]
    plants.append(f"\n\nVAR {third} = VAR {second}.\n\n")
    ids = encode(f"\n\nQuestion: Which number is VAR {third}?\nAnswer: VAR {third} = VAR {second} = VAR {first} =")
    return plants, (Question(ids=ids, answers=(number,)),)


def _common_words(dice: random.Random, encode: Encode) -> Made:
    """A list in which three words come ten times and others once or twice; the three are asked for."""
    things = dice.sample(_THINGS, len(_THINGS))
    words = things[:3] * 10 + things[3:] * 2
    dice.shuffle(words)
    plants = [f"\n\nWords: {', '.join(words[nth::3])}.\n\n" for nth in range(3)]
    ids = encode("\n\nQuestion: Which three words come most often in the lists of words?\nAnswer: The three words are")
    return plants, (Question(ids=ids, answers=tuple(things[:3]), tokens=16),)


def _first_turn(dice: random.Random, encode: Encode) -> Made:
    """A number that the user tells in the first of twenty turns, asked for in the last."""
    thing, number = dice.choice(_THINGS), _number(dice)
    told = f"User: The number of my {thing} is {number}. Keep it for me.\nAssistant: I will.\n"
    ids = encode(f"User: What is the number of my {thing}?\nAssistant: The number of your {thing} is")
    return [told], (Question(ids=ids, answers=(number,)),)


def _chat(said: Sequence[list[int]], passage: Sequence[int]) -> list[int]:
    """Turns of a chat: what was told, then passages that the user shows. said: the words around these, in turn."""
    (told, *around), each = said, len(passage) // _SHOWN
    document = list(told)
    for turn in range(_SHOWN):
        document += [*around[2 * turn], *passage[turn * each : (turn + 1) * each], *around[2 * turn + 1]]
    return document


TASKS: Mapping[str, Callable[[random.Random, Encode], Made]] = {
    "single": _single,
    "multi-key": _multi_key,
    "multi-query": _multi_query,
    "multi-value": _multi_value,
    "variables": _variables,
    "common-words": _common_words,
    "chat": _first_turn,
}
"""What is planted in a text and what is asked, by name."""
