"""One word for one thing: words that were replaced (docs/glossary.md) stay away from code, help, messages and pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from wds_tools.cli.main import COMMANDS, main

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
STIFF = {
    r"anew": "again",
    r"as ever": "still, unchanged",
    r"as (?:it|they) lies?": "unchanged",
    r"be it": "such as",
    r"beforehand": "before",
    r"behind": "after",
    r"but for": "except for",
    r"for want of": "for lack of",
    r"foretold": "estimated",
    r"in mid-run": "during a run",
    r"(?:is|are) (?:said|told)": "the message says, the command reports",
    r"of late": "recently",
    r"said to be": "labelled",
    r"so many (?:a|an|of)": "that many",
    r"undisturbed": "uninterrupted",
    r"whoever": "anyone who",
}
"""Phrases that a reader takes for translated -> what to write."""
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs/reference").glob("*.md")])
_CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
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


def stiff(text: str) -> list[str]:
    """The phrases that it has, outside of code, each with what follows."""
    return [found[0] for found in re.finditer(rf"\b(?:{'|'.join(STIFF)})\b.{{0,30}}", _CODE.sub("`", text), re.IGNORECASE)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_in_plain_english(page: Path) -> None:
    assert stiff(page.read_text()) == []


def test_the_help_of_every_command_is_in_plain_english(capsys: pytest.CaptureFixture[str]) -> None:
    for words in COMMANDS:
        assert main([*words, "--help"]) == 0
        assert stiff(" ".join(capsys.readouterr().out.split())) == [], words
