"""Attention processors that serve an unmodified Wan from tiers, and are the model's own while none asks for that."""

import weakref
from abc import ABC, abstractmethod
from threading import RLock
from typing import Any

import attrs
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor

from kvtiers import Blocks, CurrentView, Rotary, TieredCache, UnsupportedModelError
from kvtiers_diffusers.reducing import Reduced


@attrs.define(eq=False)
class Pass:
    """One forward of a `CausalWan` over a block."""

    cache: TieredCache
    rotary: Rotary
    grid: tuple[int, ...]
    text: dict[int, tuple[Tensor, Tensor]]
    """Keys and values of the prompt, by layer; filled by the first forward that needs them."""
    compressed: list[Blocks | None]
    """By layer, what the clean pass made of the reduced tokens; handed over with the commit."""
    reduced: Reduced | None = None
    """Tokens that pass through the model behind the block's own (the clean pass)."""
    tokens: Tensor | None = None
    """What the reduced tokens are before the first layer, [batch, tokens, channels]; found by this very pass."""
    ran: list[int] = attrs.field(factory=list)
    """How often each attention ran: of self-attention by layer, then of cross-attention by layer."""
    steady: list[CurrentView] | None = None
    """By layer, once a block's selection is made: what a further step reads and writes. Tensors alone, so that the step
    can be compiled; the cache is not asked."""

    def __attrs_post_init__(self) -> None:
        self.ran = [0] * (2 * len(self.compressed))

    def check_ran(self) -> None:
        """Raise `UnsupportedModelError` unless every attention of every layer ran exactly once."""
        wrong = [at for at, times in enumerate(self.ran) if times != 1]
        if wrong:
            layers = len(self.compressed)
            raise UnsupportedModelError(
                f"of this model's attention, {len(wrong)} of {len(self.ran)} did not run once in this pass, such as "
                f"{'cross' if wrong[0] >= layers else 'self'}-attention of layer {wrong[0] % layers}, which ran "
                f"{self.ran[wrong[0]]} times; a memory needs every layer of every pass: take off what skips, repeats "
                "or replaces layers (a step cache, a forward or an attention processor that was exchanged)"
            )


@attrs.define(eq=False)
class Switch:
    """Which pass the processors of one transformer serve now; none: they are the model's own."""

    lock: Any = attrs.field(factory=RLock)
    serving: Pass | None = None


class _Processor(ABC):
    """Serves one attention of one layer while a pass runs, and is the model's own processor otherwise."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __init__(self, layer: int, own: Any, switch: Switch) -> None:
        self.layer, self.own, self.switch = layer, own, switch
        self._attention_backend = own._attention_backend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """What diffusers calls. [batch, tokens, channels] in and out."""
        now = self.switch.serving
        if now is None:
            own: Tensor = self.own(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
            return own
        _check_whole(self)
        now.ran[self._place(now)] += 1
        attended = self._serve(now, attn, hidden_states, encoder_hidden_states)
        out: Tensor = attn.to_out[1](attn.to_out[0](attended.type_as(hidden_states)))
        return out

    def _place(self, now: Pass) -> int:
        """Where this attention's runs are counted."""
        return self.layer

    @abstractmethod
    def _serve(self, now: Pass, attn: Any, hidden: Tensor, text: Tensor | None) -> Tensor:
        """What the tokens of `hidden` attend, [batch, tokens, channels], before the output projection."""

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention by the backend that diffusers dispatches to; [batch, heads, tokens, head_dim] in."""
        if mask is not None and self._attention_backend is not None:
            name = AttentionBackendName(self._attention_backend).value
            if "varlen" in name:
                raise UnsupportedModelError(
                    "blocks of different length leave padding between archived ones, and attention backend "
                    f"{name!r} takes no mask per head; choose another, such as set_attention_backend('native'), or "
                    "blocks of one length"
                )
        query, keys, values = (x.transpose(1, 2) for x in (query, keys, values))
        out: Tensor = dispatch_attention_fn(
            query, keys, values, attn_mask=mask, backend=self._attention_backend, parallel_config=None
        )
        return out.flatten(2, 3)


class TieredSelfAttention(_Processor):
    """Self-attention of one layer: the block's tokens attend sink, selected mid, recent and one another."""

    def _serve(self, now: Pass, attn: Any, hidden: Tensor, text: Tensor | None) -> Tensor:
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden), attn.to_k(hidden), attn.to_v(hidden)
        query, key, value = (_heads(x, attn.heads) for x in (attn.norm_q(query), attn.norm_k(key), value))
        if now.reduced is None or now.tokens is None:
            return self._full(now, query, key, value)
        own = key.shape[2] - now.tokens.shape[1]
        full = self._full(now, *(x[:, :, :own] for x in (query, key, value)))
        rest = self._reduced(now, now.reduced, *(x[:, :, own:] for x in (query, key, value)))
        return torch.cat([full, rest], 1)

    def _full(self, now: Pass, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The block's own tokens attend the context and one another."""
        if now.steady is not None:
            steady, tokens = now.steady[self.layer], key.shape[2]
            steady.keys[:, :, -tokens:] = now.rotary.apply(key, steady.table)
            steady.values[:, :, -tokens:] = value
            return self._attend(now.rotary.apply(query, steady.table), steady.keys, steady.values, steady.logit_bias)
        cache, layer = now.cache, self.layer
        if not cache.policies[layer].realigner.rotates:
            steps = key.shape[2] // cache.geometries[layer].tokens_per_step
            table = now.rotary.run(cache.committed_steps, steps, now.grid, key.device, key.dtype)
            query, key = now.rotary.apply(query, table), now.rotary.apply(key, table)
        cache.write(layer, key, value, replace=True)
        cache.select(layer, query)
        context = cache.context(layer)
        added = context.logit_bias(query.shape[1], query.dtype)
        return self._attend(cache.only(layer).place_query(query), context.keys, context.values, added)

    def _reduced(self, now: Pass, reduced: Reduced, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The block's reduced tokens attend the context and one another, and are kept for when the block has aged."""
        cache, layer, offsets = now.cache, self.layer, reduced.offsets.to(key.device)
        if not cache.policies[layer].realigner.rotates:
            where = offsets.double().clone()
            where[:, 0] += cache.committed_steps
            table = now.rotary.table(where, key.dtype)
            query, key = now.rotary.apply(query, table), now.rotary.apply(key, table)
        one = torch.zeros(1, dtype=torch.long, device=key.device)
        now.compressed[layer] = Blocks(
            keys=key[:, :, None].clone(),  # not views that would hold all of the block's own until the commit
            values=value[:, :, None].clone(),
            offsets=offsets[None, None, None],
            starts=one,
            span=reduced.span,
        )
        own, context = cache.only(layer), cache.context(layer)
        history, tokens = slice(0, context.keys.shape[2] - context.current), key.shape[2]
        added = context.logit_bias(query.shape[1], query.dtype)
        if added is not None:
            added = torch.nn.functional.pad(added[..., history], (0, tokens))
        query, key = own.place_beside(torch.cat([query, key], 1), offsets).chunk(2, 1)
        return self._attend(
            query,
            torch.cat([context.keys[:, :, history], key], 2),
            torch.cat([context.values[:, :, history], value], 2),
            added,
        )


class PromptAttention(_Processor):
    """Cross-attention of one layer: the prompt's keys and values are worked out once."""

    def _place(self, now: Pass) -> int:
        return len(now.compressed) + self.layer

    def _serve(self, now: Pass, attn: Any, hidden: Tensor, text: Tensor | None) -> Tensor:
        found = None if torch.is_grad_enabled() else now.text.get(self.layer)
        if found is None:
            found = self._project(attn, hidden if text is None else text)
            if not torch.is_grad_enabled():
                now.text[self.layer] = found
        keys, values = (part.expand(hidden.shape[0], -1, -1, -1) for part in found)  # one prompt may serve all rows
        return self._attend(_heads(attn.norm_q(attn.to_q(hidden)), attn.heads), keys, values)

    @staticmethod
    def _project(attn: Any, text: Tensor) -> tuple[Tensor, Tensor]:
        if attn.fused_projections:
            key, value = attn.to_kv(text).chunk(2, dim=-1)
        else:
            key, value = attn.to_k(text), attn.to_v(text)
        return _heads(attn.norm_k(key), attn.heads), _heads(value, attn.heads)


def _heads(x: Tensor, heads: int) -> Tensor:
    """[batch, tokens, heads * head_dim] as [batch, heads, tokens, head_dim]."""
    split: Tensor = x.unflatten(2, (heads, -1))
    return split.transpose(1, 2)


def _check_whole(processor: Any) -> None:
    """Raise `UnsupportedModelError` for attention that is split over devices."""
    if processor._parallel_config is not None:
        raise UnsupportedModelError(
            "a tiered cache holds whole sequences and all heads, and this model's attention splits them over devices "
            "(context parallelism); load it anew, without enable_parallelism()"
        )


def _append(switch: Switch) -> Any:
    """Before the first block of the model: reduced tokens go along behind the full ones."""

    def hook(_module: Any, args: tuple[Any, ...]) -> Any:
        now = switch.serving
        if now is None or now.reduced is None:
            return None
        hidden, *others = args
        now.tokens = now.reduced.tokens.to(hidden)
        return (torch.cat([hidden, now.tokens], 1), *others)

    return hook


def _strip(switch: Switch) -> Any:
    """After the last block of the model: they have left their keys and values everywhere."""

    def hook(_module: Any, _args: tuple[Any, ...], hidden: Tensor) -> Any:
        now = switch.serving
        return None if now is None or now.tokens is None else hidden[:, : -now.tokens.shape[1]]

    return hook


@attrs.define(eq=False)
class _Installed:
    own: list[tuple[Any, Any]]
    """Each attention and the processor that is its own."""
    switch: Switch
    handles: list[Any]
    count: int = 1


_installed: "weakref.WeakKeyDictionary[torch.nn.Module, _Installed]" = weakref.WeakKeyDictionary()
_installing = RLock()


def enable(transformer: Any) -> Switch:
    """Install the processors that let a `CausalWan` serve `transformer`. Until one does, it is exactly as before."""
    transformer = unwrap_module(transformer)
    with _installing:
        state = _installed.get(transformer)
        if state is not None:
            state.count += 1
            return state.switch
        own = [(part, part.processor) for block in transformer.blocks for part in (block.attn1, block.attn2)]
        for _, processor in own:
            if type(processor) is not WanAttnProcessor:
                raise UnsupportedModelError(
                    f"this model's attention goes through {type(processor).__name__}, whose arithmetic would be passed "
                    "over; kvtiers_diffusers serves diffusers' WanAttnProcessor: set_attn_processor(WanAttnProcessor())"
                )
            _check_whole(processor)
        switch = Switch()
        for layer, block in enumerate(transformer.blocks):
            for part, kind in ((block.attn1, TieredSelfAttention), (block.attn2, PromptAttention)):
                part.set_processor(kind(layer, part.processor, switch))
        handles = [
            transformer.blocks[0].register_forward_pre_hook(_append(switch)),
            transformer.blocks[-1].register_forward_hook(_strip(switch)),
        ]
        _installed[transformer] = _Installed(own, switch, handles)
        return switch


def disable(transformer: Any) -> None:
    """Undo one `enable`: the model's own processors are put back. Harmless on a model that is not enabled."""
    transformer = unwrap_module(transformer)
    with _installing:
        state = _installed.get(transformer)
        if state is None:
            return
        state.count -= 1
        if state.count == 0:
            for part, own in state.own:
                if isinstance(part.processor, _Processor):  # a backend that was chosen meanwhile stays chosen
                    own._attention_backend = part.processor._attention_backend
                part.set_processor(own)
            for handle in state.handles:
                handle.remove()
            del _installed[transformer]
