"""What is public says what goes in, what comes out, and what is raised: parameters, fields, results and errors."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from test_public import PUBLIC

MODULES = [*PUBLIC, "wds_tools.errors", "loaders.testing"]


def functions(thing: Any, name: str) -> Iterator[tuple[str, Callable[..., Any], str]]:
    """(name, function, its docstring) of a public function, or of a class and its public methods."""
    if inspect.isfunction(thing):
        yield name, thing, thing.__doc__ or ""
    if not inspect.isclass(thing) or issubclass(thing, BaseException):
        return
    if inspect.isfunction(thing.__init__) and not dataclasses.is_dataclass(thing) and not getattr(thing, "_is_protocol", False):
        yield name, thing.__init__, thing.__doc__ or ""
    for attribute, value in vars(thing).items():
        method = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if inspect.isfunction(method) and not attribute.startswith("_"):
            yield f"{name}.{attribute}", method, inspect.getdoc(getattr(thing, attribute)) or ""


def public() -> list[tuple[str, Callable[..., Any], str]]:
    found = {}
    for module in map(importlib.import_module, MODULES):
        listed = getattr(module, "__all__", None)
        names = listed or [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        for name in names:
            if not name.startswith("_"):
                for where, function, doc in functions(getattr(module, name), f"{module.__name__}.{name}"):
                    found.setdefault(function, (where, function, doc))
    return list(found.values())


FUNCTIONS = public()


def section(doc: str, title: str) -> str:
    return re.split(r"\n\s*(?:Args|Returns|Raises):\n", doc.partition(f"{title}:\n")[2])[0]


@pytest.mark.parametrize(("name", "function", "doc"), FUNCTIONS, ids=[name for name, _, _ in FUNCTIONS])
def test_each_parameter_result_and_error_of_what_is_public_is_described(
    name: str, function: Callable[..., Any], doc: str
) -> None:
    assert doc, f"{name} has no docstring"
    described = {
        word
        for line in re.findall(r"^\s*((?:\*{0,2}\w+, )*\*{0,2}\w+): ", section(doc, "Args"), re.M)
        for word in re.findall(r"\w+", line)
    }
    signature = inspect.signature(function)
    parameters = {name for name in signature.parameters if name not in ("self", "cls") and not name.startswith("_")}
    assert "Args as" in doc or not parameters - described, f"{name}: Args does not describe {sorted(parameters - described)}"
    is_new = function.__name__ in ("__init__", "__post_init__")
    returns = not is_new and signature.return_annotation not in ("None", "Self", inspect.Signature.empty, None)
    begins_with_what = re.match(r"(The|A|An|All|Those|Which|Whether|What|Where|How|Of|One|Bytes|Samples|\w+s of)\b", doc)
    assert not returns or "Returns:\n" in doc or begins_with_what, f"{name}: says nothing of what it returns"
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    raised = {
        node.exc.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name)
        if node.exc.func.id[0].isupper() and node.exc.func.id not in ("NotImplementedError", "AssertionError")
    }
    unsaid = {error for error in raised if not re.search(rf"Raises[^.]*\b{error}\b|\b{error}\b[^.]*: ", doc, re.S)}
    assert not unsaid, f"{name}: Raises does not name {sorted(unsaid)}"


def fields() -> Iterator[tuple[str, type]]:
    for module in map(importlib.import_module, MODULES):
        for name in getattr(module, "__all__", ()):
            thing = getattr(module, name)
            if inspect.isclass(thing) and (dataclasses.is_dataclass(thing) or hasattr(thing, "_fields")):
                yield f"{module.__name__}.{name}", thing


FIELDS = list(fields())


@pytest.mark.parametrize(("name", "kind"), FIELDS, ids=[name for name, _ in FIELDS])
def test_each_field_of_what_is_public_is_described(name: str, kind: type) -> None:
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    following = zip(body.body, [*body.body[1:], ast.Pass()], strict=True)
    bare = [
        node.target.id
        for node, after in following
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        if not node.target.id.startswith("_") and not (isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant))
    ]
    bare = [field for field in bare if f"\n    {field}: " not in (kind.__doc__ or "").replace("        ", "    ")]
    assert not bare, f"{name}: nothing is said of {bare}"
