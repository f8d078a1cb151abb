"""How a transformers model rotates: read its frequencies, and find the rest (pair layout, whether at all) by trying."""

import copy
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from kvtiers import Rotary, RotaryError
from kvtiers.rotary import Layout
from kvtiers_transformers.versions import cache_name

_LAYOUTS: tuple[Layout, ...] = ("half", "interleaved")
_POSITIONS = (0, 1, 7)


def rotary_of(decoder: nn.Module, attention: nn.Module, layer_type: str, *, frozen: bool) -> Rotary | None:
    """The rotary embedding of one layer, or none if the model has none.

    A layer that the model leaves unrotated, beside others that it rotates, gets a rotary embedding of no channels.
    frozen: take the frequencies as they are now, although the model would change them with length.
    Raises RotaryError if they change and are not frozen, or if no known layout reproduces the model's own rotation.
    """
    module: Any = getattr(decoder, "rotary_emb", None)
    if module is None:
        return None
    per_type = isinstance(getattr(module, "rope_type", None), dict)
    prefix = f"{layer_type}_" if per_type else ""
    kind = module.rope_type[layer_type] if per_type else getattr(module, "rope_type", "default")
    frequencies = getattr(module, f"{prefix}inv_freq", None)
    if frequencies is None:
        return None
    if not frozen and (kind == "longrope" or "dynamic" in kind):
        raise RotaryError(
            f"the rotary frequencies of this model change with length (rope_type={kind!r}), and keys that are rotated "
            "anew need one set; use realigner='original', or freeze_rope=True to keep the frequencies it has now"
        )
    scaling = float(getattr(module, f"{prefix}attention_scaling", 1.0))
    still = copy.deepcopy(module)  # a longer or shorter input would change its frequencies, and the model's with them
    still.rope_type = dict.fromkeys(module.rope_type, "default") if per_type else "default"
    plain, turned = _tried_keys(attention, still, (layer_type,) if per_type else ())
    if torch.equal(plain, turned):
        return Rotary([frequencies.new_zeros(0, dtype=torch.float32)])
    exact = turned.dtype == torch.float32
    positions = torch.tensor(_POSITIONS, dtype=torch.float64, device=plain.device)[:, None]
    for layout in _LAYOUTS:
        rotary = Rotary([frequencies.float()], layout=layout, scaling=scaling)
        if rotary.width <= plain.shape[-1]:
            error = (rotary.rotate(plain.float(), positions) - turned.float()).abs().max()
            if error <= (1e-5 if exact else 0.03) * turned.abs().max():
                return rotary
    raise RotaryError(
        f"{type(attention).__name__} rotates in a way that kvtiers does not know (tried {', '.join(_LAYOUTS)}); "
        "use realigner='original', which keeps the model's own rotation"
    )


class _Reached(Exception):  # noqa: N818 (no error: it ends an attention that has shown its keys)
    """Raised by `_Catcher`."""


class _Catcher:
    """Stands where a cache would, to see the keys that an attention would store."""

    keys: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> None:
        self.keys = key_states
        raise _Reached


def _tried_keys(attention: nn.Module, rotary: Any, extra: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """The keys of three tokens as this attention makes them: not rotated, and rotated to `_POSITIONS`."""
    weight = next(p for p in attention.parameters() if p.dim() == 2)
    config: Any = attention.config
    hidden = torch.linspace(-1, 1, 3 * config.hidden_size, device=weight.device).sin().reshape(1, 3, -1)
    hidden = hidden.to(weight.dtype if weight.is_floating_point() else config.dtype)
    with torch.no_grad():
        cos, sin = rotary(hidden, torch.tensor([_POSITIONS], device=hidden.device), *extra)
        found = []
        for turn in ((torch.ones_like(cos), torch.zeros_like(sin)), (cos, sin)):
            catcher = _Catcher()
            named = {cache_name(attention.forward): catcher, "attention_mask": None}
            with suppress(_Reached):
                attention(hidden, position_embeddings=turn, **named)
            if catcher.keys is None:
                raise RotaryError(
                    f"{type(attention).__name__} stores no keys of its own when tried, so how it rotates cannot be "
                    "told; use realigner='original', which keeps the model's own rotation"
                )
            found.append(catcher.keys)
    return found[0], found[1]
