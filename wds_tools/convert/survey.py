"""A look at the first records of an input, before anything is written: which field is what, and what would go wrong.

    first tasks -> NUM_RECORDS records, or NUM_UNITS of them -> converter.roles(fields) -> Survey -> two lines, or a UsageError

A record with two images, or with one that nobody uses, stops the run here; later it is a reject. So does a field that an option
names and no record has; it is looked for in the first records of MAX_TASKS tasks, spread over the input.
Invariant: a function of the input and the options. Cost: these records are read twice; their images are not looked at.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final

from wds_tools.errors import Reject, UsageError
from wds_tools.records.field_map import TEXT_NAMES
from wds_tools.records.fields import value_of
from wds_tools.sources.record import Record

NUM_RECORDS: Final = 1000
NUM_UNITS: Final = 32 << 20
"""Of large records fewer are read: so many bytes of the input, as most sources count them."""
MAX_TASKS: Final = 100
_STOPS: Final = ("unused_image", "ambiguous_fields")
_MAX_DEPTH: Final = 3
_MAX_SHOWN: Final = 24
_MAX_FIELDS: Final = 1000
_MAX_CHARACTERS: Final = 60

Read = Callable[[Any], Iterator[Record[Mapping[str, Any]]]]
Roles = Callable[[Mapping[str, Any]], Mapping[str, str]]


@dataclass
class Survey:
    """What the first records hold."""

    roles_of: Roles
    """The converter's."""
    wanted: set[tuple[str, str]] = field(default_factory=set)
    """(option, field) of fields that an option names and no record had yet."""
    num_records: int = 0
    """Records that were looked at; those that can't be read, too."""
    num_units: int = 0
    """Work units of these."""
    fields: dict[str, Counter[str]] = field(default_factory=dict)
    """Name of a field, also of one inside an object -> records by the type that it has."""
    examples: dict[str, str] = field(default_factory=dict)
    """Name -> the first value that is not null, in short."""
    roles: dict[str, Counter[str]] = field(default_factory=dict)
    """Role -> field that has it -> in how many records."""
    passed_over: Counter[str] = field(default_factory=Counter)
    """Other fields that are known to hold texts."""
    rejects: Counter[str] = field(default_factory=Counter)
    """Records that can't be read, or whose roles are not clear, by reason."""
    problem: str | None = None
    """Why the run has to stop before it writes."""

    def add(self, record: Record[Mapping[str, Any]]) -> None:
        """Count a record."""
        self.num_records += 1
        self.num_units += record.num_units
        fields = record.fields
        try:
            if isinstance(fields, Reject):
                raise fields
            for name, value in islice(values_of(fields), _MAX_FIELDS):
                if name in self.fields or len(self.fields) < _MAX_FIELDS:
                    self.fields.setdefault(name, Counter())[type(value).__name__] += 1
                    if value is not None and name not in self.examples:
                        self.examples[name] = shown(value)
            self.look_for(fields)
            roles = self.roles_of(fields)
        except Reject as cause:
            if cause.reason in _STOPS:
                self.problem = self.problem or f"{place_of(record)}: {cause.detail}"
            self.rejects[cause.reason] += 1
            return
        for role, name in roles.items():
            self.roles.setdefault(role, Counter())[name] += 1
        if "text" in roles:
            used = {*roles.values()}
            self.passed_over.update(name for name in TEXT_NAMES if name not in used and type(value_of(fields, name)) is str)

    def look_for(self, fields: Mapping[str, Any]) -> None:
        """Take what this record has off `wanted`."""
        self.wanted -= {want for want in self.wanted if want[1] in fields or value_of(fields, want[1]) is not None}

    def check(self) -> None:
        """Raise UsageError if no record has a field that is named, an image would be left over, or fields are ambiguous."""
        for option, name in sorted(self.wanted) if self.fields else ():  # else there is no record at all
            if option == "--keep":
                continue
            near = difflib.get_close_matches(name, self.fields, 3, 0.5)
            meant = f": did you mean {' or '.join(near)}? The" if near else "; the"
            known = ", ".join(list(self.fields)[:_MAX_SHOWN])[:600]
            raise UsageError(f"{option}: none of the first records has a field {name}{meant} fields are: {known}")
        if self.problem is not None:
            raise UsageError(self.problem)

    def field_map(self) -> str:
        """One line: which field is what."""
        parts = []
        for role, names in self.roles.items():
            shown = [name if len(names) == 1 else f"{name} ({count:,})" for name, count in names.most_common(_MAX_SHOWN)]
            passed = [name for name in self.passed_over if name not in names] if role == "text" else []
            parts.append(f"{role} = {', '.join(shown)}" + (f" ({', '.join(passed)} passed over)" if passed else ""))
            if role in ("image", "text") and (without := self.num_usable - names.total()):
                parts[-1] += f", {without:,} of the first {self.num_usable:,} records without"
        if absent := sorted(name for option, name in self.wanted if option == "--keep"):
            parts.append(f"no {', '.join(absent)} to keep in the first records")
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.rejects.items())
        return "; ".join(parts) or f"none of the first {self.num_records:,} records can be used ({reasons or 'no known field'})"

    @property
    def is_enough(self) -> bool:
        """Whether no more records are to be looked at."""
        return self.num_records >= NUM_RECORDS or self.num_units >= NUM_UNITS

    @property
    def num_usable(self) -> int:
        """Records whose roles are clear."""
        return self.num_records - self.rejects.total()


def survey_records(read: Read, tasks: Sequence[Any], roles: Roles, named: Mapping[str, Iterable[str]]) -> Survey:
    """Look at the first records.

    Args:
        read: the source's.
        tasks: of the whole input.
        roles: the converter's.
        named: option -> fields that it names.
    """
    survey = Survey(roles, {(option, name) for option, names in named.items() for name in names})
    num_tasks = 0
    for task in tasks:
        if survey.is_enough:
            break
        num_tasks += 1
        for record in read(task):
            survey.add(record)
            if survey.is_enough:
                break
    for task in tasks[num_tasks :: max(1, (len(tasks) - num_tasks) // MAX_TASKS)][:MAX_TASKS]:
        for record in islice(read(task), NUM_RECORDS if survey.wanted else 0):
            if not isinstance(record.fields, Reject):
                survey.look_for(record.fields)
    return survey


def place_of(record: Record[Any]) -> str:
    """Where a record stands, for a message."""
    places = {"line": record.line, "element": record.element, "key": record.key}
    return ", ".join([record.source, *(f"{name} {place}" for name, place in places.items() if place is not None)])


def values_of(fields: Mapping[str, Any], depth: int = _MAX_DEPTH) -> Iterator[tuple[str, Any]]:
    """(name, value) of all fields, with those inside objects."""
    for name, value in fields.items():
        yield name, value
        if isinstance(value, Mapping) and depth:
            yield from ((f"{name}.{inner}", content) for inner, content in values_of(value, depth - 1))


def shown(value: Any) -> str:
    """A value, or the beginning of it."""
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    if isinstance(value, Mapping):
        return "{" + ", ".join(value) + "}"
    text = repr(value[:_MAX_CHARACTERS] if isinstance(value, str | list) else value)
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]} ..."
