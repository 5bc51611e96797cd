"""check_resume passes what resumes exactly, and says where anything else goes wrong, under `python -O` too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from loaders import World
from loaders import testing as checks


class Numbers:
    """The numbers 0 ... 11 in batches, with a fault."""

    def __init__(self, topology: checks.Topology, world: World, fault: str) -> None:
        self.size, self.world, self.fault = topology.batch_size, world, fault
        self.position = 0

    def __iter__(self) -> Iterator[list[int]]:
        stop = 12 - self.size * (self.fault == "a rank ends early") * self.world.rank
        while self.position < stop:
            begin, self.position = self.position, self.position + self.size
            numbers = range(begin, min(self.position, 12))
            share = self.size // self.world.world_size
            yield list(numbers[share * self.world.rank : share * (self.world.rank + 1)])

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "rank": self.world.rank if self.fault == "a state of a rank" else 0}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position = state["position"] + self.size * (self.fault == "a step is lost")


def check(fault: str, functions: Mapping[str, Any]) -> list[int]:
    topologies = [checks.Topology(4), checks.Topology(4, 2), checks.Topology(2, 2)]
    found: list[int] = functions["check_resume"](
        lambda topology, world: Numbers(topology, world, fault), topologies, items=lambda batch: batch
    )
    return found


def test_a_stage_that_resumes_exactly_gives_its_items() -> None:
    assert check("none", vars(checks)) == list(range(12))


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("a step is lost", r"saved under .* after step 1 \(4 items\), restored under .*: item 0 is 8 instead of 4"),
        ("a state of a rank", "ranks disagree on the state after step 1"),
        ("a rank ends early", "after 1 steps some ranks have ended and some have not"),
    ],
)
@pytest.mark.parametrize("optimize", [0, 1])
def test_a_stage_that_does_not_is_told_where(fault: str, says: str, optimize: int) -> None:
    path = Path(checks.__file__)
    functions: dict[str, Any] = {"__name__": "optimized"}
    exec(compile(path.read_text(), path, "exec", optimize=optimize), functions)  # noqa: S102 (the module as python -O has it)
    with pytest.raises(AssertionError, match=says):
        check(fault, functions)
