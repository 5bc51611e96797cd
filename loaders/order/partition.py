"""Batches of an epoch, and each rank's and worker's part of them: arithmetic on positions.

Step k of an epoch that begins at `start` is positions [start + k B, start + (k + 1) B). Rank r of W takes the consecutive part
[k B + r B div W, k B + (r + 1) B div W), and worker w of n computes steps w, w + n, ... So any (B, W, n) reads one sequence.
The last step of last_batch="short" has what is left, dealt out in the same way. If that is less than a sample for each rank, the
step before has it too; if there is none before, the next epoch's first samples make up one for each.
Invariant: every rank has the same number of steps, and at least one sample in each.
"""

from __future__ import annotations

from dataclasses import dataclass

from loaders.config import LastBatch


@dataclass(frozen=True, slots=True)
class BatchPartition:
    """The batches of an epoch from a position on."""

    length: int
    """Samples of the epoch."""
    start: int
    """Position of the first batch."""
    batch_size: int
    """Samples of a batch over all ranks."""
    last_batch: LastBatch
    world_size: int
    """Ranks, batch_size at most."""

    def __len__(self) -> int:
        whole, rest = divmod(max(self.length - self.start, 0), self.batch_size)
        if self.last_batch == "drop" or (self.last_batch == "short" and whole and rest < self.world_size):
            return whole
        return whole + (rest > 0)

    def end(self, step: int) -> int:
        """The position behind a step: beyond `length` where the next epoch fills up the last one."""
        low = self.start + step * self.batch_size
        if self.last_batch == "short" and step + 1 == len(self):
            return max(self.length, low + self.world_size)
        return low + self.batch_size

    def part(self, step: int, rank: int) -> tuple[int, int]:
        """Positions [low, high) of a rank's part of a step. Beyond `length` they are those of the next epoch."""
        low = self.start + step * self.batch_size
        size = self.end(step) - low
        return low + size * rank // self.world_size, low + size * (rank + 1) // self.world_size

    @property
    def dropped(self) -> int:
        """Samples that last_batch="drop" leaves out."""
        return max(self.length - self.start, 0) % self.batch_size if self.last_batch == "drop" else 0
