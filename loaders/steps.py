"""Batches of an epoch, and each rank's and worker's part of them: arithmetic on positions.

Step k of an epoch that begins at `start` is positions [start + k B, start + (k + 1) B). Rank r of W takes the consecutive part
[k B + r B div W, k B + (r + 1) B div W), and worker w of n computes steps w, w + n, ... So any (B, W, n) reads one sequence.
Invariant: every rank has the same number of steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from loaders.config import Tail, World


@dataclass(frozen=True, slots=True)
class Steps:
    """The batches of an epoch from a position on."""

    length: int
    """Samples of the epoch."""
    start: int
    """Position of the first batch."""
    batch_size: int
    """Samples of a batch over all ranks."""
    tail: Tail

    def __len__(self) -> int:
        left = max(self.length - self.start, 0)
        return left // self.batch_size if self.tail == "drop" else -(-left // self.batch_size)

    def end(self, step: int) -> int:
        """The position behind a step: beyond `length` for the last one of tail="wrap"."""
        end = self.start + (step + 1) * self.batch_size
        return end if self.tail == "wrap" else min(end, self.length)

    def part(self, step: int, world: World) -> tuple[int, int]:
        """Positions [low, high) of a rank's part of a step. Beyond `length` they are those of the next epoch."""
        low = self.start + step * self.batch_size
        end = self.end(step)
        bounds = (self.batch_size * rank // world.world_size for rank in (world.rank, world.rank + 1))
        first, last = (min(low + bound, end) for bound in bounds)
        return first, last

    @property
    def dropped(self) -> int:
        """Samples that tail="drop" leaves out."""
        return max(self.length - self.start, 0) % self.batch_size if self.tail == "drop" else 0
