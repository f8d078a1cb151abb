"""Loading checkpoints of causal Wan models, as Self-Forcing and its kin publish them, into diffusers' own model."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file
from torch import Tensor

from kvtiers import UnsupportedModelError

_INSIDE = ("generator_ema", "generator", "model", "state_dict")
"""What a checkpoint may keep its weights under; the first that is there, and not empty, is taken."""
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
"""What training wrappers put anywhere in a name."""
_MOST_UNPACKED = 4
"""How many times larger than its file a checkpoint may be."""
_PREFIXES = ("model.", "module.")


def load_causal_checkpoint(transformer: Any, path: str | Path) -> None:
    """Load the weights at `path` (.safetensors, or .pt read with `weights_only=True`) into a `WanTransformer3DModel`.

    Wan's original names and diffusers' are both understood, and the names that training wrappers add. Raises
    `UnsupportedModelError`, naming them, if keys are missing or unexpected or weights are not finite, and changes
    nothing then.
    """
    weights = {_stripped(key): part for key, part in _read(Path(path)).items()}
    if any(".self_attn." in key for key in weights):
        weights = convert_wan_transformer_to_diffusers(weights)
    own = transformer.state_dict()
    missing, unexpected = sorted(set(own) - set(weights)), sorted(set(weights) - set(own))
    wrong = [
        f"{key} {tuple(weights[key].shape)} for {tuple(own[key].shape)}"
        for key in sorted(set(own) & set(weights))
        if weights[key].shape != own[key].shape
    ]
    if missing or unexpected or wrong:
        parts = (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
        said = "; ".join(f"{len(keys)} {what}: {_some(keys)}" for what, keys in parts if keys)
        raise UnsupportedModelError(
            f"{path} does not fit this {type(transformer).__name__}: {said}; make the model with the configuration "
            "that the checkpoint was trained with"
        )
    unfit = sorted(key for key, part in weights.items() if part.is_floating_point() and not part.isfinite().all())
    if unfit:
        raise UnsupportedModelError(
            f"{path} holds NaN or infinity in {len(unfit)} weights: {_some(unfit)}; get the file again, or an earlier "
            "checkpoint of a training that has diverged"
        )
    transformer.load_state_dict(weights, strict=True)


def _read(path: Path) -> Mapping[str, Tensor]:
    found: Any = None
    try:
        size, unpacked = path.stat().st_size, _unpacked(path)
        if path.suffix == ".safetensors":
            found = load_file(path)
        elif unpacked <= _MOST_UNPACKED * size:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UnsupportedModelError(
            f"{path} cannot be read as a checkpoint: {error}; it must be .safetensors, or a .pt of tensors alone"
        ) from error
    if found is None and unpacked > _MOST_UNPACKED * size:
        raise UnsupportedModelError(
            f"{path} has {size:,} bytes and would unpack to {unpacked:,}; weights do not compress like that, and "
            f"{_MOST_UNPACKED} times its size is allowed: do not trust the file, or write it anew with torch.save"
        )
    for name in _INSIDE:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping) and found[name]:
            found = found[name]
            break
    if not isinstance(found, Mapping) or not all(isinstance(part, Tensor) for part in found.values()):
        raise UnsupportedModelError(f"{path} holds no weights under any of {', '.join(_INSIDE)} or at its top")
    return found


def _unpacked(path: Path) -> int:
    """Bytes that an archive unpacks to; those of the file, if it is none."""
    if not zipfile.is_zipfile(path):
        return path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        return sum(entry.file_size for entry in archive.infolist())


def _stripped(key: str) -> str:
    """`key` without what wrappers put in it."""
    for wrapper in _WRAPPERS:
        key = key.replace(wrapper, "")
    while (prefix := next((p for p in _PREFIXES if key.startswith(p)), None)) is not None:
        key = key.removeprefix(prefix)
    return key


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:5]) + (", ..." if len(keys) > 5 else "")
