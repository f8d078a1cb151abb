"""Compressor `press`: what a scorer press of kvpress keeps, where that library is installed.

Source: kvpress (https://github.com/NVIDIA/kvpress); each of its presses names its paper. kvpress compresses a prompt
once, when it was read: `sink=0, recent=None, block_size=1` and as many `queries` as the prompt has tokens, then
`cache.compact(recent=0)`. With a number for `recent`, a press chooses anew whenever tokens leave it, among those that
left. It is shown keys as they are rotated at their original positions, values, and the latest queries in place of
hidden states. Deviations: with a number for `recent`, a press takes the newest tokens that left it for those that asked
the latest queries, so that `snapkv` keeps them in any case; where more steps have passed than queries are held, those
that are held are repeated in place of older ones; a press that looks at anything else of a model (its weights, its
attention), or that does more than score, is refused.
"""

import json
from collections.abc import Mapping
from functools import cache
from types import SimpleNamespace
from typing import Any, ClassVar

import attrs
import torch
from attrs import validators as v
from jaxtyping import Float
from torch import Tensor, nn

from kvtiers.errors import PolicyError, explain, suggest
from kvtiers.rotary import Rotary
from kvtiers.slots import Moment
from kvtiers_methods.whole_past import Past, WholePast, rotated_keys, unrotated_queries


@cache
def presses() -> Mapping[str, Any]:
    """The presses of the kvpress that is installed which score tokens and do nothing else, by name: `snapkv` is
    `SnapKVPress`."""
    import kvpress

    found: dict[str, Any] = {name: value for name, value in vars(kvpress).items() if isinstance(value, type)}
    base = kvpress.ScorerPress
    scorers = {
        name: each
        for name, each in found.items()
        if issubclass(each, base) and each.compress is base.compress and each is not base
    }
    return {name.removesuffix("Press").lower(): each for name, each in sorted(scorers.items())}


def _short(name: object) -> object:
    return name.lower().replace("-", "").replace("_", "").removesuffix("press") if isinstance(name, str) else name


def _as_text(settings: object) -> object:
    return json.dumps(dict(settings), sort_keys=True) if isinstance(settings, Mapping) else settings


@attrs.frozen(kw_only=True)
class Press(WholePast):
    """Each KV head keeps the `most` tokens that a press of kvpress scores highest.

    press: its name, such as `knorm`, `keydiff`, `snapkv` or `SnapKVPress`. settings: of the press, as a mapping or as
    JSON, such as {"window_size": 32}; its `compression_ratio` follows from `most`, which says how many stay.
    queries: how many of the latest queries it is shown.
    """

    attention: ClassVar[None] = None
    needs_rotary: ClassVar[bool] = True
    press: str = attrs.field(default="knorm", converter=_short, validator=v.instance_of(str))
    settings: str = attrs.field(default="{}", converter=_as_text, validator=v.instance_of(str))
    queries: int = attrs.field(default=128, validator=[v.instance_of(int), v.ge(1)])

    def __attrs_post_init__(self) -> None:
        if self.press not in presses():
            raise ValueError(
                f"kvpress has no scorer press {self.press!r}; those of the version that is installed: "
                f"{', '.join(presses())}.{suggest(self.press, presses())}"
            )
        try:
            _made(self.press, self.settings)
        except (TypeError, ValueError, AssertionError) as error:
            raise ValueError(f"settings {self.settings} make no {presses()[self.press].__name__}: {error}") from error

    @property
    def window(self) -> int:
        return self.queries

    def scores(self, past: Past, moment: Moment) -> Tensor:
        geometry, name = moment.geometry, presses()[self.press].__name__
        if not geometry.causal:
            raise PolicyError(
                f"{name} of kvpress scores tokens of text, and this is a video; choose another compressor"
            )
        tokens, kept = past.keys.shape[2], self.budget(moment.layer)
        if tokens <= kept:  # all stay; a press may need more tokens than there are
            return past.bias
        hidden, known = None, {}
        if moment.queries is not None:
            hidden = _hidden_states(unrotated_queries(past, moment).flatten(1, 2).to(past.keys.dtype), moment.step)
            cos, sin = _table(moment, range(moment.step - hidden.shape[1], moment.step), past.keys)
            known["position_embeddings"] = cos, sin
        keys = rotated_keys(past, moment).to(past.keys.dtype)
        chosen = _made(self.press, self.settings)
        chosen.compression_ratio = 1 - (kept + 0.5) / tokens  # some look at how many will stay
        try:
            with torch.no_grad():
                made = chosen.score(_StandIn(moment), hidden, keys, past.values, None, known)
        except Exception as error:  # whatever a press of another library raises
            raise PolicyError(
                f"{name} of kvpress cannot score the tokens of layer {moment.layer} by their keys, values and the "
                f"latest {self.queries} queries: {explain(error)}; choose another press, or other settings"
            ) from error
        if not isinstance(made, Tensor) or made.shape != past.bias.shape:
            got = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise PolicyError(f"{name} of kvpress gave scores {got}; due is {tuple(past.bias.shape)}")
        scores: Tensor = made.float() + past.bias
        return scores


def by_name(
    *,
    name: str | None = None,
    press: str = "knorm",
    settings: str | Mapping[str, Any] = "{}",
    queries: int = 128,
    most: int = 508,
    close_up: bool = False,
) -> Press:
    """`Press`, where `name` is another word for the option `press`."""
    if name is not None and press != "knorm":
        raise ValueError(f"'name' and 'press' say the same, got {name!r} and {press!r}; give one")
    return Press(
        press=press if name is None else name, settings=settings, queries=queries, most=most, close_up=close_up
    )


def _made(press: str, settings: str) -> Any:
    return presses()[press](**json.loads(settings))


def _hidden_states(
    queries: Float[Tensor, "batch query_heads window head_dim"], steps: int
) -> Float[Tensor, "batch steps channels"]:
    """The queries of `steps` steps, all heads side by side; what is not held repeats what is."""
    flat = queries.transpose(1, 2).flatten(2)
    times = -(-steps // flat.shape[1])
    return flat.repeat(1, times, 1)[:, -steps:]


def _table(moment: Moment, steps: range, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions as transformers writes them, [1, steps, head_dim]."""
    where = torch.arange(steps.start, steps.stop, dtype=torch.float64, device=like.device)[:, None]
    rotary, width = moment.rotary, like.shape[-1]
    if rotary is None or not rotary.width:
        return like.new_ones(1, len(steps), width), like.new_zeros(1, len(steps), width)
    if not _plain(rotary, width):
        raise PolicyError(
            f"kvpress knows models that rotate all {width} channels of a key in halves; layer {moment.layer} rotates "
            f"{rotary.width} of them, {rotary.layout}. Choose a compressor of kvtiers"
        )
    cos, sin = rotary.table(where, like.dtype)
    return cos.to(like.dtype)[None], torch.cat([-sin[:, : width // 2], sin[:, width // 2 :]], -1).to(like.dtype)[None]


def _plain(rotary: Rotary, width: int) -> bool:
    return rotary.layout == "half" and rotary.width == width


class _StandIn(nn.Module):
    """What a press sees of a layer's attention: its shape, queries that need no projection, and how it rotates."""

    def __init__(self, moment: Moment) -> None:
        super().__init__()
        geometry = moment.geometry
        self.layer_idx, self.head_dim = moment.layer, geometry.head_dim
        self.num_key_value_groups = geometry.query_heads // geometry.kv_heads
        self.scaling = geometry.head_dim**-0.5
        self.config = SimpleNamespace(
            num_attention_heads=geometry.query_heads,
            num_key_value_heads=geometry.kv_heads,
            hidden_size=geometry.query_heads * geometry.head_dim,
            head_dim=geometry.head_dim,
        )
        self.q_proj = nn.Identity()
        self._moment = moment

    def rotary_emb(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines at positions, which are the same for all rows."""
        cos, sin = _table(self._moment, range(int(position_ids[0, 0]), int(position_ids[0, -1]) + 1), x)
        return cos, sin
