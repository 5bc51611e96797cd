"""A loader for trainers that think in epochs, with a length and a state: Lightning, Accelerate, the Trainer of transformers.

    Loader -> EpochLoader(loader, steps) -> the trainer

An epoch here is a number of steps, or an epoch of the loader. Its length stays the same when it is resumed in the middle, which
is how those trainers count. The state is that of all ranks, so `state_dict` is to be called by all of them, as they do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

from loaders.batches.collate import Batch
from loaders.loader import Loader
from loaders.proof.state import Change
from loaders.tokens.rows import model_inputs
from wds_tools.errors import UsageError


class EpochLoader:
    """Epochs of a fixed length: an iteration gives what is left of the current one.

    Args:
        loader: the loader of this rank.
        steps: steps of an epoch (the last is shorter if the loader's `epochs` end in it); None: those of the loader's epoch. Rows
            packed on the fly have no epochs.
        prepare: makes of a batch what the trainer gets; by default what a model's `forward` takes.

    Raises:
        UsageError: rows packed on the fly need `steps`.
    """

    def __init__(
        self, loader: Loader, steps: int | None = None, prepare: Callable[[Batch], dict[str, Any]] = model_inputs
    ) -> None:
        if steps is None and loader.config.packing:
            raise UsageError("rows packed on the fly have no epochs: give EpochLoader the number of steps")
        if steps is not None and steps < 1:
            raise UsageError(f"steps={steps}: an epoch has at least one step")
        if steps is not None and loader.config.evaluation:
            raise UsageError(f"steps={steps}: an evaluation is a whole pass; Source(max_samples=...) takes a part of the samples")
        self.loader = loader
        self._num_steps = steps
        self._prepare = prepare

    @property
    def done(self) -> int:
        """Steps of the current epoch that are done; with `steps`, epochs are counted from the first step of the run."""
        if self._num_steps is not None:
            return self.loader.step % self._num_steps
        return -(-self.loader.position // self.loader.config.batch_size)

    def __len__(self) -> int:
        """Steps of an epoch, including those done."""
        if self._num_steps is not None:
            return self._num_steps
        return len(self.loader) + (0 if self.loader.config.evaluation else self.done)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self._num_steps is None:
            yield from map(self._prepare, self.loader)
            return
        yield from map(self._prepare, islice(all_epochs(self.loader), self._num_steps - self.done))

    def state_dict(self) -> dict[str, Any]:
        """The state of all ranks, the same on each: all must call it. See Loader.gather_state."""
        return self.loader.gather_state()

    def load_state_dict(self, state: Mapping[str, Any], change: Change = None) -> None:
        """Go on from a state, of any number of ranks.

        Args:
            state, change: see Loader.load_state_dict.

        Raises:
            UsageError: see Loader.load_state_dict.
        """
        self.loader.load_state_dict(state, change)


def all_epochs(loader: Loader) -> Iterator[Batch]:
    """The batches of one epoch of a loader after another, up to the end of its last one (`epochs`)."""
    while True:
        batches = iter(loader)
        first = next(batches, None)
        if first is None:
            return
        yield first
        yield from batches
