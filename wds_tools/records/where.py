"""`--where`: a Python expression over the fields of a record -> whether the record is kept. Pure.

    text -> ast, every node of which is on a list -> nested closures -> keeps(fields, facts)

A name is a field (`a.b` and `a["b"]` one inside it, `record.a` one whose name is taken), or one of FACTS. A field that is
missing or null is false; a comparison with it is false, arithmetic and calls with it are missing. The order of what `and` joins
at the top does not matter: what needs the image is looked at last, and only then is it read.
Nothing is given to Python's eval, and nothing can grow: no power, no text times a number, globs without backtracking, and at
most MAX_CHARACTERS. Cost: about 1 us for two comparisons. (simpleeval walks the tree for each record, which takes 4.8 to 6.5 us,
and what makes up this module, the rules for missing fields, names and bounds, would be needed for it as well.)
"""

from __future__ import annotations

import ast
import fnmatch
import operator
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Final

from wds_tools.errors import Reject, UsageError
from wds_tools.records.fields import value_of

FACTS: Final = ("image_width", "image_height", "image_bytes", "image_format")
"""What is known of a sample's first image: pixels as displayed, bytes of the file, one of `images.FORMATS` in lower case."""
RECORD: Final = "record."
MAX_CHARACTERS: Final = 4000
_MAX_DEPTH: Final = 50
_MAX_BITS: Final = 4096
"""Of whole numbers that are worked out; what is larger is missing."""

Fields = Mapping[str, Any]
_Evaluate = Callable[[Fields, Fields], Any]
_Compare = Callable[[Any, Any], Any]

_COMPARISONS: dict[type[ast.cmpop], _Compare] = {
    **{ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le},
    **{ast.Gt: operator.gt, ast.GtE: operator.ge},
    **{ast.In: lambda part, whole: part in whole, ast.NotIn: lambda part, whole: part not in whole},
}
_ARITHMETIC: dict[type[ast.AST], Callable[..., Any]] = {
    **{ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv},
    **{ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.USub: operator.neg, ast.UAdd: operator.pos},
}
_FUNCTIONS: dict[str, tuple[Callable[..., Any], int]] = {
    **{"min": (min, 0), "max": (max, 0), "abs": (abs, 1), "len": (len, 1), "float": (float, 1)},
    **{"lower": (str.lower, 1), "upper": (str.upper, 1), "contains": (operator.contains, 2)},
    **{"startswith": (str.startswith, 2), "endswith": (str.endswith, 2)},
    "matches": (lambda text, glob: glob.match(text) is not None, 2),
}
"""Name -> function, number of values that it takes (0: any). The second of `matches` is a pattern in quotes."""
_WRONG = "expected fields, numbers and texts with < <= > >= == !=, in, and, or, not, + - * / // %, [lists], and the functions"


class Where:
    """A condition on records. A value that can be pickled.

    Args:
        text: the expression.

    Raises:
        UsageError: it is no expression of those above, or could take long.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.names: set[str] = set()
        """Fields that it names."""
        self.facts: set[str] = set()
        """Those of FACTS."""
        try:
            if len(text) > MAX_CHARACTERS:
                raise UsageError(f"{len(text):,} characters, at most {MAX_CHARACTERS:,}")
            with warnings.catch_warnings(action="ignore"):  # of "\\d" and the like
                tree = ast.parse(text.strip().replace("\n", " "), mode="eval").body
            conditions = tree.values if isinstance(tree, ast.BoolOp) and isinstance(tree.op, ast.And) else [tree]
            self._before: list[_Evaluate] = []
            self._after: list[_Evaluate] = []
            for node in conditions:
                compiler = _Compiler()
                evaluate = compiler.compile(node, _MAX_DEPTH)
                (self._after if compiler.facts else self._before).append(evaluate)
                self.names |= compiler.names
                self.facts |= compiler.facts
            self._conditions = (*self._before, *self._after)
        except UsageError as error:
            raise UsageError(f"--where {text[:200]!r}: {error}") from None
        except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
            what = error.msg if isinstance(error, SyntaxError) else "too deep, or too large a number"
            raise UsageError(f"--where {text[:200]!r}: not an expression ({what})") from error

    def __reduce__(self) -> tuple[type[Where], tuple[str]]:
        return Where, (self.text,)

    def keeps(self, fields: Fields, facts: Fields) -> bool:
        """Whether a record is kept of which all is known. Raises Reject ("wrong_type") as `check`."""
        for evaluate in self._conditions:  # noqa: SIM110  a generator takes twice as long
            if not evaluate(fields, facts):
                return False
        return True

    def check(self, fields: Fields, facts: Fields | None = None) -> None:
        """Look at a record: without facts at what needs no image, with facts at the rest.

        Raises:
            Reject: "filtered"; "filtered_missing": and a field that the expression names is missing or null. "wrong_type": two
                values can't be compared, or an argument is of another type.
        """
        for evaluate in self._before if facts is None else self._after:
            if not evaluate(fields, facts or {}):
                missing = [name for name in self.names if value_of(fields, name) is None]
                raise Reject("filtered_missing" if missing else "filtered", self.text[:200])


class _Compiler:
    """Makes closures of an expression's nodes, and takes down the names in it."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.facts: set[str] = set()

    def compile(self, node: ast.expr, depth: int) -> _Evaluate:
        """A function (fields, facts) -> value of a node. Raises UsageError for a node that is not allowed."""
        if not depth:
            raise UsageError(f"more than {_MAX_DEPTH} levels deep")
        match node:
            case ast.Constant(value=None):
                raise UsageError("a field that is missing or null is false by itself: write `not FIELD` for None")
            case ast.Constant(value=int() | float() | str() as value):
                return lambda _fields, _facts: value
            case ast.Name() | ast.Attribute() | ast.Subscript():
                return self._name(".".join(_path(node)))
        operands = node.args if isinstance(node, ast.Call) else ast.iter_child_nodes(node)
        parts = [self.compile(child, depth - 1) for child in operands if isinstance(child, ast.expr)]
        match node:
            case ast.BoolOp(op=op):
                return _either(parts, isinstance(op, ast.Or))
            case ast.UnaryOp(op=ast.Not()):
                return lambda fields, facts: not parts[0](fields, facts)
            case ast.Compare(ops=ops) if all(type(op) in _COMPARISONS for op in ops):
                return _comparison([_COMPARISONS[type(op)] for op in ops], parts)
            case ast.BinOp(op=op) | ast.UnaryOp(op=op) if type(op) in _ARITHMETIC:
                return _call(_ARITHMETIC[type(op)], type(op).__name__.lower(), parts, of_numbers=True)
            case ast.List() | ast.Tuple():
                return lambda fields, facts: [part(fields, facts) for part in parts]
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
                function, num_values = _FUNCTIONS[name]
                if len(args) != (num_values or max(len(args), 1)):
                    raise UsageError(f"{name} takes {num_values or 'some'} values, got {len(args)}")
                if name == "matches":
                    parts[1] = _glob(args[1])
                return _call(function, name, parts)
        raise _refused(node)

    def _name(self, name: str) -> _Evaluate:
        if name in FACTS:
            self.facts.add(name)
            return lambda _fields, facts: facts.get(name)
        name = name.removeprefix(RECORD)
        self.names.add(name)
        if "." in name:
            return lambda fields, _facts: value_of(fields, name)
        return lambda fields, _facts: fields.get(name)


def _path(node: ast.expr) -> list[str]:
    match node:
        case ast.Name(id=name):
            return [name]
        case ast.Attribute(value=value, attr=name) | ast.Subscript(value=value, slice=ast.Constant(value=str(name))):
            return [*_path(value), name]
        case ast.Subscript(value=value, slice=ast.Constant(value=int(number))):
            return [*_path(value), str(number)]
    raise _refused(node)


def _refused(node: ast.expr) -> UsageError:
    return UsageError(f"{ast.unparse(node)[:80]!r} has no place in it: {_WRONG} {', '.join(_FUNCTIONS)}")


def _glob(node: ast.expr) -> _Evaluate:
    if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
        raise UsageError("the second argument of matches is a pattern in quotes, in which * is any text and ? one character")
    glob = re.compile(fnmatch.translate(node.value.replace("[", "[[]")))
    return lambda _fields, _facts: glob


def _either(parts: list[_Evaluate], is_or: bool) -> _Evaluate:
    def either(fields: Fields, facts: Fields) -> Any:
        for part in parts:
            value = part(fields, facts)
            if bool(value) is is_or:
                break
        return value

    return either


def _comparison(comparisons: list[_Compare], parts: list[_Evaluate]) -> _Evaluate:
    """Of several in a row all have to hold."""
    (holds, *others), (first, second, *_) = comparisons, parts

    def compare(fields: Fields, facts: Fields) -> Any:
        left, right = first(fields, facts), second(fields, facts)
        try:
            return left is not None and right is not None and holds(left, right)
        except TypeError as error:
            raise Reject("wrong_type", f"--where compares {left!r:.60} with {right!r:.60}") from error

    return _either([compare, _comparison(others, parts[1:])], is_or=False) if others else compare


def _call(function: Callable[..., Any], name: str, parts: list[_Evaluate], *, of_numbers: bool = False) -> _Evaluate:
    """Arithmetic is of numbers alone: texts and lists could grow without bound."""

    def call(fields: Fields, facts: Fields) -> Any:
        values = [part(fields, facts) for part in parts]
        if None in values:
            return None
        try:
            if not of_numbers:
                return function(*values)
            if not all(isinstance(value, int | float) for value in values):
                raise TypeError
            result = function(*values)
        except (ArithmeticError, ValueError):  # a division by zero, a text that is no number
            return None
        except TypeError as error:
            shown = ", ".join(f"{value!r:.60}" for value in values)
            raise Reject("wrong_type", f"--where can't work out {name} of {shown}") from error
        return None if isinstance(result, int) and result.bit_length() > _MAX_BITS else result

    return call
