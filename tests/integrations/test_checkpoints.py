"""Checkpoints in several files, under other prefixes, and for models whose weights are kept elsewhere."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="needs the extra 'diffusers'")

import accelerate
import torch
from safetensors.torch import load_file, save_file

from kvtiers import UnsupportedModelError
from kvtiers_diffusers import load_causal_checkpoint
from tiny_wan import GOLDENS, blocks, build, golden, prompt

CPU = torch.device("cpu")


def empty() -> Any:
    """A model of the shape of the published code's rollouts, with weights of its own."""
    return build(heads=2, head_dim=48, text_dim=32, freq_dim=64, ffn_dim=192, seed=1)


def is_loaded(model: Any) -> bool:
    """Whether a forward of `model` is that of the published weights."""
    wanted, clip = golden("full").model, blocks(1)[0]
    with torch.no_grad():
        flows = [one(clip, torch.tensor([500.0]), prompt(), return_dict=False)[0] for one in (model, wanted)]
    return torch.equal(*flows)


@pytest.mark.parametrize("prefix", ["diffusion_model.", "model.diffusion_model.", "module.model."])
def test_prefixes_of_other_programs_are_understood(prefix: str, tmp_path: Path) -> None:
    found = load_file(GOLDENS / "causal_wan_full.safetensors")
    start = "weights.model."
    weights = {prefix + key.removeprefix(start): part for key, part in found.items() if key.startswith(start)}
    save_file(weights, tmp_path / "model.safetensors")
    model = empty()
    load_causal_checkpoint(model, tmp_path / "model.safetensors")
    assert is_loaded(model)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """What `save_pretrained` writes of a large model: several files and an index."""
    folder = tmp_path / "shards"
    golden("full").model.save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def test_a_checkpoint_of_several_files_is_read_by_its_index_or_its_folder(shards: Path) -> None:
    for path in (shards, next(shards.glob("*.index.json"))):
        model = empty()
        load_causal_checkpoint(model, path)
        assert is_loaded(model)


def test_a_folder_with_one_file_is_that_file_and_a_compiled_model_is_loaded_too(tmp_path: Path) -> None:
    save_file(golden("full").model.state_dict(), tmp_path / "model.safetensors")
    model = empty()
    load_causal_checkpoint(torch.compile(model, backend="eager"), tmp_path)
    assert is_loaded(model)


def _index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        path = next(folder.glob("*.index.json"))
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return write


def _lose(folder: Path) -> None:
    min(folder.glob("*.safetensors")).unlink()


def _misplace(places: dict[str, str]) -> None:
    first, last = min(places.values()), max(places.values())
    places.update({key: first for key, name in places.items() if name == last})


def _spoil(folder: Path) -> None:
    next(folder.glob("*.index.json")).write_text("{}")


def _second(folder: Path) -> None:
    (folder / "second.index.json").write_text("{}")


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(_lose, "names 1 files that are not there: .*00001-of", id="a file is lost"),
        pytest.param(_index(_misplace), "are not in the files that .* names for them", id="names in another file"),
        pytest.param(_index(lambda places: places.popitem()), "1 missing: ", id="a name is lost"),
        pytest.param(
            _index(lambda places: places.update(more="../x.safetensors")), "must lie beside it", id="a file elsewhere"
        ),
        pytest.param(_spoil, "cannot be read as the index", id="no index"),
        pytest.param(_second, "holds 2 files .*index.json", id="two indices"),
        pytest.param(_clear, "holds no .index.json, .safetensors or .pt", id="nothing"),
    ],
)
def test_a_checkpoint_of_several_files_that_is_not_whole_is_refused_and_changes_nothing(
    change: Callable[[Path], object], message: str, shards: Path
) -> None:
    model = empty()
    before = {name: part.clone() for name, part in model.state_dict().items()}
    change(shards)
    with pytest.raises(UnsupportedModelError, match=message):
        load_causal_checkpoint(model, shards)
    assert all(torch.equal(part, before[name]) for name, part in model.state_dict().items())


# ---------------------------------------------------------------- weights that are kept elsewhere


def _grouped(kind: str, disk: str | None = None) -> Callable[[Any, Path], object]:
    def offload(model: Any, folder: Path) -> None:
        more = {} if disk is None else {"offload_to_disk_path": str(folder / disk)}
        model.enable_group_offload(CPU, CPU, offload_type=kind, num_blocks_per_group=1, **more)

    return offload


@pytest.mark.parametrize(
    ("offload", "message"),
    [
        pytest.param(
            lambda model, _: accelerate.cpu_offload(model, CPU), "are kept elsewhere .accelerate's offload", id="layers"
        ),
        pytest.param(
            lambda model, folder: accelerate.disk_offload(model, str(folder / "kept"), CPU),
            "are kept elsewhere",
            id="layers from disk",
        ),
        pytest.param(_grouped("block_level", "kept"), "reads them from files on disk", id="groups of blocks from disk"),
        pytest.param(_grouped("leaf_level", "kept"), "reads them from files on disk", id="groups of leaves from disk"),
    ],
)
def test_weights_that_would_not_be_read_are_not_written(
    offload: Callable[[Any, Path], object], message: str, tmp_path: Path
) -> None:
    save_file(golden("full").model.state_dict(), tmp_path / "model.safetensors")
    model, clip, flows = empty(), blocks(1)[0], []
    (tmp_path / "kept").mkdir()
    for step in range(2):
        if step:
            offload(model, tmp_path)
            with pytest.raises(
                UnsupportedModelError, match=f"would not be those that it runs with: .*{message}.*first"
            ):
                load_causal_checkpoint(model, tmp_path / "model.safetensors")
        with torch.no_grad():
            flows.append(model(clip, torch.tensor([500.0]), prompt(), return_dict=False)[0])
    assert torch.equal(*flows)


@pytest.mark.parametrize(
    "offload",
    [
        pytest.param(lambda model, _: accelerate.cpu_offload_with_hook(model, CPU), id="whole models"),
        pytest.param(_grouped("block_level"), id="groups of blocks"),
        pytest.param(_grouped("leaf_level"), id="groups of leaves"),
    ],
)
def test_weights_that_are_only_moved_are_written_and_read(
    offload: Callable[[Any, Path], object], tmp_path: Path
) -> None:
    save_file(golden("full").model.state_dict(), tmp_path / "model.safetensors")
    model = empty()
    offload(model, tmp_path)
    load_causal_checkpoint(model, tmp_path / "model.safetensors")
    assert is_loaded(model)


@pytest.mark.parametrize("kind", [torch.int8, torch.int64, torch.bool])
def test_weights_that_are_whole_numbers_are_refused_and_change_nothing(kind: torch.dtype, tmp_path: Path) -> None:
    model = build()
    before = {key: part.clone() for key, part in model.state_dict().items()}
    save_file({key: part.to(kind) for key, part in before.items()}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"holds whole numbers \(\w+\) for \d+ weights: .* quantised"):
        load_causal_checkpoint(model, tmp_path / "model.safetensors")
    assert all(torch.equal(part, before[key]) for key, part in model.state_dict().items())


@pytest.mark.usefixtures("_shapes_go_unchecked")
@pytest.mark.parametrize("path", ["y" * 300, None], ids=["too long", "None"])
def test_what_names_no_checkpoint_is_refused(path: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"cannot be read as a checkpoint|named by a text or a Path"):
        load_causal_checkpoint(build(), path)
