"""The memories that are compared in the tiny world: presets, set to its blocks, and PackForcing with a part missing.

A block is 4 latent frames of 32 tokens; compressed it is 4 tokens. `packforcing` attends its sink, one recent and the
current block whole, and `top_k` compressed ones: 448 tokens with the paper's 16. The windows are not to lose for want
of room: they attend five whole blocks, 640 tokens. `archive` attends as many, two of which it chooses from all of the
past, which lies whole on the host. Published methods attend at most as many. About half of the steps
of training have PackForcing's layout, others those of `full` and of sink and window. No layout has what `recency`,
`mean-pool`, `original-positions`, `random-compressor`, `hr-only`, `lr-only` and most published methods show a model.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

import attrs
import torch
from attrs import validators as v

from kvtiers.errors import UnknownPolicyError, suggest
from kvtiers.plugins import registry
from kvtiers.presets import changes_of
from kvtiers_packforcing.tiny_world.vocabulary import BLOCK_FRAMES

if TYPE_CHECKING:
    from kvtiers_diffusers import CausalWan
    from kvtiers_packforcing.tiny_world.weights import Models

BLOCK_TOKENS, COMPRESSED_TOKENS = 128, 4
"""Tokens of a block, whole and compressed."""
TOP_K = 16
"""Compressed blocks that are attended, as in the paper. A clip of eight blocks has at most 5 of them."""


@attrs.frozen(kw_only=True)
class Variant:
    """One way to remember.

    name: what it was asked for by. policy: the name of a preset. options: what is changed of it.
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

    top_k: compressed blocks that are attended. window_blocks: blocks that the windows and `archive` attend, the current
    one (and the sink, where there is one) included. `sink-rolling-window` and `archive` are closed up behind their
    sink, since the model has not seen positions that lie minutes apart.
    """
    window = BLOCK_FRAMES * (window_blocks - 1)
    ends = {"sink": BLOCK_FRAMES, "recent": BLOCK_FRAMES}
    ours: dict[str, Any] = ends | {"top_k": top_k}

    def changed(name: str, compressor: Literal["trained", "random"] = "trained", **changes: Any) -> Variant:
        return Variant(name=name, policy="packforcing", options=ours | changes, compressor=compressor)

    pooled = ("mean-pool", {"ratio": BLOCK_TOKENS // COMPRESSED_TOKENS})
    sink_window = {"sink": BLOCK_FRAMES, "recent": window - BLOCK_FRAMES, "realigner": "contiguous"}
    whole: dict[str, Any] = ends | {"top_k": max(1, window_blocks - 3), "archive": "host"}
    whole |= {"realigner": "contiguous", "chunk_size": None}
    made = [
        Variant(name="full", policy="full"),
        Variant(name="rolling-window", policy="rolling-window", options={"recent": window}),
        Variant(name="sink-rolling-window", policy="sink-rolling-window", options=sink_window),
        Variant(name="archive", policy="archive", options=whole),
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


def published() -> dict[str, Variant]:
    """Other people's methods, set to the world's blocks: at most five whole blocks are attended, or as much as that.

    Rolling Forcing's anchor is `sink-rolling-window` here, and LongLive is, too, but that it makes recent frames anew
    where the prompt changes. `quant-videogen` attends everything.
    """
    whole, rewritten = BLOCK_FRAMES, {"sink": 0, "recent": 0}
    options: dict[str, dict[str, Any]] = {
        "deep-forcing": {"sink": 2 * whole, "recent": whole, "compressor": ("deep-forcing", {"frames": whole})},
        "fademem": rewritten | {"compressor": ("fademem", {"frames": 4 * whole, "horizon": 4 * whole})},
        "framepack": {"recent": whole, "compressor": ("framepack", {"frames": whole, "levels": 4})},
        "infinity-rope": {
            "sink": whole,
            "recent": whole,
            "realigner": ("block-relativistic", {"onset": 3 * whole}),
        },
        "memflow": {
            "sink": whole,
            "recent": 2 * whole,
            "compressor": ("memflow", {"frames": whole}),
            "realigner": "contiguous",
        },
        "memrope": {"sink": whole, "recent": 2 * whole},
        "quant-videogen": {"recent": whole, "codec": ("quant-videogen", {"centroids": 16, "group": 32})},
    }
    return {name: Variant(name=name, policy=name, options=changes) for name, changes in options.items()}


def choose_variants(names: str, **settings: Any) -> list[Variant]:
    """What `names` lists, separated by commas: variants, published methods, and presets of other plugins.

    Each may be changed, as in `packforcing:top_k=8,sink=0,full`: what has an equals sign and no colon belongs to the
    name before. Raises `UnknownPolicyError`, and `PolicyError` if a change cannot be read.
    """
    known = variants(**settings) | published()
    specs: list[str] = []
    for part in filter(None, (name.strip() for name in names.split(","))):
        if "=" in part and ":" not in part and specs:
            specs[-1] += f",{part}"
        else:
            specs.append(part)
    if not specs:
        raise UnknownPolicyError(f"no policies are named; choose from {', '.join(known)}")
    return [_chosen(spec, known) for spec in dict.fromkeys(specs)]


def _chosen(spec: str, known: Mapping[str, Variant]) -> Variant:
    name, changes = changes_of(spec)
    others = registry().names("policy")
    if name not in known and name not in others:
        raise UnknownPolicyError(
            f"unknown policy {name!r}; the tiny world compares {', '.join(known)}, and presets of other plugins."
            f"{suggest(name, [*known, *others])}"
        )
    variant = known.get(name) or Variant(name=name, policy=name)
    return attrs.evolve(variant, name=spec, options={**variant.options, **changes}) if changes else variant


def _random(trained: Any) -> Any:
    """A network of the same size, the same one every time. All of it is random: its last layer begins at zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        said = trained.config
        made = type(trained)(said.channels, said.width, said.widths, normalise=said.normalise)
        made.layers[-1].reset_parameters()
    return made.to(trained.device).eval().requires_grad_(requires_grad=False)
