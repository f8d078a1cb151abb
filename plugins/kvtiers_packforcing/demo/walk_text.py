"""Walks as a person writes them, and the one that is shown if none is written."""

from kvtiers_packforcing.tiny_world.vocabulary import ROOMS
from kvtiers_packforcing.tiny_world.walks import WalkError, Walks

DEFAULT_WALK = (
    "hall 5, kitchen 5, attic 5, study 5, cellar 5, kitchen 5, hall 5, study 5, attic 4, attic 6 closed, "
    "attic 5, kitchen 5, cellar 5, study 5, hall 5, kitchen 5, attic 5, study 5, cellar 4, cellar 6 closed, "
    "cellar 5, kitchen 5, hall 5, study 5"
)
"""Two minutes in five rooms, and two curtains. A room, or what is behind a curtain, is revealed every ten seconds: at
3, 13, 23, ... seconds the hall, the attic and the cellar are each seen four times, at the same moment of the visit."""


def read_walk(text: str, seconds: int | None = None) -> Walks:
    """The walk that is written as `hall 4, attic 5, attic 6 closed, ...`: rooms, seconds, and closed curtains.

    seconds: how long it is to be; None: as long as written. Raises `WalkError`.
    """
    visits = [_visit(part.split()) for part in text.split(",") if part.strip()]
    if not visits:
        raise WalkError(f"a walk has at least one visit, as in 'hall 4, attic 5'; the rooms are {', '.join(ROOMS)}")
    walks = Walks.written(*visits)
    if seconds is None:
        return walks
    if not 1 <= seconds <= walks.blocks:
        raise WalkError(
            f"{seconds} seconds were asked for, and this walk has 1 to {walks.blocks}; ask for fewer, or write more "
            "visits"
        )
    return Walks(rooms=walks.rooms[:, :seconds], curtains=walks.curtains[:, :seconds])


def _visit(words: list[str]) -> tuple[str, int] | tuple[str, int, str]:
    if len(words) not in (2, 3) or not words[1].isdecimal():
        raise WalkError(
            f"a visit is a room, its seconds, and 'closed' if its curtain is, as in 'hall 4' or 'hall 4 closed', got "
            f"{' '.join(words)!r}"
        )
    room, seconds, *rest = words
    return (room, int(seconds), *rest)  # type: ignore[return-value]  # (one word more at most)
