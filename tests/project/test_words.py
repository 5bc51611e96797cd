"""One word for one thing: words that were replaced (docs/glossary.md) stay away from code, help, messages and pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEAD = {
    "data set": "dataset",
    "extent": "chunk",
    "errand": "step request",
    "parcel": "step result",
    "tally": "coverage",
    "recipe": "order spec",
    "tape": "shuffled chunks",
    "PassOptions": "JobOptions",
    "ShardRow": "ShardInfo",
    "Rounds": "EpochLoader",
    "anew": "again",
    "tars of others": "third-party tars",
    "reference pipeline": "Liquid",
}
FILES = sorted(path for folder in ("wds_tools", "loaders", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
FILES += sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("word", DEAD)
def test_a_word_that_was_replaced_stands_nowhere_in_code_and_pages(word: str) -> None:
    pattern = re.compile(rf"(?<![\w/])_?{word}s?(?!\w)")
    if word == "data set":
        pattern = re.compile(r"\bdata[ _-]sets?\b", re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in FILES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, f"{word!r} is {DEAD[word]!r} now: {found[:5]}"
