"""Put the models of several runs together in one folder, in float16, as `kvtiers demo video --weights` reads them.

`python -m kvtiers_packforcing.tiny_world.gather --autoencoder RUN/export --student RUN/export weights`. Of the
configurations, what says where a model lay is left out. Weights beyond the range of float16 are refused. Of several
students, such as a run and the one that went on from it, the mean of their weights is taken.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvtiers.errors import KVTiersError
from kvtiers_packforcing.tiny_world.weights import (
    CONFIG,
    PARTS,
    SAMPLER,
    TENSORS,
    WeightsError,
    check_weights,
    write_sums,
)


def gather(autoencoder: Path, students: Sequence[Path], into: Path) -> None:
    """Write `into`. students: what stage `student` or `distill` exported; the configurations are those of the first.

    Raises `WeightsError`; see `check_weights`.
    """
    if into.resolve() in (autoencoder.resolve(), *(student.resolve() for student in students)):
        raise WeightsError(f"{into} is what is read; give another folder to write to")
    made: dict[str, tuple[str, dict[str, Tensor]]] = {}
    for part in PARTS:
        folders = [autoencoder] if part == "autoencoder" else [student / part for student in students]
        folder = folders[0]
        for each in folders:
            for name in (CONFIG, TENSORS):
                if not (each / name).is_file():
                    raise WeightsError(f"{each} lacks {name}; give the export folders of two runs")
        halves = {
            name: tensor.half() for name, tensor in _mean([load_file(each / TENSORS) for each in folders]).items()
        }
        if unfit := [name for name, tensor in halves.items() if not torch.isfinite(tensor).all()]:
            raise WeightsError(f"{folder}: float16 cannot hold {', '.join(unfit[:3])}")
        said = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        said.pop("_name_or_path", None)
        made[part] = json.dumps(said, indent=2) + "\n", halves
    for part, (config, halves) in made.items():
        (into / part).mkdir(parents=True, exist_ok=True)
        (into / part / CONFIG).write_text(config, encoding="utf-8")
        save_file(halves, into / part / TENSORS, {"format": "pt"})
        (into / part / TENSORS).chmod(0o644)  # safetensors lets nobody else read what it writes
    (into / SAMPLER).unlink(missing_ok=True)
    if (students[0] / SAMPLER).is_file():
        shutil.copyfile(students[0] / SAMPLER, into / SAMPLER)
    write_sums(into)
    check_weights(into)


def _mean(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    shapes = [{name: tensor.shape for name, tensor in part.items()} for part in parts]
    if any(each != shapes[0] for each in shapes):
        raise WeightsError("the students are of different sizes, so their weights have no mean; give one of them")
    return {name: torch.stack([part[name].float() for part in parts]).mean(0) for name in parts[0]}


@click.command()
@click.option("--autoencoder", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.option(
    "--student",
    "students",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    required=True,
    multiple=True,
    help="Of several, the mean is taken.",
)
@click.argument("into", type=click.Path(path_type=Path, file_okay=False))
def main(autoencoder: Path, students: tuple[Path, ...], into: Path) -> None:
    """Put the models of two runs together in the folder INTO, in float16."""
    try:
        gather(autoencoder, students, into)
    except (KVTiersError, OSError, SafetensorError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    size = sum(path.stat().st_size for path in into.rglob("*") if path.is_file())
    click.echo(f"{into}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
