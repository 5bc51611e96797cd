"""The seam between containers and converters: a `Source` turns files into tasks, and a task into records.

    files -> plan -> tasks -> read(task) -> Record(fields | Reject) -> a converter, see `wds_tools.jobs.records`

Every source works with every converter. Sources of other packages are entry points of the group `wds_tools.sources`: callables
without arguments that return a `Source`. Invariant: the same files give the same tasks, and a task always the same records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from wds_tools.errors import Reject

Fields = TypeVar("Fields")
Item = TypeVar("Item")


class InputFile(NamedTuple):
    """One file to read."""

    url: str
    """Where it is."""
    size: int
    """Its bytes."""


class Record(NamedTuple, Generic[Fields]):
    """One record of a task, and its place: a line, an element of a JSON list (from 0), or a key of the source."""

    number: int
    """Number in its task, from 0; part of the sample's key. Increases from record to record, perhaps with gaps."""
    fields: Fields | Reject
    """Content, or the reason why there is none."""
    source: str
    """URL of the file."""
    line: int | None = None
    """Its line, from 1."""
    element: int | None = None
    """Its element of a JSON list, or row of a table, from 0."""
    key: str | None = None
    """Its key in the source."""
    num_units: int = 1
    """Work units of the plan's total that are done with this record."""
    num_passed_over: int = 0
    """What lay before it, or behind the last, and is no part of any record: stray members of a tar."""


class Source(Protocol):
    """Reads one kind of container. A value that is pickled to workers."""

    def choose(self, url: str, sizes: Mapping[str, int]) -> Sequence[str]:
        """The names of the files of a folder that are inputs.

        Args:
            url: the folder.
            sizes: name -> bytes of the files below it.

        Raises:
            NotFound: there are none.
        """
        ...

    def plan(self, files: Sequence[InputFile]) -> tuple[Sequence[Any], int]:
        """Cut the inputs into tasks.

        Args:
            files: those that are named, and those of `choose`.

        Returns:
            (tasks, work units over all of them). A task can be pickled and written as JSON.

        Raises:
            UsageError: a file is of another kind.
        """
        ...

    def read(self, task: Any) -> Iterator[Record[Mapping[str, Any]]]:
        """The records of a task, in order; one that is unreadable has a Reject for its fields.

        Args:
            task: one that `plan` made.
        """
        ...


def file_records(
    url: str, numbered: Iterable[tuple[int, Mapping[str, Any] | Reject, int]]
) -> Iterator[Record[Mapping[str, Any]]]:
    """The records of one file; if `numbered` raises a Reject, the file is damaged, and the last record is that reject.

    Args:
        url: the file.
        numbered: (number in the file from 1, fields, work units) of each record.
    """
    line, number = 0, -1
    try:
        for number, (line, fields, num_units) in enumerate(numbered):
            yield Record(number, fields, url, line, None, None, num_units)
    except Reject as cause:
        yield Record(number + 1, cause, url, line=line + 1, num_units=0)


def group_to_limits(items: Iterable[Item], sizes: Callable[[Item], Sequence[int]], limits: Sequence[int]) -> Iterator[list[Item]]:
    """Cut items into runs whose sizes add up to each of `limits` at most; a larger item is a run of its own."""
    group: list[Item] = []
    held = [0] * len(limits)
    for item in items:
        held = [total + size for total, size in zip(held, sizes(item), strict=True)]
        if group and any(total > limit for total, limit in zip(held, limits, strict=True)):
            yield group
            group, held = [], [*sizes(item)]
        group.append(item)
    if group:
        yield group
