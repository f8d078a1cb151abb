"""What a callback may change while a video is made."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import attrs
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from kvtiers import GeometryError, PolicyError
from kvtiers_diffusers.texts import check_embeds, described


@attrs.define(eq=False, kw_only=True)
class Steering:
    """The block that is being made, and what steers it.

    latents: what the model takes the clean block to be. prompt_embeds, negative_prompt_embeds: of the prompts that hold
    now. guidance: for high and low noise.
    """

    latents: Tensor
    prompt_embeds: Tensor
    negative_prompt_embeds: Tensor | None
    guidance: tuple[float, float]

    def take(self, said: Mapping[str, Any]) -> None:
        """Take over what a callback returned. Raises `GeometryError` for what does not fit; unknown names are none of
        its business."""
        latents = said.get("latents", self.latents)
        if not isinstance(latents, Tensor) or latents.shape != self.latents.shape:
            raise GeometryError(
                f"a callback gave latents of {described(latents)}, and this block is {tuple(self.latents.shape)}"
            )
        self.latents = latents.to(self.latents)
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            held, found = getattr(self, name), said.get(name)
            if found is None or found is held:
                continue
            check_embeds(name, found, self.prompt_embeds.shape[2])
            if held is None or len(found) not in (1, len(self.latents)):
                raise GeometryError(
                    f"a callback gave {name} of {described(found)}, and this video has {len(self.latents)} rows"
                    + ("" if held is not None else " and no negative prompt")
                )
            setattr(self, name, found.to(self.prompt_embeds))

    def guide(self, scale: Any) -> None:
        """Guide with `scale` from here on: at high noise, and at low noise as far as it was the same.

        Raises `PolicyError` for what is no finite number, and above 1 where there is no negative prompt.
        """
        if not isinstance(scale, int | float) or not isfinite(scale):
            raise PolicyError(f"guidance_scale must be a finite number, got {scale!r}")
        if scale > 1 and self.negative_prompt_embeds is None:
            raise PolicyError(
                f"guidance_scale={scale} needs a memory of the negative prompt, and this video was begun without; "
                "begin it with guidance_scale above 1"
            )
        high, low = self.guidance
        if scale != high:
            self.guidance = (scale, scale if low == high or scale <= 1 else low)

    @property
    def scales(self) -> tuple[float, float]:
        """Guidance as it acts: 1, which is none, for both unless that of high noise is more than 1."""
        return self.guidance if self.guidance[0] > 1 else (1.0, 1.0)


def tensor_inputs(callback: Any, names: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """The tensors that `callback` is given. Raises `PolicyError` for names that are not among `known`."""
    found = list(names or ())
    if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
        found = list(callback.tensor_inputs)
    wrong = [name for name in found if name not in known]
    if wrong:
        raise PolicyError(f"callback_on_step_end_tensor_inputs are of {', '.join(known)}, got {wrong[0]!r}")
    return found
