"""Where a run stands: the epoch, the position in it, the step of the training; and which steps are still to come.

    RunProgress.rest() -> StepSpan, ... -> hand_over(step) of each batch -> the next epoch; skip() leaves steps out

Of all ranks together: they stand at the same place. A batch counts when it is handed over, not when it was prefetched.
Invariant: states and receipts say of the same `starts` and `skips` which positions each step had; see steps.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile

from loaders.config import LoaderConfig
from loaders.order.generations import Epochs
from loaders.order.partition import BatchPartition
from loaders.proof.state import Start, State, next_starts
from loaders.proof.steps import Skip, StepSpan, ahead, position_at
from wds_tools.errors import UsageError


class RunProgress:
    """Counts the batches of a run.

    Args:
        config: of the loader.
        world_size: number of ranks.
        epochs: of the order; endless where rows are packed on the fly.
    """

    def __init__(self, config: LoaderConfig, world_size: int, epochs: Epochs) -> None:
        self._config, self._world_size = config, world_size
        self.epochs = epochs
        self.step = self.epoch = self.position = 0
        self.skips: tuple[Skip, ...] = ()
        """See Record."""
        self.num_dropped = 0
        """Samples that last_batch="drop" left out, since this was made."""
        self.num_skipped = 0
        """Samples that `skip` left out, since this was made."""
        self.starts: tuple[Start, ...] = (self.here,)
        """See Record."""

    @property
    def here(self) -> Start:
        """A start at this place, with the batch and the ranks of today."""
        position = self.epochs.start(self.epoch) + self.position
        return Start(position, self.step, self._config.batch_size, self._world_size, self._config.last_batch)

    @property
    def is_over(self) -> bool:
        """Whether all epochs that the config asks for are done."""
        return self._config.epochs is not None and self.epoch >= self._config.epochs

    def go_on(self, epochs: Epochs, saved: State) -> None:
        """Stand where a state was saved, in an order with these epochs."""
        self.epochs = epochs
        self.step, self.skips = saved.step, saved.skips
        self.epoch, self.position = epochs.at(saved.position)
        self.starts = next_starts(saved, self.here)
        self._end_epoch_if_done()

    def rest(self) -> Iterator[StepSpan]:
        """The steps that are left of the current epoch; of an evaluation, which has one, all."""
        epoch, config = self.epoch, self._config
        if config.evaluation:
            length = self.epochs.length(epoch)
            steps = BatchPartition(length, 0, config.batch_size, config.last_batch, self._world_size, makes_up=False)
            return iter((StepSpan(self.here._replace(position=0), self.step, len(steps), epoch, steps),))
        coming = ahead(self.epochs, self.here, self.skips)
        return iter(()) if self.is_over else takewhile(lambda span: span.epoch == epoch, coming)

    def hand_over(self, steps: BatchPartition, step: int) -> None:
        """A batch is handed over: this step of `steps`."""
        self.position = steps.end(step)
        self.step += 1
        self._end_epoch_if_done()
        for first, stop in self.skips:
            if first == self.step:
                self._pass_over(stop)

    def skip(self, start: int, stop: int) -> None:
        """Leave steps out; see Loader.skip.

        Raises:
            UsageError: the run is past them, they are none, or millions of epochs away.
        """
        if not self.step <= start < stop:
            raise UsageError(
                f"skip({start}, {stop}): the run stands at step {self.step}: give steps that are still to come, first < stop; "
                "to leave out what was handed over, load a state from before it"
            )
        position_at(self.epochs, self.here, stop)  # refused before anything changes
        self.skips = tuple(sorted((*self.skips, (start, stop))))
        if start == self.step:
            self._pass_over(stop)

    def _pass_over(self, step: int) -> None:
        """Go on where a later step would have begun."""
        here = self.here
        there = here._replace(position=position_at(self.epochs, here, step))
        self.starts = (*(start for start in self.starts if start.step != here.step), there)
        self.num_skipped += there.position - here.position
        self.epoch, self.position = self.epochs.at(there.position)

    def _end_epoch_if_done(self) -> None:
        """Go over to the next epoch after the last batch: whoever counts batches never asks for one too many."""
        config = self._config
        if config.evaluation:
            return
        steps = BatchPartition(
            self.epochs.length(self.epoch), self.position, config.batch_size, config.last_batch, self._world_size
        )
        if not len(steps) and not self.is_over:
            self.num_dropped += steps.dropped
            self.epoch, self.position = self.epoch + 1, 0
