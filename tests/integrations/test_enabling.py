"""An enabled model without a tiered cache is itself, bit for bit; it is restored on every path; and what is refused."""

import copy
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs the extra 'transformers'")

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import create_causal_mask

from kvtiers import (
    ArchiveFullError,
    BudgetError,
    GeometryError,
    InterruptedForwardError,
    NotFiniteError,
    PolicyError,
    RotaryError,
    SavedCacheError,
    SlotError,
    UnsupportedModelError,
)
from kvtiers_transformers import disable, enable, load_model, new_cache, tiered
from kvtiers_transformers.attention import running
from strategies import unchecked
from tiny_models import FAMILIES, attentions, build, distance, feed, given, pad_left, plain, tokens

SMALL: dict[str, Any] = {"sink": 2, "recent": 8, "block_size": 4, "chunk_size": 8}


def hooks(model: nn.Module) -> int:
    """How many hooks are on the modules of `model`."""
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def is_untouched(model: Any, attention: str = "eager") -> bool:
    return hooks(model) == 0 and model.config._attn_implementation == attention and running.get() is None


# ---------------------------------------------------------------- without a tiered cache


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_enabled_model_without_a_tiered_cache_is_itself(family: str, attention: str) -> None:
    if (family, attention) == ("gemma2", "sdpa"):
        pytest.skip("transformers' sdpa refuses the softcap of Gemma 2")
    model = build(family, attention=attention)
    ids, mask = pad_left([tokens(n, seed=n)[0] for n in (30, 11)])

    def everything() -> list[Tensor]:
        with torch.no_grad():
            return [
                model(ids, attention_mask=mask).logits,
                model(ids, attention_mask=mask, use_cache=False).logits,
                feed(model, ids, DynamicCache(config=model.config), (10, 11)),
                model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False),
                model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, num_beams=2),
            ]

    before = everything()
    with tiered(model, "streaming", realigner="original", **SMALL) as cache:
        feed(model, ids, cache, (5,))
        during = everything()
    assert is_untouched(model, attention)
    for wanted, got, after in zip(before, during, everything(), strict=True):
        assert torch.equal(got, wanted)
        assert torch.equal(after, wanted)


def test_an_enabled_model_takes_the_masks_and_caches_that_it_took() -> None:
    model, ids = build(), tokens(20)
    mask = torch.ones(20, 20, dtype=torch.bool).tril()[None, None]
    static = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask).logits
        with tiered(model, "streaming"):
            assert torch.equal(model(ids, attention_mask=mask).logits, wanted)
            assert torch.equal(model(ids, **given(static)).logits, plain(model, ids))


# ---------------------------------------------------------------- on and off


def test_the_model_is_restored_when_the_block_ends_and_when_it_fails() -> None:
    model = build()
    with tiered(model, "streaming") as cache:
        feed(model, tokens(9), cache, ())
        assert hooks(model) > 0
    assert is_untouched(model)
    with pytest.raises(KeyError, match="mine"), tiered(model, "streaming"):
        raise KeyError("mine")
    assert is_untouched(model)


def test_a_policy_that_is_refused_installs_nothing() -> None:
    model = build()
    with pytest.raises(PolicyError):
        tiered(model, "streaming", recent=-1).__enter__()
    assert is_untouched(model)


def test_enabling_twice_needs_disabling_twice() -> None:
    model, ids = build(), tokens(20)
    count = None
    with tiered(model, "full") as outer:
        count = hooks(model)
        with tiered(model, "streaming", **SMALL) as inner:
            assert hooks(model) == count
            feed(model, ids, inner, ())
        assert torch.equal(feed(model, ids, outer, ()), plain(model, ids))
    assert is_untouched(model)
    disable(model)
    assert is_untouched(model)


def test_a_model_and_the_decoder_inside_it_are_one() -> None:
    model, ids = build(), tokens(20)
    with tiered(model, "full") as cache, tiered(model.model, "full") as other:
        assert torch.equal(feed(model, ids, cache, ()), plain(model, ids))
        with torch.no_grad():
            hidden = model.model(ids, **given(other)).last_hidden_state
            assert torch.equal(hidden, model.model(ids).last_hidden_state)
    assert is_untouched(model)


def test_two_models_do_not_mind_each_other() -> None:
    first, second, ids = build(), build("glm", attention="sdpa"), tokens(20)
    with tiered(first, "full") as a, tiered(second, "full") as b:
        ours = feed(first, ids, a, (7,)), feed(second, ids, b, (7,))
    assert torch.equal(ours[0], plain(first, ids, (7,)))
    assert torch.equal(ours[1], plain(second, ids, (7,)))
    assert is_untouched(first)
    assert is_untouched(second, "sdpa")


def test_an_enabled_model_inside_the_forward_of_another_leaves_it_alone() -> None:
    """An assistant, a reward: whatever runs while a tiered forward runs finds its own attention."""
    outer, inner, ids = build(), build(seed=1), tokens(20)
    wanted = plain(inner, ids)
    got = []
    handle = outer.model.layers[0].register_forward_hook(lambda *_: got.append(plain(inner, ids)))
    with tiered(outer, "full") as cache, tiered(inner, "full"):
        ours = feed(outer, ids, cache, ())
    handle.remove()
    assert torch.equal(got[0], wanted)
    assert torch.equal(ours, plain(outer, ids))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt], ids=["an error", "Ctrl-C"])
def test_a_forward_that_is_cut_short_restores_the_model_and_is_remembered(error: type[BaseException]) -> None:
    model, ids = build(), tokens(20)

    def fail(*_: Any) -> None:
        raise error

    with tiered(model, "full") as cache:
        feed(model, ids, cache, ())
        before = cache.fork()
        handle = model.model.layers[1].mlp.register_forward_hook(fail)
        with pytest.raises(error):
            feed(model, ids, cache, ())
        handle.remove()
        assert torch.equal(plain(model, ids), plain(model, ids))  # the next forward without the cache puts things right
        assert model.config._attn_implementation == "eager"
        with pytest.raises(InterruptedForwardError, match=r"failed midway.*reset\(\) the cache"):
            feed(model, ids, cache, ())
        with pytest.raises(InterruptedForwardError):
            feed(model, ids, cache.fork(), ())
        assert torch.equal(feed(model, ids, before, ()), plain(model, torch.cat([ids, ids], 1), (20,))[:, 20:])
        cache.reset()
        assert torch.equal(feed(model, ids, cache, ()), plain(model, ids))
        handle = model.model.layers[0].mlp.register_forward_hook(fail)
        with pytest.raises(error):
            feed(model, ids, cache, ())
        handle.remove()
    assert is_untouched(model)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("part", ["attention", "mlp"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_forward_that_fails_in_any_layer_is_noticed(layer: int, part: str, family: str) -> None:
    model, ids = build(family), tokens(12)
    block = model.model.layers[layer]
    module = block.mlp if part == "mlp" else block.self_attn.o_proj

    def fail(*_: Any) -> None:
        raise ValueError("mine")

    with tiered(model, "full") as cache:
        handle = module.register_forward_pre_hook(fail)
        with pytest.raises(ValueError, match="mine"):
            feed(model, ids, cache, ())
        handle.remove()
        with pytest.raises(InterruptedForwardError):
            feed(model, ids, cache, ())
        cache.reset()
        assert torch.equal(feed(model, ids, cache, ()), plain(model, ids))


def test_a_forward_that_fails_before_the_first_layer_changes_nothing() -> None:
    model, ids = build(), tokens(20)
    with tiered(model, "full") as cache:
        feed(model, ids, cache, ())
        with pytest.raises(IndexError):
            feed(model, ids + 1000, cache, ())
        assert torch.equal(feed(model, ids, cache, ()), plain(model, torch.cat([ids, ids], 1), (20,))[:, 20:])


@pytest.mark.parametrize("limit", [1_500, 4_000, 9_000])
def test_a_full_archive_stops_the_forward_and_the_model_is_restored(limit: int) -> None:
    model, ids = build(), tokens(90)
    with tiered(model, "archive", archive=("host", {"limit_bytes": limit}), **SMALL) as cache:
        with pytest.raises(ArchiveFullError, match=r"limit_bytes = [\d,]+"):
            feed(model, ids, cache, tuple(range(8, 90, 8)))
        before = {layer.layer.num_steps for layer in cache.tiered_layers}
        assert len(before) == 1, "some layers took the tokens that others refused"
        with pytest.raises(ArchiveFullError):
            feed(model, ids[:, :8], cache, ())
        assert {layer.layer.num_steps for layer in cache.tiered_layers} == before
        assert torch.equal(plain(model, ids), plain(model, ids))
    assert is_untouched(model)


def test_two_threads_have_a_model_each() -> None:
    models, ids, results = [build(), build(seed=1)], tokens(20), {}

    def run(which: int) -> None:
        with tiered(models[which], "full") as cache:
            results[which] = feed(models[which], ids, cache, tuple(range(10, 20)))

    threads = [threading.Thread(target=run, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in (0, 1):
        assert distance(results[i], plain(models[i], ids)) < 1e-5
        assert is_untouched(models[i])


def test_threads_share_a_model_and_have_a_cache_each() -> None:
    """The forwards of one model wait for one another, those without a tiered cache too."""
    model, results = build(), {}
    ids = {which: tokens(20, seed=which) for which in range(4)}
    wanted = {which: plain(model, ids[which]) for which in ids}

    def run(which: int) -> None:
        with tiered(model, "full") as cache:
            results[which] = feed(model, ids[which], cache, tuple(range(4, 20))) if which else plain(model, ids[which])

    threads = [threading.Thread(target=run, args=(which,)) for which in ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for which in ids:
        assert distance(results[which], wanted[which]) < 1e-5
    assert is_untouched(model)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_a_forward_that_another_thread_broke_off_does_not_block_the_model(error: type[BaseException]) -> None:
    model, ids = build(), tokens(12)
    enable(model)

    def stop(*_: object) -> None:
        raise error

    def broken_off() -> None:
        with suppress(BaseException):
            feed(model, ids, new_cache(model, "full"), ())

    handle = model.model.layers[1].mlp.register_forward_pre_hook(stop)
    thread = threading.Thread(target=broken_off)
    thread.start()
    thread.join()
    handle.remove()
    with torch.no_grad():
        assert distance(feed(model, ids, new_cache(model, "streaming"), ()), plain(model, ids)) < 1e-5
    disable(model)
    assert is_untouched(model)


def test_after_ctrl_c_a_new_cache_can_be_made_at_once() -> None:
    model, ids = build(), tokens(12)
    enable(model)
    with pytest.raises(KeyboardInterrupt):
        _cut_short(model, ids)
    cache = new_cache(model, "streaming")
    assert model.config._attn_implementation == "eager"
    assert distance(feed(model, ids, cache, ()), plain(model, ids)) < 1e-5
    disable(model)


def _cut_short(model: Any, ids: Tensor) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[1].mlp.register_forward_pre_hook(stop)
    try:
        feed(model, ids, new_cache(model, "full"), ())
    finally:
        handle.remove()


def test_a_mask_made_beside_a_forward_of_another_thread_is_the_models_own() -> None:
    """`generate` makes masks for a static cache outside of any forward."""
    model, ids = build(attention="sdpa"), tokens(8)
    wanted = model.generate(ids, max_new_tokens=4, do_sample=False, cache_implementation="static")
    found = []

    def beside(*_: object) -> None:
        if not found:
            found.append(None)
            thread = threading.Thread(target=lambda: found.append(_causal_mask(model, ids)))
            thread.start()
            thread.join()

    own = _causal_mask(model, ids)
    handle = model.model.layers[0].mlp.register_forward_pre_hook(beside)
    with tiered(model, "full") as cache:
        feed(model, ids, cache, ())
        handle.remove()
        again = model.generate(ids, max_new_tokens=4, do_sample=False, cache_implementation="static")
    assert torch.equal(found[1], own)
    assert torch.equal(again, wanted)


def _causal_mask(model: Any, ids: Tensor) -> Any:
    embedded = model.model.embed_tokens(ids)
    padding = torch.ones_like(ids)
    padding[:, 0] = 0
    return create_causal_mask(
        config=model.config, inputs_embeds=embedded, attention_mask=padding, **given(None), position_ids=None
    )


def test_a_copy_of_an_enabled_model_is_a_model_of_its_own() -> None:
    model, ids = build(), tokens(12)
    with tiered(model, "full") as cache:
        other = copy.deepcopy(model)
        with pytest.raises(UnsupportedModelError, match="not enabled for it"):
            feed(other, ids, new_cache(other, "full"), ())
        assert torch.equal(plain(other, ids), plain(model, ids))
        with tiered(other, "full") as second:
            assert torch.equal(feed(other, ids, second, (5,)), feed(model, ids, cache, (5,)))


# ---------------------------------------------------------------- what is refused


def _other(**changes: Any) -> Callable[[], Any]:
    return lambda: build(**changes)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(_other(num_hidden_layers=3), id="more layers"),
        pytest.param(_other(num_hidden_layers=1), id="fewer layers"),
        pytest.param(_other(head_dim=8), id="other heads"),
        pytest.param(_other(num_key_value_heads=4), id="other KV heads"),
        pytest.param(_other(num_attention_heads=8), id="other query heads"),
        pytest.param(_other(family="gemma3"), id="sliding layers"),
        pytest.param(_other(family="mistral"), id="another family of equal shape"),
        pytest.param(
            _other(rope_parameters={"rope_type": "default", "rope_theta": 500.0}), id="another rotation of equal shape"
        ),
    ],
)
def test_a_cache_of_another_model_is_refused_before_anything_happens(other: Callable[[], Any]) -> None:
    model, ids, stranger = build(), tokens(12), other()
    with tiered(model, "full") as cache, tiered(stranger, "full"):
        with pytest.raises(GeometryError, match=r"made for another model, with llama, 2 layers.*new_cache\(model"):
            feed(stranger, ids, cache, ())
        assert torch.equal(feed(model, ids, cache, ()), plain(model, ids))
    assert is_untouched(stranger)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_model_that_is_not_enabled_refuses_a_tiered_cache(family: str) -> None:
    model, ids = build(family), tokens(12)
    cache = new_cache(model, "full")
    with pytest.raises(UnsupportedModelError, match=r"not enabled for it.*enable\(model\)"):
        feed(model, ids, cache, ())
    enable(model)
    if family == "gemma3":  # its sliding layer has stored the tokens by then
        with pytest.raises(InterruptedForwardError):
            feed(model, ids, cache, ())
        cache.reset()
    assert torch.equal(feed(model, ids, cache, ()), plain(model, ids))
    disable(model)
    assert is_untouched(model)


def test_a_mask_that_is_not_one_of_padding_is_refused() -> None:
    model, ids = build(), tokens(12)
    mask = torch.ones(1, 1, 12, 12).tril()
    with tiered(model, "full") as cache, torch.no_grad():
        with pytest.raises(
            UnsupportedModelError, match=r"padding mask of shape \[batch, tokens\], got Tensor of shape"
        ):
            model(ids, attention_mask=mask, **given(cache))
        with pytest.raises(UnsupportedModelError, match="got dict of shape"):
            model(ids, attention_mask={"full_attention": mask}, **given(cache))
        assert torch.equal(feed(model, ids, cache, ()), plain(model, ids))


def test_a_mask_that_hides_what_the_cache_holds_is_refused() -> None:
    """Full attention would leave out the hidden tokens; a tiered cache has no such slots, and must not pretend."""
    model, ids = build(), tokens(12)
    late = torch.ones(1, 20, dtype=torch.long)
    late[:, :4] = 0
    with tiered(model, "full") as cache, torch.no_grad():
        model(ids, **given(cache))
        with pytest.raises(UnsupportedModelError, match=r"hold \[8\] tokens of the past, but the cache holds \[12\]"):
            model(tokens(8), attention_mask=late, **given(cache))
        with pytest.raises(UnsupportedModelError, match=r"hold \[8\] tokens of the past, but the cache holds \[12\]"):
            model(tokens(1), attention_mask=late[:, :13], **given(cache))


@pytest.mark.parametrize("shape", [(1, 15), (1, 25), (2, 20), (1, 3)], ids=str)
def test_a_mask_of_another_size_is_refused_and_changes_nothing(shape: tuple[int, int]) -> None:
    model, ids = build(), tokens(12)
    with tiered(model, "full") as cache, torch.no_grad():
        model(ids, **given(cache))
        with pytest.raises(UnsupportedModelError, match=r"give one of \(1, 20\), or of \(1, 8\)"):
            model(tokens(8), attention_mask=torch.ones(shape), **given(cache))
        model(tokens(8), attention_mask=torch.ones(1, 8), **given(cache))
        assert cache.get_seq_length() == 20


@pytest.mark.parametrize("prefix", ["Bloom", "DiffLlama"])
def test_a_model_whose_attention_is_its_own_is_refused(prefix: str) -> None:
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = getattr(transformers, f"{prefix}Config")(**sizes, intermediate_size=64, rotary_dim=4, n_positions=64)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    with pytest.raises(UnsupportedModelError, match="attention interface"), tiered(model, "full") as cache:
        feed(model, tokens(12), cache, ())
    assert hooks(model) == 0


def test_an_attention_that_skips_the_tiers_is_noticed() -> None:
    model, ids = build(), tokens(12)
    model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with (
        tiered(model, "full") as cache,
        pytest.raises(UnsupportedModelError, match="layer 1 took 0 tokens of 12: its attention does not go through"),
    ):
        feed(model, ids, cache, ())


@pytest.mark.parametrize("rows", [torch.zeros(0, dtype=torch.long), torch.tensor([]), torch.tensor([[0]])], ids=str)
def test_rows_that_are_none_are_refused_and_nothing_is_lost(rows: Tensor) -> None:
    model, ids = build(), tokens(12, rows=2)
    with tiered(model, "full") as cache:
        feed(model, ids, cache, ())
        with pytest.raises(GeometryError, match="name at least one row"), unchecked():
            cache.reorder_cache(rows)
        with pytest.raises(GeometryError, match="name at least one row"):
            cache.batch_repeat_interleave(0)
        assert torch.equal(feed(model, ids, cache, ()), plain(model, torch.cat([ids, ids], 1), (12,))[:, 12:])


def test_positions_that_jump_cannot_be_realigned() -> None:
    model, ids = build(), tokens(12)
    positions = torch.arange(12)[None].clone()
    positions[:, 6:] += 3
    with torch.no_grad():
        wanted = model(ids, position_ids=positions, **given(DynamicCache(config=model.config))).logits
        with tiered(model, "full") as cache:
            assert torch.equal(model(ids, position_ids=positions, **given(cache)).logits, wanted)
        with tiered(model, "full", realigner="contiguous") as cache:
            with pytest.raises(UnsupportedModelError, match=r"position_ids jump.*realigner='original'"):
                model(ids, position_ids=positions, **given(cache))
            assert distance(feed(model, ids, cache, ()), plain(model, ids)) < 1e-5


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gradient_checkpointing_that_takes_the_cache_away_is_refused(attention: str) -> None:
    """transformers calls every layer without its cache then, and the mask of a tiered layer is never made."""
    model, ids = build(attention=attention), tokens(12)
    named = getattr(model, "activation_checkpointing_enable", None)  # its name in newer versions
    (named or model.gradient_checkpointing_enable)()
    model.train()
    before = hooks(model)
    with tiered(model, "full") as cache, pytest.raises(UnsupportedModelError, match="gradient checkpointing"):
        model(ids, **given(cache))
    assert hooks(model) == before
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("layer", [0, 1])
def test_checking_names_the_layer_that_is_not_finite(layer: int, family: str) -> None:
    if (family, layer) == ("gemma3", 0):
        pytest.skip("that layer is a sliding one and not ours to check")
    model, ids = build(family), tokens(12)
    with torch.no_grad():
        model.model.layers[layer].self_attn.v_proj.weight[0, 0] = torch.nan
    with tiered(model, "full", check=True) as cache, pytest.raises(NotFiniteError, match=f"layer {layer} was given"):
        feed(model, ids, cache, ())
    with tiered(model, "full") as cache:
        feed(model, ids, cache, ())
    assert is_untouched(model)


def test_a_model_of_sliding_layers_alone_has_nothing_to_tier() -> None:
    with pytest.raises(UnsupportedModelError, match="every layer of MistralForCausalLM is a sliding_attention layer"):
        tiered(build("mistral", sliding_window=8), "full").__enter__()


def test_a_model_without_decoder_attention_is_refused() -> None:
    from transformers import BertConfig, BertModel

    bert = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    with pytest.raises(UnsupportedModelError, match=r"BertModel of transformers .* has no self-attention"):
        tiered(bert, "full").__enter__()


def test_a_model_that_shares_keys_between_layers_is_refused() -> None:
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    config = Gemma3nTextConfig(
        vocab_size=97,
        vocab_size_per_layer_input=97,
        hidden_size=32,
        hidden_size_per_layer_input=8,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_kv_shared_layers=2,
        laurel_rank=4,
        sliding_window=8,
        activation_sparsity_pattern=[0.0] * 4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        pad_token_id=0,
    )
    with pytest.raises(UnsupportedModelError, match="share keys and values"):
        tiered(Gemma3nForCausalLM(config), "full").__enter__()


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "sink + recent beyond the budget": ({"sink": 40, "recent": 80, "budget": 100}, BudgetError, "40 \\+ 80 = 120"),
    "bound beyond the budget": ({"sink": 4, "recent": 80, "budget": 100}, BudgetError, "attends up to"),
    "one layer beyond the budget": ({"recent": {0: 8, "*": 4000}, "budget": 500}, BudgetError, "more than"),
    "a negative layer": ({"recent": {0: -3, "*": 8}}, PolicyError, "recent must be .*got -3"),
    "a retriever of a layer that is none": (
        {"retriever": {0: 3}},
        SlotError,
        r"slot 'retriever' takes an object of class Retriever, got int",
    ),
    "a layer that gets nonsense": ({"recent": lambda layer: "many"}, PolicyError, "recent must be .*got 'many'"),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD.values(), ids=BAD)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tiered(build(), "streaming", **changes).__enter__()


def test_what_names_no_policy_is_refused() -> None:
    with pytest.raises(PolicyError, match="got a NoneType"), unchecked():
        new_cache(build(), None)


def test_autocast_is_refused_with_what_to_do_instead() -> None:
    model = build()
    with (
        tiered(model, "full") as cache,
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(GeometryError, match=r"computes in torch.float32, under torch.autocast; .*load it in the dtype"),
    ):
        feed(model, tokens(12), cache, ())
    assert is_untouched(model)


def test_another_dtype_is_refused_before_anything_is_stored() -> None:
    model, ids = build(), tokens(12)
    with tiered(model, "full") as cache:
        feed(model, ids, cache, ())
        with pytest.raises(GeometryError, match=r"holds torch.float32, and the model computes in torch.bfloat16"):
            feed(model.bfloat16(), ids, cache, ())
        model.float()
        feed(model, ids, cache, ())
        assert cache.get_seq_length() == 24


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="nowhere' cannot be loaded as a causal language model: "):
        load_model(str(tmp_path / "nowhere"))


def test_a_rotation_that_nobody_knows_is_refused() -> None:
    model = build()
    original = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda *args, **kwargs: tuple(part.flip(-1) for part in original(*args, **kwargs))
    with pytest.raises(RotaryError, match="rotates in a way that kvtiers does not know"):
        tiered(model, "streaming").__enter__()
    with tiered(model, "full") as cache:
        assert torch.equal(feed(model, tokens(12), cache, ()), plain(model, tokens(12)))


def test_every_attention_of_a_family_is_found() -> None:
    for family in FAMILIES:
        assert [m.layer_idx for m in attentions(build(family))] == [0, 1]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("verb", ["reorder_cache", "batch_select_indices", "batch_repeat_interleave"])
def test_rows_are_changed_in_every_layer_or_in_none(verb: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, more = build(family), tokens(14, rows=2), tokens(3, rows=2, seed=3)
    argument: Any = 2 if verb == "batch_repeat_interleave" else torch.tensor([1, 0])

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    with tiered(model, "streaming", **SMALL) as cache:
        feed(model, ids, cache, ())
        due = feed(model, more, cache.fork(), ())
        with monkeypatch.context() as patched:
            if family == "llama":
                patched.setattr(type(cache.core), "_join", fail)  # when every layer has its new rows
            else:
                patched.setattr(cache.layers[0], verb, fail)  # the model's own, after the tiers
            with pytest.raises(MemoryError):
                getattr(cache, verb)(argument)
        assert torch.equal(feed(model, more, cache, ()), due)


def test_a_padded_batch_after_a_failed_forward_is_refused_for_that_and_not_for_its_mask() -> None:
    model = build()
    ids, mask = pad_left([tokens(12)[0], tokens(7)[0]])
    later, longer = tokens(1, rows=2, seed=4), torch.cat([mask, mask.new_ones(2, 1)], 1)

    def fail(*_: Any) -> None:
        raise MemoryError

    with tiered(model, "full") as cache, torch.no_grad():
        model(ids, attention_mask=mask, **given(cache))
        handle = model.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            model(later, attention_mask=longer, **given(cache))
        handle.remove()
        with pytest.raises(InterruptedForwardError, match="failed midway"):
            model(later, attention_mask=longer, **given(cache))


def test_a_forward_that_fails_in_the_head_has_taken_its_tokens_and_can_be_cropped() -> None:
    model = build()
    ids, mask = pad_left([tokens(12)[0], tokens(7)[0]])
    later, longer = tokens(1, rows=2, seed=4), torch.cat([mask, mask.new_ones(2, 1)], 1)

    def fail(*_: Any) -> None:
        raise MemoryError

    with tiered(model, "full") as cache, torch.no_grad():
        model(ids, attention_mask=mask, **given(cache))
        due = model(later, attention_mask=longer, **given(cache.fork())).logits
        handle = model.lm_head.register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            model(later, attention_mask=longer, **given(cache))
        handle.remove()
        with pytest.raises(UnsupportedModelError, match=r"failed behind the layers \(in the head\).*crop\(\)"):
            model(later, attention_mask=longer, **given(cache))
        cache.crop(-1)
        assert torch.equal(model(later, attention_mask=longer, **given(cache)).logits, due)


@pytest.mark.parametrize(
    "columns",
    [None, 3, [], [[12, 0]], [[12], [12]], [[12, 0], [11, 0]], [[7, 0], [7, 0]], [[12, 13]] * 2, [[12.0, 0]] * 2],
    ids=str,
)
def test_a_file_whose_columns_make_no_sense_is_refused_and_nothing_changes(columns: Any, tmp_path: Path) -> None:
    model, ids = build(), tokens(12)
    with tiered(model, "full") as cache:
        feed(model, ids, cache, ())
        cache.core.save(tmp_path / "made", extra={"columns": columns, "shift": None, "model": str(cache.outline)})
        other = new_cache(model, "full")
        with pytest.raises(SavedCacheError, match="does not say how many columns each layer has seen"):
            other.load(tmp_path / "made")
        assert torch.equal(feed(model, ids, other, ()), plain(model, ids))


@pytest.mark.parametrize("policy", ["streaming", "packforcing-lm"])
def test_a_copy_of_an_enabled_model_can_be_enabled_itself(policy: str) -> None:
    model, ids = build(), tokens(20)
    with tiered(model, policy):
        copied = copy.deepcopy(model)
    with tiered(copied, policy) as cache:
        assert distance(feed(copied, ids, cache, ()), plain(model, ids)) < 1e-5
