"""A cache as one safetensors file: never pickle, checked against truncation and change, written whole or not at all."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvtiers import session
from kvtiers.errors import SavedCacheError
from kvtiers.presets import describe

if TYPE_CHECKING:
    from kvtiers.cache import TieredCache

FORMAT = "kvtiers-cache-1"


def save(cache: "TieredCache", path: Path, extra: dict[str, Any], beside: Mapping[str, Tensor]) -> None:
    """Write `cache` to `path`, with plain data and tensors beside it."""
    tensors = {f"beside.{name}": part.contiguous() for name, part in beside.items()}
    layers: list[list[dict[str, Any]]] = []
    for index, layer in enumerate(cache.layers):
        groups = []
        for number, group in enumerate(layer.groups):
            own, numbers = session.dump(group.layer)
            tensors |= {f"{index}.{number}.{name}": part.contiguous() for name, part in own.items()}
            groups.append({"rows": None if group.rows is None else group.rows.tolist(), "numbers": numbers})
        layers.append(groups)
    about = json.dumps({"policies": _descriptions(cache), "layers": layers, "extra": extra}, sort_keys=True)
    metadata = {"format": FORMAT, "about": about, "sha256": _checksum(tensors, about)}
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise SavedCacheError(f"{path} cannot be written: {error}; give a path in a folder that exists") from error
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata=metadata)
        Path(temporary).replace(path)
    except IsADirectoryError as error:
        raise SavedCacheError(f"{path} is a folder; give the path of a file") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def extra(path: Path) -> dict[str, Any]:
    """The plain data that was kept beside a cache; nothing else is read or checked."""
    if not path.is_file():
        raise SavedCacheError(f"{path} is no file; give the path that save() was given")
    try:
        with safe_open(path, framework="pt") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {}).get("about", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise SavedCacheError(f"{path} cannot be read as a saved cache: {error}; is it truncated?") from error
    kept: dict[str, Any] = about.get("extra", {})
    return kept


@torch.inference_mode(mode=False)
def load(
    cache: "TieredCache", path: Path, device: torch.device, expect: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fill `cache` from `path` and return what was kept beside it."""
    tensors, about = _read(path)
    tensors = {name: part.to(device) for name, part in tensors.items()}
    wanted = {"policies": json.loads(json.dumps(_descriptions(cache))), **expect}
    difference = _difference(
        {"policies": about["policies"], **{name: about["extra"].get(name) for name in expect}}, wanted
    )
    if difference is not None:
        raise SavedCacheError(
            f"{path} was saved from another model or policy: {difference}; make the cache with what it was saved with"
        )
    groups_of_layers = []
    try:
        for index, saved in enumerate(about["layers"]):
            groups = []
            for number, group in enumerate(saved):
                layer = cache._layer(index, int(group["numbers"]["batch"]))
                start = f"{index}.{number}."
                own = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
                session.restore(layer, own, group["numbers"])
                rows = None if group["rows"] is None else torch.tensor(group["rows"], device=device)
                groups.append((rows, layer))
            groups_of_layers.append(groups)
    except (KeyError, TypeError, RuntimeError) as error:
        raise SavedCacheError(f"{path} lacks a part that this cache needs ({error!r}); save it again") from error
    for layer_rows, groups in zip(cache.layers, groups_of_layers, strict=True):
        layer_rows.adopt(groups)
    kept = {name.removeprefix("beside."): t for name, t in tensors.items() if name.startswith("beside.")}
    return about["extra"], kept


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description of a saved cache, after checking that nothing is missing or changed."""
    if not path.is_file():
        raise SavedCacheError(f"{path} is no file; give the path that save() was given")
    try:
        with safe_open(path, framework="pt") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            # Copied, since get_tensor maps the file: whoever changes or truncates it later must not reach the cache.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise SavedCacheError(f"{path} cannot be read as a saved cache: {error}; is it truncated?") from error
    if metadata.get("format") != FORMAT:
        raise SavedCacheError(
            f"{path} is no saved cache of this version: format {metadata.get('format')!r}, expected {FORMAT!r}"
        )
    if _checksum(tensors, metadata.get("about", "")) != metadata.get("sha256"):
        raise SavedCacheError(f"{path} was changed after it was saved (its checksum differs); save it again")
    about: dict[str, Any] = json.loads(metadata["about"])
    return tensors, about


def _descriptions(cache: "TieredCache") -> list[dict[str, Any]]:
    """What must agree between the cache that was saved and the one that loads, for each layer."""
    said = []
    for policy, geometry, rotary in zip(cache.policies, cache.geometries, cache.rotaries, strict=True):
        shape = [geometry.kv_heads, geometry.query_heads, geometry.head_dim, geometry.value_dim, list(geometry.grid)]
        turn = None
        if rotary is not None and policy.realigner.rotates:
            frequencies = torch.cat([f.double().cpu() for f in rotary.frequencies]).numpy().tobytes()
            turn = [rotary.layout, rotary.scaling, hashlib.sha256(frequencies).hexdigest()]
        said.append({"policy": describe(policy), "shape": shape, "dtype": str(geometry.dtype), "rotary": turn})
    return said


def _difference(saved: Any, wanted: Any, where: str = "") -> str | None:
    """The first place at which two descriptions differ, in words."""
    if isinstance(saved, Mapping) and isinstance(wanted, Mapping):
        pairs = [
            (f"{where}.{key}" if where else str(key), saved.get(key), wanted.get(key)) for key in {**saved, **wanted}
        ]
    elif isinstance(saved, list) and isinstance(wanted, list) and len(saved) == len(wanted):
        pairs = [(f"{where}[{i}]", a, b) for i, (a, b) in enumerate(zip(saved, wanted, strict=True))]
    elif isinstance(saved, list) and isinstance(wanted, list):
        return f"{where} has {len(saved)} entries in the file and {len(wanted)} here"
    else:
        return None if saved == wanted else f"{where} is {saved!r} in the file and {wanted!r} here"
    found = (_difference(a, b, place) for place, a, b in pairs)
    return next((words for words in found if words is not None), None)


def _checksum(tensors: Mapping[str, Tensor], about: str) -> str:
    total = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        part = tensors[name].detach().cpu().contiguous()
        total.update(f"{name}{tuple(part.shape)}{part.dtype}".encode())
        total.update(part.reshape(-1).view(torch.uint8).numpy().tobytes() if part.numel() else b"")
    return total.hexdigest()
