"""A run whose settings or data changed on the way: generations, each from a position of the endless stream on.

    first start -> (Generation,);   a change of the future -> (*generations, Generation)
    generations -> epochs_of, schedule_of -> SampleOrder;   -> state, receipt -> parse_generations

Each generation says what the whole order would be if it alone held; it holds from its position on. All have the sources of those
before, and perhaps more at the end; one that was removed is at weight 0.
Invariant: what stands at a position depends on the generations that begin before it, so a change alters nothing in the past.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Annotated, Any

import numpy as np

from loaders.order.plan import Ints
from loaders.order.spec import OrderSpec
from wds_tools.errors import FormatError, UsageError, WdsToolsError
from wds_tools.format.typed_json import Count, shape

MAX_GENERATIONS = 256
"""Of a run; each change adds one."""
_MAX_WEIGHTS = 1024
"""Sets of weights of a run: a position looks at all before it, and each takes up to 4 MiB."""
Position = Annotated[int, range(1 << 56)]
"""Of the endless stream. No real run comes near; sums and small multiples of a few of them stay within int64."""


class Epochs:
    """Epochs one after the other on an endless line, in runs of equal length.

    >>> epochs = Epochs(10)
    >>> epochs.change(25, 4)  # from the first epoch on that begins at 25 or later
    3
    >>> [epochs.start(epoch) for epoch in range(6)]
    [0, 10, 20, 30, 34, 38]
    >>> [column.tolist() for column in epochs.locate(np.array([29, 30, 39]))]
    [[2, 3, 5], [9, 0, 1]]

    Args:
        length: of each epoch, at least 1.
    """

    def __init__(self, length: int) -> None:
        self._firsts, self._starts, self._lengths = [0], [0], [length]

    def change(self, index: int, length: int) -> int:
        """Give another length to the epochs that begin at this index or later, and return the first of them."""
        while self._starts[-1] >= index and len(self._starts) > 1:
            del self._firsts[-1], self._starts[-1], self._lengths[-1]
        first = self._firsts[-1] + -((self._starts[-1] - index) // self._lengths[-1])
        start = self.start(first)
        if start == self._starts[-1]:
            self._lengths[-1] = length
        elif length != self._lengths[-1]:
            self._firsts.append(first)
            self._starts.append(start)
            self._lengths.append(length)
        return first

    def start(self, epoch: int) -> int:
        """Index at which an epoch begins."""
        run = bisect_right(self._firsts, epoch) - 1
        return self._starts[run] + (epoch - self._firsts[run]) * self._lengths[run]

    def length(self, epoch: int) -> int:
        """Length of an epoch."""
        return self._lengths[bisect_right(self._firsts, epoch) - 1]

    def at(self, index: int) -> tuple[int, int]:
        """(epoch, place in it) of an index."""
        epoch, place = self.locate(np.array([index]))
        return int(epoch[0]), int(place[0])

    def locate(self, indices: Ints) -> tuple[Ints, Ints]:
        """(epoch, place in it) of each index."""
        run = np.searchsorted(self._starts, indices, "right") - 1
        firsts, starts, lengths = (np.array(column, np.int64)[run] for column in (self._firsts, self._starts, self._lengths))
        return firsts + (indices - starts) // lengths, (indices - starts) % lengths


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A source, as states and receipts name it."""

    url: str
    """URL at which it was read."""
    fingerprint: str
    """Fingerprint of its manifest."""
    num_samples: Count
    """Number of its samples."""
    num_shards: Count
    """Number of its shards: a dataset that grew has these first."""
    name: str | None = None
    """What lines of its mask may call it, if not its URL."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What holds from a position on."""

    spec: OrderSpec
    sources: tuple[Origin, ...]
    position: Position
    """Position of the stream from which it holds."""
    step: Position
    """Step of the training there: step s of the config's schedule is position + (s - step) x step_samples."""
    step_samples: Annotated[int, range(1, 1 << 40)]
    """Batch size there, in samples."""

    def __post_init__(self) -> None:
        if len(self.sources) != len(self.spec.sources):
            raise UsageError(f"{len(self.sources)} sources, but an order of {len(self.spec.sources)}")
        if any(len(weights) != len(self.sources) for _, weights in self.spec.schedule):
            raise UsageError(f"{len(self.sources)} sources, but a schedule of others")


def first_generation(spec: OrderSpec, sources: Sequence[Origin]) -> Generation:
    """That of a run that begins."""
    return Generation(spec=spec, sources=tuple(sources), position=0, step=0, step_samples=spec.batch_size)


@dataclass(frozen=True, kw_only=True)
class _Form:
    generations: tuple[dict[str, Any], ...]


def generations_to_json(generations: Iterable[Generation]) -> list[dict[str, Any]]:
    """Plain JSON values; of a later one only what differs from the one before."""
    documents: list[dict[str, Any]] = []
    before: dict[str, Any] = {}
    for generation in generations:
        fields = asdict(generation) | {"spec": generation.spec.to_json(), "sources": list(map(asdict, generation.sources))}
        documents.append({name: value for name, value in fields.items() if before.get(name) != value})
        before = fields
    return documents


def parse_generations(record: Mapping[str, Any], what: str, error: type[WdsToolsError] = FormatError) -> tuple[Generation, ...]:
    """The generations of a state or a receipt.

    Args:
        record: untrusted JSON values; its `generations` are as generations_to_json made them.
        what: how the message begins.
        error: what is raised: they are none, too many, or do not follow one another.
    """
    documents = shape(_Form, record, what, error).generations
    if not 1 <= len(documents) <= MAX_GENERATIONS:
        raise error(f"{what} (generations are {len(documents):,}, expected 1 to {MAX_GENERATIONS})")
    generations: list[Generation] = []
    fields: dict[str, Any] = {}
    for document in documents:
        fields = {**fields, **document}
        generations.append(shape(Generation, fields, what, error))
    if generations[0].position or generations[0].step:
        raise error(f"{what} (the first generation begins at {generations[0].position}, expected 0)")
    for before, after in pairwise(generations):
        is_later = before.position <= after.position and before.step <= after.step and len(before.sources) <= len(after.sources)
        if not is_later or bool(before.spec.schedule) != bool(after.spec.schedule):
            raise error(
                f"{what} (the generation from position {after.position} on does not follow that from {before.position} on)"
            )
    return tuple(generations)


def epochs_of(generations: Sequence[Generation]) -> Epochs:
    """The epochs of the order: another length holds from the first epoch on that begins no earlier than its generation."""
    epochs = Epochs(generations[0].spec.length)
    for generation in generations[1:]:
        epochs.change(generation.position, generation.spec.length)
    return epochs


def schedule_of(generations: Sequence[Generation]) -> list[tuple[int, tuple[float, ...]]]:
    """(position from which they hold, weights of all sources of the last generation); empty without weights."""
    num_sources = len(generations[-1].sources)
    schedule: list[tuple[int, tuple[float, ...]]] = []
    for generation in generations:
        held = [(start, (*weights, *[0.0] * (num_sources - len(weights)))) for start, weights in generation.spec.schedule]
        schedule = [entry for entry in schedule if entry[0] < generation.position]
        due = [entry for entry in held if entry[0] <= generation.position][-1:]
        if due and (not schedule or schedule[-1][1] != due[0][1]):
            schedule.append((generation.position, due[0][1]))
        schedule += [entry for entry in held if entry[0] > generation.position]
    if len(schedule) > _MAX_WEIGHTS:
        raise UsageError(f"the weights change {len(schedule):,} times, at most {_MAX_WEIGHTS:,} sets of them are kept")
    return schedule
