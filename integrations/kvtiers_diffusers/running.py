"""Running an unmodified Wan over one block while its attention reads a cache, and what is held of prompts."""

import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor

from kvtiers import Blocks, CurrentView, Geometry, GeometryError, TieredCache
from kvtiers.events import PromptChanged
from kvtiers_diffusers.admitting import check_gradients, check_hooks
from kvtiers_diffusers.processors import Pass, disable, enable
from kvtiers_diffusers.prompts import KeysValues, Prompts
from kvtiers_diffusers.reducing import Reduced
from kvtiers_diffusers.rope import rotary_of

_owners: "weakref.WeakKeyDictionary[TieredCache, weakref.ref[Runner]]" = weakref.WeakKeyDictionary()
"""Who makes the video that a cache remembers."""


class Runner:
    """Runs a transformer over the blocks of one video, until it is closed or nothing refers to it."""

    def __init__(self, transformer: Any) -> None:
        self.given = transformer
        """The transformer, or what `torch.compile` made of it."""
        self.transformer: Any = unwrap_module(transformer)
        self.rotary = rotary_of(self.transformer)
        self.switch = enable(self.transformer)
        self._give_back = weakref.finalize(self, disable, self.transformer)
        """Called by `close`, or when nothing refers to this any more."""
        self._give_back.atexit = False
        self.forget_prompts()

    def fork(self) -> "Runner":
        """For another video with the same transformer."""
        return Runner(self.given)

    @property
    def closed(self) -> bool:
        """Whether it has given the transformer back."""
        return not self._give_back.alive

    def close(self) -> None:
        """Give the transformer back. Harmless if that is done."""
        self._give_back()

    def forget_prompts(self) -> None:
        """Project prompts anew from here on."""
        self.prompts = Prompts()
        self._prompt: KeysValues = {}

    def grid(self, block: Tensor) -> tuple[int, int]:
        """Tokens of one frame, in height and width."""
        _, high, wide = self.transformer.config.patch_size
        return block.shape[3] // high, block.shape[4] // wide

    def geometry(self, grid: tuple[int, ...], block_frames: int, *, even: bool) -> Geometry:
        """What every layer stores of a frame of `grid` tokens."""
        attention = self.transformer.blocks[0].attn1
        return Geometry(
            kv_heads=attention.heads,
            head_dim=attention.inner_dim // attention.heads,
            grid=grid,
            steps_per_commit=block_frames,
            even=even,
            causal=False,
            dtype=self.transformer.dtype,
        )

    def run(
        self,
        cache: TieredCache,
        block: Tensor,
        times: Tensor,
        text: Tensor,
        reduced: Reduced | None = None,
        *,
        clean: bool = False,
    ) -> tuple[Tensor, list[Blocks | None]]:
        """The flow of one forward, and what each layer made of the reduced tokens that went along.

        clean: whether this is a clean pass, which asks the cache although the block's selection is made.
        """
        check_gradients(self.transformer)
        check_hooks(self.transformer)
        self._own(cache)
        self._find_prompt(cache, text)
        now = None if reduced is not None or clean else self.further_step(cache, block)
        kind = block.device.type
        if self.prompts.check_makers(self.transformer, kind, look=now is None or kind == "cpu"):
            now = None
        further = now is not None
        if now is None:
            now = self._pass(cache, block, reduced=reduced)
        with self.switch.lock, nullcontext() if further else self._eager():
            self.switch.serving = now
            try:
                flow: Tensor = self.given(block, times, text, return_dict=False)[0]
            finally:
                self.switch.serving = None
        now.check_ran()
        return flow, now.compressed

    def further_step(self, cache: TieredCache, block: Tensor) -> Pass | None:
        """What a further denoise step of `block` reads and writes, tensors alone; None if it must ask the cache, as the
        first step does, and every step where gradients are wanted."""
        if torch.is_grad_enabled():
            return None
        steady: list[CurrentView] = []
        for number, layer in enumerate(cache.every_layer()):
            view = layer.current_view() if layer.num_steps - layer.committed_steps == block.shape[2] else None
            if view is None or number not in self._prompt:
                return None
            steady.append(view)
        return self._pass(cache, block, steady=steady) if len(steady) == len(cache.layers) else None

    def _pass(self, cache: TieredCache, block: Tensor, **more: Any) -> Pass:
        compressed: list[Blocks | None] = [None] * len(cache.layers)
        return Pass(cache, self.rotary, self.grid(block), self._prompt, compressed, **more)

    def _own(self, cache: TieredCache) -> None:
        """Refuse a cache that remembers another video."""
        owner = _owners.get(cache)
        if owner is not None and owner() not in (None, self):
            raise GeometryError(
                "this cache remembers the video of another CausalWan; two videos cannot share one: fork() it"
            )
        _owners[cache] = weakref.ref(self)

    def _find_prompt(self, cache: TieredCache, text: Tensor) -> None:
        """Find the keys and values of this prompt, or begin them and say that it changes."""
        found = self.prompts.find(text)
        if found is None:
            found = self.prompts.begin(text)
            if cache.tell:
                cache.tell(PromptChanged(words=text.shape[1]))
        changes, self._prompt = found is not self._prompt, found
        if changes:
            mine = weakref.ref(self)  # keys are held by whoever runs, not by the cache and its forks
            cache.set_prompt(text, lambda layer: None if (runner := mine()) is None else runner.prompt_keys(layer))

    def prompt_keys(self, layer: int) -> Tensor | None:
        """What a layer's cross-attention makes of the current prompt; None before its first pass."""
        return self._prompt[layer][0] if layer in self._prompt else None

    def _eager(self) -> AbstractContextManager[Any]:
        """A pass that asks the cache cannot be compiled: it runs as it is, in a model that is."""
        parts = (part for block in self.transformer.blocks for part in (block, block.attn1, block.attn2))
        compiled = any(
            part is not unwrap_module(part) or part._compiled_call_impl is not None for part in (self.given, *parts)
        )
        return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
