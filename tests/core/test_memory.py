"""Invariant 10: what was saved, forked or rolled back goes on exactly as if nothing had happened."""

import json
import os
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from kvtiers import testing
from kvtiers.cache import TieredCache
from kvtiers.errors import CropError, SavedCacheError
from kvtiers.geometry import Geometry
from kvtiers.presets import build, policy
from kvtiers.rows import PaddingPattern
from kvtiers.slots import Compressor
from strategies import Setting, Stream, copied, cuts, policies, rotary, settings_of, small_presets


def go_on(cache: TieredCache, tokens: Stream, lengths: list[int], start: int) -> list:
    """Contexts of further forwards, and the counts after each."""
    said = []
    for length in lengths:
        now = tokens.part(start, start + length)
        cache.write(0, now.keys, now.values)
        cache.select(0, now.query)
        said.append((copied(cache.context(0)), cache.tier_counts()))
        start += length
    return said


def assert_same_future(one: TieredCache, other: TieredCache, tokens: Stream, lengths: list[int], start: int) -> None:
    for (a, x), (b, y) in zip(go_on(one, tokens, lengths, start), go_on(other, tokens, lengths, start), strict=True):
        assert testing.difference(a, b) is None
        assert x == y


@pytest.mark.parametrize("location", ["device", "host", "disk"])
def test_what_an_archive_held_is_loaded_to_where_it_lives(location, tmp_path, monkeypatch):
    """Blocks of a `device` archive go where the cache goes; they stayed on the CPU. Others do not pass the device."""
    small = {"sink": 1, "recent": 3, "block_size": 2, "top_k": 2, "chunk_size": 4, "archive": location}
    setting = Setting(
        policy=policy("archive", **small), geometry=Geometry(kv_heads=2, head_dim=4), rotary=rotary(4), seed=0
    )
    cache = setting.cache()
    go_on(cache, setting.tokens, [4, 4, 4], 0)
    assert cache.only(0).history.count
    cache.save(tmp_path / "saved")
    found = {}

    def look(layer):
        written = layer.history.stores["full"].parts()
        found.update(store=written, window=layer.window.planes)

    monkeypatch.setattr("kvtiers.layer.check_filled", look)  # it looks at values, and `meta` has none
    setting.cache().load(tmp_path / "saved", device="meta")
    assert all(x.is_meta for x in found["window"].values())
    assert all(x.is_meta == (location == "device") for x in found["store"].values())


@given(data=st.data())
def test_what_was_saved_goes_on_exactly(data):
    setting = data.draw(settings_of())
    cache, lengths = setting.cache(), data.draw(cuts(setting.policy))
    split = data.draw(st.integers(0, len(lengths)))
    go_on(cache, setting.tokens, lengths[:split], 0)
    loaded = setting.cache()
    with TemporaryDirectory() as folder:
        cache.save(Path(folder) / "saved.safetensors", extra={"note": [1, "two"]})
        assert loaded.load(Path(folder) / "saved.safetensors") == {"note": [1, "two"]}
        assert [path.name for path in Path(folder).iterdir()] == ["saved.safetensors"]
    assert loaded.tier_counts() == cache.tier_counts()
    if split:
        assert testing.difference(cache.context(0), loaded.context(0)) is None
    assert_same_future(cache, loaded, setting.tokens, lengths[split:], sum(lengths[:split]))


@given(data=st.data())
def test_a_fork_goes_on_exactly_and_neither_disturbs_the_other(data):
    setting = data.draw(settings_of())
    cache, lengths = setting.cache(), data.draw(cuts(setting.policy))
    split = data.draw(st.integers(0, len(lengths)))
    go_on(cache, setting.tokens, lengths[:split], 0)
    fork, start = cache.fork(), sum(lengths[:split])
    untouched = setting.cache()
    go_on(untouched, setting.tokens, lengths[:split], 0)
    other = attrs.evolve(setting, seed=setting.seed + 1).tokens
    go_on(cache, other, lengths[split:], start)
    assert_same_future(fork, untouched, setting.tokens, lengths[split:], start)


@given(data=st.data())
def test_a_roll_back_is_exact_or_refused(data):
    """Against a cache that only ever saw what is left, cut as the original was."""
    setting = data.draw(settings_of())
    lengths = data.draw(cuts(setting.policy, most=8))
    total = sum(lengths)
    steps = data.draw(st.integers(0, total) | st.integers(max(0, total - 3), total), label="crop to")
    cache, kept = setting.cache(), setting.cache()
    go_on(cache, setting.tokens, lengths, 0)
    before, tier_counts = copied(cache.context(0)), cache.tier_counts()
    refusal = None
    try:
        cache.crop(steps)
    except CropError as error:
        refusal = str(error)
    if refusal is not None:
        assert "fork() the cache" in refusal
        assert testing.difference(before, cache.context(0)) is None
        assert cache.tier_counts() == tier_counts
        return
    assert cache.num_steps == steps
    left, done = [], 0
    for length in lengths:
        if done < steps:
            left.append(min(length, steps - done))
        done += length
    go_on(kept, setting.tokens, left, 0)
    future = data.draw(
        cuts(setting.policy, most=4, steps=setting.steps - steps) if steps < setting.steps else st.just([])
    )
    other = attrs.evolve(setting, seed=setting.seed + 1).tokens
    assert_same_future(cache, kept, other, future, steps)


@pytest.mark.parametrize("name", ["full", "sliding-window", "streaming", "archive", "packforcing-lm"])
def test_the_newest_tokens_can_be_taken_back(name):
    """Speculative decoding: one chunk is checked, and the part that was wrong goes."""
    found = policy(name, **({"reach": 14} if name == "packforcing-lm" else {}))
    found = attrs.evolve(
        found, recent=None if found.recent is None else 12, block_size=4, refresh="chunk", sink=found.sink
    )
    setting = Setting(policy=found, geometry=Geometry(kv_heads=2, head_dim=4, batch=2), rotary=rotary(4), seed=0)
    cache, kept = setting.cache(), setting.cache()
    go_on(cache, setting.tokens, [8, 8, 5], 0)
    go_on(kept, setting.tokens, [8, 8, 2], 0)
    try:
        cache.crop_by(3)
    except CropError:
        assert name in ("archive", "packforcing-lm"), "nothing depends on the queries that go"
        return
    assert_same_future(cache, kept, setting.tokens, [1, 2, 1, 4], 18)


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        pytest.param(21, "it holds 20 steps", id="more than there is"),
        pytest.param(-1, "it holds 20 steps", id="less than nothing"),
        pytest.param(5, "have left recent since then", id="what was dropped"),
    ],
)
def test_a_roll_back_that_cannot_be_exact_is_refused_with_the_reason(steps, reason):
    setting = Setting(
        policy=policy("streaming", sink=1, recent=3, block_size=2, chunk_size=20),
        geometry=Geometry(kv_heads=1, head_dim=4),
        rotary=rotary(4),
        seed=0,
    )
    cache = setting.cache()
    go_on(cache, setting.tokens, [10, 10], 0)
    with pytest.raises(CropError, match=reason):
        cache.crop(steps)


@given(data=st.data())
def test_rows_that_parted_ways_are_saved_and_forked_too(data):
    setting = data.draw(settings_of(policies(chunk_size=5) | small_presets(), max_heads=2))
    batch, tokens = setting.geometry.batch, setting.tokens
    valid = (
        torch.arange(9) >= torch.tensor(data.draw(st.lists(st.integers(0, 9), min_size=batch, max_size=batch)))[:, None]
    )
    cache, loaded = setting.cache(), setting.cache()
    layers = [cache.layers[0]]
    now = tokens.part(0, 9)
    list(cache.layers[0].chunks(now.query, now.keys, now.values, PaddingPattern.of(valid)))
    fork = cache.fork()
    with TemporaryDirectory() as folder:
        cache.save(Path(folder) / "saved")
        loaded.load(Path(folder) / "saved")
    layers += [fork.layers[0], loaded.layers[0]]
    later = tokens.part(9, 15)
    runs = []
    for layer in layers:
        chunks = layer.chunks(later.query, later.keys, later.values)
        runs.append([(chunk.rows, copied(chunk.context)) for chunk in chunks])
    for other in runs[1:]:
        for (rows, a), (same_rows, b) in zip(runs[0], other, strict=True):
            assert (rows is None) == (same_rows is None)
            assert rows is None or torch.equal(rows, same_rows)
            assert testing.difference(a, b) is None


@pytest.mark.parametrize("name", ["full", "streaming", "archive", "packforcing-lm"])
@pytest.mark.parametrize("back", [0, 2, "recent"])
def test_what_was_compacted_and_rolled_back_is_saved_too(name, back, tmp_path):
    found = policy(name, **({"reach": 7} if name == "packforcing-lm" else {}))
    recent = None if found.recent is None else 6
    found = attrs.evolve(found, sink=1, recent=recent, block_size=3, chunk_size=4, refresh="chunk")
    setting = Setting(policy=found, geometry=Geometry(kv_heads=2, head_dim=4), rotary=rotary(4), seed=0)
    cache, loaded = setting.cache(), setting.cache()
    go_on(cache, setting.tokens, [4, 4, 4, 1, 1], 0)
    cache.compact(recent=2)
    cache.rewind_recent() if back == "recent" else cache.crop_by(back)
    cache.save(tmp_path / "cache")
    loaded.load(tmp_path / "cache")
    assert_same_future(cache, loaded, setting.tokens, [1, 4, 2], cache.num_steps)


# ---------------------------------------------------------------------- files that are wrong


def saved(folder: Path, **changes):
    setting = Setting(
        policy=policy("archive", **{"sink": 1, "recent": 3, "block_size": 2, "top_k": 1, **changes}),
        geometry=Geometry(kv_heads=2, head_dim=4, batch=2),
        rotary=rotary(4),
        seed=0,
    )
    cache = setting.cache()
    go_on(cache, setting.tokens, [4, 4, 4], 0)
    path = folder / "cache.safetensors"
    cache.save(path, extra={})
    return setting, cache, path


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-17])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def no_safetensors(path: Path) -> None:
    path.write_bytes(b"this is a letter, and no cache")


def one_byte_changed(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


def rewritten(path: Path, change) -> None:
    """Tensors and metadata of the file after `change(tensors, metadata)`, written as a valid safetensors file."""
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


def one_tensor_missing(path: Path) -> None:
    rewritten(path, lambda tensors, _: tensors.pop("0.0.placed.window.planes.values"))


def numbers_changed(path: Path) -> None:
    def change(_, metadata):
        about = json.loads(metadata["about"])
        about["layers"][0][0]["state"]["num_steps"] += 1
        metadata["about"] = json.dumps(about, sort_keys=True)

    rewritten(path, change)


def of_another_program(path: Path) -> None:
    rewritten(path, lambda _, metadata: metadata.clear())


def of_another_version(path: Path) -> None:
    rewritten(path, lambda _, metadata: metadata.update(format="kvtiers-cache-0"))


def header_too_long(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**40) + path.read_bytes()[8:])


def absent(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    "damage",
    [
        truncated,
        emptied,
        no_safetensors,
        one_byte_changed,
        one_tensor_missing,
        numbers_changed,
        of_another_program,
        of_another_version,
        header_too_long,
        absent,
    ],
    ids=lambda damage: damage.__name__,
)
def test_a_damaged_file_is_refused_and_the_cache_stays_as_it_was(damage, tmp_path):
    setting, cache, path = saved(tmp_path)
    cache.load(path)
    before, tier_counts = copied(cache.context(0)), cache.tier_counts()
    damage(path)
    with pytest.raises(SavedCacheError, match=str(path)):
        cache.load(path)
    assert testing.difference(before, cache.context(0)) is None
    assert cache.tier_counts() == tier_counts
    go_on(cache, setting.tokens, [1], 12)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"policy": policy("archive", sink=2, recent=3, block_size=2, top_k=1)}, id="another sink"),
        pytest.param({"policy": policy("streaming")}, id="another preset"),
        pytest.param({"geometry": Geometry(kv_heads=1, head_dim=4)}, id="another number of heads"),
        pytest.param({"geometry": Geometry(kv_heads=2, head_dim=8)}, id="another head size"),
        pytest.param({"geometry": Geometry(kv_heads=2, head_dim=4, dtype=torch.bfloat16)}, id="another dtype"),
    ],
)
def test_the_file_of_another_policy_or_model_is_refused(other, tmp_path):
    setting, _, path = saved(tmp_path)
    cache = attrs.evolve(setting, **other).cache()
    with pytest.raises(SavedCacheError, match=r"saved from another model or policy: .* in the file and"):
        cache.load(path)
    assert cache.num_steps == 0


def test_a_file_of_another_rotation_is_refused_where_keys_are_rotated_here(tmp_path):
    setting, _, path = saved(tmp_path, realigner="contiguous")
    same, other = setting.cache(), attrs.evolve(setting, rotary=rotary(4, layout="interleaved")).cache()
    same.load(path)
    with pytest.raises(SavedCacheError, match=r"saved from another model or policy: .* in the file and"):
        other.load(path)


def test_the_first_difference_is_named(tmp_path):
    _, _, path = saved(tmp_path, recent=3)
    (tmp_path / "other").mkdir()
    other, _, _ = saved(tmp_path / "other", recent=4)
    with pytest.raises(SavedCacheError, match=r"policies\[0\].policy.recent is 3 in the file and 4 here"):
        other.cache().load(path)


def test_a_path_that_leads_nowhere_is_named(tmp_path):
    setting, cache, path = saved(tmp_path)
    with pytest.raises(SavedCacheError, match="give a path in a folder that exists"):
        cache.save(tmp_path / "nowhere" / "cache.safetensors")
    with pytest.raises(SavedCacheError, match="give the path that save"):
        setting.cache().load(path.with_name("nothing.safetensors"))


@pytest.mark.parametrize("method", ["save", "load"])
def test_a_path_that_cannot_be_one_is_named(tmp_path, method):
    _, cache, _ = saved(tmp_path)
    with pytest.raises(SavedCacheError, match=r"x00b' is no path of a file|is no file"):
        getattr(cache, method)(tmp_path / "a\0b")


def test_what_is_no_regular_file_is_not_replaced(tmp_path):
    _, cache, path = saved(tmp_path)
    link = tmp_path / "link"
    link.symlink_to(path)
    for place, what in ((link, "a symbolic link"), (tmp_path, "a folder"), (Path("/dev/null"), "no regular file")):
        with pytest.raises(SavedCacheError, match=rf"is {what}, which would be replaced; give the path of a file$"):
            cache.save(place)


def test_what_json_cannot_hold_is_refused_and_nothing_is_written(tmp_path):
    _, cache, path = saved(tmp_path)
    old = path.read_bytes()
    with pytest.raises(SavedCacheError, match=r"extra must be plain data that JSON can hold: .*object"):
        cache.save(path, extra={"a": object()})
    assert path.read_bytes() == old


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    setting, cache, path = saved(tmp_path)
    old = path.read_bytes()
    go_on(cache, setting.tokens, [2], 12)

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kvtiers.saving.save_file", full_disk)
    with pytest.raises(SavedCacheError, match=r"cannot be written: .*No space left on device; is the disk full\?"):
        cache.save(path)
    assert path.read_bytes() == old
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


WRITES = """
import sys, time
import torch
from kvtiers import saving

def half_of_it(tensors, path, metadata):
    open(path, "wb").write(b"half")
    print("ready", flush=True)
    sys.stdin.read()

saving.save_file = half_of_it
saving.write_file(saving.Path(sys.argv[1]), {}, {})
"""


@pytest.mark.skipif(sys.platform == "win32", reason="files cannot be locked there")
def test_what_a_save_that_was_killed_left_is_removed_by_the_next_and_what_a_living_one_writes_is_not(tmp_path):
    command = [sys.executable, "-c", WRITES, str(tmp_path / "other")]
    path = os.pathsep.join(filter(None, sys.path))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, **pipes) for _ in range(3)]
    try:
        assert [writer.stdout.readline() for writer in writers] == ["ready\n"] * 3
        for writer in writers[:2]:
            writer.kill()
            writer.wait()
        assert len(list(tmp_path.iterdir())) == 3
        saved(tmp_path)
        assert len(list(tmp_path.iterdir())) == 2  # what was saved, and what is being written
        writers[2].communicate("")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["cache.safetensors", "other"]
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()


def test_threads_save_and_load_in_one_folder_and_find_whole_files(tmp_path):
    setting, cache, path = saved(tmp_path)
    whole = copied(cache.context(0)).keys

    def work(own: Path) -> None:
        for _ in range(15):
            cache.save(own, extra={})
            cache.save(path, extra={})
            other = setting.cache()
            other.load(path)
            assert torch.equal(other.context(0).keys, whole)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, tmp_path / f"{number}.safetensors") for number in range(4)]:
            done.result()
    names = {found.name for found in tmp_path.iterdir()}
    assert names == {path.name, *(f"{number}.safetensors" for number in range(4))}


def test_a_saved_file_is_no_pickle_and_keeps_nothing_beside_the_tiers(tmp_path):
    setting, cache, path = saved(tmp_path)
    secret = 12345.0
    window = cache.every_layer()[0].window
    assert window.tail < window.slots
    for plane in window.planes.values():
        plane[:, :, window.tail :] = secret  # spare slots
    cache.save(path)
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            assert not (file.get_tensor(name).double() == secret).any()
    assert setting.cache().load(path) == {}


def test_what_a_layer_watches_is_forked_saved_and_rolled_back_with_it(tmp_path):
    """The latest queries, and what attention every token got."""
    found = policy("archive", retriever="recency", sink=0, recent=4, block_size=2, top_k=1, attend="compressed")
    found = attrs.evolve(found, compressor=build("compressor", ("top-tokens", {"by": "attention", "window": 3})))
    setting = Setting(policy=found, geometry=Geometry(kv_heads=1, head_dim=4), rotary=rotary(4), seed=0)
    cache, loaded = setting.cache(), setting.cache()
    go_on(cache, setting.tokens, [4, 4, 4], 0)
    latest = cache.every_layer()[0].watched.latest
    assert torch.equal(latest, setting.tokens.query[:, :, 9:12])
    cache.save(tmp_path / "cache")
    loaded.load(tmp_path / "cache")
    for other in (loaded, cache.fork()):
        held = other.every_layer()[0].watched.latest
        assert torch.equal(held, latest)
        assert held.data_ptr() != latest.data_ptr()
        assert_same_future(other, cache.fork(), setting.tokens, [4, 1], 12)


@attrs.frozen
class Weighed(Compressor):
    """Values times the attention that their tokens got."""

    @property
    def attention(self):
        return "sum"

    def age(self, blocks, moment):
        weights = blocks.attention.mean(1, keepdim=True)[..., None]
        return attrs.evolve(blocks, values=blocks.values * weights, attention=None)

    def compressed_tokens(self, tokens):
        return tokens


def test_a_roll_back_by_nothing_forgets_nothing():
    """Not even what attention the current tokens gave."""
    found = policy("archive", retriever="recency", sink=0, recent=2, block_size=1, top_k=3, attend="compressed")
    setting = Setting(
        policy=attrs.evolve(found, compressor=Weighed()),
        geometry=Geometry(kv_heads=1, head_dim=4),
        rotary=rotary(4),
        seed=0,
    )
    cache, untouched = setting.cache(), setting.cache()
    for one in (cache, untouched):
        go_on(one, setting.tokens, [2, 1, 1], 0)
    cache.crop(4)
    cache.crop_by(0)
    assert_same_future(cache, untouched, setting.tokens, [1, 1, 2], 4)


def test_a_loaded_cache_does_not_look_at_its_file_again(tmp_path):
    setting, cache, path = saved(tmp_path)
    loaded = setting.cache()
    loaded.load(path)
    path.write_bytes(b"")  # a mapped file would take the process down with it
    assert_same_future(cache, loaded, setting.tokens, [1, 4], 12)
