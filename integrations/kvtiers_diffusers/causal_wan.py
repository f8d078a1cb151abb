"""`CausalWan`: an unmodified Wan, block by block, from tiers. A denoise step reads; one commit per block writes."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, cast

from diffusers.utils.torch_utils import unwrap_module
from jaxtyping import Float
from torch import Tensor, nn

import kvtiers
from kvtiers import (
    Blocks,
    CropError,
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
from kvtiers.changes import check_steps
from kvtiers.undoing import undone_on_error
from kvtiers_diffusers.admitting import by_row, check_block, check_continues, check_model
from kvtiers_diffusers.graph_layer import GraphLayer
from kvtiers_diffusers.offloading import device_of
from kvtiers_diffusers.reducing import Reducer
from kvtiers_diffusers.running import Runner
from kvtiers_diffusers.sources import Sources
from kvtiers_diffusers.tensor_identity import TensorIdentity

_SAVED: dict[str, Callable[[Any], bool]] = {
    "grid": lambda x: isinstance(x, list) and len(x) == 2 and all(type(n) is int and n > 0 for n in x),
    "block_frames": lambda x: type(x) is int and x > 0,
    "even": lambda x: type(x) is bool,
    "encoded": lambda x: type(x) is int and x >= 0,
    "given": lambda x: x is None or type(x) is bool,
}
"""What a saved video says beside its cache, and whether a value may be that."""


class CausalWan:
    """Makes a video of any length with a Wan transformer, one block of latent frames after the other.

    The transformer keeps its weights and its code. While a `CausalWan` runs it, its self-attention sees what the policy
    keeps of the blocks before, instead of the whole video, so that a block takes as long as any other. For each block,
    call `denoise` at every timestep, which only reads, and then `commit`, which remembers the finished block.

    Where no gradients are wanted, the transformer may be compiled: `transformer.compile(fullgraph=True)`. The first
    step of a block, which chooses what is attended, and its clean pass run as they are. The other steps run compiled,
    and no longer recompile once what is attended has its full length.

    transformer: a `WanTransformer3DModel` as diffusers ships it, or what `torch.compile` made of one. `close()` gives
        it back as it was.
    policy: the name of a preset, the path of a .toml file, or a `kvtiers.Policy`. Further keywords change its settings.
    vae: the model's `AutoencoderKLWan`, which a policy needs that compresses blocks by their pixels.
    compressor_network: trained weights for the policy's compressor, instead of those that its settings name.
    block_frames: how many latent frames a block has. None: as many as the first one.
    even: whether all blocks are of that length. False allows shorter ones; then the bound on what is attended is not
        reached.
    check: whether to refuse keys and values that are not finite.
    keep_graph: whether gradients reach the compressor from later blocks, to train it. Graphs are held until `reset()`.

    Source: PackForcing (arXiv 2603.25730) section 3; blocks and clean passes are those of Self-Forcing (arXiv
    2506.08009).
    """

    def __init__(
        self,
        transformer: nn.Module,
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
        self.transformer = cast(Any, unwrap_module(transformer))  # diffusers' models say little about their own types
        check_model(self.transformer)
        layers = list(range(len(self.transformer.blocks)))
        self.policies = kvtiers.resolve(policy, layers=layers, **changes)
        if block_frames is not None and block_frames < 1:
            raise GeometryError(f"block_frames is a whole number of at least 1, or none, got {block_frames!r}")
        self.block_frames, self.even, self.check, self.keep_graph = block_frames, even, check, keep_graph
        self.cache: TieredCache | None = None
        self._committed, self._committed_frames = TensorIdentity(), 0
        self._unfinished = False
        self._compressed: list[Blocks | None] = []
        """By layer, the compressed form of the block that is being committed."""
        self._last_timestep: float | None = None
        compressor = self.policies[0].compressor
        self.sources = Sources(compressor, self.transformer, vae, compressor_network)
        self.runner = Runner(transformer)
        self.rotary = self.runner.rotary
        if keep_graph and self.sources.reducer is None:
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

        timestep: 0 to 1,000, one for all rows or one each, which may be repeated for the row's frames or tokens.
        text: the encoder's embedding of the prompt.

        What is attended is chosen by the first step of a block, and anew where timesteps rise (tensors that are not on
        the CPU are not looked at).
        """

        def run() -> Tensor:
            self._admit(block, text)
            times = by_row(block, timestep, prod(self.runner.grid(block)) * block.shape[2])
            self._finish()
            self._begin_again(timestep)
            return self.runner.run(self._filled, block, times, text)[0]

        return self._undone_on_error(run)

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

        def run() -> Tensor:
            self._admit(block, text)
            reduced, times = self.sources.reduce(block, pixels, self._filled), by_row(block, 0.0)
            flow, self._compressed = self.runner.run(self._filled, block, times, text, reduced, clean=True)
            self.sources.frames += block.shape[2]
            self._committed.note(block)
            self._committed_frames = self.frames + block.shape[2]
            self._unfinished, self._last_timestep = True, None
            return flow

        flow = self._undone_on_error(run, sources=True)
        self._finish()
        return flow

    def _undone_on_error(self, run: Callable[[], Tensor], *, sources: bool = False) -> Tensor:
        """What `run` returns. If it fails, a new video has no size yet, what encodes pixels (`sources`) has seen no
        block more, a block whose first step it was has chosen nothing, and the same block is known as the last one."""
        began, timestep = self.cache is None, self._last_timestep
        frames, given = self.sources.frames, self.sources.given
        before = self.sources.remembered() if sources else None
        committed = copy.copy(self._committed), self._committed_frames

        def undo() -> None:
            if began:
                self.cache = None
                self.runner.forget_prompts()  # the next cache is to be told
            elif timestep is None and self.cache is not None:
                self.cache.reselect()
            self._last_timestep = timestep
            if before is not None:
                self.sources.restore(before)
            self.sources.frames, self.sources.given = frames, given
            self._committed, self._committed_frames = committed

        return undone_on_error(run, undo)

    def _begin_again(self, timestep: float | int | Tensor) -> None:
        """Choose anew what is attended if timesteps rise: then another rollout of this block begins."""
        if isinstance(timestep, Tensor):
            if timestep.device.type != "cpu":
                return
            timestep = float(timestep.max())
        if self._last_timestep is not None and timestep > self._last_timestep:
            self._filled.reselect()
        self._last_timestep = timestep

    def _finish(self) -> None:
        """Make what was committed history, in every layer."""
        if self._unfinished:
            self._filled.commit(compressed=self._compressed)
            self._unfinished, self._compressed = False, []

    # ------------------------------------------------------------------ what comes in

    @property
    def _filled(self) -> TieredCache:
        if self.cache is None:
            raise GeometryError("nothing was denoised or committed yet, so this video has no size")
        return self.cache

    def _admit(self, block: Tensor, text: Tensor) -> None:
        """Check a block against the model and the video so far; the first one gives the video its size."""
        if self.runner.closed:
            raise UnsupportedModelError("this CausalWan was closed; make a new one")
        check_block(self.transformer, block, text)
        grid = self.runner.grid(block)
        if self.cache is None:
            self.cache = self._cache_of(grid, self.block_frames or block.shape[2], even=self.even)
        check_continues(self.cache, block, grid, even=self.even)

    def _cache_of(self, grid: tuple[int, ...], block_frames: int, *, even: bool) -> TieredCache:
        geometry, count = self.runner.geometry(grid, block_frames, even=even), len(self.transformer.blocks)
        return TieredCache(
            self.policies,
            [geometry] * count,
            rotaries=[self.rotary] * count,
            check=self.check,
            layer=GraphLayer if self.keep_graph else Layer,
        )

    def forget_prompts(self) -> None:
        """Project prompts anew from here on.

        Every step notices by itself weights that were changed in place, as optimisers and loaders do, modules that were
        replaced, adapters that were switched, scaled, merged or removed, and hooks on its modules (not those on all
        modules of a program). What is written past autograd, as `weight.data.copy_(other)` is, shows in the numbers
        alone. Of those, diagonals are compared, by every step on a CPU, and elsewhere by the first step of a block and
        by its clean pass: call this where that is not enough.
        """
        self.runner.forget_prompts()

    # ------------------------------------------------------------------ as a whole

    @property
    def frames(self) -> int:
        """Latent frames committed."""
        return 0 if self.cache is None else self.cache.committed_steps

    @property
    def needs_pixels(self) -> bool:
        """Whether a commit looks at the block's pixels; it decodes them if none are given."""
        return self.sources.needs_pixels

    @property
    def reducer(self) -> Reducer | None:
        """What compresses blocks before the model sees them, if the policy does."""
        return self.sources.reducer

    def memory_usage(self) -> list[MemoryUsage]:
        """Bytes held per tier and location, the prompt's keys and values included."""
        held = [] if self.cache is None else self.cache.memory_usage()
        prompt = self.runner.prompts.nbytes
        return [*held, MemoryUsage(tier="prompt", location="device", bytes=prompt)] if prompt else held

    def attended(self) -> list[int]:
        """Tokens that the last forward of each layer attended, its own included."""
        return [] if self.cache is None else self.cache.attended()

    def tier_counts(self, row: int = 0) -> dict[str, int]:
        """How many latent frames of a row are in each tier of the first layer, and how many a policy dropped."""
        return {} if self.cache is None else self.cache.tier_counts(0, row)

    def compact(self, *, recent: int) -> None:
        """Age now what is older than the newest `recent` latent frames, whatever the policy's `recent` is."""
        self._finish()
        self._filled.compact(recent=recent)
        self._last_timestep = None

    def rewind_recent(self) -> int:
        """Forget the recent latent frames; returns how many. Commit them again, with a new prompt as a rule.

        Source: LongLive (arXiv 2509.22622), which computes the window anew when the prompt changes. Raises `CropError`
        and changes nothing where the compressor has seen their pixels.
        """
        self._refuse_if_seen("rewound")
        self._finish()
        frames = self._filled.rewind_recent()
        self._last_timestep = None
        return frames

    def _refuse_if_seen(self, what: str) -> None:
        if self.needs_pixels:
            raise CropError(
                f"this video cannot be {what}: its compressor has seen the pixels of later frames; fork() before "
                "blocks that may have to be undone"
            )

    def crop(self, frames: int) -> None:
        """Go back to the first `frames` latent frames, exactly, or raise `CropError` and change nothing."""
        check_steps(frames)
        if 0 < frames < self.frames:
            self._refuse_if_seen(f"rolled back to {frames} frames")
        if not frames:
            self.reset()
            return
        self._finish()
        self._filled.crop(frames)
        self._last_timestep = None

    def fork(self) -> "CausalWan":
        """An independent `CausalWan` of the same transformer that goes on exactly from here.

        It needs the transformer until its own `close`, or until nothing refers to it.
        """
        self._finish()
        if self.runner.closed:
            raise UnsupportedModelError("this CausalWan was closed; make a new one and load() the video")
        other = copy.copy(self)
        other.cache = None if self.cache is None else self.cache.fork()
        other.sources = self.sources.fork()
        other._committed = copy.copy(self._committed)
        other.runner = self.runner.fork()
        return other

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file what is remembered, and what compressing and decoding need."""
        self._finish()
        geometry = self._filled.geometries[0]
        video = {
            "grid": list(geometry.grid),
            "block_frames": geometry.steps_per_commit,
            "even": geometry.even,
            "encoded": self.sources.frames,
            "given": self.sources.given,
        }
        self._filled.save(path, extra={"video": video}, beside=self.sources.remembered())

    def load(self, path: str | Path) -> None:
        """Become what `save` wrote, of a video with the same model and policy. On an error nothing changes."""
        where = saving.file_path(path)
        video = saving.extra(where).get("video")
        if not isinstance(video, dict):
            raise SavedCacheError(f"{where} holds no video; give a file that save() of a CausalWan wrote")
        wrong = [name for name, may_be in _SAVED.items() if name not in video or not may_be(video[name])]
        if wrong:
            raise SavedCacheError(f"{where} does not say {', '.join(sorted(wrong))} of its video; save it again")
        try:
            cache = self._cache_of(tuple(video["grid"]), video["block_frames"], even=video["even"])
        except GeometryError as error:
            raise SavedCacheError(f"{where} was saved with other settings: {error}") from error
        beside: dict[str, Tensor] = {}
        cache.load(where, device=device_of(self.transformer), beside=beside)
        if self.needs_pixels and video["encoded"] != cache.committed_steps:
            raise SavedCacheError(f"{where} does not say encoded of its video; save it again")
        sources = self.sources.fork()
        try:
            sources.restore(beside)
        except (IndexError, ValueError) as error:
            raise SavedCacheError(
                f"{where} was saved with another autoencoder ({error}); give the one that it was made with"
            ) from error
        sources.frames, sources.given = video["encoded"], video["given"]
        self._begin(cache, sources)

    def swap(self, policy: str | Path | Policy, **changes: Any) -> None:
        """Go on under another policy, as `TieredCache.swap`; its compressor stays."""
        policies = kvtiers.resolve(policy, layers=list(range(len(self.transformer.blocks))), **changes)
        self._filled.swap(policies)
        self.policies = policies

    def reset(self) -> None:
        """Forget the video and its prompt; the next block begins another."""
        sources = self.sources.fork()
        sources.reset()
        self._begin(None, sources)

    def _begin(self, cache: TieredCache | None, sources: Sources) -> None:
        """Go on with these, between two blocks. It happens at once, so that Ctrl-C finds all of it done or nothing."""
        self.forget_prompts()
        vars(self).update(
            cache=cache, sources=sources, _committed=TensorIdentity(), _committed_frames=0, _unfinished=False,
            _compressed=[], _last_timestep=None,
        )  # fmt: skip

    def close(self) -> None:
        """Give the transformer back as it was. Harmless if that is done."""
        self.runner.close()


@contextmanager
def tiered(transformer: nn.Module, policy: str | Path | Policy = "full", **options: Any) -> Iterator[CausalWan]:
    """A `CausalWan` over `transformer`, which is restored when the `with` block ends, however it ends."""
    wan = CausalWan(transformer, policy, **options)
    try:
        yield wan
    finally:
        wan.close()
