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
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
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
    kind: Callable[[str], Any] | None
    """What makes a value of a word; None: no word follows."""
    choices: Mapping[str, Any]
    """Word -> value, if only some are taken."""
    known: Names | None
    """Names that it may take beside other words, if there is such a list."""
    count: int | str | None
    """Words that make a value: a number, "*" for any, None for one that is no tuple."""
    default: Any
    """dataclasses.MISSING if it has to be given."""
    group: str
    """Heading in the help."""

    @property
    def is_positional(self) -> bool:
        """Whether it stands without an option in front."""
        return not self.flag.startswith("-")

    @property
    def is_required(self) -> bool:
        """Whether it has to be given."""
        return self.default is dataclasses.MISSING

    @property
    def invocation(self) -> str:
        """How it is written: `--image-root ROOT ...`."""
        short = {int: "N", float: "X"}.get(typing.cast(Any, self.kind), self.name.rpartition("_")[2].upper())
        word = "{" + ",".join(self.choices) + "}" if self.choices else short
        words = f"{word} ..." if self.count == "*" else " ".join([word] * int(self.count or 1))
        return words if self.is_positional else self.flag if self.kind is None else f"{self.flag} {words}"

    def value(self, words: Any) -> Any:
        """The value of the words that followed: one, or several. Raises UsageError: there is none."""
        if self.kind is None:
            return not self.default
        return self._one(words) if self.count is None else tuple(map(self._one, words))

    def _one(self, word: str) -> Any:
        assert self.kind is not None
        try:
            return self.choices[word] if self.choices else self.kind(word)
        except (KeyError, ValueError):
            expected = (
                f"one of {', '.join(self.choices)}"
                if self.choices
                else _EXPECTED.get(typing.cast(Any, self.kind), "another value")
            )
            raise UsageError(f"{self.flag} {word!r}: {meant(word, self.choices)}expected {expected}") from None


def options_of(config: Any) -> list[Option]:
    """The options of a config: required ones first, then by group, those of the command's own classes before those of many.

    Raises:
        UsageError: a field is of a type that no word can say.
    """
    hints = typing.get_type_hints(config, include_extras=True)
    ranks = {"required": -2, **{name: rank for rank, name in enumerate(_LAST_GROUPS)}}
    homes = {
        name: (-depth, base) for depth, base in enumerate(reversed(config.__mro__)) for name in inspect.get_annotations(base)
    }
    found = []
    for field in dataclasses.fields(config):
        depth, base = homes[field.name]
        option = _option(field, hints[field.name], vars(base).get("help_group", "options"))
        found.append(((ranks.get(option.group, -1), option.is_required and option.name == "output", depth), option))
    return [option for _, option in sorted(found, key=lambda one: one[0])]


def _option(field: dataclasses.Field[Any], hint: Any, group: str) -> Option:
    kind, *marks = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        (kind,) = (one for one in typing.get_args(kind) if one is not types.NoneType)
    count: int | str | None = None
    if typing.get_origin(kind) is tuple:
        kind, *others = typing.get_args(kind)
        count = "*" if others == [...] else 1 + len(others)
    choices = {str(one): one for one in typing.get_args(kind)} if typing.get_origin(kind) is Literal else {}
    if not choices and kind not in (str, int, float, bool):
        raise UsageError(
            f"{field.name} is {hint}, which no word of a command line can say: expected str, int, float or a Literal"
        )
    named = next((mark.name for mark in marks if isinstance(mark, Named)), field.name.replace("_", "-"))
    flag = field.name.upper() if _POSITIONAL in marks else f"--{'no-' if field.default is True else ''}{named}"
    return Option(
        name=field.name,
        flag=flag,
        kind=None if kind is bool else str if choices else kind,
        choices=choices,
        known=next((mark for mark in marks if isinstance(mark, Names)), None),
        count=count,
        default=field.default,
        group="required" if field.default is dataclasses.MISSING else group,
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument "))


def parse(config: Any, args: Sequence[str]) -> Any:
    """The config that arguments say. An option that takes several words may be given several times.

    Raises:
        UsageError: an option is unknown or missing, a word is no value of its option, or the config refuses the values.
    """
    options = options_of(config)
    parser = _Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for option in options:
        if not option.is_positional:
            how = {"action": "store_true"} if option.kind is None else {"nargs": option.count} if option.count else {}
            parser.add_argument(option.flag, dest=option.name, **how | ({"action": "extend"} if option.count == "*" else {}))
    given, rest = parser.parse_known_args(args)
    found = vars(given)
    if unknown := next((word.partition("=")[0] for word in rest if word.startswith("--")), ""):
        close = meant(unknown, (option.flag for option in options))
        raise UsageError(f"unknown option {unknown}: {close or 'there is none like it'}".rstrip())
    for option in options:
        if option.is_positional and rest:
            found[option.name], rest = (rest, []) if option.count else (rest[0], rest[1:])
    if rest:
        raise UsageError(f"{rest[0]!r} is one word too many")
    if missing := [option for option in options if option.is_required and option.name not in found]:
        words = _words(config)
        names = ((words[option.name].rstrip(".") if option.is_positional else option.flag) for option in missing)
        raise UsageError(f"missing: {', '.join(name[:1].lower() + name[1:] for name in names)}")
    return config(**{option.name: option.value(found[option.name]) for option in options if option.name in found})


def help_of(config: Any, command: str, example: str) -> Iterator[str]:
    """The lines of --help, for a terminal of this width."""
    options, words = options_of(config), _words(config)
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    required = [option.invocation for option in options if option.is_required]
    optional = [f"[{option.invocation}]" for option in options if option.is_positional and not option.is_required]
    yield from _wrapped(" ".join([f"usage: {command}", *required, *optional, "[options]"]), width, 4)
    for paragraph in (inspect.getdoc(config) or "").split("\n\n"):
        yield from ("", *_wrapped(paragraph, width))
    yield from ("", "example:", f"  {example}")
    for before, option in pairwise([None, *options]):
        if option is not None:
            if before is None or before.group != option.group:
                yield from ("", f"{option.group}:")
            said = " ".join(filter(None, (words.get(option.name), _said_default(option.default))))
            first, *others = _wrapped(said, width - _COLUMN) or [""]
            head = f"  {option.invocation}"
            yield from [f"{head:<{_COLUMN}}{first}"] if len(head) < _COLUMN - 1 else [head, " " * _COLUMN + first]
            yield from (" " * _COLUMN + line for line in others)


def _wrapped(text: str, width: int, indent: int = 0) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent=" " * indent, break_on_hyphens=False, break_long_words=False)


def _said_default(value: Any) -> str:
    if isinstance(value, bool) or value in (None, "", (), dataclasses.MISSING):
        return ""
    return f"(default: {value:g})" if isinstance(value, float) else f"(default: {value})"


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
