"""`contiguous`, `bounded` and `incremental` against attention that is worked out by hand, in float64, layer by layer.

What goes into every layer's attention and what comes out of it is taken from the run itself; between the two the
reference here decides which tokens remain, puts them where DESIGN.md says, rotates them (with complex numbers), and
attends.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import pytest

pytest.importorskip("transformers", reason="needs the extra 'transformers'")

import torch
from torch import Tensor

from kvtiers_transformers import TransformersCache, tiered
from tiny_models import attentions, build, feed, tokens

LENGTH = 47
REACH = 22
SMALL: dict[str, Any] = {"sink": 3, "recent": 8, "block_size": 4, "chunk_size": 8, "top_k": 2}
YARN = {"rope_type": "yarn", "factor": 8.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "half", {}),
    "yarn": ("llama", "half", {"rope_parameters": YARN}),
    "qwen3-norms": ("qwen3", "half", {}),
    "glm-interleaved-partial": ("glm", "interleaved", {}),
}


@attrs.define
class TensorIdentity:
    """What one layer's attention was given and gave, all forwards so far: [heads, tokens, head_dim]."""

    queries: list[Tensor] = attrs.field(factory=list)
    keys: list[Tensor] = attrs.field(factory=list)
    values: list[Tensor] = attrs.field(factory=list)
    outputs: list[Tensor] = attrs.field(factory=list)


@contextmanager
def watched(model: Any) -> Iterator[list[TensorIdentity]]:
    """Record what enters and leaves the attention of every layer; q and k before any rotation."""
    seen, handles = [], []

    def keep(into: list[Tensor], width: int) -> Any:
        def hook(_: Any, __: Any, output: Tensor) -> None:
            heads = output if output.dim() == 4 else output.unflatten(-1, (-1, width))
            into.append(heads[0].transpose(0, 1).double())

        return hook

    def keep_input(into: list[Tensor], width: int) -> Any:
        def hook(_: Any, args: tuple[Tensor, ...]) -> None:
            into.append(args[0][0].unflatten(-1, (-1, width)).transpose(0, 1).double())

        return hook

    for module in attentions(model):
        one, width = TensorIdentity(), module.head_dim
        normed = type(module).__name__.startswith("Qwen3")
        sources = (module.q_norm, module.k_norm) if normed else (module.q_proj, module.k_proj)
        for source, into in zip((*sources, module.v_proj), (one.queries, one.keys, one.values), strict=True):
            handles.append(source.register_forward_hook(keep(into, width)))
        handles.append(module.o_proj.register_forward_pre_hook(keep_input(one.outputs, width)))
        seen.append(one)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def turned(x: Tensor, positions: Tensor, frequencies: Tensor, scaling: float, layout: str) -> Tensor:
    """`x` [..., tokens, head_dim] rotated to `positions` [tokens], as complex numbers."""
    width = 2 * frequencies.numel()
    part, rest = x[..., :width], x[..., width:]
    pairs = part.unflatten(-1, (2, -1)).transpose(-1, -2) if layout == "half" else part.unflatten(-1, (-1, 2))
    angle = positions.double()[:, None] * frequencies.double()
    out = torch.view_as_real(
        torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.full_like(angle, scaling), angle)
    )
    out = out.transpose(-1, -2).flatten(-2) if layout == "half" else out.flatten(-2)
    return torch.cat([out, rest], -1)


@attrs.frozen(kw_only=True)
class Held:
    """The tokens that one KV head holds of the past and present, and where they lie."""

    origins: list[int]
    places: list[int]


def held_by_hand(
    seen: int, start: int, chosen: Sequence[int], *, sink: int, recent: int, block: int, realigner: str
) -> Held:
    """Sink, the chosen archived blocks, recent and current of a chunk that begins at `start` and ends at `seen`."""
    aged = [b for b in range((start - sink) // block + 1) if sink + (b + 1) * block <= start - recent]
    first = sink + len(aged) * block
    mid = [sink + b * block + i for b in chosen for i in range(block)]
    late = list(range(min(first, seen), seen))
    early = list(range(min(sink, seen)))
    if realigner == "contiguous":
        places = early + [sink + i for i in range(len(mid))] + [t - first + sink + len(mid) for t in late]
    elif realigner == "bounded":
        shift, free, placed = max(sink + len(mid) - first, min(0, REACH - first)), sink, []
        for number in chosen:
            begin = max(sink + number * block + shift, free)
            free = begin + block
            placed += range(begin, free)
        places = early + placed + [t + shift for t in late]
    else:
        from_mid = first - len(mid)
        places = [t + from_mid - sink for t in early] + [from_mid + i for i in range(len(mid))] + late
    return Held(origins=early + mid + late, places=places)


def by_hand(
    one: TensorIdentity,
    start: int,
    heads: Sequence[Held],
    *,
    rope: tuple[Tensor, float, str],
    scaling: float,
    window: dict[str, int] | None,
) -> Tensor:
    """The attention's output for the tokens from `start`, [query_heads, tokens, head_dim]."""
    queries, keys, values = (torch.cat(part, 1) for part in (one.queries, one.keys, one.values))
    now = torch.arange(start, queries.shape[1])
    group, out = queries.shape[0] // keys.shape[0], []
    for number, query in enumerate(queries):
        held = heads[number // group]
        origins = torch.tensor(held.origins)
        place = dict(zip(held.origins, held.places, strict=True))
        k = turned(keys[number // group, origins], torch.tensor(held.places), *rope)
        q = turned(query[now], torch.tensor([place[t] for t in now.tolist()]), *rope)
        allowed = origins[None] <= now[:, None]
        if window is not None:  # blocks that the policy drops while this chunk passes
            end = window["sink"] + ((origins - window["sink"]) // window["block"] + 1) * window["block"]
            allowed &= (origins < window["sink"])[None] | (end[None] > now[:, None] - window["recent"])
        scores = (q @ k.T * scaling).masked_fill(~allowed, -torch.inf)
        out.append(scores.softmax(-1) @ values[number // group, origins])
    return torch.stack(out)


def _worst(
    name: str,
    policy: str,
    realigner: str,
    splits: Sequence[int],
    *,
    off: int = 0,
    keep: bool = True,
    model_positions: int = 512,
    **changes: Any,
) -> float:
    """The largest error of any layer's attention over a whole run. off: how far the reference misplaces recent tokens;
    keep: whether the reference attends what was chosen; model_positions: how many its configuration says it knows."""
    family, layout, more = MODELS[name]
    model, ids = build(family, **more, max_position_embeddings=model_positions), tokens(LENGTH)
    settings = {**SMALL, **({"reach": REACH} if realigner == "bounded" else {}), **changes}
    window = {"sink": settings["sink"], "recent": settings["recent"], "block": settings["block_size"]}
    drops = policy == "streaming"
    rotary, worst, start = model.get_decoder().rotary_emb, 0.0, 0
    chunk = settings["chunk_size"]
    with tiered(model, policy, realigner=realigner, **settings) as cache, watched(model) as seen:
        for stop in sorted({*splits, *range(chunk, LENGTH, chunk), LENGTH}):
            feed(model, ids[:, start:stop], cache, ())
            for number, one in enumerate(seen):
                held = []
                for head in range(2):
                    chosen = _chosen(cache, number, head) if keep else []
                    held.append(held_by_hand(stop, start, chosen, realigner=realigner, **window))
                if off:
                    held = [
                        Held(
                            origins=h.origins,
                            places=[p + off * (o >= window["sink"]) for o, p in zip(h.origins, h.places, strict=True)],
                        )
                        for h in held
                    ]
                wanted = by_hand(
                    one,
                    start,
                    held,
                    rope=(rotary.inv_freq, rotary.attention_scaling, layout),
                    scaling=attentions(model)[number].scaling,
                    window=window if drops else None,
                )
                worst = max(worst, (one.outputs[-1] - wanted).abs().max().item() / wanted.abs().max().item())
            start = stop
    return worst


def _chosen(cache: TransformersCache, layer: int, head: int) -> list[int]:
    selection = cache.core.every_layer()[layer].history.selection
    return [] if selection is None else selection.chosen[0, head].tolist()


SPLITS = [
    pytest.param((), id="chunks"),
    pytest.param((1, 2, 5, 19, *range(21, LENGTH)), id="odd-then-tokens"),
]


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("realigner", ["contiguous", "incremental"])
@pytest.mark.parametrize("policy", ["streaming", "archive"])
@pytest.mark.parametrize("name", MODELS)
def test_a_realigned_context_is_what_one_places_by_hand(
    name: str, policy: str, realigner: str, splits: tuple[int, ...]
) -> None:
    assert _worst(name, policy, realigner, splits) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_a_bounded_context_is_what_one_places_by_hand(name: str) -> None:
    assert _worst(name, "archive", "bounded", (1, 2, 5, 19, 21)) < 1e-5


@pytest.mark.parametrize("known", [2 * REACH, 2 * REACH + 1])
def test_by_itself_bounded_takes_half_of_the_positions_that_the_model_was_made_for(known: int) -> None:
    assert _worst("llama", "archive", "bounded", (5,), model_positions=known, reach=None) < 1e-5
    assert _worst("llama", "archive", "bounded", (5,), model_positions=known - 2, reach=None) > 0.01


@pytest.mark.parametrize(
    "changes",
    [
        {"recent": 0, "sink": 0},
        {"sink": 30, "recent": 1},
        {"block_size": 1, "top_k": 7},
        {"block_size": 17},
        {"top_k": 99},
        {"refresh": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("realigner", ["contiguous", "bounded", "incremental"])
def test_odd_budgets_are_placed_by_hand_too(realigner: str, changes: dict[str, Any]) -> None:
    assert _worst("llama", "archive", realigner, (5, *range(33, LENGTH)), **changes) < 1e-5


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "wrong",
    [{"off": 1}, {"off": -1}, {"keep": False}],
    ids=["a position too late", "a position too early", "what was recalled left out"],
)
def test_a_reference_that_is_wrong_by_one_is_noticed(name: str, wrong: dict[str, Any]) -> None:
    assert _worst(name, "archive", "contiguous", (), **wrong) > 0.01


def test_a_reference_that_bounds_otherwise_is_noticed() -> None:
    assert _worst("llama", "archive", "bounded", (), off=1) > 0.01
    assert _worst("llama", "archive", "bounded", (), reach=REACH + 4) > 0.01
