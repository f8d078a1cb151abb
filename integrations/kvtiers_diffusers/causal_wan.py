"""`CausalWan`: an unmodified Wan, block by block, from tiers. A denoise step reads; one commit per block writes."""

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import WanTransformer3DModel
from jaxtyping import Float
from torch import Tensor

import kvtiers
from kvtiers import (
    Geometry,
    GeometryError,
    Held,
    Policy,
    Reduced,
    Reducer,
    SourceCompressor,
    TieredCache,
    UnsupportedModelError,
)
from kvtiers_diffusers.processors import Pass, Steady, disable, enable
from kvtiers_diffusers.rope import rotary_of
from kvtiers_diffusers.streaming_vae import StreamingDecoder


class CausalWan:
    """A video of any length from a Wan transformer whose self-attention reads a tiered cache.

    The transformer may be compiled (`transformer.compile(fullgraph=True)`): the first step of a block, which chooses
    what is attended, and its clean pass run as they are, the other steps compiled, and blocks do not recompile once
    what is attended has its full length. (Without gradients.)

    transformer: a `WanTransformer3DModel` as diffusers ships it; `close()` gives it back as it was.
    policy: a preset's name, the path of a .toml file, or a `kvtiers.Policy`; changes as for `kvtiers_transformers`.
    vae: its `AutoencoderKLWan`, for a policy that compresses through pixels.
    block_frames: latent frames of a block; none: those of the first block. even: whether all blocks are of that length,
        which makes the bound exact; otherwise it is the most.
    check: refuse keys and values that are not finite.
    keep_graph: where gradients are enabled, let them flow from later blocks through compressed ones to the compressor,
        for training it; graphs are held until `reset()`.

    Source: PackForcing (arXiv 2603.25730) section 3; the recipe of blocks and clean passes is Self-Forcing's (arXiv
    2506.08009).
    """

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        policy: str | Path | Policy = "full",
        *,
        vae: Any = None,
        block_frames: int | None = None,
        even: bool = True,
        check: bool = False,
        keep_graph: bool = False,
        **changes: Any,
    ) -> None:
        self.transformer = cast(Any, transformer)  # diffusers' models say little about their own types
        config = self.transformer.config
        if config.added_kv_proj_dim is not None or config.image_dim is not None:
            raise UnsupportedModelError(
                "this Wan attends an image beside the prompt (image to video); kvtiers_diffusers serves text to video"
            )
        if config.patch_size[0] != 1:
            raise UnsupportedModelError(
                f"patch_size is {tuple(config.patch_size)}: a token must belong to one latent frame, so the first "
                "must be 1"
            )
        layers = list(range(len(self.transformer.blocks)))
        self.policies = kvtiers.resolve(policy, layers=layers, **changes)
        self.block_frames, self.even, self.check, self.keep_graph = block_frames, even, check, keep_graph
        self.rotary = rotary_of(transformer)
        self.cache: TieredCache | None = None
        self._text: Tensor | None = None
        self._text_version = 0
        self._prompt: dict[int, tuple[Tensor, Tensor]] = {}
        self._committed: weakref.ref[Tensor] | None = None
        self._unfinished = False
        self._reduced: tuple[weakref.ref[Tensor], Reduced | None] | None = None
        self._decoder = None if vae is None else StreamingDecoder(vae)
        compressor = self.policies[0].compressor
        self.reducer: Reducer | None = None
        """What compresses blocks before the model sees them, if the policy does."""
        if isinstance(compressor, SourceCompressor):
            self.reducer = compressor.bind(self.transformer, vae)
        self._switch = enable(transformer)
        self._closed = False

    # ------------------------------------------------------------------ the two verbs

    def denoise(
        self,
        block: Float[Tensor, "batch channels frames height width"],
        timestep: float | int | Tensor,
        text: Float[Tensor, "#batch words text_dim"],
    ) -> Float[Tensor, "batch channels frames height width"]:
        """The flow that the model predicts for a noisy block, given what it remembers. Changes nothing that is stored.

        timestep: 0 to 1,000, one for all rows or one each. text: the encoder's embedding of the prompt.
        """
        self._admit(block, text)
        self._finish()
        return self._forward(block, timestep, text)

    def commit(
        self,
        block: Float[Tensor, "batch channels frames height width"],
        text: Float[Tensor, "#batch words text_dim"],
        pixels: Float[Tensor, "batch 3 pixel_frames pixel_height pixel_width"] | None = None,
    ) -> Float[Tensor, "batch channels frames height width"]:
        """Run the clean block once more, at timestep 0, and remember its keys and values. Returns that pass's flow.

        pixels: what was streamed of this block, from -1 to 1, if it was decoded; a policy that compresses through
            pixels decodes it otherwise.

        If an archive is full, `ArchiveFullError` is raised once the block is written: nothing is lost, and the next
        call archives what this one could not.
        """
        if self._committed is not None and self._committed() is block:
            raise GeometryError(
                "this block is committed already; denoise the next one, or give a copy if the same frames come again"
            )
        self._admit(block, text)
        self._finish()
        flow = self._forward(block, 0.0, text, self._reduce(block, pixels), clean=True)
        self._committed, self._unfinished, self._reduced = weakref.ref(block), True, None
        self._finish()
        return flow

    def _reduce(self, block: Tensor, pixels: Tensor | None) -> Reduced | None:
        """The reduced tokens of a clean block, if the policy compresses before the model."""
        if self.reducer is None:
            return None
        if self._reduced is not None and self._reduced[0]() is block:
            return self._reduced[1]  # the clean pass failed; branches with a memory must not see a block twice
        if pixels is None and self.reducer.needs_pixels and self._decoder is not None:
            pixels = self._decoder.decode(block)
        reduced = None
        if self._is_anchor(block.shape[2]):
            self.reducer.skip(block, pixels)
        else:
            reduced = self.reducer.reduce(block, pixels)
        self._reduced = (weakref.ref(block), reduced)
        return reduced

    def _is_anchor(self, frames: int) -> bool:
        """Whether a block of `frames` frames, committed now, is an anchor in every layer."""
        cache, stop = self._filled, self.frames + frames
        for policy, geometry, layer in zip(self.policies, cache.geometries, cache.layers, strict=True):
            timeline = next((store.timeline for store in layer.stores()), policy.timeline(geometry))
            if policy.extended(timeline, stop).sink != stop:
                return False
        return True

    def _finish(self) -> None:
        """Make what was committed history, in every layer."""
        if self._unfinished:
            self._filled.settle()
            self._unfinished = False

    def _forward(
        self,
        block: Tensor,
        timestep: float | int | Tensor,
        text: Tensor,
        reduced: Reduced | None = None,
        *,
        clean: bool = False,
    ) -> Tensor:
        if torch.is_grad_enabled() and getattr(self.transformer, "gradient_checkpointing", False):
            raise UnsupportedModelError(
                "gradient checkpointing runs layers again in backward, when this block's tiers have moved on; call "
                "disable_gradient_checkpointing(), or torch.no_grad() if no gradients are wanted"
            )
        self._remember_prompt(text)
        times = torch.as_tensor(timestep, device=block.device, dtype=torch.float32).expand(block.shape[0])
        words = text.expand(block.shape[0], -1, -1)
        steady = None if reduced is not None or clean else self._steady(block)
        with self._switch.lock, nullcontext() if steady is not None else self._eager():
            self._switch.serving = Pass(self._filled, self.rotary, self._grid(block), self._prompt, reduced, steady)
            try:
                flow: Tensor = self.transformer(block, times, words, return_dict=False)[0]
            finally:
                self._switch.serving = None
        return flow

    def _steady(self, block: Tensor) -> list[Steady] | None:
        """What further denoise steps of a block read and write, if its first one was made; none otherwise."""
        if torch.is_grad_enabled():
            return None
        found = []
        for layer, store in enumerate(self._filled.stores()):
            table = store.draft_table(block.shape[2] * store.geometry.tokens_per_step)
            if table is None or layer not in self._prompt:
                return None
            context = store.context()
            found.append(Steady(context.keys, context.values, table, context.mask))
        return found if len(found) == len(self.policies) else None

    def _eager(self) -> AbstractContextManager[Any]:
        """A pass that asks the store cannot be compiled: it runs as it is, in a model that is."""
        compiled = any(module._compiled_call_impl is not None for module in self.transformer.modules())
        return torch.compiler.set_stance("force_eager") if compiled else nullcontext()

    # ------------------------------------------------------------------ what comes in

    @property
    def _filled(self) -> TieredCache:
        if self.cache is None:
            raise GeometryError("nothing was denoised or committed yet, so this video has no size")
        return self.cache

    def _grid(self, block: Tensor) -> tuple[int, int]:
        _, high, wide = self.transformer.config.patch_size
        return block.shape[3] // high, block.shape[4] // wide

    def _admit(self, block: Tensor, text: Tensor) -> None:
        """Check a block against the model and the video so far; the first one gives the video its size."""
        if self._closed:
            raise UnsupportedModelError("this CausalWan was closed; make a new one")
        config = self.transformer.config
        high, wide = config.patch_size[1:]
        if block.dim() != 5 or block.shape[1] != config.in_channels:
            raise GeometryError(
                f"a block is [batch, {config.in_channels} channels, frames, height, width], got {tuple(block.shape)}"
            )
        if block.shape[3] % high or block.shape[4] % wide:
            raise GeometryError(
                f"latents of {block.shape[3]} x {block.shape[4]} cannot be cut into patches of {high} x {wide}; "
                "give a height and width that they divide"
            )
        if text.dim() != 3 or text.shape[0] not in (1, block.shape[0]) or text.shape[2] != config.text_dim:
            raise GeometryError(
                f"text is [{block.shape[0]} rows (or 1), words, {config.text_dim}], got {tuple(text.shape)}; "
                "give the prompt's embedding for each row of the block"
            )
        if self.cache is None:
            self.cache = self._new_cache(block)
        grid, held = self._grid(block), self.cache.geometries[0]
        if grid != held.grid:
            raise GeometryError(
                f"this video has {held.grid[0]} x {held.grid[1]} tokens a frame, got a block of {grid[0]} x {grid[1]}; "
                "use one CausalWan per video, or reset() it"
            )
        frames = block.shape[2]
        if frames > held.steps_per_commit or (self.even and frames != held.steps_per_commit):
            most = "at most " if not self.even else ""
            raise GeometryError(
                f"this video has blocks of {most}{held.steps_per_commit} frames, got {frames}; "
                "for blocks of different length give block_frames=<the longest> and even=False"
            )

    def _new_cache(self, block: Tensor) -> TieredCache:
        attention = self.transformer.blocks[0].attn1
        geometry = Geometry(
            kv_heads=attention.heads,
            head_dim=attention.inner_dim // attention.heads,
            grid=self._grid(block),
            steps_per_commit=self.block_frames or block.shape[2],
            even=self.even,
            causal=False,
            dtype=self.transformer.dtype,
        )
        count = len(self.transformer.blocks)
        return TieredCache(
            self.policies,
            [geometry] * count,
            rotaries=[self.rotary] * count,
            observe=kvtiers.observer(),
            check=self.check,
            keep_graph=self.keep_graph,
        )

    def _remember_prompt(self, text: Tensor) -> None:
        """Forget the keys and values of another prompt."""
        version = 0 if text.is_inference() else text._version  # inference tensors do not count their changes
        if self._text is not text or self._text_version != version:
            self._text, self._text_version = text, version
            self._prompt.clear()

    # ------------------------------------------------------------------ as a whole

    @property
    def frames(self) -> int:
        """Latent frames committed."""
        return 0 if self.cache is None else self.cache.settled

    @property
    def needs_pixels(self) -> bool:
        """Whether a commit looks at the block's pixels; it decodes them if none are given."""
        return self.reducer is not None and self.reducer.needs_pixels

    def held(self) -> list[Held]:
        """Bytes held per tier and place."""
        return [] if self.cache is None else self.cache.held()

    def attended(self) -> list[int]:
        """Tokens that the last forward of each layer attended, its own included."""
        return [] if self.cache is None else self.cache.attended()

    def reset(self) -> None:
        """Forget the video and its prompt; the next block begins another."""
        self.cache, self._committed, self._text, self._reduced = None, None, None, None
        self._unfinished = False
        self._prompt.clear()
        for part in (self.reducer, self._decoder):
            if part is not None:
                part.reset()

    def close(self) -> None:
        """Give the transformer back as it was. Harmless if that is done."""
        if not self._closed:
            self._closed = True
            disable(self.transformer)


@contextmanager
def tiered(
    transformer: WanTransformer3DModel, policy: str | Path | Policy = "full", **options: Any
) -> Iterator[CausalWan]:
    """A `CausalWan` over `transformer`, which is restored when the `with` block ends, however it ends."""
    wan = CausalWan(transformer, policy, **options)
    try:
        yield wan
    finally:
        wan.close()
