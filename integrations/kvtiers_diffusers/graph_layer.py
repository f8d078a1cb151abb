"""A layer through whose compressed blocks gradients flow to what made them: for training a compressor."""

from collections.abc import Mapping
from typing import Any, cast

import attrs
import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad

from kvtiers import Blocks, Context, SelectionError, SlotError
from kvtiers.layer import Layer


@attrs.define(eq=False, slots=False, kw_only=True)
class GraphLayer(Layer):
    """Holds every compressed block that was given with its graph, as long as the layer lives."""

    graph: dict[int, tuple[Tensor, Tensor]] = attrs.field(factory=dict)
    """Keys and values by the block's first step, [batch, kv_heads, 1, tokens, width]."""

    def __attrs_post_init__(self) -> None:
        if not (self.policy.compressor.given and self.policy.attend == "compressed"):
            raise SlotError(
                f"keep_graph lets gradients reach a compressor that the model's own layers follow, with "
                f"attend='compressed'; this policy has {type(self.policy.compressor).__name__} and "
                f"{self.policy.attend!r}"
            )
        super().__attrs_post_init__()

    def clear(self) -> None:
        super().clear()
        self.graph = {}

    def receive(self, compressed: Blocks, start: int) -> None:
        super().receive(compressed, start)
        more = (0, 0, 0, self.history.most_tokens["compressed"] - compressed.tokens)
        self.graph = {**self.graph, start: (pad(compressed.keys, more), pad(compressed.values, more))}

    def context(self) -> Context:
        context = super().context()
        if not (self.graph and self.window.mid and torch.is_grad_enabled()):
            return context
        before, after = self.window.sink, self.window.sink + self.window.mid
        keys, values = (
            torch.cat([part[:, :, :before], mid, part[:, :, after:]], 2)
            for part, mid in zip((context.keys, context.values), self._mid_with_graph(), strict=True)
        )
        return attrs.evolve(context, keys=keys, values=values)

    def _mid_with_graph(self) -> tuple[Tensor, Tensor]:
        """The selected blocks, placed, as they were computed."""
        selection, starts = self.history.selection, sorted(self.graph)[: self.history.count]
        where = self.placed.mid
        if selection is None or where is None:
            raise SelectionError(f"layer {self.layer} has no archived blocks to select")
        index = selection.both[..., None, None]
        keys, values = (torch.cat([self.graph[start][i] for start in starts], 2) for i in (0, 1))
        keys, values = (part.take_along_dim(index, 2).flatten(2, 3) for part in (keys, values))
        if self.policy.realigner.rotates and self.rotary is not None:
            keys = self.rotary.rotate(keys, where.at(where.placed))
        return keys, values

    def select_rows(self, at: Int[Tensor, " rows"]) -> "GraphLayer":
        other = cast(GraphLayer, super().select_rows(at))
        other.graph = {
            start: (keys.index_select(0, at.to(keys.device)), values.index_select(0, at.to(values.device)))
            for start, (keys, values) in self.graph.items()
        }
        return other

    def crop(self, steps: int) -> None:
        super().crop(steps)
        self.graph = {start: held for start, held in self.graph.items() if start < steps}

    def fill(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """As `Layer.fill`; what was loaded has no graph."""
        super().fill(tensors, about)
        history = self.history
        held = {int(start): (one.keys, one.values) for start, one in history.waiting.items()}
        if history.count and history.starts is not None:
            index = torch.arange(history.count, device=history.starts.device)
            index = index.expand(*history.wide, -1)
            keys, values = history.parts("compressed", index)
            each = zip(history.starts.tolist(), keys.split(1, 2), values.split(1, 2), strict=True)
            held |= {start: (k, v) for start, k, v in each}
        self.graph = held
