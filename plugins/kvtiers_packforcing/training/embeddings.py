"""Prompts from a text file, and their embeddings: worked out once by the model's own text encoder, then read.

A file of embeddings holds each prompt's words without padding, in bfloat16, and says of which prompts and encoder they
are.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvtiers_packforcing.training.config import TrainingConfigError

WORDS = 512
"""Of a prompt, padded with zeros, as Wan was trained."""


def read_prompts(path: str) -> list[str]:
    """The lines of a file that are not empty. Raises `TrainingConfigError` if there are none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingConfigError(
            f"[model]: prompts: {path} cannot be read: {error}; give a text file with a prompt on each line"
        ) from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise TrainingConfigError(f"[model]: prompts: {path} has no prompts; write one on each line")
    return found


@attrs.frozen(kw_only=True)
class Embeddings:
    """A file of embeddings of these prompts, as the text encoder of `base` makes them."""

    path: Path
    prompts: tuple[str, ...]
    base: str

    @property
    def is_there(self) -> bool:
        """Whether the file exists. Raises `TrainingConfigError` if it is of other prompts or another model."""
        if not self.path.exists():
            return False
        try:
            with safe_open(self.path, "pt") as file:
                said = (file.metadata() or {}).get("kvtiers")
        except (OSError, SafetensorError) as error:
            raise TrainingConfigError(f"[model]: embeddings: {self.path} cannot be read: {error}") from error
        if said != self._said:
            raise TrainingConfigError(
                f"[model]: embeddings: {self.path} holds those of other prompts or of another model; delete it, or "
                "name another file"
            )
        return True

    def write(self, encode: Any) -> None:
        """Embed every prompt. encode: gives [1, words, text_width] of a text, padded with zeros."""
        found = {str(nth): _unpadded(encode(prompt)) for nth, prompt in enumerate(self.prompts)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f"{self.path.name}.part")
        save_file(found, beside, {"kvtiers": self._said})
        beside.replace(self.path)

    def of(self, numbers: Iterable[int], words: int = WORDS) -> Float[Tensor, "batch words text_width"]:
        """The embeddings of some prompts, in float32."""
        with safe_open(self.path, "pt") as file:
            parts: list[Tensor] = [file.get_tensor(str(number)).float() for number in numbers]
        return torch.stack([torch.cat((part, part.new_zeros(words - len(part), part.shape[1]))) for part in parts])

    @property
    def _said(self) -> str:
        digest = hashlib.sha256(json.dumps([self.base, *self.prompts]).encode()).hexdigest()
        return json.dumps({"format": "kvtiers prompts 1", "prompts and model": digest})


def encoder_of(base: str, device: torch.device) -> Any:
    """What embeds one text: the text encoder and the tokenizer of a Wan, which are held no longer than this is."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
    from transformers import AutoTokenizer, UMT5EncoderModel

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    encoder: Any = UMT5EncoderModel.from_pretrained(base, subfolder="text_encoder", dtype=dtype)
    tokenizer: Any = AutoTokenizer.from_pretrained(base, subfolder="tokenizer")
    pipeline: Any = WanPipeline(tokenizer, encoder.to(device).eval(), None, FlowMatchEulerDiscreteScheduler())

    @torch.no_grad()
    def encode(prompt: str) -> Tensor:
        found: Tensor = pipeline.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=WORDS, device=device
        )[0]
        return found

    return encode


def _unpadded(embedding: Tensor) -> Tensor:
    """[words, text_width] up to the last word, in bfloat16."""
    used: Sequence[int] = embedding[0].abs().amax(-1).nonzero().flatten().tolist()
    return embedding[0, : (used[-1] if used else 0) + 1].to(torch.bfloat16).cpu().contiguous()
