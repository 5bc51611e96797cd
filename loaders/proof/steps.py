"""Which positions the steps of a run are: from start to start, epoch by epoch, without what was skipped.

    Record -> history -> StepSpan: steps of one start in one epoch, whose partition says the rest

Invariant: the spans of a run are the batches that its loaders handed over, in their order, since each loader makes its steps
of the same `ahead`.
Cost: a few operations for each epoch and start.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from loaders.order.generations import Epochs
from loaders.order.partition import BatchPartition
from loaders.proof.state import Record, Start
from wds_tools.errors import UsageError

_MAX_EPOCHS = 1 << 22
"""Epochs from a start on that are followed: more come of no run, but of a step that was mistyped or a damaged state."""
Skip = tuple[int, int]
"""See Record.skips."""


class StepSpan(NamedTuple):
    """Steps one after the other, of one start and one epoch."""

    start: Start
    step: int
    """Number of the first of them in the training."""
    num_steps: int
    """How many, at least 1."""
    epoch: int
    steps: BatchPartition
    """Its step k is `step` + k of the training."""


def ahead(epochs: Epochs, start: Start, skips: Iterable[Skip]) -> Iterator[StepSpan]:
    """The steps of a run that goes on from a start, without end.

    Args:
        epochs: of the order.
        start: where it goes on.
        skips: of the run; those behind the start are left out.

    Raises:
        UsageError: an epoch has no batch of the start's size, or the steps are of more epochs than are followed.
    """
    for first, end in sorted(skip for skip in skips if skip[0] > start.step):
        yield from _until(_unbroken(epochs, start), first)
        start = start._replace(position=position_at(epochs, start, end), step=first)
    yield from _unbroken(epochs, start)


def position_at(epochs: Epochs, start: Start, step: int) -> int:
    """The position of the stream at which a step begins, of a run that skips nothing from its start on."""
    for span in _unbroken(epochs, start):
        if step < span.step + span.num_steps:
            return epochs.start(span.epoch) + span.steps.start + (step - span.step) * start.batch_size
    raise AssertionError("_unbroken ends by an error")


def history(epochs: Epochs, record: Record, step: int) -> Iterator[StepSpan]:
    """The steps of a run before a step of the training; beyond the last start's, as it will go on from there."""
    ends = [start.step for start in record.starts[1:]]
    for start, end in zip(record.starts, [*ends, step], strict=True):
        yield from _until(ahead(epochs, start, record.skips), min(end, step))


def skipped(epochs: Epochs, record: Record) -> Iterator[tuple[int, int]]:
    """Positions of the stream [low, high) that a run has skipped, ascending."""
    steps = {first for first, _ in record.skips}
    for before, start in zip((None, *record.starts), record.starts, strict=False):
        if start.step in steps:
            yield position_at(epochs, before, start.step) if before else 0, start.position


def _unbroken(epochs: Epochs, start: Start) -> Iterator[StepSpan]:
    first, place = epochs.at(start.position)
    step = start.step
    for epoch in range(first, first + _MAX_EPOCHS):
        steps = BatchPartition(epochs.length(epoch), place, start.batch_size, start.last_batch, start.world_size)
        if len(steps):
            yield StepSpan(start, step, len(steps), epoch, steps)
        elif not place:
            raise UsageError(f"epoch {epoch} has {steps.length} samples, less than a batch of {start.batch_size}")
        step, place = step + len(steps), 0
    raise UsageError(f"step {step:,} is {_MAX_EPOCHS:,} epochs behind step {start.step:,}, and a later one was asked for")


def _until(spans: Iterable[StepSpan], end: int) -> Iterator[StepSpan]:
    for span in spans:
        if span.step >= end:
            return
        yield span._replace(num_steps=min(span.num_steps, end - span.step))
