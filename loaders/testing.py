"""The resume conformance check: for this project's tests, and for users who build a stage with state of their own.

`check_resume` saves a run at every step, restores each state on every topology, and demands the uninterrupted sequence.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from loaders.world import World


class Stateful(Protocol):
    """What is checked: an iterable over the rest of an epoch, with a state that can be saved and restored."""

    def __iter__(self) -> Iterator[Any]: ...

    def state_dict(self) -> Mapping[str, Any]:
        """Where it stands, after the last batch that it gave."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Args:
            state: what `state_dict` gave.
        """
        ...


class Topology(NamedTuple):
    """Settings that may change when a run goes on."""

    batch_size: int
    """Samples of a batch over all ranks."""
    world_size: int = 1
    """Number of ranks."""
    num_workers: int = 0
    """Worker processes of a rank."""


Make = Callable[[Topology, World], Stateful]
Merge = Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]]


def check_resume(
    make: Make,
    topologies: Sequence[Topology],
    *,
    items: Callable[[Any], Iterable[Any]] = lambda batch: batch["__key__"],
    every: int = 1,
    merge: Merge | None = None,
) -> list[Any]:
    """Save at every step under every topology, restore under every other; the sequence must stay what it is.

    Args:
        make: makes a stage for one rank, whose epoch loses nothing (last_batch="short").
        topologies: topologies between which runs are moved; the first gives the reference.
        items: gives what is compared of a batch, in order.
        every: number of steps from one restored state to the next.
        merge: makes one state of those of all ranks; None: they must be equal.

    Returns:
        The items of an uninterrupted epoch.

    Raises:
        AssertionError: a restored run differs, or ranks disagree on their state or on the number of steps; says where. It is
            raised under `python -O` too.
    """
    reference, _ = run(make, topologies[0], None, items, merge)
    begun = make(topologies[0], World()).state_dict()  # the order is that of the first batch size, wherever it goes on
    for before in topologies:
        is_as_first = before.batch_size == topologies[0].batch_size
        whole, states = run(make, before, None if is_as_first else begun, items, merge)
        whole = _without_made_up(whole, states, before, reference)
        _check(whole == reference, f"{before} reads another sequence than {topologies[0]}", whole, reference)
        for step in range(0, len(states), every):
            seen, state = states[step]
            for after in topologies:
                rest, its_states = run(make, after, state, items, merge)
                expected = reference[seen:] if seen < len(reference) else None
                rest = _without_made_up(rest, its_states, after, expected)
                where = f"saved under {before} after step {step + 1} ({seen} items), restored under {after}"
                _check(expected is None or rest == expected, where, rest, expected)
    return reference


def run(
    make: Make,
    topology: Topology,
    state: Mapping[str, Any] | None,
    items: Callable[[Any], Iterable[Any]],
    merge: Merge | None = None,
) -> tuple[list[Any], list[tuple[int, Mapping[str, Any]]]]:
    """All ranks of a topology in step, to the end of the epoch.

    Args:
        make, topology, items, merge: see check_resume.
        state: state to begin from; None for the beginning.

    Returns:
        The items in global order, and (number of items, state) after each step.

    Raises:
        AssertionError: ranks disagree on their state or on the number of steps.
    """
    ranks = [make(topology, World(rank=rank, world_size=topology.world_size)) for rank in range(topology.world_size)]
    if state is not None:
        for rank in ranks:
            rank.load_state_dict(json.loads(json.dumps(state)))
    collected: list[Any] = []
    states: list[tuple[int, Mapping[str, Any]]] = []
    iterators = [iter(rank) for rank in ranks]
    while True:
        batches = [next(iterator, None) for iterator in iterators]
        ended = [batch is None for batch in batches]
        _check(all(ended) or not any(ended), f"{topology}: after {len(states)} steps some ranks have ended and some have not")
        if any(ended):
            break
        collected += [item for batch in batches for item in items(batch)]
        saved = [rank.state_dict() for rank in ranks]
        if merge is None:
            is_same = all(other == saved[0] for other in saved)
            _check(is_same, f"{topology}: ranks disagree on the state after step {len(states) + 1}")
        states.append((len(collected), saved[0] if merge is None else merge(saved)))
    for rank in ranks:
        if close := getattr(rank, "close", None):
            close()
    return collected, states


def _without_made_up(seen: list[Any], states: Sequence[Any], topology: Topology, expected: Sequence[Any] | None) -> list[Any]:
    """Without the next epoch's items, with which a single step of fewer samples than ranks is made up to one for each."""
    return seen[: len(expected)] if expected is not None and len(states) == 1 and topology.world_size > 1 else seen


def _check(is_good: bool, what: str, seen: Sequence[Any] = (), expected: Sequence[Any] | None = None) -> None:
    """Raise AssertionError unless it is good, with the first item that differs: `assert` is void under `python -O`."""
    if is_good:
        return
    if expected is not None:
        pairs = enumerate(zip(seen, expected, strict=False))
        number = next((number for number, pair in pairs if pair[0] != pair[1]), None)
        what += (
            f": {len(seen)} items instead of {len(expected)}"
            if number is None
            else f": item {number} is {seen[number]!r} instead of {expected[number]!r}"
        )
    raise AssertionError(what)
