"""The source of every conversion: files of any kind, each recognised by its content, -> tasks -> records.

    files -> detect -> runs of one kind -> plain lines and lists: ranges | else: units of a container, grouped -> read(task)

A task takes --task-lines lines of a plain file; of a JSON list --task-records elements; of all else consecutive units (files,
tars, row groups) until it has --task-records records, where the container says how many, or --task-bytes bytes of input,
whichever comes first, or one unit that is larger. Work units are bytes. What a folder holds beside its data is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from wds_tools.dataset.layout import IS_REJECTS_FILE
from wds_tools.errors import NotFound, UsageError
from wds_tools.sources.containers import Container, Unit
from wds_tools.sources.detect import SUFFIXES, Kind, detect, suffix_of
from wds_tools.sources.record import InputFile, Record, group_to_limits
from wds_tools.sources.tables import ARROW, Tables, saved_files
from wds_tools.sources.text.compressed import TextFiles
from wds_tools.sources.text.elements import ElementRange, plan_list, read_elements
from wds_tools.sources.text.lines import LineRange, plan_lines, read_lines
from wds_tools.sources.text.objects import fields_of
from wds_tools.storage import join


def container_of(kind: Kind) -> Container:
    """What reads files of a kind, but for plain lines and lists, which are cut into ranges."""
    return Tables() if kind.name in ("parquet", "arrow") else TextFiles(kind.name, kind.compression)


@dataclass(frozen=True)
class Units:
    """A task: consecutive units of one kind."""

    kind: str
    compression: str
    units: tuple[Unit, ...]


@dataclass(frozen=True)
class Containers:
    """Source of files of any kind."""

    task_lines: int
    task_records: int
    task_bytes: int
    quiet: bool

    def choose(self, url: str, sizes: Mapping[str, int]) -> Sequence[str]:
        """See Source: all files of all containers, in the order of their names."""
        saved = saved_files(url, sizes)
        chosen = sorted(name for name in sizes if _is_candidate(name))
        kinds = detect([InputFile(join(url, name), sizes[name]) for name in chosen])
        chosen = [name for name, kind in zip(chosen, kinds, strict=True) if not kind.is_other]
        for state in sorted(saved):  # in the order of their rows
            chosen += saved[state]
        if not chosen:
            others = f"; there are {len(sizes)} other files, such as {min(sizes)}" if sizes else ""
            if any(name.endswith(ARROW) for name in sizes):
                others = ": an unfinished save_to_disk: there is no state.json"
            raise NotFound(f"{url}: no such file, and under a folder of that name no *{', *'.join(SUFFIXES)}{others}")
        return chosen

    def plan(self, files: Sequence[InputFile]) -> tuple[Sequence[LineRange | Units], int]:
        """See Source. Tasks, and bytes over all of them.

        Raises:
            UsageError: a file is nothing that can be read.
            FormatError: a JSON list breaks off.
        """
        kinds = detect(files)
        for file, kind in zip(files, kinds, strict=True):
            if kind.problem:
                raise UsageError(f"{file.url} is {kind.problem}")
        tasks: list[LineRange | Units] = []
        for kind, pairs in groupby(zip(kinds, files, strict=True), lambda pair: pair[0]):
            tasks += self._plan_run(kind, [file for _, file in pairs])
        return tasks, sum(file.size for file in files)

    def read(self, task: LineRange | Units) -> Iterator[Record[Mapping[str, Any]]]:
        """See Source."""
        if isinstance(task, Units):
            container = container_of(Kind(task.kind, task.compression))
            first = 0
            for unit in task.units:
                number = first
                for record in container.read(unit):
                    number = first + record.number
                    yield record._replace(number=number)
                    number += 1
                first = number
        elif isinstance(task, ElementRange):
            for line in read_elements(task):
                number, num_bytes = line.number - task.first_line, len(line.data or b"") + 1
                yield Record(number, fields_of(line), task.url, element=line.number, num_units=num_bytes)
        else:
            for line in read_lines(task):
                number, num_bytes = line.number - task.first_line, len(line.data or b"") + 1
                yield Record(number, fields_of(line), task.url, line=line.number, num_units=num_bytes)

    def _plan_run(self, kind: Kind, files: Sequence[InputFile]) -> Sequence[LineRange | Units]:
        if kind == Kind("lines"):
            return plan_lines(files, self.task_lines, quiet=self.quiet)
        if kind == Kind("list"):
            return [span for file in files for span in plan_list(file, self.task_records)]
        units = container_of(kind).units(files)
        limits = (self.task_records, self.task_bytes)
        groups = group_to_limits(units, lambda unit: (unit.num_records or 0, unit.num_bytes), limits)
        return [Units(kind.name, kind.compression, tuple(group)) for group in groups]


def kind_of_task(task: Any) -> str:
    """What the files of a task are; of the task of another source its name."""
    if isinstance(task, Units):
        return f"{task.kind}.{task.compression}" if task.compression else task.kind
    return "list" if isinstance(task, ElementRange) else "lines" if isinstance(task, LineRange) else type(task).__name__


def _is_candidate(name: str) -> bool:
    kind, compression = suffix_of(name)
    hidden = any(part.startswith(".") for part in name.split("/"))
    return bool(kind or compression) and kind != "arrow" and not hidden and not IS_REJECTS_FILE.search(name)
