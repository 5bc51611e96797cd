"""The worked examples in docstrings do what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in ("wds_tools", "loaders")
    for path in (ROOT / folder).rglob("*.py")
    if "\n    >>> " in path.read_text()
)


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_of_a_module_do_what_they_say(module: str) -> None:
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted
    assert not result.failed


def test_the_order_sequences_packing_and_batches_are_explained_by_examples() -> None:
    order = {"loaders.order.mix", "loaders.order.partition", "loaders.order.samples"}
    assert order | {"wds_tools.sequences.build", "wds_tools.sequences.pack", "loaders.batches.collate"} <= set(MODULES)
