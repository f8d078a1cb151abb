"""The attention backends and dtypes that a model may run with, and gradients through a tiered forward."""

from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs the extra 'transformers'")

import torch
from torch._inductor.exc import InductorError
from transformers import DynamicCache

from kvtiers import UnsupportedModelError
from kvtiers_transformers import tiered
from kvtiers_transformers.attention import _mask_for
from tiny_models import build, distance, feed, given, pad_left, plain, tokens

SMALL: dict[str, Any] = {"sink": 2, "recent": 8, "block_size": 4, "chunk_size": 16}
POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "sliding-window": ("sliding-window", {"recent": 9, "chunk_size": 16}),
    "streaming": ("streaming", SMALL),
    "archive": ("archive", {**SMALL, "top_k": 2}),
    "pooled": ("packforcing-lm", {**SMALL, "top_k": 2, "attend": "compressed", "realigner": "contiguous"}),
}


def run(model: Any, name: str, *, padded: bool = True) -> torch.Tensor:
    """The logits of a batch, read in a long forward, a short one and single tokens."""
    policy, changes = POLICIES[name]
    with tiered(model, policy, **changes) as cache:
        return read(model, cache, padded=padded)


@torch.no_grad()
def read(model: Any, cache: Any, *, padded: bool) -> torch.Tensor:
    ids, mask = pad_left([tokens(n, seed=n)[0] for n in (40, 33 if padded else 40)])
    positions, parts, start = (mask.cumsum(1) - 1).clamp(min=0), [], 0
    for stop in (30, 36, 37, 38, 39, 40):
        out = model(
            ids[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions[:, start:stop],
            **given(cache),
        )
        parts.append(out.logits[:, :])
        start = stop
    return torch.cat(parts, 1)[:, 7 if padded else 0 :]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("name", POLICIES)
def test_sdpa_attends_as_eager_does(name: str, family: str) -> None:
    assert distance(run(build(family, attention="sdpa"), name), run(build(family), name)) < 1e-5


@pytest.fixture(scope="module")
def _padding_can_be_compiled() -> None:
    model = build(attention="flex_attention")
    try:
        read(model, DynamicCache(config=model.config), padded=True)
    except InductorError:
        pytest.skip("torch cannot compile flex attention over a padded batch on this CPU, with DynamicCache neither")


# Each new length is compiled, 20 seconds a time, until torch gives up and goes on uncompiled; both ways must be right.
# Llama only: on a CPU, torch 2.13 cannot compile the mask of Gemma's own sliding layers, with DynamicCache neither.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler, about torch's own modules
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["full", "sliding-window", "streaming", "archive"])
def test_flex_attention_attends_as_eager_does(name: str) -> None:
    found = [run(build(attention=backend), name, padded=False) for backend in ("flex_attention", "eager")]
    assert distance(*found) < 1e-5


@pytest.mark.slow
@pytest.mark.usefixtures("_padding_can_be_compiled")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["full", "sliding-window", "streaming", "archive"])
def test_flex_attention_attends_a_padded_batch_as_eager_does(name: str) -> None:
    assert distance(run(build(attention="flex_attention"), name), run(build(), name)) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["full", "streaming", "archive"])
def test_flash_attention_attends_as_eager_does(name: str) -> None:
    pytest.importorskip("flash_attn", reason="needs the package flash-attn")
    options = {"head_dim": 16, "hidden_size": 64}
    flash = build(attention="flash_attention_2", **options).to("cuda", torch.bfloat16)
    eager = build(**options).to("cuda", torch.bfloat16)
    ids = tokens(40).to("cuda")
    policy, changes = POLICIES[name]
    logits = []
    for model in (flash, eager):
        with tiered(model, policy, **changes) as cache:
            logits.append(feed(model, ids, cache, (16, 32)))
    assert distance(*logits) < 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("name", POLICIES)
def test_a_gpu_attends_as_the_cpu_does(name: str) -> None:
    policy, changes = POLICIES[name]
    logits = []
    for device in ("cpu", "cuda"):
        model = build(attention="sdpa").to(device)
        with tiered(model, policy, **changes) as cache:
            logits.append(feed(model, tokens(40, rows=2).to(device), cache, (16, 32, 33)).cpu())
    assert distance(*logits) < 1e-3


def test_flash_attention_is_refused_where_only_a_mask_says_what_is_attended() -> None:
    """While blocks drop out in the middle of a forward, causal order alone is not enough."""
    model, ids = build(), tokens(40)
    with tiered(model, "streaming", **SMALL) as cache:
        feed(model, ids[:, :32], cache, ())
        query = torch.zeros(1, 4, 8, 12)
        feed(model, ids[:, 32:], cache, ())
        context = cache.core.context(0)
        assert context.banded
        with pytest.raises(UnsupportedModelError, match="attention 'flash_attention_2' cannot attend this context"):
            _mask_for("flash_attention_2", context, query)


# A rounding of bfloat16 is 2^-9 and of float16 2^-12 of a number; over two layers and a softmax as sharp as this one
# they add up to some 20 of them. Under `original` both sides round alike, so that `full` must agree bit for bit.
_ROUNDING = {torch.bfloat16: 0.05, torch.float16: 0.005}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", _ROUNDING, ids=str)
def test_full_in_half_precision_is_the_models_own_cache(dtype: torch.dtype, attention: str) -> None:
    model, ids = build(attention=attention).to(dtype), tokens(40, rows=2)
    with tiered(model, "full") as cache:
        assert torch.equal(feed(model, ids, cache, (16, 30, 31)), plain(model, ids, (16, 30, 31)))
    for realigner in ("contiguous", "incremental"):
        with tiered(model, "full", realigner=realigner) as cache:
            assert distance(feed(model, ids, cache, (16, 30, 31)), plain(model, ids, (16, 30, 31))) < _ROUNDING[dtype]


@pytest.mark.parametrize("dtype", _ROUNDING, ids=str)
@pytest.mark.parametrize("name", ["sliding-window", "streaming", "pooled"])
def test_policies_in_half_precision_are_those_of_float32_but_for_rounding(name: str, dtype: torch.dtype) -> None:
    """`archive` is left out: a rounding may make it choose another block."""
    policy, changes = POLICIES[name]
    logits = []
    for model in (build().to(dtype), build().to(dtype).float()):  # the same weights
        with tiered(model, policy, **{**changes, **({"retriever": "all"} if name == "pooled" else {})}) as cache:
            logits.append(feed(model, tokens(40, rows=2), cache, (16, 30, 31)))
    assert logits[0].dtype == dtype
    assert distance(*logits) < 2 * _ROUNDING[dtype]


@pytest.mark.parametrize("dtype", _ROUNDING, ids=str)
@pytest.mark.parametrize("name", POLICIES)
def test_a_context_holds_the_dtype_of_the_model(name: str, dtype: torch.dtype) -> None:
    policy, changes = POLICIES[name]
    with tiered(build().to(dtype), policy, **changes) as cache:
        assert all(g.dtype == dtype for g in cache.core.geometries)


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("realigner", ["original", "contiguous"])
@pytest.mark.parametrize("family", ["llama", "glm", "gemma3"])
def test_the_gradients_of_a_tiered_forward_are_the_models_own(family: str, realigner: str, attention: str) -> None:
    model = build(family, attention=attention)
    ids, mask = pad_left([tokens(n, seed=n)[0] for n in (20, 13)])
    found = []
    for tiers in (False, True):
        model.zero_grad()
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        with tiered(model, "full", realigner=realigner) as cache:
            used = cache if tiers else DynamicCache(config=model.config)
            logits = model(inputs_embeds=embeddings, attention_mask=mask, **given(used)).logits
        (logits.log_softmax(-1)[:, :, 5] * mask).sum().backward()
        weights = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append((embeddings.grad * mask[..., None], weights))
    (wanted, wanted_weights), (got, weights) = found
    assert distance(got, wanted) < 1e-5
    for a, b in zip(weights, wanted_weights, strict=True):
        assert distance(a, b) < 1e-4


def test_a_prompt_that_was_read_before_is_a_constant() -> None:
    model, ids = build(), tokens(30)
    past = DynamicCache(config=model.config)
    found = []
    for tiers in (False, True):
        embeddings = model.get_input_embeddings()(ids[:, 20:]).detach().requires_grad_()
        with tiered(model, "full") as cache:
            used = cache if tiers else past
            feed(model, ids[:, :20], used, ())
            model(inputs_embeds=embeddings, **given(used)).logits.square().sum().backward()
        found.append(embeddings.grad)
    assert distance(found[1], found[0]) < 1e-5


@pytest.mark.parametrize("name", POLICIES)
def test_backward_after_a_forward_of_many_chunks_finds_what_it_read(name: str) -> None:
    """Only the queries learn, so nothing that is stored has a gradient: yet no later chunk may write over it."""
    policy, changes = POLICIES[name]
    model, ids = build(), tokens(60)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    weight = model.model.layers[1].self_attn.q_proj.weight.requires_grad_()

    def loss() -> torch.Tensor:
        with tiered(model, policy, **changes) as cache:
            value: torch.Tensor = model(ids, **given(cache)).logits.double().square().mean()
        return value

    loss().backward()
    step = torch.zeros_like(weight)
    at = weight.grad.abs().flatten().argmax()
    step.view(-1)[at] = 1e-2
    with torch.no_grad():
        weight += step
        up = loss()
        weight -= 2 * step
        down = loss()
    assert (up - down).item() / 2e-2 == pytest.approx(weight.grad.flatten()[at].item(), rel=0.02)
