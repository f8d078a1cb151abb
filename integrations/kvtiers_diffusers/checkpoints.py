"""Loading checkpoints of causal Wan models, as Self-Forcing and its kin publish them, into diffusers' own model."""

import json
import zipfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from diffusers.utils.torch_utils import unwrap_module
from safetensors.torch import load_file
from torch import Tensor

from kvtiers import UnsupportedModelError
from kvtiers_diffusers.offloading import hidden_weights

_INSIDE = ("generator_ema", "generator", "model", "state_dict")
"""What a checkpoint may keep its weights under; the first that is there, and not empty, is taken."""
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
"""What training wrappers put anywhere in a name."""
_MOST_UNPACKED = 4
"""How many times larger than its file a checkpoint may be."""
_PREFIXES = ("model.", "module.", "diffusion_model.")


def load_causal_checkpoint(transformer: Any, path: str | Path) -> None:
    """Load the weights at `path` (.safetensors, or .pt read with `weights_only=True`) into a `WanTransformer3DModel`.

    path: one file, the .index.json of several, or a folder with either. Wan's original names and diffusers' are both
    understood, and the names that wrappers add. Raises `UnsupportedModelError`, naming them, if keys are missing or
    unexpected or weights are not finite, and if the model is offloaded so that it would not run with what is written;
    it changes nothing then.
    """
    if not isinstance(path, str | PathLike):
        raise UnsupportedModelError(f"a checkpoint is a file or a folder, named by a text or a Path; got {path!r}")
    transformer = unwrap_module(transformer)
    hidden = hidden_weights(transformer)
    if hidden is not None:
        raise UnsupportedModelError(
            f"weights written to this {type(transformer).__name__} would not be those that it runs with: {hidden}; "
            "load the checkpoint first, and let the model be offloaded after that"
        )
    weights = {_stripped(key): part for key, part in _weights(Path(path)).items()}
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
    whole = sorted(key for key in own if own[key].is_floating_point() and not weights[key].is_floating_point())
    if whole:
        raise UnsupportedModelError(
            f"{path} holds whole numbers ({_kinds(weights, whole)}) for {len(whole)} weights: {_some(whole)}; a "
            "quantised checkpoint is loaded by what wrote it"
        )
    unfit = sorted(key for key, part in weights.items() if part.is_floating_point() and not part.isfinite().all())
    if unfit:
        raise UnsupportedModelError(
            f"{path} holds NaN or infinity in {len(unfit)} weights: {_some(unfit)}; get the file again, or an earlier "
            "checkpoint of a training that has diverged"
        )
    transformer.load_state_dict(weights, strict=True)
    lost = [key for key, part in transformer.state_dict().items() if not _same(part, weights[key])]
    if lost:
        raise UnsupportedModelError(
            f"{len(lost)} weights of this {type(transformer).__name__} are not what was written to them: "
            f"{_some(lost)}; some are written now and some are not, so load the model anew, and the checkpoint before "
            "anything else"
        )


def _kinds(weights: Mapping[str, Tensor], keys: list[str]) -> str:
    return ", ".join(sorted({str(weights[key].dtype).removeprefix("torch.") for key in keys}))


def _same(written: Tensor, given: Tensor) -> bool:
    return not written.is_meta and torch.equal(written, given.to(written))


def _weights(path: Path) -> Mapping[str, Tensor]:
    """The weights in one file, or in the shards that an index names, which may be given by their folder."""
    try:
        if path.is_dir():
            path = _index_in(path)
    except OSError as error:
        raise UnsupportedModelError(f"{path} cannot be read as a checkpoint: {error}") from error
    if not path.name.endswith(".index.json"):
        return _read(path)
    try:
        places: Any = json.loads(path.read_text())["weight_map"]
        files = sorted(set(places.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnsupportedModelError(
            f"{path} cannot be read as the index of a checkpoint: {error}; it must hold a weight_map of names to files"
        ) from error
    outside = [name for name in files if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise UnsupportedModelError(f"{path} names {outside[0]!r}, and its shards must lie beside it")
    absent = [name for name in files if not (path.parent / name).is_file()]
    if absent:
        raise UnsupportedModelError(f"{path} names {len(absent)} files that are not there: {_some(absent)}; get them")
    found = {name: _read(path.parent / name) for name in files}
    lacking = [key for key, name in places.items() if key not in found[name]]
    if lacking:
        raise UnsupportedModelError(
            f"{len(lacking)} weights are not in the files that {path} names for them: {_some(lacking)}; get them again"
        )
    return {key: found[name][key] for key, name in places.items()}


def _index_in(folder: Path) -> Path:
    """What a folder holds: one index, or one file of weights."""
    for pattern in ("*.index.json", "*.safetensors", "*.pt"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            raise UnsupportedModelError(
                f"{folder} holds {len(found)} files {pattern}: {_some([path.name for path in found])}; name the one"
            )
    raise UnsupportedModelError(f"{folder} holds no .index.json, .safetensors or .pt; name the checkpoint's file")


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
