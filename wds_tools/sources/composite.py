"""The source of every conversion: files of any kind, each recognised by its content, -> tasks -> records.

    files -> detect -> runs of one kind -> plain lines and lists: ranges | else: units of a container, grouped -> read(task)

A task takes --task-lines lines of a plain file; of a JSON list --task-records elements; of all else consecutive units (files,
tars, row groups) until it has --task-records records, where the container says how many, or --task-bytes bytes of input,
whichever comes first, or one unit that is larger. Work units are bytes. What a folder holds beside its data is left out.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from wds_tools.dataset.layout import MANIFEST, PLAN, REMOVABLE
from wds_tools.errors import NotFound, Reject, UsageError
from wds_tools.sources.containers import Container, Unit
from wds_tools.sources.detect import SUFFIXES, Kind, detect, is_candidate
from wds_tools.sources.folders import Folders, companions, named_by_records, pictures_of
from wds_tools.sources.record import InputFile, Record, group_to_limits
from wds_tools.sources.tables import ARROW, Tables, saved_files
from wds_tools.sources.tars import Tars
from wds_tools.sources.text.compressed import TextFiles
from wds_tools.sources.text.elements import ElementRange, plan_list, read_elements
from wds_tools.sources.text.lines import LineRange, plan_lines, read_lines
from wds_tools.sources.text.objects import fields_of
from wds_tools.storage import join
from wds_tools.terminal import counted

_WRITTEN = re.compile(rf"(?<![^/])({REMOVABLE.pattern})$")
_OF_DATASETS = re.compile(r"(?<![^/])(data-\d+-of-\d+|cache-[^/]*|tmp[^/]*)\.arrow$")
"""Arrow files that `datasets` writes: parts of a save_to_disk, which its state.json names, and copies."""

KEY = "__key__"
"""Field with the key of a record whose container has keys, as webdataset calls it."""


def container_of(kind: Kind, columns: tuple[str, ...] | None = None) -> Container:
    """What reads files of a kind, of tables these columns; but for plain lines and lists, which are cut into ranges."""
    match kind.name:
        case "parquet" | "arrow":
            return Tables(columns)
        case "tar":
            return Tars(kind.compression)
        case "image":
            return Folders()
        case name:
            return TextFiles(name, kind.compression)


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
    columns: tuple[str, ...] | None = None
    """Of tables, the columns that are read; see Tables."""

    def choose(self, url: str, sizes: Mapping[str, int]) -> Sequence[str]:
        """See Source: all files of all containers, in the order of their names."""
        names = sorted(_without_datasets(url, sizes))
        saved = saved_files(url, {name: sizes[name] for name in names})
        states = {posixpath.dirname(state) for state in saved}
        pictures = pictures_of(names)
        passed_over = pictures | companions(names, pictures)
        candidates = [
            name
            for name in names
            if name not in passed_over
            and is_candidate(name)
            and not (name.lower().endswith(ARROW) and (posixpath.dirname(name) in states or _OF_DATASETS.search(name)))
        ]

        def kinds_of(names: Sequence[str]) -> Iterator[tuple[str, Kind]]:
            return zip(names, detect([InputFile(join(url, name), sizes[name]) for name in names]), strict=True)

        data = {name for name, kind in kinds_of(candidates) if not kind.is_other}
        named = named_by_records(pictures, data)
        lists = [name for name, kind in kinds_of([*filter(is_candidate, named)]) if kind.name == "list"]  # named as an image is
        data.update(pictures - named, lists)
        chosen = [*sorted(data), *(name for state in sorted(saved) for name in saved[state])]  # these in the order of their rows
        if not chosen:
            others = f"; what is there: {counted(len(sizes), 'other file')}, such as {min(sizes)}" if sizes else ""
            if any(name.endswith(ARROW) for name in sizes):
                others = ": an unfinished save_to_disk: there is no state.json"
            raise NotFound(f"{url}: no such file or folder, or one without images, *{', *'.join(SUFFIXES)}{others}")
        return chosen

    def plan(self, files: Sequence[InputFile]) -> tuple[Sequence[LineRange | Units], int]:
        """See Source. Tasks, and bytes over all of them.

        Raises:
            UsageError: a file is nothing that can be read, or nothing that is known.
            FormatError: a JSON list breaks off.
        """
        kinds = detect(files, dict.fromkeys(pictures_of([file.url for file in files]), Kind("image")))
        problems = [f"{file.url} is {kind.problem}" for file, kind in zip(files, kinds, strict=True) if kind.problem]
        if problems:
            more = f" (and {counted(len(problems) - 1, 'more file')} can't be read)" if len(problems) > 1 else ""
            raise UsageError(problems[0] + more)
        tasks: list[LineRange | Units] = []
        for kind, pairs in groupby(zip(kinds, files, strict=True), lambda pair: pair[0]):
            tasks += self._plan_run(kind, [file for _, file in pairs])
        return tasks, sum(file.size for file in files)

    def read(self, task: LineRange | Units) -> Iterator[Record[Mapping[str, Any]]]:
        """See Source."""
        if isinstance(task, Units):
            container = container_of(Kind(task.kind, task.compression), self.columns)
            first = 0
            for unit in task.units:
                number = first
                for record in container.read(unit):
                    number = first + record.number
                    if record.key is not None and not isinstance(record.fields, Reject):
                        record = record._replace(fields={**record.fields, KEY: record.key})
                    yield Record(number, *record[1:]) if first else record
                    number += 1
                first = number
            return
        is_list = isinstance(task, ElementRange)
        for line in read_elements(task) if isinstance(task, ElementRange) else read_lines(task):
            number, num_bytes = line.number - task.first_line, len(line.data or b"") + 1
            line_number, element = (None, line.number) if is_list else (line.number, None)
            yield Record(number, fields_of(line), task.url, line_number, element, num_units=num_bytes)

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


def _without_datasets(url: str, sizes: Mapping[str, int]) -> Iterator[str]:
    """The files of a folder but for hidden ones, and those of datasets that this project wrote below it.

    Raises:
        UsageError: the folder itself is such a dataset.
    """
    written = {name[: match.start()] for name in sizes if (match := _WRITTEN.search(name))}
    roots = {root for root in written if f"{root}{MANIFEST}" in sizes or f"{root}{PLAN}" in sizes}
    if "" in roots:
        raise UsageError(f"{url} is a dataset of wds-tools: it goes into `wds-tools encode`, `select`, `pack` or `export`")
    for name in sizes:
        if not any(part.startswith(".") for part in name.split("/")) and not any(name.startswith(root) for root in roots):
            yield name
