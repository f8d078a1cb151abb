"""What a video remembers of a prompt is forgotten when what makes it changes, though no parameter does."""

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="needs the extra 'diffusers'")

import torch
from torch import Tensor

from kvtiers_diffusers import CausalWan, tiered
from tiny_wan import blocks, build, prompt

Change = Callable[[Any], object]
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # of two adapters, which is wanted


def plain(model: Any, clip: Tensor, text: Tensor) -> Tensor:
    """The model's own forward; of a first block, what a video must give."""
    flow: Tensor = model(clip, torch.tensor([500.0]), text, return_dict=False)[0]
    return flow


def check(model: Any, change: Change) -> None:
    """Before the change and after it, a first block is denoised as the model itself does it."""
    clip, text = blocks(1)[0], prompt()
    with torch.no_grad(), tiered(model) as wan:
        for timestep in (500.0, 500.0):
            before = wan.denoise(clip, timestep, text)
        assert (before - plain(model, clip, text)).abs().max() < 1e-5
        change(model)
        for _ in range(2):
            assert (wan.denoise(clip, 500.0, text) - plain(model, clip, text)).abs().max() < 1e-5


def adapted() -> Any:
    """A model with two adapters, the first of which is on."""
    peft = pytest.importorskip("peft", reason="adapters need peft")
    model = build()
    targets = ["to_q", "to_k", "to_v", "text_embedder.linear_1"]
    for name in ("a", "b"):
        model.add_adapter(peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False), adapter_name=name)
    model.set_adapters(["a"], [1.0])
    return model


ADAPTERS: dict[str, Change] = {
    "another scale": lambda model: model.set_adapters(["a"], [0.1]),
    "another adapter": lambda model: model.set_adapter("b"),
    "both adapters": lambda model: model.set_adapters(["a", "b"], [0.5, 0.5]),
    "off": lambda model: model.disable_adapters(),
    "merged into the weights": lambda model: model.fuse_lora(0.5),
    "removed": lambda model: model.unload_lora(),
}


@pytest.mark.parametrize("change", ADAPTERS.values(), ids=ADAPTERS)
def test_adapters_that_change_are_noticed_by_the_next_step(change: Change) -> None:
    check(adapted(), change)


def test_adapters_that_come_back_and_a_scale_for_one_call_are_noticed() -> None:
    model, clip, text = adapted(), blocks(1)[0], prompt()
    check(model, lambda model: (model.disable_adapters(), model.enable_adapters(), model.fuse_lora()))
    check(model, lambda model: model.unfuse_lora())
    check(
        model,
        lambda model: model(clip, torch.tensor([500.0]), text, return_dict=False, attention_kwargs={"scale": 0.3}),
    )


def _replaced(model: Any) -> None:
    other = torch.nn.Linear(48, 48)
    model.blocks[1].attn2.to_v = other


def _scaled(model: Any) -> None:
    model.blocks[0].attn2.to_v.register_forward_hook(lambda _module, _args, out: 2 * out)


def _other_data(model: Any) -> None:
    weight = model.condition_embedder.text_embedder.linear_2.weight
    weight.data = weight.data * 3


def _past_autograd(model: Any) -> None:
    model.blocks[0].attn2.to_v.weight.data.mul_(3)


def _exchanged(model: Any) -> None:
    part = model.blocks[0].attn2.to_v
    forward = part.forward
    part.forward = lambda x: 3 * forward(x)


OTHERS: dict[str, Change] = {
    "a module is replaced": _replaced,
    "a hook scales": _scaled,
    "a weight gets other memory": _other_data,
    "a weight is written past autograd": _past_autograd,
    "a forward is exchanged": _exchanged,
    "a setting changes": lambda model: setattr(model.blocks[0].attn2.norm_k, "eps", 10.0),
    "a weight is written in place": lambda model: model.blocks[1].attn2.norm_k.weight.mul_(2),
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_hooks_settings_and_replaced_parts_are_noticed_by_the_next_step(change: Change) -> None:
    check(build(), change)


def test_a_part_of_a_weight_that_is_written_past_autograd_needs_to_be_said() -> None:
    model, clip, text = build(), blocks(1)[0], prompt()
    with torch.no_grad(), tiered(model) as wan:
        wan.denoise(clip, 500.0, text)
        model.blocks[0].attn2.to_v.weight.data[0, 1:] = 5.0
        wan.forget_prompts()
        assert (wan.denoise(clip, 500.0, text) - plain(model, clip, text)).abs().max() < 1e-5


def test_a_prompt_that_is_changed_in_place_is_another_under_inference_mode_too() -> None:
    model, clip = build(), blocks(1)[0]
    with torch.inference_mode(), tiered(model) as wan:
        text = prompt().clone()
        wan.denoise(clip, 500.0, text)
        text.mul_(2)
        assert (wan.denoise(clip, 500.0, text) - plain(model, clip, text)).abs().max() < 1e-5


def test_the_blocks_before_stay_what_they_were_when_an_adapter_changes() -> None:
    """What is committed was seen with the adapter of its time; the next block is made with that of now."""
    clips, text = blocks(3), prompt()

    def begin(model: Any) -> CausalWan:
        wan = CausalWan(model)
        for clip in clips[:2]:
            wan.denoise(clip, 500.0, text)
            wan.commit(clip, text)
        return wan

    model = adapted()
    with torch.no_grad():
        one, other = begin(model), begin(model)
        other.forget_prompts()
        kept = one.denoise(clips[2], 500.0, text)
        model.set_adapters(["a"], [0.1])
        changed = one.denoise(clips[2], 500.0, text)
        assert torch.equal(changed, other.denoise(clips[2], 500.0, text))
        assert not torch.equal(changed, kept)
        model.set_adapters(["a"], [1.0])
        assert torch.equal(one.denoise(clips[2], 500.0, text), kept)
        one.close()
        other.close()
