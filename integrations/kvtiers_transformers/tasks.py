"""Tasks that tell memories apart: a long text with something in it, and questions that are not known while it is read.

They follow RULER (arXiv 2404.06654, section 3: single and multi-key needles, multi-value, multi-query, variable
tracking, common words) and SCBench (arXiv 2412.10319: many questions after one text, and what is asked after many
turns). Deviations: numbers have five digits, and the text around them is the user's document. The tasks that are named
together share one text, so that it is read once; only `chat` has its own. All that is drawn depends on the seed alone.
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
"""Each task of a text gets its own of these."""
_WORDS = (
    "anchor", "basket", "carpet", "dragon", "eagle", "fabric", "glove", "honey", "insect", "jungle", "kitten", "lemon",
    "marble", "napkin", "onion", "parrot", "quartz", "rabbit", "salmon", "tunnel", "urchin", "velvet",
)  # fmt: skip
"""The words of `common-words`."""
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
        flat = _flat(said)
        return sum(_flat(answer) in flat for answer in self.answers) / len(self.answers)


def _flat(text: str) -> str:
    return "".join(text.split()).lower()


@attrs.frozen(kw_only=True)
class TaskText:
    """A text as token ids, and the questions about it by task. Each question is asked of the text alone.

    planted: where tokens that are not the document's own begin and end. again: the beginning of the text, which comes
    a second time after it if the task `again` is named, else empty.
    """

    document: list[int]
    questions: Mapping[str, tuple[Question, ...]]
    planted: tuple[tuple[int, int], ...]
    again: list[int]


def plant(passage: Sequence[int], plants: Sequence[tuple[float, list[int]]]) -> tuple[list[int], list[tuple[int, int]]]:
    """`passage` with `plants`, each so far of the way in (in order), and where each begins and ends then."""
    ids: list[int] = []
    at, last = [], 0
    for depth, planted in plants:
        cut = int(len(passage) * depth)
        ids += passage[last:cut]
        at.append((len(ids), len(ids) + len(planted)))
        ids += planted
        last = cut
    return ids + list(passage[last:]), at


def passkey(key: str) -> str:
    """What is planted so that a key can be asked for."""
    return f"\n\nThe secret key is {key}. Remember it: the secret key is {key}.\n\n"


ASKS_FOR_THE_KEY = "\n\nQuestion: What is the secret key mentioned in the text?\nAnswer: The secret key is"


def make_text(names: Sequence[str], prose: Sequence[int], encode: Encode, *, tokens: int, seed: int) -> TaskText:
    """One text for the tasks `names`, of at most `tokens` tokens with the longest of what comes after it.

    names: of `ALL_TASKS`; `chat` alone. prose: token ids of the document that fills it; at least
    `tokens` of them. Raises `PolicyError` where the text has no room for its tasks.
    """
    things = random.Random(f"things {seed}").sample(_THINGS, len(_THINGS))
    by_task: list[list[list[int]]] = []
    questions: dict[str, tuple[Question, ...]] = {}
    for name, make in TASKS.items():
        plants, asked = make(random.Random(f"{name} {seed}"), things, encode)  # takes its things, named or not
        if name in names:
            by_task.append([encode(planted) for planted in plants])
            questions[name] = asked
    if "chat" in names:
        turn = [encode("\nUser: Here is a passage. "), encode("\nAssistant: I have read it.\n")]
        by_task[0] += turn * _SHOWN
    planted = _mixed(by_task, random.Random(f"order {seed}"))
    after = [len(question.ids) + question.tokens for asked in questions.values() for question in asked]
    again = tokens // 8 if "again" in names else 0
    taken = sum(map(len, planted))
    room = tokens - taken - max([again, *after])
    if room < _LEAST_ROOM:
        # the passage that comes again is an eighth of all
        least = taken + _LEAST_ROOM + max([-(-(taken + _LEAST_ROOM) // 7) + 1 if again else 0, *after])
        raise PolicyError(f"{tokens} tokens have no room for {', '.join(names)}; give at least {least}, or fewer tasks")
    dice = random.Random(f"passage {seed}")
    first = dice.randrange(max(1, len(prose) - room))
    passage = list(prose[first : first + room])
    if "chat" in names:
        return TaskText(document=_chat(planted, passage), questions=questions, planted=(), again=[])
    depths = [_alone_at(seed)] if len(planted) == 1 else sorted(dice.uniform(0.02, 0.98) for _ in planted)
    document, at = plant(passage, list(zip(depths, planted, strict=True)))
    return TaskText(document=document, questions=questions, planted=tuple(at), again=document[:again])


def _alone_at(seed: int) -> float:
    """How deep the only thing that is planted lies: in the middle of the first text, then where it lay least."""
    golden = (5**0.5 - 1) / 2
    return 0.02 + 0.96 * ((0.5 + seed * golden) % 1)


def _mixed(by_task: Sequence[Sequence[list[int]]], dice: random.Random) -> list[list[int]]:
    """What all tasks plant, mixed; what one task plants stays in order."""
    order = [number for number, plants in enumerate(by_task) for _ in plants]
    dice.shuffle(order)
    left = [iter(plants) for plants in by_task]
    return [next(left[number]) for number in order]


def texts(names: Sequence[str]) -> list[tuple[str, ...]]:
    """`names` by the text that they share."""
    shared, alone = tuple(name for name in names if name != "chat"), tuple(name for name in names if name == "chat")
    return [group for group in (shared, alone) if group]


Made = tuple[list[str], tuple[Question, ...]]


def _number(dice: random.Random) -> str:
    return str(dice.randint(10_000, 99_999))


def _asked(what: str, encode: Encode) -> list[int]:
    return encode(f"\n\nQuestion: What is the {what} mentioned in the text?\nAnswer: The {what} is")


def _taken(things: list[str], count: int) -> list[str]:
    """The next `count` things, which no other task gets."""
    return [things.pop() for _ in range(count)]


def _single(dice: random.Random, things: list[str], encode: Encode) -> Made:
    """One key, asked for."""
    key = _number(dice)
    return [passkey(key)], (Question(ids=encode(ASKS_FOR_THE_KEY), answers=(key,)),)


def _multi_key(dice: random.Random, things: list[str], encode: Encode) -> Made:
    """The numbers of four things, of which one is asked for."""
    numbers = {thing: _number(dice) for thing in _taken(things, 4)}
    wanted = dice.choice(list(numbers))
    plants = [
        f"\n\nThe number of the {thing} is {number}. Remember: the {thing} has the number {number}.\n\n"
        for thing, number in numbers.items()
    ]
    return plants, (Question(ids=_asked(f"number of the {wanted}", encode), answers=(numbers[wanted],)),)


def _multi_query(dice: random.Random, things: list[str], encode: Encode) -> Made:
    """The prices of three things, each asked for."""
    prices = {thing: _number(dice) for thing in _taken(things, 3)}
    plants = [
        f"\n\nThe price of the {thing} is {price}. Remember: the {thing} has the price {price}.\n\n"
        for thing, price in prices.items()
    ]
    questions = tuple(
        Question(ids=_asked(f"price of the {thing}", encode), answers=(price,)) for thing, price in prices.items()
    )
    return plants, questions


def _multi_value(dice: random.Random, things: list[str], encode: Encode) -> Made:
    """Three codes of one thing. Each is asked for after the two others, as small models list nothing by themselves."""
    (thing,), codes = _taken(things, 1), tuple(_number(dice) for _ in range(3))
    one = f"One of the codes of the {thing} is"
    asked = f"\n\nQuestion: What are the three codes of the {thing} mentioned in the text?\nAnswer: "
    questions = tuple(
        Question(
            ids=encode(asked + "".join(f"{one} {other}. " for other in codes if other != code) + one), answers=(code,)
        )
        for code in codes
    )
    return [f"\n\n{one} {code}.\n\n" for code in codes], questions


def _variables(dice: random.Random, things: list[str], encode: Encode) -> Made:
    """A number, and two names that each stand for the one before. Each step is asked for, as small models take one."""
    first, second, third = (name.upper() for name in _taken(things, 3))
    values = {first: _number(dice), second: f"VAR {first}", third: f"VAR {second}"}
    questions = tuple(
        Question(ids=encode(f"\n\nQuestion: What is VAR {name} in the text?\nAnswer: VAR {name} ="), answers=(value,))
        for name, value in values.items()
    )
    return [f"\n\nVAR {name} = {value}.\n\n" for name, value in values.items()], questions


def _common_words(dice: random.Random, things: list[str], encode: Encode) -> Made:
    """Three lists of words, in which one word comes twelve times and ten words once; a fourth list is to be gone on."""
    common, *others = dice.sample(_WORDS, 11)
    words = [common] * 12 + others
    dice.shuffle(words)
    plants = [f"\n\nWords: {', '.join(words[nth::3])}.\n\n" for nth in range(3)]
    return plants, (Question(ids=encode(f"\n\nWords: {', '.join(others[:3])},"), answers=(common,)),)


def _first_turn(dice: random.Random, things: list[str], encode: Encode) -> Made:
    """A number that the user tells in the first of twenty turns, asked for in the last."""
    (thing,), number = _taken(things, 1), _number(dice)
    fact = f"the number of my {thing} is {number}"
    told = f"User: {fact.capitalize()}. Keep it: {fact}.\nAssistant: I will.\n"
    ids = encode(f"User: What is the number of my {thing}?\nAssistant: The number of your {thing} is")
    return [told], (Question(ids=ids, answers=(number,)),)


def _chat(said: Sequence[list[int]], passage: Sequence[int]) -> list[int]:
    """Turns of a chat: what was told, then passages that the user shows. said: the words around these, in turn."""
    (told, *around), each = said, len(passage) // _SHOWN
    document = list(told)
    for turn in range(_SHOWN):
        document += [*around[2 * turn], *passage[turn * each : (turn + 1) * each], *around[2 * turn + 1]]
    return document


TASKS: Mapping[str, Callable[[random.Random, list[str], Encode], Made]] = {
    "single": _single,
    "multi-key": _multi_key,
    "multi-query": _multi_query,
    "multi-value": _multi_value,
    "variables": _variables,
    "common-words": _common_words,
    "chat": _first_turn,
}
"""What is planted in a text and what is asked, by name."""
PERPLEXITIES = ("prose", "again")
"""Tasks without a question: the perplexity of the document's own tokens of a text, and of its beginning when that comes
again."""
ALL_TASKS = (*TASKS, *PERPLEXITIES)
