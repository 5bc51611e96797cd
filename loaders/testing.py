"""The resume conformance check: for this project's tests, and for users who build a stage with state of their own.

`check_resume` saves a run at every step, restores each state on every topology, and demands the uninterrupted sequence.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from loaders.config import World


class Stateful(Protocol):
    """What is checked: an iterable over the rest of an epoch that can say and take where it stands."""

    def __iter__(self) -> Iterator[Any]: ...

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Topology(NamedTuple):
    """Under which a run goes on."""

    batch_size: int
    world_size: int = 1
    num_workers: int = 0


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
        make: a fresh stage for one rank, whose epoch loses nothing (last_batch="short").
        topologies: between which runs are moved; the first gives the reference.
        items: what to compare of a batch, in order.
        every: restore only every so many steps.
        merge: makes one state of those of all ranks; None: they must be equal.

    Returns:
        The items of an uninterrupted epoch.

    Raises:
        AssertionError: a restored run differs, ranks disagree on their state or on the number of steps; says where.
    """
    reference, _ = run(make, topologies[0], None, items, merge)
    for before in topologies:
        whole, states = run(make, before, None, items, merge)
        whole = _without_made_up(whole, states, before, reference)
        assert whole == reference, f"{before} reads another sequence than {topologies[0]}: {_difference(whole, reference)}"
        for step in range(0, len(states), every):
            seen, state = states[step]
            for after in topologies:
                rest, its_states = run(make, after, state, items, merge)
                expected = reference[seen:] if seen < len(reference) else None
                rest = _without_made_up(rest, its_states, after, expected)
                assert expected is None or rest == expected, (
                    f"saved under {before} after step {step + 1} ({seen} items), restored under {after}: "
                    f"{_difference(rest, expected)}"
                )
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
        state: to begin from.

    Returns:
        The items in global order, and behind each step how many they were and the state.
    """
    ranks = [make(topology, World(rank=rank, world_size=topology.world_size)) for rank in range(topology.world_size)]
    if state is not None:
        for rank in ranks:
            rank.load_state_dict(json.loads(json.dumps(state)))
    found: list[Any] = []
    states: list[tuple[int, Mapping[str, Any]]] = []
    iterators = [iter(rank) for rank in ranks]
    while True:
        batches = [next(iterator, None) for iterator in iterators]
        ended = [batch is None for batch in batches]
        assert all(ended) or not any(ended), f"{topology}: after {len(states)} steps some ranks have ended and some have not"
        if any(ended):
            break
        found += [item for batch in batches for item in items(batch)]
        saved = [rank.state_dict() for rank in ranks]
        if merge is None:
            assert all(other == saved[0] for other in saved), (
                f"{topology}: ranks disagree on the state after step {len(states) + 1}"
            )
        states.append((len(found), saved[0] if merge is None else merge(saved)))
    for rank in ranks:
        if close := getattr(rank, "close", None):
            close()
    return found, states


def _without_made_up(found: list[Any], states: Sequence[Any], topology: Topology, expected: Sequence[Any] | None) -> list[Any]:
    """Without the next epoch's items, with which a single step of fewer samples than ranks is made up to one for each."""
    return found[: len(expected)] if expected is not None and len(states) == 1 and topology.world_size > 1 else found


def _difference(found: Sequence[Any], expected: Sequence[Any] | None) -> str:
    assert expected is not None
    at = next((at for at, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), None)
    if at is None:
        return f"{len(found)} items instead of {len(expected)}"
    return f"item {at} is {found[at]!r} instead of {expected[at]!r}"
