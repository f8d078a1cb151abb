"""First weights with which a model tells prompts apart and attends earlier blocks of the same prompt more.

A room's name says nothing of what the room holds, so it helps a model only to look up earlier blocks of that name. As
long as no layer does, a difference between names is noise to the model, and training removes it: after 10,500 steps
embeddings of all six names had a cosine of 0.99, and a block that was told another name was made just the same. So the
look-up is put in beforehand, and training builds on it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kvtiers_packforcing.tiny_world import Clips, LinearCodec, text_table
from kvtiers_packforcing.tiny_world.vocabulary import BLOCK_FRAMES, ROOMS

_APART = 4.0
"""Length of the part of a name's embedding that no other word has."""
_CARRIED = 12.0
"""Length of what the first layer's cross-attention would add to a token that attended the name alone."""
_MATCH = 1.5
"""By how much a logit rises, about, where query and key were told the same name."""
_SEED = 7
_CLIPS = [f"names {nth}" for nth in (2, 3, 21, 25, 27, 28, 29, 31)]
_TIMESTEPS = (0.0, 1000.0, 900.0, 600.0)
_USED = slice(8, 72)
"""Which left singular vectors of a cross-attention's output carry names: neither the strongest nor the weakest."""
_SLOW = 4
"""Of each axis, how many channels of a head carry the match: those that turn slowest, so that it holds far away."""
_RIDGE = 1e-2
_MARGIN = 3.0
"""By how much a logit of an earlier block of the same room is to be above that of one of another room."""


def mismatch(
    affinities: Float[Tensor, "layers batch streams blocks earlier"],
    clips: Clips,
    which: Bool[Tensor, "blocks earlier"] | None = None,
) -> Float[Tensor, ""]:
    """A loss that is 0 if blocks like earlier blocks of their own room more than those of other rooms, by a margin.

    affinities: logits of the mean query of each block and the mean key of each block of the clip. which: the earlier
    blocks that are compared with one another, for each block; None: all. Neither blocks behind a curtain count, nor
    clips in which nothing can be compared; without any, it is 0.
    """
    rows = torch.arange(len(clips.blocks))[:, None]
    rooms, opened = clips.walks.rooms[rows, clips.blocks], ~clips.walks.curtains[rows, clips.blocks]
    earlier = (opened[:, :, None] & opened[:, None]).tril(-1)
    if which is not None:
        earlier = earlier & which.to(earlier.device)
    same = rooms[:, :, None] == rooms[:, None]
    pairs = ((earlier & same)[..., None] & (earlier & ~same)[:, :, None]).to(affinities.device)
    above = affinities[..., None] - affinities[..., None, :]
    off = ((_MARGIN - above).clamp(min=0) / _MARGIN).square().mean((0, 2)) * pairs
    count = pairs.sum((1, 2, 3))
    found: Tensor = (off.sum((1, 2, 3)) / count.clamp(min=1)).sum() / (count > 0).sum().clamp(min=1)
    return found


@torch.no_grad()
def match_prompts(transformer: Any) -> None:
    """Change a Wan transformer's weights in place so that it tells rooms apart by name, and attends blocks of the same.

    * The text embedder gives every name a direction of its own; the other words keep their embeddings.
    * The first layer's cross-attention writes that direction into the tokens that are told the name.
    * In all later layers queries and keys of self-attention get a code of the name that they can read from their
      tokens, in the channels that rotary embeddings turn least.

    What the model makes changes little, as long as no name is looked up.
    """
    draw = torch.Generator().manual_seed(_SEED)
    names, every = len(ROOMS), text_table()
    own = _spread(transformer.condition_embedder.text_embedder, every, names, draw)
    _carry(transformer.blocks, own, draw)
    clips = Clips.of_seeds(_CLIPS, "consecutive")
    latents = LinearCodec.load().encode(clips.pixels())[:, :, :BLOCK_FRAMES]
    prompts = torch.stack([torch.stack((name, *every[names : names + 2])) for name in every[:names]])
    for layer in transformer.blocks[1:]:
        _match(layer.attn1, _inputs(transformer, layer.attn1, latents, prompts), draw)


def _spread(embedder: Any, every: Tensor, names: int, draw: torch.Generator) -> Float[Tensor, "width names"]:
    """Give each of the first `names` words a direction that no other word has. Returns these directions."""
    before: Tensor = embedder(every)
    common = before[:names].mean(0)
    taken = torch.linalg.qr(torch.cat((before[names:], common[None])).T)[0]
    own = torch.randn(before.shape[1], names, generator=draw)
    own = torch.as_tensor(torch.linalg.qr(own - taken @ (taken.T @ own))[0])
    wanted = torch.cat((common + _APART * own.T, before[names:]))
    nn.init.orthogonal_(embedder.linear_1.weight, generator=draw)
    embedder.linear_1.bias.zero_()
    hidden = embedder.act_1(embedder.linear_1(every))
    embedder.linear_2.weight.copy_((torch.linalg.pinv(hidden) @ (wanted - wanted.mean(0))).T)
    embedder.linear_2.bias.copy_(wanted.mean(0))
    return own


def _carry(layers: Any, own: Float[Tensor, "width names"], draw: torch.Generator) -> None:
    """Let the first layer alone write names into its tokens, and let no layer choose its words by the name."""
    out = layers[0].attn2.to_out[0].weight.double()  # and so below: in float32 sums depend on where a tensor lies
    basis = torch.linalg.svd(out)[0][:, _USED]
    written = torch.linalg.qr(basis @ torch.randn(basis.shape[1], own.shape[1], generator=draw).double())[0]
    for nth, layer in enumerate(layers):
        for linear in (layer.attn2.to_k, layer.attn2.to_v)[: 1 if nth == 0 else 2]:
            linear.weight.sub_(linear.weight @ own @ own.T)
    values = torch.linalg.lstsq(out, _CARRIED * written).solution
    layers[0].attn2.to_v.weight.add_((values / _APART @ own.double().T).float())


def _match(attention: Any, tokens: Float[Tensor, "names tokens width"], draw: torch.Generator) -> None:
    """Add to queries and keys of every head the code of the name that a linear map reads from their tokens."""
    names, _, width = tokens.shape
    flat = tokens.flatten(0, 1).double()
    mean = flat.mean(0)
    flat = flat - mean
    which = (torch.eye(names, dtype=torch.float64) - 1 / names).repeat_interleave(tokens.shape[1], 0)
    strength = _RIDGE * flat.square().mean() * torch.eye(width, dtype=torch.float64)
    read = torch.linalg.solve(flat.T @ flat / len(flat) + strength, flat.T @ which / len(flat)).T
    slow = _slowest(width // attention.heads)
    code = torch.linalg.qr(torch.randn(len(slow), names, generator=draw))[0]
    placed = torch.zeros(attention.heads, width // attention.heads, names, dtype=torch.float64)
    placed[:, slow] = code.double()
    gain = (attention.norm_q.weight * attention.norm_k.weight).mean()
    amplitude = (_MATCH * (width // attention.heads) ** 0.5 / gain) ** 0.5
    for linear in (attention.to_q, attention.to_k):
        size = linear((flat + mean).float()).square().mean().sqrt()
        added = amplitude * size * placed.flatten(0, 1) @ read
        linear.weight.add_(added.float())
        linear.bias.sub_((added @ mean).float())


def _slowest(head_width: int) -> list[int]:
    """Channels of a head that rotary embeddings turn least, of each of the axes time, height and width."""
    of_plane = 2 * (head_width // 6)
    ends = (head_width - 2 * of_plane, head_width - of_plane, head_width)
    return [end - back for end in ends for back in range(_SLOW, 0, -1)]


def _inputs(
    transformer: Any, attention: nn.Module, latents: Tensor, prompts: Tensor
) -> Float[Tensor, "names tokens width"]:
    """What a self-attention is given of the same blocks under each prompt, clean and with noise."""
    found: list[Tensor] = []
    with _listening(attention, found):
        for timestep in _TIMESTEPS:
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
            noisy = torch.lerp(latents, noise, timestep / 1000)
            for prompt in prompts:
                transformer(noisy, torch.full((len(latents),), timestep), prompt.expand(len(latents), -1, -1))
    by_name: Tensor = torch.stack(found).unflatten(0, (len(_TIMESTEPS), len(prompts))).transpose(0, 1)
    of_name: Tensor = by_name.flatten(1, 3)
    return of_name


@contextmanager
def _listening(attention: nn.Module, found: list[Tensor]) -> Iterator[None]:
    def note(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.append((args[0] if args else named["hidden_states"]).clone())

    handle = attention.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
