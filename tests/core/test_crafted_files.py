"""A saved cache that was made to be wrong, checksum and all, is refused, or is one that the cache could have had.

Every number and every tensor of a file is changed in turn. What is loaded all the same must go on: it takes tokens,
selects and ages as a cache does.
"""

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from hypothesis import settings
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvtiers import saving
from kvtiers.blocks import Blocks
from kvtiers.cache import TieredCache
from kvtiers.errors import SavedCacheError
from kvtiers.geometry import Geometry
from kvtiers.policy import Policy
from kvtiers.presets import build, policy
from kvtiers.rotary import Rotary
from strategies import rotary, stream

TEXT = Geometry(kv_heads=2, query_heads=4, head_dim=4, batch=2)
VIDEO = Geometry(kv_heads=1, head_dim=12, grid=(4, 4), steps_per_commit=4, causal=False)
SMALL: dict[str, Any] = {"sink": 1, "recent": 3, "block_size": 2, "chunk_size": 4}


WINDOW, UNROTATED = ("placed", "state", "window", "state"), ("placed", "state", "unrotated", "state")


def watching() -> Policy:
    found = policy("archive", **SMALL, top_k=1, attend="compressed", retriever="page-bounds", codec="int8")
    return attrs.evolve(found, compressor=build("compressor", ("top-tokens", {"by": "attention", "window": 3})))


POLICIES: Mapping[str, Callable[[], Policy]] = {
    "full": lambda: policy("full"),
    "streaming": lambda: policy("streaming", **SMALL),
    "archive": lambda: policy("archive", **SMALL, top_k=2),
    "archive that rotates": lambda: policy("archive", **SMALL, top_k=2, realigner="incremental"),
    "anchors that move": lambda: policy("archive", **SMALL, top_k=2, realigner=("incremental", {"rotations": "once"})),
    "compressed forms": lambda: policy("packforcing-lm", **SMALL, top_k=1, top_k_compressed=1),
    "watching, with a codec": watching,
    "rewriting": lambda: policy("streaming", **SMALL, compressor=("h2o", {"most": 5}), realigner="contiguous"),
    "given": lambda: policy("packforcing", sink=4, recent=4, top_k=2, archive="device"),
}


def feed(cache: TieredCache, count: int, start: int) -> None:
    """Some forwards, of 4 tokens and then of 1; blocks, for a video."""
    tokens = stream(cache.geometries[0], 64)
    for _ in range(count):
        stop = start + (4 if start < 16 or not cache.geometries[0].causal else 1)
        now, at = slice(start * per_step(cache), stop * per_step(cache)), start
        keys, values, query = tokens.keys[:, :, now], tokens.values[:, :, now], tokens.query[:, :, now]
        cache.write(0, keys, values)
        cache.select(0, query)
        cache.context(0)
        if not cache.geometries[0].causal:
            compressor = cache.policies[0].compressor
            offsets = compressor.offsets(4, (4, 4))
            some = keys[:, :, None, : len(offsets)]
            starts = torch.tensor([at])
            cache.commit(
                compressed=[
                    Blocks(
                        keys=some,
                        values=some,
                        offsets=offsets[None, None, None],
                        starts=starts,
                        span=compressor.span(4),
                    )
                ]
            )
        start = stop


def per_step(cache: TieredCache) -> int:
    return cache.geometries[0].tokens_per_step


def empty(name: str) -> TieredCache:
    geometry = VIDEO if name == "given" else TEXT
    turns = Rotary([torch.ones(2)] * 3, layout="interleaved") if name == "given" else rotary(4)
    return TieredCache(POLICIES[name](), [geometry], rotaries=[turns])


@attrs.frozen
class File:
    """What a saved cache consists of."""

    tensors: dict[str, Tensor]
    about: dict[str, Any]

    @staticmethod
    def of(path: Path) -> "File":
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return File(tensors, json.loads(file.metadata()["about"]))

    def write(self, path: Path) -> None:
        """With the checksum that is due."""
        about = json.dumps(self.about, sort_keys=True)
        tensors = {name: x.contiguous().clone() for name, x in self.tensors.items()}
        save_file(tensors, path, {"format": saving.FORMAT, "about": about, "sha256": saving._checksum(tensors, about)})


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where every value of nested lists and mappings is."""
    if path:
        yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def others(value: Any) -> list[Any]:
    """What may stand in place of a value."""
    made: list[Any] = ["x", None, 1.5, [], {}, -1, 2**40, not value]
    if isinstance(value, int):
        made += [value + 1, value - 1, 10**30]
    if isinstance(value, list):
        made += [[*value, 1], value[1:], value[::-1]]
    if isinstance(value, dict):
        made += [value | {"more": 0}]
    return [one for one in made if type(one) is not type(value) or one != value]


def changed_headers(file: File) -> Iterator[tuple[str, File]]:
    for path in places(file.about["layers"]):
        about = copy.deepcopy(file.about)
        inner = about["layers"]
        for key in path[:-1]:
            inner = inner[key]
        for other in others(inner[path[-1]]):
            inner[path[-1]] = other
            yield f"{path} = {other!r}", File(file.tensors, copy.deepcopy(about))
        del inner[path[-1]]
        yield f"{path} is gone", File(file.tensors, about)
    for name in file.about:
        yield f"no {name}", File(file.tensors, {key: value for key, value in file.about.items() if key != name})
        for other in ("x", None, 1, [], {}, [None], [[None]]):
            yield f"{name} = {other!r}", File(file.tensors, {**file.about, name: other})


def changed_tensors(file: File) -> Iterator[tuple[str, File]]:
    for name, x in file.tensors.items():
        yield f"no {name}", File({key: one for key, one in file.tensors.items() if key != name}, file.about)
        made = {f"as {dtype}": x.to(dtype) for dtype in DTYPES if dtype != x.dtype}
        for axis in range(x.dim() if x.numel() else 0):
            made[f"one less along {axis}"] = x.narrow(axis, 0, x.shape[axis] - 1)
            made[f"twice along {axis}"] = torch.cat([x, x], axis)
            made[f"backwards along {axis}"] = x.flip(axis)
            made[f"summed along {axis}"] = x.sum(axis).to(x.dtype)
        made |= {
            "with an axis more": x[None],
            "of nothing": x.flatten()[:0],
            "a number": x.flatten()[:1].sum().to(x.dtype),
        }
        numbers = (torch.nan, torch.inf, -torch.inf, 1e30, -1) if x.is_floating_point() else (-1, 2**40, 0, 1, 99)
        for number in numbers if x.dtype not in (torch.uint8, torch.int8) else (0, 1, 99):
            made[f"all {number}"] = torch.full_like(x, number)
            some = x.clone()
            some.view(-1)[-1:] = number
            made[f"with {number}"] = some
        for what, one in made.items():
            if one.shape != x.shape or one.dtype != x.dtype or not torch.equal(one.nan_to_num(7), x.nan_to_num(7)):
                yield f"{name} {what}", File({**file.tensors, name: one}, file.about)


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool)
EVERY = 1 if settings().max_examples > 100 else 3
"""Of so many changes one is tried, another one for each policy: all of them under the profile `deep`."""
NEVER = re.compile(r"= 'x'|= 1\.5|1099511627776|10{30}|\d\) is gone|no (policies|layers|extra)")
"""What no header may say."""
KEYS_AND_VALUES = re.compile(r"^\S*(planes\.(?!bias|attention)\S+|stores\.\S+|watched\.[cf]\S+|\.(keys|values))$")
"""What a model gave may be any numbers, as long as there are as many."""
FREE = re.compile(r"^\S*(mid\.\S+|offsets|selection\.\S+|planes\.unrotated|watched\.\S+)$")
"""Tensors that may have more or fewer rows, heads, blocks, queries or slots, or another dtype."""


def may_be(what: str) -> bool:
    """Whether a changed tensor is one that the cache could have had: keys and values may be any, others in range."""
    name, _, change = what.partition(" ")
    if re.search(r"along|axis|nothing|number|as torch", change) and not change.startswith("backwards"):
        return FREE.match(name) is not None
    wrong = r"nan|inf" if "digests" in name else r"nan|inf|1e\+30|1099511627776"
    return KEYS_AND_VALUES.match(name) is not None or re.search(wrong, change) is None


def state(cache: TieredCache) -> tuple[dict[str, Tensor], Any]:
    tensors, about = cache.every_layer()[0].dump()
    return {name: x.clone() for name, x in tensors.items()}, about


@pytest.mark.parametrize("change", [changed_headers, changed_tensors], ids=["headers", "tensors"])
@pytest.mark.parametrize("name", POLICIES)
@torch.no_grad()
def test_whatever_is_changed_in_a_file_is_refused_or_is_a_cache_that_goes_on(name, change, tmp_path):
    path, cache, target = tmp_path / "cache", empty(name), empty(name)
    feed(cache, 6, 0)
    feed(target, 5, 0)
    cache.save(path)
    file, start, groups = File.of(path), cache.num_steps, target.layers[0].groups
    tensors, about = state(target)
    target.load(path)
    feed(target, 4, start)
    target.layers[0].groups = groups
    refused, accepted = 0, []
    for what, other in islice(change(file), list(POLICIES).index(name) % EVERY, None, EVERY):
        other.write(path)
        try:
            target.load(path)
        except SavedCacheError:
            refused += 1
            assert target.layers[0].groups is groups, what
            continue
        accepted.append(what)
        try:
            feed(target, 4, start)
        except Exception as error:
            raise AssertionError(f"{what} was loaded, and does not go on: {error}") from error
        target.layers[0].groups = groups
    after, said = state(target)
    assert said == about
    assert all(torch.equal(after[each], tensors[each]) for each in tensors)
    if change is changed_headers:
        assert [what for what in accepted if NEVER.search(what) and not what.startswith("(0, 0)")] == []
        assert refused > 5 * len(accepted)
    else:
        assert [what for what in accepted if not may_be(what)] == []


def test_layers_that_have_not_come_equally_far_are_refused(tmp_path):
    path = tmp_path / "cache.safetensors"
    cache = TieredCache(POLICIES["archive"](), [TEXT, TEXT], rotaries=[rotary(4)] * 2)
    tokens = stream(TEXT, 4)
    cache.write(0, tokens.keys, tokens.values)
    with pytest.raises(SavedCacheError, match="have not come equally far, as in the middle of a forward"):
        cache.save(path)
    cache.write(1, tokens.keys, tokens.values)
    cache.save(path)
    file = File.of(path)
    for layer in (0, 1):
        about = copy.deepcopy(file.about)
        about["layers"][layer] = []
        left = {name: x for name, x in file.tensors.items() if not name.startswith(f"{layer}.")}
        File(left, about).write(path)
        with pytest.raises(SavedCacheError, match="its layers have not come equally far"):
            TieredCache(POLICIES["archive"](), [TEXT, TEXT], rotaries=[rotary(4)] * 2).load(path)


@pytest.mark.parametrize(
    ("name", "place", "change"),
    [
        ("streaming", ("timeline", "state", "origin"), lambda _: 0),
        ("streaming", ("recent_start",), lambda _: 0),
        ("archive that rotates", (*WINDOW, "tail"), lambda tail: tail + 1),
        ("archive that rotates", (*UNROTATED, "tail"), lambda tail: tail + 1),
        ("archive that rotates", (*UNROTATED, "tail"), lambda tail: tail - 1),
        ("archive that rotates", (*WINDOW, "recent_shift"), lambda shift: shift + 1),
        ("anchors that move", (*WINDOW, "sink_shift"), lambda shift: shift - 1),
        ("compressed forms", (*WINDOW, "sink_shift"), lambda shift: shift + 1),
    ],
    ids=[
        "an origin in the sink",
        "recent that begins in the sink",
        "slots beside the tokens",
        "later unrotated keys",
        "earlier unrotated keys",
        "recent keys placed elsewhere",
        "anchors placed elsewhere",
        "anchors that never move",
    ],
)
def test_numbers_that_point_beside_what_is_held_are_refused(name, place, change, tmp_path):
    cache, path = empty(name), tmp_path / "cache.safetensors"
    feed(cache, 6, 0)
    cache.save(path)
    file = File.of(path)
    inner = file.about["layers"][0][0]["state"]
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = change(inner[place[-1]])
    file.write(path)
    with pytest.raises(SavedCacheError, match=r"contradicts itself: the .* of layer 0 do not go with the rest"):
        empty(name).load(path)
