"""Where the lanes of rows packed on the fly stand: in the main process, in requests and in states.

    LaneBook (main process): the LaneState of each lane, as of the rows handed over -> requests -> packing.LanePacker
    lanes_to_json -> state -> merge_states (of all ranks) -> parse_lanes

A rank knows the lanes whose rows it was handed. A state that lacks some is right, since packing repeats from what is known; it is
cheap with those of all ranks.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np

from loaders.order.partition import BatchPartition
from loaders.order.samples import SampleOrder
from wds_tools.errors import UsageError
from wds_tools.format.typed_json import shape

ENDLESS = 1 << 39
"""Rows of the one epoch that there is."""
_NO_LANES = "the state's lane cursors are invalid"
_Number = Annotated[int, range(ENDLESS)]


class LaneState(NamedTuple):
    """Where a lane stands."""

    row: _Number = 0
    """Number of its next row."""
    cursor: _Number = 0
    """Number of the next sample in the lane."""
    waiting: tuple[tuple[_Number, _Number], ...] = ()
    """(cursor, used tokens) of the samples in its window, ascending."""


class LaneBook:
    """What the main process of a rank knows of the lanes.

    Args:
        num_lanes: number of lanes of the order.
        rank: of this process.
        lanes: where they stand by a saved state.
    """

    def __init__(self, num_lanes: int, rank: int, lanes: Mapping[int, LaneState] | None = None) -> None:
        self._num_lanes = num_lanes
        self._rank = rank
        self.lanes: dict[int, LaneState] = dict(lanes or {})
        """By number, those that are known."""
        self._met: dict[int, set[int]] = {}
        """Worker -> lanes that it has met in this loop."""

    def begin(self) -> None:
        """A new loop begins: its workers know no lane."""
        self._met = {}

    def new_lanes(self, steps: BatchPartition, step: int, num_workers: int) -> dict[int, LaneState]:
        """Where the lanes stand that the worker of a step meets for the first time in this loop.

        Row q is in lane q mod num_lanes:

        >>> book = LaneBook(num_lanes=4, rank=0, lanes={1: LaneState(row=7, cursor=9)})
        >>> steps = BatchPartition(ENDLESS, start=0, batch_size=2, last_batch="drop", world_size=1)
        >>> for step in range(3):
        ...     print(book.new_lanes(steps, step, num_workers=1))
        {0: LaneState(row=0, cursor=0, waiting=()), 1: LaneState(row=7, cursor=9, waiting=())}
        {2: LaneState(row=0, cursor=0, waiting=()), 3: LaneState(row=0, cursor=0, waiting=())}
        {}
        """
        low, high = steps.part(step, self._rank)
        met = self._met.setdefault(step % num_workers, set())
        new = {row % self._num_lanes for row in range(low, min(high, low + self._num_lanes))} - met
        met |= new
        return {lane: self.lanes.get(lane, LaneState()) for lane in sorted(new)}


def lanes_to_json(lanes: Mapping[int, LaneState]) -> list[Any]:
    """Where lanes stand, as JSON values: a list, since torch.distributed.checkpoint reads of a dict the keys it had before."""
    return [[lane, [row, cursor, list(map(list, waiting))]] for lane, (row, cursor, waiting) in sorted(lanes.items())]


def parse_lanes(lanes: Any, num_lanes: int, position: int, *, is_whole: bool = False) -> dict[int, LaneState]:
    """Where lanes stand by a state at a position (of rows); warns if packing again will take long.

    Args:
        lanes: untrusted JSON values, as lanes_to_json makes them.
        num_lanes: number of lanes of the order.
        position: number of rows handed over.
        is_whole: where it lacks lanes, refuse it.

    Raises:
        UsageError: no lane can stand so, or some are lacking.
    """
    parsed: dict[int, LaneState] = {}
    for lane, state in shape(list[tuple[int, LaneState]], lanes, _NO_LANES, UsageError):
        cursors = [cursor for cursor, _ in state.waiting]
        if (
            lane in parsed
            or not 0 <= lane < num_lanes
            or cursors != sorted(set(cursors))
            or max(cursors, default=-1) >= state.cursor
        ):
            raise UsageError(f"{_NO_LANES} (lane {lane} of {num_lanes} stands at {list(state)})")
        parsed[lane] = state
    known = min(num_lanes, position)
    num_behind = sum(parsed.get(lane, LaneState()).row < -((lane - position) // num_lanes) for lane in range(known))
    if num_behind:
        lacking = f"the state does not know where {num_behind:,} of {num_lanes:,} lanes stand"
        merge = "merge the states of all ranks (merge_states, gather_state)"
        if is_whole:
            raise UsageError(f"{lacking}, so nothing that they read can change: {merge}")
        warnings.warn(f"{lacking}: their rows are packed again from where it does, or from the beginning; {merge}", stacklevel=4)
    return parsed


def lanes_of(state: Mapping[str, Any], spec: Mapping[str, Any] | None, num_lanes: int, *, is_whole: bool) -> dict[int, LaneState]:
    """Where lanes stand by a state; none without packing.

    Args:
        state: of the loader, untrusted JSON values.
        spec: how the config makes rows that are packed on the fly; None: it packs none.
        num_lanes, is_whole: see parse_lanes.

    Raises:
        UsageError: the state's rows are made otherwise, or see parse_lanes.
    """
    packing = state.get("packing")
    if (packing is None) != (spec is None):
        raise UsageError(f"the state was saved with packing={packing is not None}, the config has {spec is not None}")
    if spec is None:
        return {}
    saved = packing.get("spec") if isinstance(packing, Mapping) else None
    if not isinstance(packing, Mapping) or not isinstance(saved, Mapping):
        raise UsageError(f"not the state of packed rows: its packing is {str(packing)[:80]}")
    names = [name for name in [*saved, *spec] if saved.get(name) != spec.get(name)]
    if names:
        raise UsageError(
            f"the state was saved with other rows: {names[0]} was {saved.get(names[0])!r}, is {spec.get(names[0])!r}: "
            "keep the settings of the run, or start a new one"
        )
    return parse_lanes(packing.get("lanes"), num_lanes, state["position"], is_whole=is_whole)


def without_excluded(order: SampleOrder, number: int, lane: LaneState) -> LaneState:
    """A lane in whose window samples that are excluded now begin again, as those that stand in for them."""
    cursors = np.array([cursor for cursor, _ in lane.waiting], np.int64)
    excluded = order.is_excluded(order.locate(0, cursors * order.spec.lanes + number)) if len(cursors) else cursors
    waiting = zip(lane.waiting, excluded.tolist(), strict=True)
    return lane._replace(waiting=tuple((cursor, 0 if begins else used) for (cursor, used), begins in waiting))


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state of those that all ranks saved after the same step.

    Needed where rows are packed on the fly, since a rank knows its own lanes only; else all states are equal. Of a lane that
    several know, what is furthest is kept:

    >>> ours, theirs = [[0, [2, 5, []]]], [[0, [0, 0, []]], [1, [1, 3, [[2, 40]]]]]
    >>> merge_states([{"packing": {"lanes": lanes}} for lanes in (ours, theirs)])
    {'packing': {'lanes': [[0, [2, 5, []]], [1, [1, 3, [[2, 40]]]]]}}

    Args:
        states: of all ranks, in any order. With fewer, what the others packed is packed again from where it is known.

    Returns:
        A state for `Loader.load_state_dict` of any rank.

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
        known = sorted(lane for state in states for lane in state["packing"]["lanes"])
        merged["packing"] = {**merged["packing"], "lanes": list(map(list, dict(known).items()))}
    return merged


def _without_lanes(state: Mapping[str, Any]) -> dict[str, Any]:
    packing = state.get("packing")
    return {**state, "packing": None if packing is None else {**packing, "lanes": None}}
