"""`kvtiers eval attention`: how much of its attention a model gives to each tier, in videos of the tiny world.

Each query's attention weights sum to 1. What falls on a tier, beside the share of its tokens, says whether the model
looks there at all; of what falls on mid, the share on blocks that show the room in sight says whether it finds them.
Layers differ: the first one of this model knows no prompt yet.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import click
import torch
from jaxtyping import Bool, Float
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from kvtiers.errors import KVTiersError
from kvtiers_packforcing.tiny_world import Walks
from kvtiers_packforcing.tiny_world.codec import LinearCodec
from kvtiers_packforcing.tiny_world.making import LATENT_SHAPE, CodecDecoder
from kvtiers_packforcing.tiny_world.prompts import embed_walks
from kvtiers_packforcing.tiny_world.sampling import Sampler
from kvtiers_packforcing.tiny_world.sampling_options import sampled, sampling_options
from kvtiers_packforcing.tiny_world.variants import Variant, choose_variants
from kvtiers_packforcing.tiny_world.vocabulary import BLOCK_FRAMES
from kvtiers_packforcing.tiny_world.weights import SHIPPED, Models, check_weights, load_models

TIERS = ("sink", "mid", "recent", "current")
RETURNS, OTHERS = "a room comes back", "other blocks"
"""The first block of a visit to a room that was left before, if a block of mid shows it; and all other blocks."""


@attrs.define(eq=False)
class Mass:
    """Sums over blocks of one kind, steps, rows and heads; `count` of them for each layer."""

    attention: Float[Tensor, "layers tiers"]
    tokens: Float[Tensor, "layers tiers"]
    same_room: Float[Tensor, "layers 2"]
    """What falls of both on those tokens of mid that show the room in sight."""
    count: int = 0

    @staticmethod
    def zero(layers: int) -> "Mass":
        return Mass(torch.zeros(layers, 4), torch.zeros(layers, 4), torch.zeros(layers, 2))

    def shares(self) -> tuple[Float[Tensor, "layers tiers"], Float[Tensor, "layers tiers"]]:
        """The share of attention, and of the tokens attended, of each tier in each layer."""
        return self.attention / self.count, self.tokens / self.count

    def found(self) -> tuple[Float[Tensor, " layers"], Float[Tensor, " layers"]]:
        """Of the attention on mid, and of mid's tokens, the share that shows the room in sight (0 without mid)."""
        both = torch.stack([self.attention[:, 1], self.tokens[:, 1]], 1)
        attention, tokens = (self.same_room / both).nan_to_num().unbind(1)
        return attention, tokens


class _Watch(TorchFunctionMode):
    """Looks at every attention call of a `CausalWan`, which are self- and cross-attention of its layers in turn."""

    def __init__(self, wan: Any, walks: Walks) -> None:
        super().__init__()
        self.wan, self.walks, self.calls, self.block = wan, walks, 0, 0
        self.found = {kind: Mass.zero(len(wan.policies)) for kind in (RETURNS, OTHERS)}
        self.comes_back = torch.zeros(len(walks.rooms), dtype=torch.bool)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is scaled_dot_product_attention:
            layer, crosses = divmod(self.calls % (2 * len(self.wan.policies)), 2)
            self.calls += 1
            if not crosses:
                query, key = args[:2] if args else (given["query"], given["key"])
                self._note(layer, query, key, given.get("attn_mask"))
        return func(*args, **given)

    def begin(self, block: int) -> None:
        """Another block of each walk is about to be made."""
        rooms, self.block = self.walks.rooms, block
        before = max(0, block - 1)  # the newest committed block is recent
        seen = (rooms[:, 1:before] == rooms[:, block, None]).any(1)
        self.comes_back = self.walks.entered()[:, block] & seen

    def _note(self, layer: int, query: Tensor, key: Tensor, added: Tensor | None) -> None:
        held = self.wan.cache.every_layer()[layer]
        logits = query.float() @ key.float().mT / query.shape[-1] ** 0.5
        weights = (logits if added is None else logits + added).softmax(-1).mean(2)  # [rows, heads, tokens]
        window, current = held.window, held.current
        sizes = [window.sink, window.mid, window.recent - current, current]
        of_tier = torch.stack([part.sum(-1).mean(-1) for part in weights.split(sizes, -1)], -1)
        share = torch.tensor(sizes) / sum(sizes)
        same = torch.zeros(len(weights), 2)
        if window.mid:
            origin = held.context().locate()[0][..., 0].expand_as(weights)  # heads may choose by themselves
            rooms = self.walks.rooms.gather(1, (origin // BLOCK_FRAMES).long().flatten(1)).view(weights.shape)
            shows = rooms == self.walks.rooms[:, self.block, None, None]
            mid = slice(window.sink, window.sink + window.mid)
            same[:, 0] = (weights * shows)[..., mid].sum(-1).mean(-1)
            same[:, 1] = shows[..., mid].float().mean((1, 2)) * share[1]
        for kind, which in ((RETURNS, self.comes_back), (OTHERS, ~self.comes_back)):
            self._add(self.found[kind], layer, which, of_tier, share, same)

    @staticmethod
    def _add(
        mass: Mass, layer: int, which: Bool[Tensor, " rows"], of_tier: Tensor, share: Tensor, same: Tensor
    ) -> None:
        mass.attention[layer] += of_tier[which].sum(0)
        mass.tokens[layer] += share * int(which.sum())
        mass.same_room[layer] += same[which].sum(0)
        mass.count += int(which.sum()) if layer == 0 else 0


@torch.no_grad()
def attention_mass(
    models: Models, variant: Variant, walks: Walks, *, seeds: Sequence[int], sampler: Sampler
) -> Mapping[str, Mass]:
    """The attention of the denoising steps of one video for each walk, by kind of block (`RETURNS`, `OTHERS`).

    seeds: of the noise of each video. Blocks are committed with the pixels of the linear codec.
    """
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    decoder = CodecDecoder(LinearCodec.load())
    with variant.remember(models) as wan:
        watch = _Watch(wan, walks)
        for block, words in enumerate(embed_walks(walks).unbind(1)):
            noises = [
                torch.stack([torch.randn(LATENT_SHAPE, generator=draw) for draw in draws])
                for _ in range(sampler.noises)
            ]
            watch.begin(block)
            with watch:
                latents = sampler.denoise(wan, noises, words)
            wan.commit(latents, words, pixels=decoder.decode(latents))
    return watch.found


@click.command()
@click.option("--policies", default="packforcing,archive,full", show_default=True, help="Memories, with commas.")
@click.option("--walks", default=4, show_default=True, type=click.IntRange(min=1), help="Videos, of a walk each.")
@click.option("--seconds", default=60, show_default=True, type=click.IntRange(min=1), help="Their length.")
@sampling_options
@click.option("--weights", default=SHIPPED, type=click.Path(path_type=Path), help="Models.  [default: those shipped]")
def attention(
    policies: str,
    walks: int,
    seconds: int,
    steps: int | None,
    shift: float | None,
    sampling: str | None,
    weights: Path,
) -> None:
    """How much attention a model gives to sink, mid, recent and current, while it makes videos of the tiny world.

    A cell is the share of attention, and in brackets the share of the tokens attended.
    """
    try:
        chosen = choose_variants(policies)
        check_weights(weights)
        models, console = load_models(weights), Console()
        sampler = sampled(models.sampler, steps=steps, shift=shift, sampling=sampling)
        shown = Walks.of_seeds([f"evaluation walk {nth}" for nth in range(walks)], seconds)
        table = Table(title=f"Attention, {walks} videos of {seconds} s", box=box.SIMPLE_HEAD, padding=(0, 1))
        for name in ("memory", "blocks", *TIERS, "mid, layer by layer", "of it the room in sight"):
            table.add_column(name, justify="left" if name in ("memory", "blocks") else "right", overflow="fold")
        for variant in track(chosen, "memories", console=console, disable=not console.is_terminal):
            found = attention_mass(models, variant, shown, seeds=range(walks), sampler=sampler)
            for kind, mass in found.items():
                if mass.count:
                    table.add_row(variant.name, kind, *_cells(mass))
    except KVTiersError as error:
        raise click.ClickException(str(error)) from error
    console.print(table)


def _cells(mass: Mass) -> list[str]:
    attended, tokens = mass.shares()
    cells = [f"{a:.1%} ({t:.1%})" for a, t in zip(attended.mean(0).tolist(), tokens.mean(0).tolist(), strict=True)]
    if not mass.attention[:, 1].any():
        return [*cells, "", ""]
    by_layer, room, there = (_percent(shares) for shares in (attended[:, 1], *mass.found()))
    return [*cells, by_layer, f"{room} ({there})"]


def _percent(shares: Float[Tensor, " layers"]) -> str:
    return " ".join(f"{share:.0%}" for share in shares.tolist())
