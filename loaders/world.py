"""Which of the processes that read different data this one is: by torch.distributed, by the environment, or as it is told.

A world counts data-parallel readers. Tensor-, pipeline- and context-parallel peers of a process read the same: `from_mesh` and
`from_group` give them the same rank. Only a world that was made of a group communicates.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.distributed as dist

from wds_tools.errors import UsageError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

_LAUNCHERS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""Where srun, Open MPI's mpirun and MPICH's say how many processes they have started."""


@dataclass(frozen=True, kw_only=True)
class World:
    """Which of the data-parallel processes this one is. It reads the part of its rank."""

    rank: int = 0
    """Number of this process among those that read different data, 0 ... world_size - 1."""
    world_size: int = 1
    """Number of processes that read different data."""
    is_detected: bool = field(default=False, compare=False, repr=False)
    """Whether it was detected; then torch.distributed must agree at the first batch."""
    group: Any = field(default=None, compare=False, repr=False)
    """gloo process group over its processes, or these and their peers, if made from a group or mesh. None: processes communicate
    only in `gather_state`."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise UsageError(f"rank={self.rank} is not in 0 ... world_size - 1 = {self.world_size - 1}")

    def __getstate__(self) -> dict[str, Any]:
        self.check()  # before it goes to a worker process, which may not know of torch.distributed
        return {**self.__dict__, "group": None}

    @classmethod
    def detect(cls, environment: Mapping[str, str] | None = None) -> Self:
        """From torch.distributed where it is initialized, else from RANK and WORLD_SIZE (torchrun), else one process.

        Args:
            environment: variables to use instead of torch.distributed and this process's environment.

        Raises:
            UsageError: RANK or WORLD_SIZE is set alone or is not a number; or neither is set, and Slurm or MPI started several
                processes.
        """
        if environment is None and dist.is_available() and dist.is_initialized():
            return cls(rank=dist.get_rank(), world_size=dist.get_world_size(), is_detected=True)
        variables = os.environ if environment is None else environment
        rank, world_size = variables.get("RANK"), variables.get("WORLD_SIZE")
        if rank is None and variables.get("LOCAL_RANK") and world_size:
            raise UsageError(
                f"LOCAL_RANK={variables['LOCAL_RANK']}, WORLD_SIZE={world_size} without RANK, as Lightning starts its processes: "
                "make the loader where torch.distributed is initialized, in train_dataloader() of the module or data module"
            )
        if rank is None and world_size is None:
            if started := [f"{name}={variables[name]}" for name in _LAUNCHERS if variables.get(name, "1") != "1"]:
                raise UsageError(
                    f"{', '.join(started)} without RANK: is this one of several training processes, or the only one? Say it with "
                    "World.from_slurm() under srun, World(rank=..., world_size=...) under another launcher, World() for the only "
                    "one; or set RANK and WORLD_SIZE"
                )
            return cls(is_detected=True)
        if rank is None or world_size is None or not rank.isdigit() or not world_size.isdigit():
            raise UsageError(f"RANK={rank!r}, WORLD_SIZE={world_size!r}: expected two numbers, as torchrun sets them")
        return cls(rank=int(rank), world_size=int(world_size), is_detected=True)

    @classmethod
    def from_slurm(cls, environment: Mapping[str, str] | None = None) -> Self:
        """A process that srun started, by SLURM_PROCID and SLURM_NTASKS. It is not guessed: a shell of sbatch has them as well.

        Args:
            environment: variables to look at in place of this process's.

        Raises:
            UsageError: they are not set, or no numbers.
        """
        variables = os.environ if environment is None else environment
        rank, world_size = variables.get("SLURM_PROCID", ""), variables.get("SLURM_NTASKS", "")
        if not (rank.isdigit() and world_size.isdigit()):
            raise UsageError(
                f"SLURM_PROCID={rank!r}, SLURM_NTASKS={world_size!r}: expected two numbers; was this started by srun?"
            )
        return cls(rank=int(rank), world_size=int(world_size), is_detected=True)

    @classmethod
    def from_group(cls, group: ProcessGroup) -> Self:
        """The rank in a process group whose members read different data. All of its members, and no others, must call this.

        Args:
            group: the data-parallel group, with any backend; for Megatron-Core `parallel_state.get_data_parallel_group()`.

        Raises:
            UsageError: this process is not a member.
        """
        return cls._of_members(dist.get_process_group_ranks(group))

    @classmethod
    def from_mesh(cls, mesh: DeviceMesh) -> Self:
        """The rank in the data-parallel dimensions of a mesh. Every process of the mesh must call this.

        Args:
            mesh: a mesh of only those dimensions: `mesh["dp"]`, `mesh["dp_replicate", "dp_shard"]`.

        Raises:
            UsageError: this process is not in it.
        """
        return cls._of_members(mesh.mesh.flatten().tolist())

    @classmethod
    def _of_members(cls, members: list[int]) -> Self:
        if dist.get_rank() not in members:
            raise UsageError(f"process {dist.get_rank()} of {dist.get_world_size()} is not among {members}, which read")
        group = dist.new_group(members, backend="gloo", use_local_synchronization=True)
        return cls(rank=members.index(dist.get_rank()), world_size=len(members), group=group)

    @classmethod
    def of(cls, rank: int | None, world_size: int | None) -> Self:
        """The given world, or the detected one if neither number is given.

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
        """Compare a detected world with torch.distributed, without communication; called before the first batch.

        Raises:
            UsageError: they differ, since the process group was made later; ranks would read the same data.
        """
        if not self.is_detected or not dist.is_available() or not dist.is_initialized():
            return
        now = World(rank=dist.get_rank(), world_size=dist.get_world_size())
        if now != self:
            raise UsageError(
                f"this loader was made as rank {self.rank} of {self.world_size}, torch.distributed says rank {now.rank} of "
                f"{now.world_size}: make it after init_process_group, or give it World(rank={now.rank}, world_size="
                f"{now.world_size}); World(rank={self.rank}, world_size={self.world_size}) to read so on purpose"
            )

    def gather(self, value: bytes) -> list[bytes]:
        """Gather a value from each process of the group on all of them. All must call this.

        Args:
            value: what this process gives.

        Returns:
            The values, in the order of ranks.

        Raises:
            UsageError: there is no group, and torch.distributed is not initialized or has other processes than this world.
        """
        if self.group is None and self.world_size == 1:
            return [value]
        num_processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if self.group is None and num_processes != self.world_size:
            raise UsageError(
                f"this world has {self.world_size} ranks, torch.distributed {num_processes} processes: init_process_group, or "
                "make it with World.from_group(group) or World.from_mesh(mesh), so that those who read can speak with each other"
            )
        device = "cuda" if dist.get_backend(self.group) == "nccl" else "cpu"
        sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(sizes, torch.tensor([len(value)], device=device), group=self.group)
        sent = torch.zeros(max(int(size) for size in sizes), dtype=torch.uint8)
        sent[: len(value)] = torch.frombuffer(bytearray(value), dtype=torch.uint8)
        received = [torch.zeros(len(sent), dtype=torch.uint8, device=device) for _ in sizes]
        dist.all_gather(received, sent.to(device), group=self.group)
        return [padded[: int(size)].cpu().numpy().tobytes() for padded, size in zip(received, sizes, strict=True)]

    def compare(self, facts: Mapping[str, object]) -> None:
        """Compare facts that must be equal on all ranks. All must call this.

        Args:
            facts: values that must be equal, by name; anything that JSON can hold.

        Raises:
            UsageError: they differ; says which, and how. Or see `gather`.
        """
        mine = {name: json.dumps(value) for name, value in facts.items()}
        for rank, data in enumerate(self.gather(json.dumps(mine).encode())):
            others = json.loads(data)
            for name, value in mine.items():
                if others.get(name) != value:
                    raise UsageError(
                        f"ranks {self.rank} and {rank} differ in {name}: {value[:200]} and {str(others.get(name))[:200]}; all "
                        "must read the same data, with the same settings, from the same state"
                    )


def ranks_of_machine() -> int:
    """Training processes on this machine, by LOCAL_WORLD_SIZE (torchrun); 1 where it is not set."""
    return max(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)
