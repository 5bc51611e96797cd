"""Packing on the fly, lane by lane: lane c's packer reads lane c's samples in order, and row q is row q div C of lane q mod C.

    LaneBook (main process): the cursor of each lane, as of the rows handed over -> requests -> LaneRows (reading process): rows

Lanes are those of the endless stream: sample position g is lane g mod C at depth g div C, through all epochs. A lane's rows
depend on its samples alone, so on no topology. A cursor says where a lane stands: its next row, the next depth, and what waits
in its window. A process that is asked for a later row than its cursor's packs those between again and drops them, so a state
is right with any cursors; it is cheap with those of all ranks (`merge_states`).
Cost: the tokenizer's; in a process, five rows of tokens for each of its lanes.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from loaders.batches.collate import Columns, TokenTensors
from loaders.batches.decode import Decoder, Substitution
from loaders.order.partition import BatchPartition
from loaders.order.samples import Located, SampleOrder
from loaders.reading.prefetch import Planned, PositionRange, Reader
from loaders.tokens.rows import RowMaker
from wds_tools.errors import UsageError
from wds_tools.sequences.build import Example
from wds_tools.sequences.pack import WINDOW_ROWS, Packer, Row
from wds_tools.sequences.rows import packed_batch

ENDLESS = 1 << 39
"""Rows of the one epoch that there is."""
_MOST_AT_ONCE = 256
_FIRST_GUESS = 512.0
"""Tokens of a sample, before any was seen."""


class Cursor(NamedTuple):
    """Where a lane stands."""

    row: int = 0
    """Its next row."""
    depth: int = 0
    """Of the next sample."""
    waiting: tuple[tuple[int, int], ...] = ()
    """(depth, used tokens) of the samples in its window, ascending."""


class LaneBook:
    """What the main process of a rank knows of the lanes.

    Args:
        num_lanes: of the order.
        rank: of this process.
        cursors: of a state.
    """

    def __init__(self, num_lanes: int, rank: int, cursors: Mapping[int, Cursor] | None = None) -> None:
        self._num_lanes = num_lanes
        self._rank = rank
        self.cursors: dict[int, Cursor] = dict(cursors or {})
        self._told: dict[int, set[int]] = {}

    def begin(self) -> None:
        """A new loop begins: its workers know no lane."""
        self._told = {}

    def tell(self, steps: BatchPartition, step: int, stride: int) -> dict[int, Cursor]:
        """The cursors of the lanes that the worker of a step meets for the first time in this loop."""
        low, high = steps.part(step, self._rank)
        told = self._told.setdefault(step % stride, set())
        new = {row % self._num_lanes for row in range(low, min(high, low + self._num_lanes))} - told
        told |= new
        return {lane: self.cursors.get(lane, Cursor()) for lane in sorted(new)}


class PackedPart(NamedTuple):
    """A rank's rows of a step."""

    columns: Columns
    sources: list[int]
    """Of the samples whose last token is in them."""
    substitutions: list[Substitution]
    cursors: dict[int, Cursor]
    """Of their lanes, behind these rows."""


class LaneRows:
    """Packs the rows of a process.

    Args:
        stream: what is read.
        reader: of this process.
        decoder: of this process.
        maker: of this process.
    """

    def __init__(self, order: SampleOrder, reader: Reader, decoder: Decoder, maker: RowMaker) -> None:
        self._order = order
        self._reader = reader
        self._decoder = decoder
        self._maker = maker
        self._lanes: dict[int, _Lane] = {}
        self._loop = 0
        self._mean_tokens = _FIRST_GUESS
        self._substitutions: list[Substitution] = []

    def part(self, low: int, high: int, loop: int, told: Mapping[int, Cursor]) -> PackedPart:
        """Rows [low, high).

        Args:
            low, high: of the stream of rows.
            loop: another than before: the lanes of the one before were left where nobody knows.
            told: where lanes stand that this process is to take up.

        Raises:
            FormatError, StorageError: a sample can't be read.
        """
        if loop != self._loop:
            self._loop = loop
            self._lanes.clear()
            self._reader.forget()
        for lane, cursor in told.items():
            self._lanes[lane] = _Lane(lane, cursor, self._new_packer())
        try:
            rows = self._rows(low, high)
        except BaseException:
            self._lanes.clear()  # the next request would find samples missing
            self._reader.forget()
            raise
        names = [opened.name for opened in self._order.sources]
        lists: dict[str, list[Any]] = {
            "__key__": [row.keys for row, _ in rows],
            "__source__": [[names[number] for number in sources] for _, sources in rows],
        }
        length = self._maker.builder.config.max_length
        ids_BL = np.concatenate([np.zeros(0, np.int32), *(row.ids for row, _ in rows)]).reshape(-1, length)
        loss_BL = np.concatenate([np.zeros(0, np.bool_), *(row.loss for row, _ in rows)]).reshape(-1, length)
        padding = sum(row.num_padding for row, _ in rows)
        self._maker.count(len(rows), ids_BL.size - padding, padding)
        substitutions, self._substitutions = self._substitutions, []
        lanes = self._order.spec.lanes
        ended = [lane.take_ended() for lane in self._of(low, high)]
        return PackedPart(
            Columns(lists, None, TokenTensors.of(packed_batch(ids_BL, loss_BL, [row.segments for row, _ in rows]))),
            [source for sources in ended for source in sources],
            substitutions,
            {row % lanes: self._lanes[row % lanes].cursor() for row in range(low, high)},
        )

    def _of(self, low: int, high: int) -> list[_Lane]:
        count = self._order.spec.lanes
        return [self._lanes[row % count] for row in range(low, min(high, low + count))]

    def _rows(self, low: int, high: int) -> list[tuple[Row, list[int]]]:
        """The rows, each with the sources of its segments."""
        count = self._order.spec.lanes
        made: dict[int, tuple[Row, list[int]]] = {}
        until = {lane.number: (high - 1 - lane.number) // count for lane in self._of(low, high)}
        while hungry := [lane for lane in self._of(low, high) if not lane.pack(until[lane.number], low, count, made)]:
            self._ask(hungry)
            self._feed(hungry)
        self._ask(self._of(low, high))  # for when their turn comes again
        return [made[row] for row in range(low, high)]

    def _ask(self, lanes: Sequence[_Lane]) -> None:
        """Have what lanes will need read in the background, unless it is."""
        wanted = (WINDOW_ROWS + 1) * self._maker.builder.config.max_length
        parts: list[PositionRange] = []
        owners: list[_Lane] = []
        for lane in lanes:
            if not lane.asked:
                missing = wanted - lane.num_tokens
                count = min(max(int(missing / self._mean_tokens), 1), _MOST_AT_ONCE) if missing > 0 else 0
                own = list(lane.parts(count, self._order.spec.lanes))
                parts += own
                owners += [lane] * len(own)
        for lane, planned in zip(owners, self._reader.ask(parts), strict=True):
            lane.asked.append(planned)

    def _feed(self, lanes: Sequence[_Lane]) -> None:
        """Give lanes the samples that they asked for: all are parsed and tokenized together."""
        asked = [planned for lane in lanes for planned in lane.asked]
        answers = self._reader.answer(asked)
        columns = zip(*(located for located, _ in answers), strict=True)
        located = Located(*(np.concatenate(column) for column in columns))
        positions = np.concatenate([np.arange(*planned.part[1:]) for planned in asked])
        rows = [held for _, part_rows in answers for held in part_rows]
        samples, substitutions, _ = self._decoder.decode(located, rows, self._maker.read)
        self._substitutions += substitutions
        examples = self._maker.examples(samples, self._order.source_epochs(0, positions))
        self._mean_tokens = 0.9 * self._mean_tokens + 0.1 * sum(len(one.ids) for one in examples) / len(examples)
        found = zip(examples, located.source.tolist(), strict=True)
        for lane in lanes:
            for planned in lane.asked:
                for position in range(*planned.part[1:]):
                    lane.take(position // self._order.spec.lanes, *next(found))
            lane.asked = []

    def _new_packer(self) -> Packer:
        builder = self._maker.builder
        return Packer(builder.config.max_length, builder.vocabulary.eos)


class _Lane:
    """A lane in the process that packs it."""

    def __init__(self, number: int, cursor: Cursor, packer: Packer) -> None:
        self.number = number
        self.asked: list[Planned] = []
        self._row, self._depth = cursor.row, cursor.depth
        self._missing = dict(cursor.waiting)
        """Depth -> used tokens of the samples that a state says wait, and that are to be read again."""
        self._next_read = cursor.depth
        self._packer = packer
        self._ready: deque[tuple[int, Example]] = deque()
        """(depth, example) of those read ahead, which the packer does not know yet."""
        self._sources: dict[int, int] = {}
        self._ended: list[int] = []
        self.num_tokens = 0
        """Of what waits and what is ready."""

    def parts(self, count: int, num_lanes: int) -> Iterator[PositionRange]:
        """Where its next samples lie: those that wait, of a state, and so many behind."""
        for depth in self._missing:
            position = depth * num_lanes + self.number
            yield PositionRange(0, position, position + 1)
        if count:
            low = self._next_read * num_lanes + self.number
            self._next_read += count
            yield PositionRange(0, low, low + count * num_lanes, num_lanes)

    def take(self, depth: int, example: Example, source: int) -> None:
        """A sample that was read."""
        self._sources[depth] = source
        used = self._missing.pop(depth, None)
        if used is None:
            self._ready.append((depth, example))
        else:
            self._packer.add(depth, example, used)
        self.num_tokens += len(example.ids) - (used or 0)

    def pack(self, last_row: int, low: int, num_lanes: int, made: dict[int, tuple[Row, list[int]]]) -> bool:
        """Make rows up to `last_row`, and keep those from position `low` on; False if samples are wanting."""
        while self._row <= last_row:
            while self._packer.wants_more and self._ready and not self._missing:
                depth, example = self._ready.popleft()
                self._packer.add(depth, example)
                self._depth = depth + 1
            if self._packer.wants_more or self._missing:
                return False
            row = self._packer.row()
            position = self._row * num_lanes + self.number
            self._row += 1
            self.num_tokens -= sum(row.segments)
            if position >= low:
                made[position] = row, [self._sources[number] for number in row.numbers]
                self._ended += [self._sources[number] for number in row.ended]
            for number in row.ended:
                del self._sources[number]
        return True

    def take_ended(self) -> list[int]:
        """The sources of the samples that ended since it was asked last."""
        ended, self._ended = self._ended, []
        return ended

    def cursor(self) -> Cursor:
        """Where it stands."""
        return Cursor(self._row, self._depth, tuple(self._packer.waiting))


def cursors_to_json(cursors: Mapping[int, Cursor]) -> dict[str, Any]:
    """Cursors as JSON values."""
    return {
        str(lane): [cursor.row, cursor.depth, [list(one) for one in cursor.waiting]] for lane, cursor in sorted(cursors.items())
    }


def check_packing(packing: Any, spec: Mapping[str, Any]) -> None:
    """Raise UsageError unless a state's rows are made as the config makes them."""
    saved = packing.get("spec") if isinstance(packing, Mapping) else None
    if not isinstance(saved, Mapping):
        raise UsageError(f"not the state of packed rows: its packing is {str(packing)[:80]}")
    names = [name for name, value in spec.items() if saved.get(name) != value]
    if names:
        raise UsageError(
            f"the state was saved with other rows: {names[0]} was {saved.get(names[0])!r}, is {spec[names[0]]!r}: "
            "keep the settings of the run, or start a new one"
        )


def parse_cursors(lanes: Any, num_lanes: int, position: int) -> dict[int, Cursor]:
    """Cursors from a state at a position of the stream of rows; warns if packing again will take long.

    Raises:
        UsageError: they are none.
    """
    try:
        found = {
            int(lane): Cursor(row, depth, tuple((number, used) for number, used in waiting))
            for lane, (row, depth, waiting) in lanes.items()
        }
        for lane, cursor in found.items():
            depths = [number for number, _ in cursor.waiting]
            numbers = [cursor.row, cursor.depth, *depths, *(used for _, used in cursor.waiting)]
            is_good = 0 <= lane < num_lanes and all(type(number) is int and 0 <= number < ENDLESS for number in numbers)
            if not is_good or depths != sorted(set(depths)) or (depths and depths[-1] >= cursor.depth):
                raise ValueError(f"lane {lane} stands at {list(cursor)}")
    except (AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"the state's lanes can't be meant ({type(error).__name__}: {error})") from error
    behind = sum(found.get(lane, Cursor()).row < -((lane - position) // num_lanes) for lane in range(min(num_lanes, position)))
    if behind:
        warnings.warn(
            f"the state does not know where {behind:,} of {num_lanes:,} lanes stand: their rows are packed again from where it "
            "does, or from the beginning; merge the states of all ranks (merge_states, gather_state)",
            stacklevel=4,
        )
    return found


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state of those that all ranks saved behind the same step.

    Needed where rows are packed on the fly, since a rank knows its own lanes; else all are alike, and one is as good.

    Args:
        states: of all ranks, in any order. With fewer, what the others packed is packed again from where it is known.

    Raises:
        UsageError: they are not of one run and one step.
    """
    if not states:
        raise UsageError("no states to merge")
    merged = dict(states[0])
    first = _without_lanes(merged)
    for state in states[1:]:
        if (other := _without_lanes(state)) != first:
            names = [name for name in first | other if first.get(name) != other.get(name)]
            raise UsageError(f"states of different steps or runs can't be merged: they differ in {', '.join(names)}")
    if "packing" in merged:
        lanes: dict[str, Any] = {}
        for state in states:
            for lane, cursor in state["packing"]["lanes"].items():
                if lane not in lanes or lanes[lane][0] < cursor[0]:
                    lanes[lane] = cursor
        merged["packing"] = {**merged["packing"], "lanes": dict(sorted(lanes.items(), key=lambda item: int(item[0])))}
    return merged


def _without_lanes(state: Mapping[str, Any]) -> dict[str, Any]:
    packing = state.get("packing")
    return {**state, "packing": None if packing is None else {**packing, "lanes": None}}
