"""The weights of the tiny world's models: a folder, and what is checked before any of it is used.

weights/
    autoencoder/  transformer/  compressor/    each as `save_pretrained` of diffusers writes it
    sampler.json                               how a block is denoised, if nothing else is asked; else 4 Euler steps
    sha256                                     as `sha256sum` writes it; without it nothing is compared
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import attrs
import torch

from kvtiers.errors import KVTiersError
from kvtiers_packforcing.tiny_world.sampling import Sampler

SHIPPED = Path(__file__).parent / "weights"
PARTS = ("autoencoder", "transformer", "compressor")
SUMS, SAMPLER = "sha256", "sampler.json"
CONFIG, TENSORS = "config.json", "diffusion_pytorch_model.safetensors"


class WeightsError(KVTiersError, OSError):
    """When weights are missing, were changed, or are not those of the tiny world's models."""


@attrs.frozen(eq=False, kw_only=True)
class Models:
    """What makes videos: a Wan transformer, the HR branch of its compressor, and the autoencoder, all in float32.

    sampler: how a block is denoised, if nothing else is asked.
    """

    transformer: Any
    compressor: Any
    autoencoder: Any
    sampler: Sampler = attrs.field(factory=Sampler)


def check_weights(folder: Path | str = SHIPPED) -> None:
    """Raise `WeightsError` unless `folder` holds what `load_models` reads. Nothing is loaded."""
    folder = Path(folder)
    if not folder.is_dir():
        hint = "they are not part of this checkout" if folder == SHIPPED else "give a folder that training wrote"
        raise WeightsError(f"there are no weights in {folder}: {hint}")
    for part in PARTS:
        for name in (CONFIG, TENSORS):
            if not (folder / part / name).is_file():
                others = sorted(path.name for path in (folder / part).glob("*.bin"))
                hint = f"; {others[0]} is not read, since it can run code" if others else ""
                raise WeightsError(
                    f"{folder} lacks {part}/{name}{hint}; write each of {', '.join(PARTS)} with save_pretrained(..., "
                    "safe_serialization=True)"
                )
    if (folder / SUMS).is_file():
        _compare(folder)
    elif folder == SHIPPED:
        raise WeightsError(f"{folder} lacks the file {SUMS}, so that nobody can tell whether its weights are whole")


def fingerprint(folder: Path | str) -> str:
    """One hash for all weights in a folder, however blocks are sampled with them."""
    sums = [_sum(Path(folder) / name) for name in _names(Path(folder)) if name != SAMPLER]
    return hashlib.sha256(" ".join(sums).encode()).hexdigest()


def write_sums(folder: Path | str) -> None:
    """Write `sha256` for the weights in `folder`."""
    folder = Path(folder)
    lines = [f"{_sum(folder / name)}  {name}\n" for name in _names(folder)]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def load_models(folder: Path | str = SHIPPED) -> Models:
    """The models in `folder`, without gradients. Raises `WeightsError`; see `check_weights`."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    from kvtiers_packforcing.network import HighResolution

    check_weights(folder)
    kinds = {"autoencoder": AutoencoderKLWan, "transformer": WanTransformer3DModel, "compressor": HighResolution}
    parts = {part: _load(kind, Path(folder) / part) for part, kind in kinds.items()}
    return Models(**parts, sampler=read_sampler(folder))


def read_sampler(folder: Path | str) -> Sampler:
    """The sampler in a folder of weights. Raises `WeightsError` if what stands there is none."""
    path = Path(folder) / SAMPLER
    if not path.exists():
        return Sampler()
    try:
        return Sampler(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        said = error if isinstance(error, OSError | UnicodeDecodeError) else error.args[0]  # attrs has more in args
        raise WeightsError(
            f"{path} says no sampler: {said}; copy the file that the export of a training wrote"
        ) from error


def write_sampler(folder: Path | str, sampler: Sampler) -> None:
    """Write `sampler.json`."""
    (Path(folder) / SAMPLER).write_text(json.dumps(attrs.asdict(sampler)) + "\n", encoding="utf-8")


def _load(kind: Any, folder: Path) -> Any:
    try:
        model, about = kind.from_pretrained(
            folder, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, TypeError, NotImplementedError) as error:
        said = str(error).splitlines() or [type(error).__name__]
        raise WeightsError(f"{folder} cannot be read as {kind.__name__}: {said[0]}") from error
    missing, unexpected = about["missing_keys"], about["unexpected_keys"]
    if missing or unexpected:
        raise WeightsError(
            f"the weights in {folder} are not those that its config.json describes: missing {missing[:3]}, unexpected "
            f"{unexpected[:3]}; save both with save_pretrained"
        )
    return model.eval().requires_grad_(requires_grad=False)


def _compare(folder: Path) -> None:
    listed = {}
    for line in (folder / SUMS).read_text(encoding="utf-8").splitlines():
        found, _, name = line.partition("  ")
        listed[name] = found
    for name in _names(folder):
        if name not in listed:
            raise WeightsError(f"{folder / SUMS} does not list {name}; write it anew with write_sums()")
        if listed[name] != _sum(folder / name):
            raise WeightsError(
                f"{folder / name} is not the file that {SUMS} was written for; fetch it again, or write_sums() if it "
                "was changed on purpose"
            )


def _names(folder: Path) -> list[str]:
    found = [f"{part}/{name}" for part in PARTS for name in (CONFIG, TENSORS)]
    return [*found, SAMPLER] if (folder / SAMPLER).exists() else found


def _sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
