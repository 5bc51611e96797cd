"""What to stream (`LoaderConfig` of `Source`s), and where this process stands (`World`). Values, checked when they are made."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal, Self

from wds_tools.errors import UsageError
from wds_tools.sequences.config import SequenceConfig

LastBatch = Literal["drop", "short", "wrap"]
_LAUNCHERS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""Where srun, Open MPI's mpirun and MPICH's say how many processes they have started."""


@dataclass(frozen=True)
class Source:
    """A dataset and its part in the mixture. `Source("s3://bucket/pairs", weight=0.7)`."""

    url: str
    """Directory or URL of the dataset."""
    _: KW_ONLY
    weight: float | None = None
    """Its share, relative to the other sources'. None for all: every sample of every source once an epoch."""
    repeat: int = 1
    """How often it is seen in an epoch: without weights, exactly; with weights, it counts as seen after so many times."""
    max_samples: int | None = None
    """Use this many of its samples, the same in every epoch."""
    fraction: float | None = None
    """The same as a share of its samples, above 0 and up to 1."""
    name: str | None = None
    """What `__source__` says; by default the URL."""
    codes: str | None = None
    """Name of the codes to read, where its samples have several (`wds-tools encode --codes`); by default the first they have."""

    def __post_init__(self) -> None:
        weight, repeat, max_samples, fraction = self.weight, self.repeat, self.max_samples, self.fraction
        where = f"source {self.url}"
        if not isinstance(self.url, str):
            raise UsageError(f"{where}: a {type(self.url).__name__}, expected a string: a folder or URL")
        _check_ints(where, repeat=repeat, max_samples=max_samples)
        if weight is not None and not 0 <= weight < float("inf"):
            raise UsageError(f"{where}: weight={weight}, expected a number of 0 or more")
        if repeat < 1:
            raise UsageError(f"{where}: repeat={repeat}, expected 1 or more")
        if max_samples is not None and max_samples < 1:
            raise UsageError(f"{where}: max_samples={max_samples}, expected 1 or more")
        if fraction is not None and not 0 < fraction <= 1:
            raise UsageError(f"{where}: fraction={fraction} is not above 0 and up to 1")
        if fraction is not None and max_samples is not None:
            raise UsageError(f"{where}: give max_samples or fraction, not both")


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """A training stream."""

    sources: tuple[Source, ...]
    """One or more. Either all have a weight or none has."""
    batch_size: int
    """Samples of a batch over all ranks."""
    seed: int = 42
    """Of the order; 0 ... 2**64 - 1."""
    shuffle: bool = True
    """False: the order of the manifest, for evaluation. One source or several without weights."""
    last_batch: LastBatch = "drop"
    """What becomes of an epoch's last samples, fewer than a batch: `drop` leaves them out (and counts them), `short` gives a
    smaller batch (or, if they are fewer than the ranks, a larger one before), `wrap` fills up from the beginning of the next
    epoch. Every rank takes the same number of steps, and no batch is empty."""
    length: int | Literal["first", "last"] = "first"
    """With weights, where an epoch ends: at a number of samples, or when the first or the last source has been seen in full."""
    schedule: tuple[tuple[int, tuple[float, ...]], ...] = ()
    """Changes of the weights: (from this step of the whole training, weights in the order of the sources). A step is a batch
    of the run's first batch size."""
    num_workers: int = 0
    """Processes that read for this rank; 0: this one reads."""
    prefetch_factor: int = 4
    """Batches that each worker prepares ahead."""
    start_method: Literal["fork", "spawn", "forkserver"] | None = None
    """How workers are started; None: as torch does."""
    lanes: int | None = None
    """Parts of the data that are read side by side; None: 8 x the batch size of the run's first start (docs/order.md)."""
    memory_bytes: int = 2 << 30
    """What one process may keep of the data that it has read. Less costs more requests, never another order."""
    cache_dir: str | None = None
    """A folder on a local disk that keeps what was fetched from object storage, for all processes and runs."""
    cache_bytes: int = 100 << 30
    """Size limit of that folder."""
    check_crc: bool = False
    """Compare every sample's bytes with the CRC-32 of the index."""
    sequences: SequenceConfig | None = None
    """Batches of token rows instead of texts and codes: how they are made. None: as stored; shards of `wds-tools pack` give token
    rows by themselves."""
    packing: bool = False
    """With sequences: pack rows of exactly max_length on the fly. batch_size counts rows, and there is no end: see
    docs/training.md."""
    on_error: Literal["raise", "substitute"] = "raise"
    """An unreadable sample stops the run, or is replaced by the next readable one of its shard, counted and reported."""
    max_bad: int = 100
    """With substitute: more unreadable samples than this, on one rank, stop the run."""

    def __post_init__(self) -> None:
        sources = self.sources if isinstance(self.sources, tuple | list) else ()
        if not sources or not all(isinstance(source, Source) for source in sources):
            raise UsageError(f"sources={self.sources!r}: expected a tuple of one or more Source(...)")
        counts = ("batch_size", "seed", "lanes", "num_workers", "prefetch_factor", "max_bad")
        _check_ints("a loader", **{name: getattr(self, name) for name in counts})
        if self.batch_size < 1:
            raise UsageError(f"batch_size={self.batch_size}, expected 1 or more")
        if not 0 <= self.seed < 1 << 64:
            raise UsageError(f"seed={self.seed} is not in 0 ... 2**64 - 1")
        if self.last_batch not in ("drop", "short", "wrap"):
            raise UsageError(f"last_batch={self.last_batch!r} is not drop, short or wrap")
        if self.on_error not in ("raise", "substitute"):
            raise UsageError(f"on_error={self.on_error!r} is not raise or substitute")
        if self.num_workers < 0 or self.prefetch_factor < 1 or self.memory_bytes < 1 or self.max_bad < 0 or self.cache_bytes < 1:
            raise UsageError("num_workers, max_bad: 0 or more; prefetch_factor, memory_bytes, cache_bytes: 1 or more")
        if self.lanes is not None and not 1 <= self.lanes < 1 << 31:
            raise UsageError(f"lanes={self.lanes} is not in 1 ... 2**31 - 1")
        if self.packing and self.sequences is None:
            raise UsageError("packing=True packs token rows: give sequences=SequenceConfig(...) too")
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise UsageError("some sources have a weight and some have none: give every one a weight, or none")
        if not any(weighted) and self.schedule:
            raise UsageError("a schedule of weights needs a weight for every source")
        if not any(weighted) and self.length != "first":
            raise UsageError(f"length={self.length!r} is for sources with weights: without, an epoch is every sample once")
        if any(weighted) and not self.shuffle:
            raise UsageError("shuffle=False has no meaning for a mixture with weights")
        if self.length not in ("first", "last") and not (type(self.length) is int and self.length >= 1):
            raise UsageError(f"length={self.length!r}: expected 'first', 'last' or a number of samples")
        for step, weights in self.schedule:
            if step < 1 or len(weights) != len(self.sources):
                raise UsageError(f"schedule entry {(step, weights)}: expected (step of 1 or more, one weight per source)")


@dataclass(frozen=True, kw_only=True)
class World:
    """Which of the training processes this one is."""

    rank: int = 0
    world_size: int = 1
    is_detected: bool = field(default=False, compare=False, repr=False)
    """Nobody named it: what torch.distributed says at the first batch has to be the same."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise UsageError(f"rank={self.rank} is not in 0 ... world_size - 1 = {self.world_size - 1}")

    def __getstate__(self) -> dict[str, Any]:
        self.check()  # before it goes to a worker process, which may not know of torch.distributed
        return self.__dict__

    @classmethod
    def detect(cls, environment: Mapping[str, str] | None = None) -> Self:
        """From torch.distributed where it is initialized, else from RANK and WORLD_SIZE (torchrun), else one process.

        Raises:
            UsageError: RANK or WORLD_SIZE is set alone, or is no number; or neither is, and Slurm or MPI started several
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
        """The one that is named, or, if neither number is given, the one that is detected.

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
                f"{now.world_size}: make it behind init_process_group, or give it World(rank={now.rank}, world_size="
                f"{now.world_size}); World(rank={self.rank}, world_size={self.world_size}) to read so on purpose"
            )


def _check_ints(where: str, **values: int | None) -> None:
    """Raise UsageError for the first that is none: a state could not hold it."""
    for name, value in values.items():
        if value is not None and type(value) is not int:
            raise UsageError(f"{where}: {name}={value!r} is a {type(value).__name__}, expected an int")
