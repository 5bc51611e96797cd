"""Which training process this is, by torch.distributed, by environment variables, or as it is told."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from wds_tools.errors import UsageError

_LAUNCHERS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""Where srun, Open MPI's mpirun and MPICH's say how many processes they have started."""


@dataclass(frozen=True, kw_only=True)
class World:
    """Which of the training processes this one is: of all that is read, it gets the part of its rank."""

    rank: int = 0
    """Number of this process, 0 ... world_size - 1."""
    world_size: int = 1
    """Number of training processes."""
    is_detected: bool = field(default=False, compare=False, repr=False)
    """Whether it was detected: then torch.distributed has to say the same at the first batch."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise UsageError(f"rank={self.rank} is not in 0 ... world_size - 1 = {self.world_size - 1}")

    def __getstate__(self) -> dict[str, Any]:
        self.check()  # before it goes to a worker process, which may not know of torch.distributed
        return self.__dict__

    @classmethod
    def detect(cls, environment: Mapping[str, str] | None = None) -> Self:
        """From torch.distributed where it is initialized, else from RANK and WORLD_SIZE (torchrun), else one process.

        Args:
            environment: variables to look at in place of torch.distributed and this process's environment.

        Raises:
            UsageError: RANK or WORLD_SIZE is set alone or is not a number; or neither is set, and Slurm or MPI started several
                processes.
        """
        import torch.distributed as dist

        if environment is None and dist.is_available() and dist.is_initialized():
            return cls(rank=dist.get_rank(), world_size=dist.get_world_size(), is_detected=True)
        variables = os.environ if environment is None else environment
        rank, world_size = variables.get("RANK"), variables.get("WORLD_SIZE")
        if rank is None and world_size is None:
            if started := [f"{name}={variables[name]}" for name in _LAUNCHERS if variables.get(name, "1") != "1"]:
                raise UsageError(
                    f"{', '.join(started)} without RANK: is this one of several training processes, or the only one? Say it with "
                    "World(rank=..., world_size=...), World(rank=0, world_size=1) for the only one; or set RANK and WORLD_SIZE"
                )
            return cls(is_detected=True)
        if rank is None or world_size is None or not rank.isdigit() or not world_size.isdigit():
            raise UsageError(f"RANK={rank!r}, WORLD_SIZE={world_size!r}: expected two numbers, as torchrun sets them")
        return cls(rank=int(rank), world_size=int(world_size), is_detected=True)

    @classmethod
    def of(cls, rank: int | None, world_size: int | None) -> Self:
        """The world that is named, or, if neither number is given, the one that is detected.

        Args:
            rank: number of this process.
            world_size: number of training processes.

        Raises:
            UsageError: one is given without the other, or see `detect`.
        """
        if rank is None and world_size is None:
            return cls.detect()
        if rank is None or world_size is None:
            raise UsageError(f"rank={rank}, world_size={world_size}: give both, or neither to have them detected")
        return cls(rank=rank, world_size=world_size)

    def check(self) -> None:
        """Compare what was detected with torch.distributed, without communication; to be called before the first batch.

        Raises:
            UsageError: they differ: the process group came later, so that ranks would read what others read too.
        """
        import torch.distributed as dist

        if not self.is_detected or not dist.is_available() or not dist.is_initialized():
            return
        now = World(rank=dist.get_rank(), world_size=dist.get_world_size())
        if now != self:
            raise UsageError(
                f"this loader was made as rank {self.rank} of {self.world_size}, torch.distributed says rank {now.rank} of "
                f"{now.world_size}: make it after init_process_group, or give it World(rank={now.rank}, world_size="
                f"{now.world_size}); World(rank={self.rank}, world_size={self.world_size}) to read so on purpose"
            )


def ranks_of_machine() -> int:
    """Training processes on this machine, by LOCAL_WORLD_SIZE (torchrun); 1 where it is not set."""
    return max(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)
