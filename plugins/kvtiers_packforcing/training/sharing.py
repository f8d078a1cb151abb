"""Several processes that share every step: each takes some of its clips, and gradients are averaged.

`accelerate launch --multi_gpu --num_processes 8 -m kvtiers_packforcing.training CONFIG.toml` starts them on GPUs, and
`torchrun --nproc-per-node 2 -m ...` on CPUs, where accelerate needs MPI for several processes. Both set the same
variables. On CPUs two processes of one thread are faster than one process of two.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import attrs
import torch
from torch import Tensor, distributed

from kvtiers_packforcing.training.config import TrainingConfig, TrainingConfigError


@attrs.frozen(kw_only=True)
class Share:
    """The part that this process has of every step. `world` is the number of processes."""

    rank: int = 0
    world: int = 1

    def check(self, config: TrainingConfig) -> None:
        """Raise `TrainingConfigError` if the processes cannot share a phase's clips evenly."""
        for nth, phase in enumerate(config.phases, 1):
            if phase.clips % self.world:
                raise TrainingConfigError(
                    f"[[phases]] number {nth}: {self.world} processes cannot share {phase.clips} clips evenly; choose "
                    f"a multiple of {self.world}"
                )

    def numbers(self, clips: int) -> range:
        """Which clips of a step are this process's."""
        return range(self.rank, clips, self.world)

    @property
    def writes(self) -> bool:
        """Whether this process writes files: one does."""
        return self.rank == 0

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Put the mean over all processes into each tensor, in one exchange."""
        parts = list(tensors)
        if self.world > 1 and parts:
            flat = torch.cat([part.flatten() for part in parts])
            distributed.all_reduce(flat)
            for part, mean in zip(parts, (flat / self.world).split([part.numel() for part in parts]), strict=True):
                part.copy_(mean.view_as(part))

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.world > 1:
            distributed.barrier()


def once(action: Callable[[], object]) -> None:
    """Let one process do something, such as write a file, while the others wait for it."""
    together = distributed.is_initialized()
    if not together or distributed.get_rank() == 0:
        action()
    if together:
        distributed.barrier()


@contextmanager
def joined(variables: Mapping[str, str] = os.environ) -> Iterator[Share]:
    """Join the processes that a launcher started, if one did, and leave them at the end."""
    world = int(variables.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Share()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(variables.get("LOCAL_RANK", "0")))
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield Share(rank=distributed.get_rank(), world=world)
    finally:
        distributed.destroy_process_group()
