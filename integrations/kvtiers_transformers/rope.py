"""How a transformers model rotates: read its frequencies, and find its pair layout by trying it."""

import sys

import torch
from torch import nn

from kvtiers import Rotary, RotaryError
from kvtiers.rotary import Layout

_LAYOUTS: tuple[Layout, ...] = ("half", "interleaved")


def rotary_of(decoder: nn.Module, attention: nn.Module, layer_type: str, *, frozen: bool) -> Rotary | None:
    """The rotary embedding of one layer, or none if the model has none.

    frozen: take the frequencies as they are now, although the model would change them with length.
    Raises RotaryError if they change and are not frozen, or if no known layout reproduces the model's own rotation.
    """
    module = getattr(decoder, "rotary_emb", None)
    apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if module is None or apply is None:
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
            "anew need one set; use realigner='gaps', or freeze_rope=True to keep the frequencies it has now"
        )
    scaling = float(getattr(module, f"{prefix}attention_scaling", 1.0))
    positions = torch.tensor([[0, 1, 7]], device=frequencies.device)
    extra = (layer_type,) if per_type else ()
    width = getattr(attention, "head_dim", None) or getattr(attention, "head_size", 2 * frequencies.numel())
    probe = torch.linspace(-1, 1, 3 * width, device=frequencies.device).reshape(1, 1, 3, width)
    with torch.no_grad():
        before = {name: buffer.clone() for name, buffer in module.named_buffers()}
        cos, sin = module(probe, positions, *extra)
        wanted = apply(probe, probe, cos, sin)[0]
        for name, buffer in before.items():
            setattr(module, name, buffer)
        for layout in _LAYOUTS:
            rotary = Rotary([frequencies.float()], layout=layout, scaling=scaling)
            if rotary.width <= width and torch.allclose(
                rotary.rotate(probe, positions[0][:, None].double()), wanted, atol=1e-5
            ):
                return rotary
    raise RotaryError(
        f"{type(attention).__name__} rotates in a way that kvtiers does not know (tried {', '.join(_LAYOUTS)}); "
        "use realigner='gaps', which keeps the model's own rotation"
    )
