"""How a run computes: in which precision, and whether layers are compiled or run again for their gradients."""

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.compiler.config as compiler

from kvtiers_packforcing.training.config import RunConfig, TrainingConfig

_COMPILED = 64
"""The most versions that the compiler makes of a layer; beyond its own limit, 8, it leaves layers as they are."""


@contextmanager
def mixed(run: RunConfig, device: torch.device) -> Iterator[None]:
    """Inside of the block, matrix products are computed in the run's precision. Weights and sums stay in float32."""
    if run.precision == "float32":
        yield
        return
    with torch.autocast(device.type, torch.bfloat16), warnings.catch_warnings():
        # torch's RMSNorm would like weights and input of one dtype, for a faster kernel
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        yield


def prepare(transformer: Any, run: RunConfig) -> None:
    """Let the layers of a transformer be compiled when they first run, or be run again for their gradients."""
    if run.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if run.compile:
        # the layers share their code, and the first, the last and those between are compiled for every layout
        compiler.recompile_limit = max(compiler.recompile_limit, _COMPILED)
        for block in transformer.blocks:
            block.compile(dynamic=False)


def slow_bfloat16(config: TrainingConfig, device: torch.device) -> str | None:
    """What to change if the run computes in bfloat16 on a CPU that only imitates it; None if all is well."""
    muon, products = config.optimiser.matrices == "muon", config.run.precision == "bfloat16"
    if device.type != "cpu" or not (muon or products) or (times := _bfloat16_times()) < 2:
        return None
    changes = ['precision = "float32"'] * products + ['matrices = "adamw"'] * muon
    return (
        f"on this CPU a matrix product in bfloat16 takes {times:.0f} times as long as in float32; "
        f"{' and '.join(changes)} would do without"
    )


def _bfloat16_times(size: int = 384) -> float:
    """How many times as long as in float32 a matrix product takes on this CPU: the quickest of three."""
    taken = []
    for dtype in (torch.float32, torch.bfloat16):
        matrix, each = torch.ones(size, size, dtype=dtype), []
        for _ in range(3):
            began = time.perf_counter()
            matrix @ matrix
            each.append(time.perf_counter() - began)
        taken.append(min(each))
    return taken[1] / taken[0]


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside of the block, compiled layers run as they were written: for shapes that come up now and then."""
    with torch.compiler.set_stance("force_eager"):
        yield
