"""A command's config is its command line: the fields of a frozen dataclass are the options, and the words under them the help.

    Config -> options_of -> Option ... -> parse: arguments -> Config
                                       -> help_of: the lines of --help; `completion` makes its script of them too

The type of a field says what may follow: str, int, float, Literal, nothing (bool), `X | None`, tuple[X, ...], tuple[X, X].
Invariant: no list of commands or options is kept here. What a class of fields is about, its `help_group` says, once for all
commands that have them; what has to be given comes first. Cost: only --help reads source files, for the words.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import shutil
import textwrap
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from wds_tools.errors import UsageError, meant
from wds_tools.plugins import Names

T = TypeVar("T")
_POSITIONAL = object()
Positional = Annotated[T, _POSITIONAL]
"""The type of a field that stands without an option in front."""
_LAST_GROUPS = ("input", "images", "encoding", "output", "workers and machines", "messages")
"""Groups of several commands in the order of --help; those of one command come before them."""
_EXPECTED = {int: "a whole number", float: "a number"}
_COLUMN, _WIDEST = 24, 100


@dataclass(frozen=True)
class Named:
    """In the type of a field: what its option is called, where that is no name in Python."""

    name: str


@dataclass(frozen=True)
class Option:
    """A field of a config, as the command line has it."""

    name: str
    """Of the field."""
    flag: str
    """What it is called: --image-root, or INPUT if it stands without an option."""
    kind: Any
    """Type of the value of a word; bool: no word follows."""
    choices: tuple[str, ...]
    """The words that it takes, if not any."""
    known: Names | None
    """Names that it may take beside other words, if there is such a list."""
    count: int | str | None
    """Words that make a value: a number, "*" for any, None for one that is no tuple."""
    default: Any
    """Of the field; None if it has to be given."""
    is_required: bool
    """Whether it has to be given."""
    group: str
    """Heading in the help."""

    @property
    def is_positional(self) -> bool:
        """Whether it stands without an option in front."""
        return not self.flag.startswith("-")

    @property
    def invocation(self) -> str:
        """How it is written: `--image-root ROOT ...`."""
        word = {int: "N", float: "X"}.get(self.kind, self.name.rpartition("_")[2].upper())
        word = "{" + ",".join(self.choices) + "}" if self.choices else word
        words = f"{word} ..." if self.count == "*" else " ".join([word] * int(self.count or 1))
        return words if self.is_positional else self.flag if self.kind is bool else f"{self.flag} {words}"

    def value(self, words: Any) -> Any:
        """The value of what was given: a word, or several, or True. Raises UsageError: there is none."""
        return tuple(map(self._one, words)) if self.count else self._one(words)

    def _one(self, word: Any) -> Any:
        try:
            if word in self.choices or not self.choices:
                return self.kind(word)
        except ValueError:
            pass
        expected = _EXPECTED.get(self.kind) or f"one of {', '.join(self.choices)}"
        raise UsageError(f"{self.flag} {word!r}: {meant(word, self.choices)}expected {expected}")


def options_of(config: Any) -> list[Option]:
    """The options of a config: required ones first, then by group, those of the command's own classes before those of many.

    Raises:
        UsageError: a field is of a type that no word can say.
    """
    hints = typing.get_type_hints(config, include_extras=True)
    homes = {name: base for base in reversed(config.__mro__) for name in inspect.get_annotations(base)}

    def place(option: Option) -> tuple[int, bool, int]:
        rank = -2 if option.is_required else _LAST_GROUPS.index(option.group) if option.group in _LAST_GROUPS else -1
        return rank, option.is_required and option.name == "output", config.__mro__.index(homes[option.name])

    return sorted((_option(field, hints[field.name], homes[field.name]) for field in dataclasses.fields(config)), key=place)


def _option(field: dataclasses.Field[Any], hint: Any, home: type) -> Option:
    kind, *marks = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
    if type(None) in typing.get_args(kind):
        kind, _ = typing.get_args(kind)
    count: int | str | None = None
    if typing.get_origin(kind) is tuple:
        kind, *others = typing.get_args(kind)
        count = "*" if others == [...] else 1 + len(others)
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    if (not choices and kind not in (str, int, float, bool)) or field.default is True:
        expected = "str, int, float, a Literal, a tuple of such, or a bool that is False"
        raise UsageError(f"option {field.name} is a {hint} = {field.default}: expected {expected}")
    named = next((mark.name for mark in marks if isinstance(mark, Named)), field.name.replace("_", "-"))
    is_required = field.default is dataclasses.MISSING
    return Option(
        name=field.name,
        flag=field.name.upper() if _POSITIONAL in marks else f"--{named}",
        kind=str if choices else kind,
        choices=choices,
        known=next((mark for mark in marks if isinstance(mark, Names)), None),
        count=count,
        default=None if is_required else field.default,
        is_required=is_required,
        group="required" if is_required else vars(home).get("help_group", "options"),
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument ").replace("ignored explicit argument", "it takes no value, got"))


def parse(config: Any, args: Sequence[str]) -> Any:
    """The config that arguments say. An option that takes several words may be given several times; none comes behind `--`.

    Raises:
        UsageError: an option is unknown or missing, a word is no value of its option, or the config refuses the values.
    """
    options = options_of(config)
    parser = _Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for option in options:
        if not option.is_positional:
            action = "store_true" if option.kind is bool else "extend" if option.count == "*" else "store"
            how: dict[str, Any] = {"nargs": option.count} if option.count else {}
            parser.add_argument(option.flag, dest=option.name, action=action, **how)
    end = list(args).index("--") if "--" in args else len(args)
    given, rest = parser.parse_known_args(args[:end])
    found = vars(given)
    if unknown := next((word.partition("=")[0] for word in rest if word.startswith("--")), ""):
        close = meant(unknown, (option.flag for option in options)) or "there is none like it"
        raise UsageError(f"unknown option {unknown}: {close.strip()}")
    rest += args[end + 1 :]
    for option in options:
        if option.is_positional and rest:
            found[option.name], rest = (rest, []) if option.count else (rest[0], rest[1:])
    if rest:
        raise UsageError(f"{rest[0]!r} is one word too many")
    if missing := [option for option in options if option.is_required and option.name not in found]:
        words = _words(config)
        names = (words.get(option.name, option.name).rstrip(".") if option.is_positional else option.flag for option in missing)
        raise UsageError(f"missing: {', '.join(name[:1].lower() + name[1:] for name in names)}")
    return config(**{option.name: option.value(found[option.name]) for option in options if option.name in found})


def help_of(config: Any, command: str, example: str) -> Iterator[str]:
    """The lines of --help, for a terminal of this width."""
    options, words = options_of(config), _words(config)
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    usage = [option.invocation if option.is_required else f"[{option.invocation}]" for option in options]
    shown = (text for text, option in zip(usage, options, strict=True) if option.is_required or option.is_positional)
    yield from _wrapped(" ".join([f"usage: {command}", *shown, "[options]"]), width)
    for paragraph in (inspect.getdoc(config) or "").split("\n\n"):
        yield from ("", *_wrapped(paragraph, width))
    yield from ("", "example:", f"  {example}")
    for group, members in groupby(options, key=lambda option: option.group):
        yield from ("", f"{group}:")
        for option in members:
            default = "" if option.default in (None, False, "", ()) else f"(default: {option.default})"
            lines = _wrapped(f"{words.get(option.name, '')} {default}", width - _COLUMN) or [""]
            head = f"  {option.invocation}"
            if len(head) > _COLUMN - 2:
                yield head
                head = ""
            yield f"{head:<{_COLUMN}}{lines[0]}"
            yield from (" " * _COLUMN + line for line in lines[1:])


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)


def _words(config: Any) -> dict[str, str]:
    """Field -> what is written under it, in the class that says it last."""
    found = {}
    for base in reversed(config.__mro__):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0] if inspect.get_annotations(base) else None
        for field, below in pairwise(body.body if isinstance(body, ast.ClassDef) else ()):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = " ".join(text.split())
    return found
