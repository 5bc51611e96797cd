"""JSON that anybody may have written, as a value of a type: how manifests, indices, working files, states, receipts are read.

    bytes -> read_json(kind, ...) -> orjson -> shape(kind, value, ...) -> a value of that kind

A kind is a type: a dataclass, by the names and types of its fields; a NamedTuple, as the list of them; a mapping, list or tuple
of kinds; Literal, unions, bool, str, float (JSON has finite ones only), int (64 bits), Annotated[int, range(...)] such as Count;
Any, MAX_DEPTH levels of it. An object may have more fields than its dataclass: later releases add some, and hashes find those
that damage made.
Invariant: what is not of the kind is one error of this project that names document, field, value and what was expected.
Cost: two to three times what orjson and the dataclasses take by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Hashable, Iterable, Mapping
from dataclasses import MISSING, fields
from functools import cache, partial
from itertools import repeat
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import orjson

from wds_tools.errors import FormatError, UsageError, WdsToolsError

MAX_DEPTH = 100
"""Lists and objects in one another. Python and orjson go further, but not much."""
MAX_BYTES = 1 << 30
Count = Annotated[int, range(1 << 53)]
"""What every JSON reader keeps exact."""
_WORD = range(-(1 << 63), 1 << 64)
_SHOWN_CHARS = 80
_OBJECTS = dict, Mapping
_PLAIN: dict[Any, tuple[tuple[type, ...], str]] = {
    str: ((str,), "text"),
    bool: ((bool,), "true or false"),
    NoneType: ((NoneType,), "null"),
    float: ((float, int), "a number"),
}
_SCALARS = frozenset((str, int, float, bool, NoneType))
_Kind = TypeVar("_Kind")
_Read = Callable[[Any], Any]


def read_json(kind: type[_Kind], data: bytes | memoryview | str, what: str, error: type[WdsToolsError] = FormatError) -> _Kind:
    """The value of this kind that a JSON document holds.

    Args:
        kind: see the module.
        data: the document.
        what: how the message begins, such as "m.json: not a manifest".
        error: what is raised.

    Raises:
        WdsToolsError: of the class `error`: this is no JSON, larger than MAX_BYTES, or not of the kind.
    """
    if len(data) > MAX_BYTES:
        raise error(f"{what} (it has {len(data):,} bytes, at most {MAX_BYTES:,} are read)")
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as cause:
        raise error(f"{what} (no JSON: {cause})") from cause
    return shape(kind, value, what, error)


def shape(kind: type[_Kind], value: Any, what: str, error: type[WdsToolsError] = FormatError, way: str = "") -> _Kind:
    """The same of a value that was parsed already, such as a state in a checkpoint; `way`: to it in its document."""
    try:
        shaped: _Kind = _reader(cast(Hashable, kind))(value)
    except _Odd as odd:
        raise error(f"{what} ({odd.inside(way)})") from odd.__cause__
    return shaped


class _Odd(Exception):
    """A value is not of its kind. Each container that the error leaves puts the way to it in front."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.way = ""

    def inside(self, step: str) -> _Odd:
        self.way = step + self.way
        return self

    def __str__(self) -> str:
        return f"{self.way.removeprefix('.') or 'it'} {self.args[0]}"


def _expected(what: str, value: Any) -> _Odd:
    is_shown = type(value) in _SCALARS and (type(value) is not int or value in _WORD)
    text = repr(value[:_SHOWN_CHARS] if isinstance(value, str) else value) if is_shown else f"a {type(value).__name__}"
    return _Odd(f"is {text}, expected {what}")


@cache
def _reader(kind: Any) -> _Read:
    """What reads a value of this kind, or raises _Odd."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return _any
    if kind in _PLAIN:
        return partial(_scalar, types=_PLAIN[kind][0], what=_PLAIN[kind][1])
    if origin is Annotated or kind is int:
        allowed = args[1] if args else _WORD
        return partial(_scalar, types=(int,), what=f"a whole number from {allowed[0]} to {allowed[-1]}", allowed=allowed)
    if origin is Literal:
        return partial(_scalar, types=tuple(map(type, args)), what=" or ".join(map(repr, args)), allowed=args)
    if origin in (Union, UnionType):
        return partial(_union, readers=tuple(map(_reader, args)))
    if origin is tuple and args[-1] is not Ellipsis:
        return partial(_tuple, readers=tuple(map(_reader, args)))
    if origin in (list, tuple):
        return partial(_items, make=origin, read=_reader(args[0]))
    if origin in (dict, Mapping):
        return partial(_mapping, read=_reader(args[1]))
    hints = get_type_hints(kind, include_extras=True)
    if hasattr(kind, "_make"):  # a NamedTuple
        return partial(_tuple, readers=tuple(map(_reader, hints.values())), make=kind._make)
    required = frozenset(entry.name for entry in fields(kind) if entry.default is MISSING and entry.default_factory is MISSING)
    return partial(_record, kind=kind, readers={name: _reader(hint) for name, hint in hints.items()}, required=required)


def _scalar(value: Any, types: tuple[type, ...], what: str, allowed: Container[Any] | None = None) -> Any:
    if type(value) not in types or (allowed is not None and value not in allowed):
        raise _expected(what, value)
    return value


def _union(value: Any, readers: tuple[_Read, ...]) -> Any:
    for read in readers[1:]:
        try:
            return read(value)
        except _Odd:
            pass
    return readers[0](value)  # whose error is worth most: the others are such as None


def _tuple(value: Any, readers: tuple[_Read, ...], make: _Read = tuple) -> Any:
    if not isinstance(value, list | tuple) or len(value) != len(readers):
        raise _expected(f"a list of {len(readers)} values", value)
    return make(_each(readers, value))


def _items(value: Any, make: type, read: _Read) -> Any:
    if not isinstance(value, list | tuple):
        raise _expected("a list", value)
    return make(_each(repeat(read), value))


def _mapping(value: Any, read: _Read) -> Any:
    if not isinstance(value, _OBJECTS) or not all(type(name) is str for name in value):
        raise _expected("an object", value)
    return dict(zip(value, _each(repeat(read), value.values(), value), strict=True))


def _record(value: Any, kind: Any, readers: Mapping[str, _Read], required: frozenset[str]) -> Any:
    if not isinstance(value, _OBJECTS):
        raise _expected("an object", value)
    names: Collection[str] = readers
    reads: Iterable[_Read] = readers.values()
    if value.keys() != readers.keys():
        names = [name for name in readers if name in value or name in required]
        reads = [readers[name] if name in value else _missing for name in names]
    items = _each(reads, map(value.get, names), names)
    try:
        return kind(**dict(zip(names, items, strict=True)))
    except UsageError as cause:
        raise _Odd(f"can't be meant: {cause}") from cause


def _missing(_: Any) -> Any:
    raise _Odd("is missing")


def _each(readers: Iterable[_Read], items: Iterable[Any], names: Collection[str] | None = None) -> list[Any]:
    """Each item, read by its reader. The error of one says which: its name, or by default its number."""
    done: list[Any] = []
    try:
        for read, item in zip(readers, items, strict=False):
            done.append(read(item))
    except _Odd as odd:
        number = len(done)
        raise odd.inside(f"[{number}]" if names is None else f".{list(names)[number][:_SHOWN_CHARS]}")  # noqa: B904 (it is the same error)
    return done


def _any(value: Any, left: int = MAX_DEPTH) -> Any:
    if isinstance(value, dict | list | tuple):
        if not left:
            raise _Odd(f"is nested deeper than {MAX_DEPTH} levels")
        for item in value.values() if isinstance(value, dict) else value:
            if type(item) is not str:
                _any(item, left - 1)
    elif type(value) not in _SCALARS or (type(value) is int and value not in _WORD):
        raise _expected("a JSON value", value)
    return value
