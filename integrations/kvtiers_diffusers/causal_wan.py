"""`CausalWan`: an unmodified Wan, block by block, from tiers. A denoise step reads; one commit per block writes."""

import copy
import weakref
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import WanTransformer3DModel
from jaxtyping import Float
from torch import Tensor

import kvtiers
from kvtiers import (
    Blocks,
    CropError,
    CurrentView,
    Geometry,
    GeometryError,
    Layer,
    MemoryUsage,
    Policy,
    SavedCacheError,
    SlotError,
    TieredCache,
    UnsupportedModelError,
    saving,
)
from kvtiers.events import PromptChanged
from kvtiers_diffusers.graph_layer import GraphLayer
from kvtiers_diffusers.processors import Pass, disable, enable
from kvtiers_diffusers.reducing import Reduced, Reducer, Reduces
from kvtiers_diffusers.rope import rotary_of
from kvtiers_diffusers.streaming_vae import StreamingDecoder
from kvtiers_diffusers.tensor_identity import TensorIdentity

_PROMPTS_KEPT = 2
"""Prompts whose keys and values are held at a time: one, or two that alternate."""
_owners: "weakref.WeakKeyDictionary[TieredCache, weakref.ref[CausalWan]]" = weakref.WeakKeyDictionary()
"""Whose video a cache remembers."""


class CausalWan:
    """A video of any length from a Wan transformer whose self-attention reads a tiered cache.

    The transformer may be compiled (`transformer.compile(fullgraph=True)`): the first step of a block, which chooses
    what is attended, and its clean pass run as they are, the other steps compiled, and blocks do not recompile once
    what is attended has its full length. (Without gradients.)

    transformer: a `WanTransformer3DModel` as diffusers ships it; `close()` gives it back as it was.
    policy: a preset's name, the path of a .toml file, or a `kvtiers.Policy`; changes as for `kvtiers_transformers`.
    vae: its `AutoencoderKLWan`, for a policy that compresses through pixels. compressor_network: trained weights of the
        policy's compressor, instead of those that its settings name.
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
        compressor_network: Any = None,
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
        if block_frames is not None and block_frames < 1:
            raise GeometryError(f"block_frames is a whole number of at least 1, or none, got {block_frames!r}")
        self.block_frames, self.even, self.check, self.keep_graph = block_frames, even, check, keep_graph
        self.rotary = rotary_of(transformer)
        self.cache: TieredCache | None = None
        self._prompts: list[tuple[TensorIdentity, dict[int, tuple[Tensor, Tensor]]]] = []
        """The prompts that came last, and their keys and values by layer."""
        self._weights: tuple[tuple[int, int], ...] = ()
        self._prompt: dict[int, tuple[Tensor, Tensor]] = {}
        self._committed, self._committed_frames = TensorIdentity(content=True), 0
        self._unfinished = False
        self._compressed: list[Blocks | None] = []
        """By layer, the compressed form of the block that is being committed."""
        self._last_timestep: float | None = None
        self._given: bool | None = None
        """Whether this video's pixels are given with its blocks."""
        self._encoded = 0
        """Frames whose pixels the compressor has seen."""
        self._decoder = None if vae is None else StreamingDecoder(vae)
        compressor = self.policies[0].compressor
        self.reducer: Reducer | None = None
        """What compresses blocks before the model sees them, if the policy does."""
        if compressor.given and isinstance(compressor, Reduces):
            self.reducer = compressor.bind(self.transformer, vae, compressor_network)
        self._switch = enable(transformer)
        self._closed = False
        if keep_graph and self.reducer is None:
            self.close()
            raise SlotError(
                "keep_graph lets gradients reach a compressor that the model's own layers follow; this policy has "
                f"{type(compressor).__name__}; choose one such as dual-branch, or leave keep_graph out"
            )

    # ------------------------------------------------------------------ the two verbs

    def denoise(
        self,
        block: Float[Tensor, "batch channels frames height width"],
        timestep: float | int | Tensor,
        text: Float[Tensor, "#batch words text_dim"],
    ) -> Float[Tensor, "batch channels frames height width"]:
        """The flow that the model predicts for a noisy block, given what it remembers. Changes nothing that is stored.

        timestep: 0 to 1,000, one for all rows or one each. text: the encoder's embedding of the prompt (under inference
            mode, one that is changed in place is taken for unchanged).

        What is attended is chosen by the first step of a block, and anew where timesteps rise (tensors that are not on
        the CPU are not looked at).
        """
        times = self._times(block, timestep)
        with self._undo_on_error():
            self._admit(block, text)
            self._finish()
            self._begin_again(timestep)
            return self._forward(block, times, text)

    def commit(
        self,
        block: Float[Tensor, "batch channels frames height width"],
        text: Float[Tensor, "#batch words text_dim"],
        pixels: Float[Tensor, "batch 3 pixel_frames pixel_height pixel_width"] | None = None,
    ) -> Float[Tensor, "batch channels frames height width"]:
        """Run the clean block once more, at timestep 0, and remember its keys and values. Returns that pass's flow.

        pixels: what was streamed of this block, from -1 to 1, if it was decoded; a policy that compresses through
            pixels decodes it otherwise. They are given with every block of a video, or with none.

        If an archive is full, `ArchiveFullError` is raised once the block is written: nothing is lost, and the next
        call archives what this one could not.
        """
        self._finish()
        if self.frames and self.frames == self._committed_frames and self._committed.knows(block):
            raise GeometryError(
                "this block is committed already; denoise the next one, or give a copy if the same frames come again"
            )
        with self._undo_on_error(sources=True):
            self._admit(block, text)
            reduced = self._reduce(block, pixels)
            flow = self._forward(block, self._times(block, 0.0), text, reduced, clean=True)
        self._encoded += block.shape[2]
        self._committed.note(block)
        self._committed_frames = self.frames + block.shape[2]
        self._unfinished, self._last_timestep = True, None
        self._finish()
        return flow

    @contextmanager
    def _undo_on_error(self, *, sources: bool = False) -> Iterator[None]:
        """If a pass fails, a new video has no size yet, what encodes pixels (`sources`) has seen no block more, and a
        block whose first step it was has chosen nothing."""
        began, given, timestep = self.cache is None, self._given, self._last_timestep
        before = self._remembered() if sources else None
        try:
            yield
        except BaseException:
            if began:
                self.cache = None
            elif timestep is None and self.cache is not None:
                self.cache.reselect()
            self._last_timestep = timestep
            if before is not None:
                self._restore(before)
            self._given = given
            raise

    def _begin_again(self, timestep: float | int | Tensor) -> None:
        """Choose anew what is attended if timesteps rise: then another rollout of this block begins."""
        if isinstance(timestep, Tensor):
            if timestep.device.type != "cpu":
                return
            timestep = float(timestep.max())
        if self._last_timestep is not None and timestep > self._last_timestep:
            self._filled.reselect()
        self._last_timestep = timestep

    def _remembered(self) -> dict[str, Tensor]:
        """What compressing and decoding depend on of the blocks before."""
        found: dict[str, Tensor] = {}
        for name, part in self._sources():
            found |= {f"{name}.{key}": value for key, value in part.remembered().items()}
        return found

    def _restore(self, remembered: Mapping[str, Tensor]) -> None:
        for name, part in self._sources():
            start = f"{name}."
            part.restore({k.removeprefix(start): v for k, v in remembered.items() if k.startswith(start)})

    def _sources(self) -> list[tuple[str, Any]]:
        parts = (("reducer", self.reducer), ("decoder", self._decoder))
        return [(name, part) for name, part in parts if part is not None]

    def _reduce(self, block: Tensor, pixels: Tensor | None) -> Reduced | None:
        """The reduced tokens of a clean block, if the policy compresses before the model."""
        if self.reducer is None:
            return None
        if self.needs_pixels:
            self._check_source(pixels)
        if pixels is None and self.reducer.needs_pixels and self._decoder is not None:
            pixels = self._decoder.decode(block)
        if self._is_anchor(block.shape[2]):
            self.reducer.skip(block, pixels)
            return None
        return self.reducer.reduce(block, pixels)

    def _check_source(self, pixels: Tensor | None) -> None:
        """Refuse what would let the compressor see another video than the one that is remembered."""
        if self._encoded != self.frames:
            raise GeometryError(
                f"this video has {self.frames} frames, and the compressor has seen the pixels of {self._encoded}; go "
                "back with crop(), fork() or load() of the CausalWan, not of its cache"
            )
        if self._given is not None and self._given != (pixels is not None):
            raise GeometryError(
                f"the blocks before came with{'' if self._given else 'out'} pixels and this one "
                f"{'without' if self._given else 'with them'}; give them with every block of a video, or with none"
            )
        self._given = pixels is not None

    def _is_anchor(self, frames: int) -> bool:
        """Whether a block of `frames` frames, committed now, is an anchor in every layer."""
        cache, stop = self._filled, self.frames + frames
        for policy, geometry, rows in zip(self.policies, cache.geometries, cache.layers, strict=True):
            timeline = next((layer.timeline for layer in rows.layers()), policy.timeline(geometry))
            if policy.extended(timeline, stop).sink != stop:
                return False
        return True

    def _finish(self) -> None:
        """Make what was committed history, in every layer."""
        if self._unfinished:
            self._filled.commit(compressed=self._compressed)
            self._unfinished, self._compressed = False, []

    def _forward(
        self,
        block: Tensor,
        times: Tensor,
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
        owner = _owners.get(self._filled)
        if owner is not None and owner() not in (None, self):
            raise GeometryError(
                "this cache remembers the video of another CausalWan; two videos cannot share one: fork() it"
            )
        _owners[self._filled] = weakref.ref(self)
        self._remember_prompt(text)
        steady = None if reduced is not None or clean else self._steady(block)
        if steady is None:
            self._remember_weights()
        with self._switch.lock, nullcontext() if steady is not None else self._eager():
            compressed: list[Blocks | None] = [None] * len(self.policies)
            self._switch.serving = Pass(
                self._filled, self.rotary, self._grid(block), self._prompt, compressed, reduced, steady
            )
            try:
                flow: Tensor = self.transformer(block, times, text, return_dict=False)[0]
            finally:
                self._switch.serving = None
        if clean:
            self._compressed = compressed
        return flow

    def _steady(self, block: Tensor) -> list[CurrentView] | None:
        """What further denoise steps of a block read and write, if its first one was made; none otherwise."""
        if torch.is_grad_enabled():
            return None
        frames, found = block.shape[2], []
        for number, layer in enumerate(self._filled.every_layer()):
            view = layer.current_view() if layer.num_steps - layer.committed_steps == frames else None
            if view is None or number not in self._prompt:
                return None
            found.append(view)
        return found if len(found) == len(self.policies) else None

    def _eager(self) -> AbstractContextManager[Any]:
        """A pass that asks the cache cannot be compiled: it runs as it is, in a model that is."""
        parts = (part for block in self.transformer.blocks for part in (block, block.attn1, block.attn2))
        compiled = any(part._compiled_call_impl is not None for part in (self.transformer, *parts))
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
            self.cache = self._cache_of(self._grid(block), self.block_frames or block.shape[2], even=self.even)
        grid, held = self._grid(block), self.cache.geometries[0]
        if grid != held.grid:
            raise GeometryError(
                f"this video has {held.grid[0]} x {held.grid[1]} tokens a frame, got a block of {grid[0]} x {grid[1]}; "
                "use one CausalWan per video, or reset() it"
            )
        rows = self.cache.layers[0].batch
        if rows is not None and rows != block.shape[0]:
            raise GeometryError(
                f"this video holds {rows} rows, got a block of {block.shape[0]}; use one CausalWan per batch, or "
                "reset() it"
            )
        frames = block.shape[2]
        if frames > held.steps_per_commit or (self.even and frames != held.steps_per_commit):
            most = "at most " if not self.even else ""
            raise GeometryError(
                f"this video has blocks of {most}{held.steps_per_commit} frames, got {frames}; "
                "for blocks of different length give block_frames=<the longest> and even=False"
            )

    def _times(self, block: Tensor, timestep: float | int | Tensor) -> Tensor:
        """The timestep of each row."""
        known = not isinstance(timestep, Tensor) or timestep.device.type == "cpu"
        if known and not bool(((torch.as_tensor(timestep) >= 0) & (torch.as_tensor(timestep) <= 1000)).all()):
            raise GeometryError(f"timesteps are 0 (clean) to 1000 (noise), got {timestep}")
        if not isinstance(timestep, Tensor):
            return torch.full((block.shape[0],), float(timestep), device=block.device)
        if timestep.numel() not in (1, block.shape[0]):
            raise GeometryError(
                f"timestep is one number, or one for each of {block.shape[0]} rows, got {tuple(timestep.shape)}"
            )
        return timestep.to(block.device, torch.float32).reshape(-1).expand(block.shape[0])

    def _cache_of(self, grid: tuple[int, ...], block_frames: int, *, even: bool) -> TieredCache:
        attention = self.transformer.blocks[0].attn1
        geometry = Geometry(
            kv_heads=attention.heads,
            head_dim=attention.inner_dim // attention.heads,
            grid=grid,
            steps_per_commit=block_frames,
            even=even,
            causal=False,
            dtype=self.transformer.dtype,
        )
        count = len(self.transformer.blocks)
        return TieredCache(
            self.policies,
            [geometry] * count,
            rotaries=[self.rotary] * count,
            check=self.check,
            layer=GraphLayer if self.keep_graph else Layer,
        )

    def _remember_prompt(self, text: Tensor) -> None:
        """Find the keys and values of this prompt, or begin them and say that it changes."""
        found = next((one for one in self._prompts if one[0].knows(text)), None)
        if found is None:
            found = (TensorIdentity(), {})
            found[0].note(text)
            self._prompts = [*self._prompts[1 - _PROMPTS_KEPT :], found]
            self._filled.set_prompt(text)
            if self._filled.tell:
                self._filled.tell(PromptChanged(words=text.shape[1]))
        self._prompt = found[1]

    def forget_prompts(self) -> None:
        """Project prompts anew from here on.

        The first step of a block notices weights that were changed in place, as optimisers and loaders do, and modules
        that were replaced; it does not notice what is written past autograd (`.data`), or a setting of a module.
        """
        self._prompts, self._prompt = [], {}

    def _remember_weights(self) -> None:
        """Forget a prompt's keys and values if what made them has changed: trained, loaded, replaced."""
        makers = [self.transformer.condition_embedder.text_embedder]
        for block in self.transformer.blocks:
            attn = block.attn2
            makers += [attn.to_kv] if attn.fused_projections else [attn.to_k, attn.to_v]
            makers.append(attn.norm_k)
        parameters = [parameter for maker in makers for parameter in maker.parameters()]
        weights = tuple((id(one), 0 if one.is_inference() else one._version) for one in parameters)
        if weights != self._weights:
            self._weights = weights
            for _, prompt in self._prompts:
                prompt.clear()

    # ------------------------------------------------------------------ as a whole

    @property
    def frames(self) -> int:
        """Latent frames committed."""
        return 0 if self.cache is None else self.cache.committed_steps

    @property
    def needs_pixels(self) -> bool:
        """Whether a commit looks at the block's pixels; it decodes them if none are given."""
        return self.reducer is not None and self.reducer.needs_pixels

    def memory_usage(self) -> list[MemoryUsage]:
        """Bytes held per tier and location, the prompt's keys and values included."""
        held = [] if self.cache is None else self.cache.memory_usage()
        kept = [both for _, prompt in self._prompts for both in prompt.values()]
        storages = {part.untyped_storage() for both in kept for part in both}
        prompt = sum(storage.nbytes() for storage in storages)
        return [*held, MemoryUsage(tier="prompt", location="device", bytes=prompt)] if prompt else held

    def attended(self) -> list[int]:
        """Tokens that the last forward of each layer attended, its own included."""
        return [] if self.cache is None else self.cache.attended()

    def crop(self, frames: int) -> None:
        """Go back to the first `frames` latent frames, exactly, or raise `CropError` and change nothing."""
        if self.needs_pixels and 0 < frames < self.frames:
            raise CropError(
                f"this video cannot be rolled back to {frames} frames: its compressor has seen the pixels of later "
                "ones; fork() before blocks that may have to be undone"
            )
        if not frames:
            self.reset()
            return
        self._finish()
        self._filled.crop(frames)
        self._last_timestep = None

    def fork(self) -> "CausalWan":
        """An independent `CausalWan` of the same transformer that goes on exactly from here; it has its own `close`."""
        self._finish()
        if self._closed:
            raise UnsupportedModelError("this CausalWan was closed; make a new one and load() the video")
        other = copy.copy(self)
        other.cache = None if self.cache is None else self.cache.fork()
        other.reducer, other._decoder = copy.copy(self.reducer), copy.copy(self._decoder)
        other._restore(self._remembered())
        other._committed = copy.copy(self._committed)
        other.forget_prompts()
        enable(self.transformer)
        return other

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file what is remembered, and what compressing and decoding need."""
        self._finish()
        geometry = self._filled.geometries[0]
        video = {
            "grid": list(geometry.grid),
            "block_frames": geometry.steps_per_commit,
            "even": geometry.even,
            "encoded": self._encoded,
            "given": self._given,
        }
        self._filled.save(path, extra={"video": video}, beside=self._remembered())

    def load(self, path: str | Path) -> None:
        """Become what `save` wrote, of a video with the same model and policy. On an error nothing changes."""
        where = Path(path)
        video = saving.extra(where).get("video")
        if not isinstance(video, dict):
            raise SavedCacheError(f"{where} holds no video; give a file that save() of a CausalWan wrote")
        missing = {"grid", "block_frames", "even", "encoded", "given"} - set(video)
        if missing:
            raise SavedCacheError(f"{where} does not say {', '.join(sorted(missing))} of its video; save it again")
        cache = self._cache_of(tuple(video["grid"]), video["block_frames"], even=video["even"])
        beside: dict[str, Tensor] = {}
        cache.load(where, device=self.transformer.device, beside=beside)
        before = self._remembered()
        try:
            self._restore(beside)
        except (IndexError, ValueError) as error:
            self._restore(before)
            raise SavedCacheError(
                f"{where} was saved with another autoencoder ({error}); give the one that it was made with"
            ) from error
        self.forget_prompts()
        self._committed.clear()
        self.cache, self._encoded, self._given = cache, video["encoded"], video["given"]
        self._unfinished, self._last_timestep, self._committed_frames = False, None, 0

    def swap(self, policy: str | Path | Policy, **changes: Any) -> None:
        """Go on under another policy, as `TieredCache.swap`; its compressor stays."""
        policies = kvtiers.resolve(policy, layers=list(range(len(self.transformer.blocks))), **changes)
        self._filled.swap(policies)
        self.policies = policies

    def reset(self) -> None:
        """Forget the video and its prompt; the next block begins another."""
        self.cache, self._unfinished, self._last_timestep = None, False, None
        self._given, self._encoded, self._committed_frames = None, 0, 0
        self._committed.clear()
        self.forget_prompts()
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
