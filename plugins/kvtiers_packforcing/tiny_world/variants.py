"""The memories that are compared in the tiny world: presets, set to its blocks, and PackForcing with a part missing.

A block is 4 latent frames of 32 tokens; compressed it is 4 tokens. The model was trained on clips of five blocks, of
which one is the sink, one recent and one the current block. `packforcing` attends those three and `top_k` compressed
ones, 448 tokens with the paper's 16. The windows are not to lose for want of room: they attend five whole blocks, 640
tokens. In the last phase of training four in ten steps have PackForcing's layout, and a fourth those of the windows
and of `full`, with up to five blocks in full. One in twenty has no sink. No layout has what `recency`,
`original-positions`, `mean-pool`, `random-compressor`, `hr-only` and `lr-only` show a model: those take a part away
from the trained one.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

import attrs
import torch
from attrs import validators as v

from kvtiers.errors import UnknownPolicyError, suggest
from kvtiers_packforcing.tiny_world.vocabulary import BLOCK_FRAMES

if TYPE_CHECKING:
    from kvtiers_diffusers import CausalWan
    from kvtiers_packforcing.tiny_world.weights import Models

BLOCK_TOKENS, COMPRESSED_TOKENS = 128, 4
"""Tokens of a block, whole and compressed."""
TOP_K = 16
"""Compressed blocks that are attended, as in the paper. A clip that is trained on has at most 3 of them."""


@attrs.frozen(kw_only=True)
class Variant:
    """One way to remember.

    policy: the name of a preset. options: what is changed of it.
    compressor: whether the compressor's convolutions are the trained ones, or `random`.
    """

    name: str
    policy: str
    options: Mapping[str, Any] = attrs.field(factory=dict)
    compressor: Literal["trained", "random"] = attrs.field(default="trained", validator=v.in_(("trained", "random")))

    def remember(self, models: "Models") -> AbstractContextManager["CausalWan"]:
        """A `CausalWan` that remembers so. It gives the transformer back when the `with` block ends."""
        from kvtiers_diffusers import tiered

        network = models.compressor if self.compressor == "trained" else _random(models.compressor)
        return tiered(
            models.transformer,
            self.policy,
            vae=models.autoencoder,
            compressor_network=network,
            block_frames=BLOCK_FRAMES,
            **self.options,
        )


def variants(*, top_k: int = TOP_K, window_blocks: int = 5) -> dict[str, Variant]:
    """All of them, by name.

    top_k: compressed blocks that are attended. window_blocks: blocks that the windows attend, the current one (and the
    sink, where there is one) included. `sink-rolling-window` is closed up behind its sink, since the model has not seen
    positions that lie minutes apart.
    """
    window = BLOCK_FRAMES * (window_blocks - 1)
    ours: dict[str, Any] = {"sink": BLOCK_FRAMES, "recent": BLOCK_FRAMES, "top_k": top_k}

    def changed(name: str, compressor: Literal["trained", "random"] = "trained", **changes: Any) -> Variant:
        return Variant(name=name, policy="packforcing", options=ours | changes, compressor=compressor)

    pooled = ("mean-pool", {"ratio": BLOCK_TOKENS // COMPRESSED_TOKENS})
    sink_window = {"sink": BLOCK_FRAMES, "recent": window - BLOCK_FRAMES, "realigner": "contiguous"}
    made = [
        Variant(name="full", policy="full"),
        Variant(name="rolling-window", policy="rolling-window", options={"recent": window}),
        Variant(name="sink-rolling-window", policy="sink-rolling-window", options=sink_window),
        changed("packforcing"),
        changed("no-sink", sink=0),
        changed("sink-16", sink=16),
        changed("recency", retriever="recency"),
        changed("original-positions", realigner="original"),
        changed("hr-only", branches="hr"),
        changed("lr-only", branches="lr"),
        Variant(name="mean-pool", policy="packforcing", options=ours | {"compressor": pooled}),
        changed("random-compressor", "random"),
    ]
    return {variant.name: variant for variant in made}


def choose_variants(names: str, **settings: Any) -> list[Variant]:
    """The variants whose names `names` lists, separated by commas. Raises `UnknownPolicyError`."""
    known = variants(**settings)
    chosen = list(dict.fromkeys(filter(None, (name.strip() for name in names.split(",")))))
    if not chosen:
        raise UnknownPolicyError(f"no policies are named; choose from {', '.join(known)}")
    for name in chosen:
        if name not in known:
            raise UnknownPolicyError(
                f"unknown policy {name!r}; the tiny world compares {', '.join(known)}.{suggest(name, known)}"
            )
    return [known[name] for name in chosen]


def _random(trained: Any) -> Any:
    """A network of the same size, the same one every time. All of it is random: its last layer begins at zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = type(trained)(trained.config.channels, trained.config.width, trained.config.widths)
        made.layers[-1].reset_parameters()
    return made.to(trained.device).eval().requires_grad_(requires_grad=False)
