"""A cache as one safetensors file: never pickle, checked against truncation, change and nonsense, written whole."""

import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvtiers.errors import SavedCacheError
from kvtiers.geometry import Geometry
from kvtiers.layer import Layer
from kvtiers.locks import OURS, left_behind, locked
from kvtiers.policy import Policy
from kvtiers.presets import describe
from kvtiers.rotary import Rotary
from kvtiers.rows import LayerRows, RowGroup

FORMAT = "kvtiers-cache-5"


def file_path(path: object) -> Path:
    """`path` as a `Path`. Raises `SavedCacheError` for what is none."""
    if not isinstance(path, str | os.PathLike):
        raise SavedCacheError(f"a cache is kept in a file, whose path is a text or a Path; got {path!r}")
    return Path(path)


def usable_device(device: Any) -> torch.device:
    """`device`, which a cache is to be loaded to. Raises `SavedCacheError` if torch cannot put a tensor there."""
    try:
        found: torch.device = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise SavedCacheError(f"a cache cannot be loaded to the device {device!r}: {error}") from error
    return found


def save(
    layers: Sequence[LayerRows],
    outline: list[dict[str, Any]],
    path: Path,
    extra: Any,
    beside: Any,
) -> None:
    """Write `layers` to `path`, with a mapping of plain data (`extra`) and one of tensors beside them."""
    for name, given in (("extra", extra), ("beside", beside)):
        if not isinstance(given, Mapping):
            raise SavedCacheError(f"{name} must be a mapping of names to what is kept, got a {type(given).__name__}")
        if odd := [key for key in given if not isinstance(key, str)]:
            raise SavedCacheError(f"names in {name} must be text, got {odd[0]!r}")
    if not _come_equally_far([layer.groups for layer in layers]):
        raise SavedCacheError(
            "the layers of this cache have not come equally far, as in the middle of a forward, and could not be "
            "loaded so; give every layer its tokens first"
        )
    for name, part in beside.items():
        if not isinstance(part, Tensor) or part.is_meta:
            got = "one on the meta device" if isinstance(part, Tensor) else f"a {type(part).__name__}"
            raise SavedCacheError(f"beside[{name!r}] must be a tensor that holds values, got {got}")
    tensors = {f"beside.{name}": part.contiguous() for name, part in beside.items()}
    said: list[list[dict[str, Any]]] = []
    for index, layer in enumerate(layers):
        groups = []
        for number, group in enumerate(layer.groups):
            own, about = group.layer.dump()
            tensors |= {f"{index}.{number}.{name}": part.contiguous().clone() for name, part in own.items()}
            rows = None if group.rows is None else group.rows.tolist()
            groups.append({"rows": rows, "batch": group.layer.geometry.batch, "state": about})
        said.append(groups)
    try:
        about_all = json.dumps(
            {"policies": outline, "layers": said, "extra": dict(extra)}, sort_keys=True, allow_nan=False
        )
    except (TypeError, ValueError) as error:
        raise SavedCacheError(f"extra must be plain data that JSON can hold: {error}") from error
    write_file(path, tensors, {"format": FORMAT, "about": about_all, "sha256": _checksum(tensors, about_all)})


def write_file(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all. Raises `SavedCacheError` if that cannot be.

    What a process that was killed while it wrote to the same folder has left there is removed.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG  # it will be one
    except (OSError, ValueError) as error:
        raise SavedCacheError(f"{str(path)!r} is no path of a file: {error}") from error
    if not stat.S_ISREG(mode):
        kind = {stat.S_IFDIR: "a folder", stat.S_IFLNK: "a symbolic link"}.get(stat.S_IFMT(mode), "no regular file")
        raise SavedCacheError(f"{path} is {kind}, which would be replaced; give the path of a file")
    try:
        for left, handle in left_behind(path.parent, f".{OURS}*.partial"):
            shutil.rmtree(left, ignore_errors=True)
            os.close(handle)
        folder, lock = locked(lambda: Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{OURS}", suffix=".partial")))
    except OSError as error:
        raise SavedCacheError(f"{path} cannot be written: {error}; give a path in a folder that exists") from error
    try:
        written = folder / path.name  # in a folder of its own, since the writer may put another file in its place
        save_file(dict(tensors), written, metadata=metadata)
        written.replace(path)
    except (OSError, SafetensorError) as error:
        full = isinstance(error, SafetensorError) or error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise SavedCacheError(f"{path} cannot be written: {error}{'; is the disk full?' if full else ''}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def extra(path: Path) -> dict[str, Any]:
    """The plain data that was kept beside a cache; nothing else is read or checked."""
    with _opened(path) as (_, metadata):
        return dict(json.loads(metadata.get("about", "{}"))["extra"])


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Mapping[str, str]]]:
    """A saved cache that is being read, and its header. What cannot be read is a `SavedCacheError`."""
    try:
        there = path.is_file()
    except OSError:  # as for a name that is too long
        there = False
    if not there:
        raise SavedCacheError(f"{path} is no file; give the path that save() was given")
    try:
        with safe_open(path, framework="pt") as file:
            yield file, file.metadata() or {}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise SavedCacheError(f"{path} cannot be read as a saved cache: {error}; is it truncated?") from error


Groups = list[tuple[RowGroup, ...]]


@torch.inference_mode(mode=False)
def load(
    new_layer: Callable[[int, int], Layer],
    outline: list[dict[str, Any]],
    path: Path,
    device: torch.device,
    expect: Mapping[str, Any],
) -> tuple[Groups, dict[str, Any], dict[str, Tensor]]:
    """The groups of every layer that `path` says, and what was kept beside them."""
    tensors, about = _read(path)
    wanted = {"policies": json.loads(json.dumps(outline)), **expect}
    difference = _difference(
        {"policies": about["policies"], **{name: about["extra"].get(name) for name in expect}}, wanted
    )
    if difference is not None:
        raise SavedCacheError(
            f"{path} was saved from another model or policy: {difference}; make the cache with what it was saved with"
        )
    try:
        groups = [
            _groups(new_layer, index, saved, tensors, device)
            for index, saved in enumerate(_listed(about["layers"], len(outline)))
        ]
    except (ArithmeticError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        # what a crafted file can hold is more than its declared state; nothing was changed yet
        raise SavedCacheError(f"{path} does not describe this cache: {error}") from error
    if not _come_equally_far(groups):
        raise SavedCacheError(f"{path} does not describe this cache: its layers have not come equally far")
    kept = {
        name.removeprefix("beside."): part.to(device) for name, part in tensors.items() if name.startswith("beside.")
    }
    return groups, about["extra"], kept


def _come_equally_far(layers: Sequence[tuple[RowGroup, ...]]) -> bool:
    """Whether every row has come as far in all layers. In a video a pass that failed leaves current steps in some."""
    steps = [
        {
            row: group.layer.num_steps if group.layer.geometry.causal else group.layer.committed_steps
            for group in groups
            for row in group.numbers()
        }
        for groups in layers
    ]
    return all(one == steps[0] for one in steps)


def _listed(value: Any, count: int) -> list[Any]:
    if not isinstance(value, list) or len(value) != count:
        raise SavedCacheError(f"{count} layers are expected, not what the file says")
    return value


def _groups(
    new_layer: Callable[[int, int], Layer], index: int, saved: Any, tensors: Mapping[str, Tensor], device: torch.device
) -> tuple[RowGroup, ...]:
    """The groups of rows of one layer."""
    groups: list[RowGroup] = []
    rows: list[int] = []
    for number, group in enumerate(saved):
        batch, named = group["batch"], group["rows"]
        whole = type(batch) is int and batch > 0 and (len(saved) == 1 if named is None else len(named) == batch)
        if not whole or any(type(row) is not int for row in named or ()):
            raise SavedCacheError(f"a group of layer {index} holds rows {named} of {batch}")
        layer = new_layer(index, batch)
        start = f"{index}.{number}."
        own = {name.removeprefix(start): part for name, part in tensors.items() if name.startswith(start)}
        on_device = layer.policy.archive.location == "device"
        moves = {name for name in own if on_device or not name.startswith("history.stores.")}
        layer.fill({name: x.to(device) if name in moves else x for name, x in own.items()}, group["state"])
        rows += named or ()
        groups.append(RowGroup(None if named is None else torch.tensor(named, device=device), layer))
    if sorted(rows) != list(range(len(rows))):
        raise SavedCacheError(f"the groups of layer {index} hold rows {sorted(rows)}")
    return tuple(groups)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description of a saved cache, after checking that nothing is missing or changed."""
    with _opened(path) as (file, metadata):
        # Copied, since get_tensor maps the file: whoever changes or truncates it later must not reach the cache.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)
    if metadata.get("format") != FORMAT:
        raise SavedCacheError(
            f"{path} is no saved cache of this version: format {metadata.get('format')!r}, expected {FORMAT!r}"
        )
    if _checksum(tensors, metadata.get("about", "")) != metadata.get("sha256"):
        raise SavedCacheError(f"{path} was changed after it was saved (its checksum differs); save it again")
    about: Any = json.loads(metadata["about"])
    kinds = {"policies": list, "layers": list, "extra": dict}
    if not isinstance(about, dict) or any(not isinstance(about.get(name), kind) for name, kind in kinds.items()):
        raise SavedCacheError(f"{path} does not say what it holds: {', '.join(kinds)}")
    return tensors, about


def outline(policy: Policy, geometry: Geometry, rotary: Rotary | None) -> dict[str, Any]:
    """What must agree between a layer that was saved and the one that loads it."""
    shape = [geometry.kv_heads, geometry.query_heads, geometry.head_dim, geometry.value_dim, list(geometry.grid)]
    turn = None
    if rotary is not None and policy.realigner.rotates:
        frequencies = torch.cat([f.double().cpu() for f in rotary.frequencies]).numpy().tobytes()
        turn = [rotary.layout, rotary.scaling, rotary.first, hashlib.sha256(frequencies).hexdigest()]
    return {"policy": describe(policy), "shape": shape, "dtype": str(geometry.dtype), "rotary": turn}


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
        flat = part.as_strided((part.numel(),), (1,))  # a single number may have any stride
        total.update(flat.view(torch.uint8).numpy().tobytes() if part.numel() else b"")
    return total.hexdigest()
