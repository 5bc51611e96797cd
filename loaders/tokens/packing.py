"""Packing on the fly, lane by lane: lane c's packer reads lane c's samples in order, and row q is row q div C of lane q mod C.

    requests with the LaneStates of new lanes -> LanePacker (reading process) -> rows, and where their lanes stand after them

Lanes are those of the endless order: sample position g has cursor g div C in lane g mod C, through all epochs. A lane's rows
depend on its samples alone, so on no topology. A LaneState says where a lane stands: its next row, its cursor, and what waits
in its window. A process that is asked for a later row than its state's packs those between again and drops them, so a saved
state is right with any LaneStates; it is cheap with those of all ranks (`merge_states`).
Cost: the tokenizer's; in a process, five rows of tokens for each of its lanes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from loaders.batches.collate import Columns, TokenTensors
from loaders.batches.decode import Decoder
from loaders.order.mask import Substitution
from loaders.order.samples import Located, SampleOrder
from loaders.reading.planner import Plan, PositionRange
from loaders.reading.reader import PositionReader
from loaders.reading.source import LoadedSamples
from loaders.tokens.lanes import LaneState
from loaders.tokens.rows import RowMaker
from wds_tools.sequences.build import Example
from wds_tools.sequences.pack import WINDOW_ROWS, Packer, Row
from wds_tools.sequences.rows import packed_batch

_MOST_AT_ONCE = 256
_FIRST_GUESS = 512.0
"""Tokens of a sample, before any was seen."""


class PackedRows(NamedTuple):
    """A rank's rows of a step."""

    columns: Columns
    """The rows."""
    sources: list[int]
    """Source of each sample whose last token is in them."""
    substitutions: list[Substitution]
    """What was substituted while they were made."""
    lanes: dict[int, LaneState]
    """Where their lanes stand after these rows."""


class LanePacker:
    """Packs the rows of a process.

    Args:
        order: which sample stands at a position.
        reader: of this process.
        decoder: of this process.
        maker: of this process.
    """

    def __init__(self, order: SampleOrder, reader: PositionReader[LoadedSamples], decoder: Decoder, maker: RowMaker) -> None:
        self._order = order
        self._num_lanes = order.spec.lanes
        self._reader = reader
        self._decoder = decoder
        self._maker = maker
        self._lanes: dict[int, _Lane] = {}
        self._loop = 0
        self._mean_tokens = _FIRST_GUESS
        self._substitutions: list[Substitution] = []

    def rows(self, low: int, high: int, loop: int, new_lanes: Mapping[int, LaneState]) -> PackedRows:
        """Rows [low, high).

        Args:
            low, high: numbers of rows, over all lanes.
            loop: number of the loop over the loader; with another one, all lanes begin again from `new_lanes`.
            new_lanes: where lanes stand that this process is to take up.

        Raises:
            FormatError, StorageError: a sample can't be read.
        """
        if loop != self._loop:
            self._loop = loop
            self._forget()
        builder = self._maker.builder
        length = builder.config.max_length
        for number, state in new_lanes.items():
            self._lanes[number] = _Lane(number, self._num_lanes, state, Packer(length, builder.vocabulary.eos))
        try:
            made = self._make(low, high)
        except BaseException:
            self._forget()  # the next request would find samples missing
            raise
        names = [opened.name for opened in self._order.sources]
        rows = [row for row, _ in made]
        lists: dict[str, list[Any]] = {
            "__key__": [row.keys for row in rows],
            "__source__": [[names[number] for number in sources] for _, sources in made],
        }
        ids_BL = np.concatenate([np.zeros(0, np.int32), *(row.ids for row in rows)]).reshape(-1, length)
        loss_BL = np.concatenate([np.zeros(0, np.bool_), *(row.loss for row in rows)]).reshape(-1, length)
        num_padding = sum(row.num_padding for row in rows)
        self._maker.count(len(rows), ids_BL.size - num_padding, num_padding)
        substitutions, self._substitutions = self._substitutions, []
        lanes = self._lanes_of(low, high)
        return PackedRows(
            Columns(lists, None, TokenTensors.of(packed_batch(ids_BL, loss_BL, [row.segments for row in rows]))),
            [source for lane in lanes for source in lane.take_ended()],
            substitutions,
            {lane.number: lane.state() for lane in lanes},
        )

    def _forget(self) -> None:
        self._lanes.clear()
        self._reader.forget()

    def _lanes_of(self, low: int, high: int) -> list[_Lane]:
        return [self._lanes[row % self._num_lanes] for row in range(low, min(high, low + self._num_lanes))]

    def _make(self, low: int, high: int) -> list[tuple[Row, list[int]]]:
        """The rows, each with the sources of its segments."""
        made: dict[int, tuple[Row, list[int]]] = {}
        lanes = self._lanes_of(low, high)
        last_rows = {lane.number: (high - 1 - lane.number) // self._num_lanes for lane in lanes}
        while hungry := [lane for lane in lanes if not lane.pack(last_rows[lane.number], low, made)]:
            self._plan(hungry)
            self._feed(hungry)
        self._plan(lanes)  # for the next rows of these lanes
        return [made[row] for row in range(low, high)]

    def _plan(self, lanes: Sequence[_Lane]) -> None:
        """Have what lanes will need read in the background, unless it is."""
        wanted = (WINDOW_ROWS + 1) * self._maker.builder.config.max_length
        ranges: list[PositionRange] = []
        owners: list[_Lane] = []
        for lane in lanes:
            if not lane.plans:
                num_missing = wanted - lane.num_tokens
                count = min(max(int(num_missing / self._mean_tokens), 1), _MOST_AT_ONCE) if num_missing > 0 else 0
                lane_ranges = list(lane.next_ranges(count))
                ranges += lane_ranges
                owners += [lane] * len(lane_ranges)
        for lane, plan in zip(owners, self._reader.plan(ranges), strict=True):
            lane.plans.append(plan)

    def _feed(self, lanes: Sequence[_Lane]) -> None:
        """Give lanes the samples that are planned for them: all are parsed and tokenized together."""
        plans = [plan for lane in lanes for plan in lane.plans]
        taken = [self._reader.take(plan) for plan in plans]
        located = Located(*map(np.concatenate, zip(*(part for part, _ in taken), strict=True)))
        positions = np.concatenate([np.arange(*plan.positions[1:]) for plan in plans])
        loaded = [samples for _, part in taken for samples in part]
        samples, substitutions = self._decoder.decode(located, loaded, self._maker.read)
        self._substitutions += substitutions.values()
        examples = self._maker.examples(samples, self._order.source_epochs(0, positions), located.source.tolist())
        self._mean_tokens = 0.9 * self._mean_tokens + 0.1 * sum(len(example.ids) for example in examples) / len(examples)
        for position, example, source in zip(positions.tolist(), examples, located.source.tolist(), strict=True):
            self._lanes[position % self._num_lanes].take(position // self._num_lanes, example, source)
        for lane in lanes:
            lane.plans = []


class _Lane:
    """A lane in the process that packs it."""

    def __init__(self, number: int, num_lanes: int, state: LaneState, packer: Packer) -> None:
        self.number = number
        self.plans: list[Plan] = []
        """What is being read for it."""
        self._num_lanes = num_lanes
        self._row, self._cursor = state.row, state.cursor
        self._missing = dict(state.waiting)
        """Cursor -> used tokens of the samples that wait by a state, and that are to be read again."""
        self._next_read = state.cursor
        self._packer = packer
        self._ready: deque[tuple[int, Example]] = deque()
        """(cursor, example) of those read ahead, which the packer does not know yet."""
        self._sources: dict[int, int] = {}
        self._ended: list[int] = []
        self.num_tokens = 0
        """Tokens of what waits and what is ready."""

    def next_ranges(self, count: int) -> Iterator[PositionRange]:
        """Positions of its next samples: those that wait by a state, and `count` that follow."""
        for cursor in self._missing:
            position = cursor * self._num_lanes + self.number
            yield PositionRange(0, position, position + 1)
        if count:
            low = self._next_read * self._num_lanes + self.number
            self._next_read += count
            yield PositionRange(0, low, low + count * self._num_lanes, self._num_lanes)

    def take(self, cursor: int, example: Example, source: int) -> None:
        """Take a sample that was read."""
        self._sources[cursor] = source
        used = self._missing.pop(cursor, None)
        if used is None:
            self._ready.append((cursor, example))
        else:
            self._packer.add(cursor, example, used)
        self.num_tokens += len(example.ids) - (used or 0)

    def pack(self, last_row: int, low: int, made: dict[int, tuple[Row, list[int]]]) -> bool:
        """Make rows up to `last_row`, and keep those from number `low` on; False if samples are missing."""
        while self._row <= last_row:
            while self._packer.wants_more and self._ready and not self._missing:
                cursor, example = self._ready.popleft()
                self._packer.add(cursor, example)
                self._cursor = cursor + 1
            if self._packer.wants_more or self._missing:
                return False
            row = self._packer.row()
            number = self._row * self._num_lanes + self.number
            self._row += 1
            self.num_tokens -= sum(row.segments)
            if number >= low:
                made[number] = row, [self._sources[cursor] for cursor in row.numbers]
                self._ended += [self._sources[cursor] for cursor in row.ended]
            for cursor in row.ended:
                del self._sources[cursor]
        return True

    def take_ended(self) -> list[int]:
        """Sources of the samples that ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def state(self) -> LaneState:
        """Where it stands."""
        return LaneState(self._row, self._cursor, tuple(self._packer.waiting))
