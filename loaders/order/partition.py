"""Batches of an epoch, and what of them each rank and worker reads: arithmetic on positions.

Step k of an epoch that begins at `start` is positions [start + k B, start + (k + 1) B). Rank r of W takes positions
[k B + r B div W, k B + (r + 1) B div W), and worker w of n computes steps w, w + n, ... So any (B, W, n) reads one sequence.
The last step of last_batch="short" has what is left, dealt out in the same way. If that is less than a sample for each rank, the
step before has it too; if there is none before, the next epoch's first samples make up one for each.
Invariant: every rank has the same number of steps, and at least one sample in each. An evaluation has no next epoch: where it has
fewer samples than ranks, some ranks have no part.
"""

from __future__ import annotations

from dataclasses import dataclass

from loaders.config import LastBatch
from wds_tools.errors import UsageError


def check_batch(length: int, batch_size: int, last_batch: LastBatch, world_size: int) -> None:
    """Raise UsageError if batches leave a rank without a sample, or an epoch of this length without a batch."""
    if batch_size < world_size:
        raise UsageError(f"batch_size={batch_size} is less than one sample for each of {world_size} ranks")
    if last_batch == "drop" and length < batch_size:
        raise UsageError(
            f"an epoch of {length} samples is less than a batch of {batch_size}, and last_batch='drop' leaves it out: choose a "
            "smaller batch_size, or last_batch='short' or 'wrap'"
        )


@dataclass(frozen=True, slots=True)
class BatchPartition:
    """The batches of an epoch from a position on.

    Ten samples in batches of 4 over 2 ranks, the last one short:

    >>> steps = BatchPartition(length=10, start=0, batch_size=4, last_batch="short", world_size=2)
    >>> [[steps.part(step, rank) for rank in range(2)] for step in range(len(steps))]
    [[(0, 2), (2, 4)], [(4, 6), (6, 8)], [(8, 9), (9, 10)]]

    Resumed at position 8 with batches of 6 over 3 ranks, filled up from the next epoch:

    >>> steps = BatchPartition(length=10, start=8, batch_size=6, last_batch="wrap", world_size=3)
    >>> [steps.part(0, rank) for rank in range(3)]
    [(8, 10), (10, 12), (12, 14)]
    """

    length: int
    """Samples of an epoch."""
    start: int
    """Position of the first batch."""
    batch_size: int
    """Samples of a batch over all ranks."""
    last_batch: LastBatch
    world_size: int
    """Number of ranks, at most batch_size."""
    makes_up: bool = True
    """Whether the next epoch's samples make up one for each rank."""

    def __len__(self) -> int:
        whole, rest = divmod(max(self.length - self.start, 0), self.batch_size)
        if self.last_batch == "drop" or (self.last_batch == "short" and whole and rest < self.world_size):
            return whole
        return whole + (rest > 0)

    def end(self, step: int) -> int:
        """The position after a step: beyond `length` where the next epoch fills up the last one."""
        low = self.start + step * self.batch_size
        if self.last_batch == "short" and step + 1 == len(self):
            return max(self.length, low + self.world_size * self.makes_up)
        return low + self.batch_size

    def part(self, step: int, rank: int) -> tuple[int, int]:
        """Positions [low, high) that a rank reads of a step. Beyond `length` they are those of the next epoch."""
        low = self.start + step * self.batch_size
        size = self.end(step) - low
        return low + size * rank // self.world_size, low + size * (rank + 1) // self.world_size

    @property
    def dropped(self) -> int:
        """Samples that last_batch="drop" leaves out."""
        return max(self.length - self.start, 0) % self.batch_size if self.last_batch == "drop" else 0
