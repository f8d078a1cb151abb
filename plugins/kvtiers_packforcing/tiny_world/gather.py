"""Put the models of several runs together in one folder, in float16, as `kvtiers demo video --weights` reads them.

`python -m kvtiers_packforcing.tiny_world.gather --autoencoder RUN/export --student RUN/export weights`. Of the
configurations, what says where a model lay is left out. Weights beyond the range of float16 are refused.
"""

import json
import shutil
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


def gather(autoencoder: Path, student: Path, into: Path) -> None:
    """Write `into`. student: what stage `student` or `distill` exported. Raises `WeightsError`; see `check_weights`."""
    if into.resolve() in (autoencoder.resolve(), student.resolve()):
        raise WeightsError(f"{into} is what is read; give another folder to write to")
    made: dict[str, tuple[str, dict[str, Tensor]]] = {}
    for part in PARTS:
        folder = autoencoder if part == "autoencoder" else student / part
        for name in (CONFIG, TENSORS):
            if not (folder / name).is_file():
                raise WeightsError(f"{folder} lacks {name}; give the export folders of two runs")
        halves = {name: tensor.half().clone() for name, tensor in load_file(folder / TENSORS).items()}
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
    if (student / SAMPLER).is_file():
        shutil.copyfile(student / SAMPLER, into / SAMPLER)
    write_sums(into)
    check_weights(into)


@click.command()
@click.option("--autoencoder", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.option("--student", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.argument("into", type=click.Path(path_type=Path, file_okay=False))
def main(autoencoder: Path, student: Path, into: Path) -> None:
    """Put the models of two runs together in the folder INTO, in float16."""
    try:
        gather(autoencoder, student, into)
    except (KVTiersError, OSError, SafetensorError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    size = sum(path.stat().st_size for path in into.rglob("*") if path.is_file())
    click.echo(f"{into}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
