"""What a container is to the source of every conversion: units of files, and the records of one unit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from wds_tools.sources.record import InputFile, Record


@dataclass(frozen=True)
class Unit:
    """What a task takes whole: a file, or some row groups of one. Can be pickled and written as JSON."""

    url: str
    """The file; of several, the folder."""
    num_bytes: int
    """Bytes of input, for progress and for the size of tasks."""
    num_records: int | None = None
    """Records in it, if the container says so before it is read."""
    place: tuple[Any, ...] = ()
    """Where in the file, in JSON values that the container understands, such as numbers of row groups."""


class Container(Protocol):
    """Reads files of one kind. A value that is pickled to workers."""

    def units(self, files: Sequence[InputFile]) -> Iterator[Unit]:
        """Cut files into units, in order.

        Args:
            files: of this kind.

        Raises:
            UsageError: a file can't be read at all, for a reason that the user has to know before anything is written.
        """
        ...

    def read(self, unit: Unit) -> Iterator[Record[Mapping[str, Any]]]:
        """The records of a unit, numbered from 0; one that is unreadable has a Reject for its fields.

        Damage costs what lies behind it in the unit: the last record is then the reject that says where it begins.
        """
        ...
