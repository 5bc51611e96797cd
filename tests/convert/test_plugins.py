"""Packages that add sources, converters and tokenizers, such as that in examples/plugin: the product knows none of them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from commands import read_rejects, read_samples, tree, wds_tools, write_pairs
from plugin import MODULE, installed, write_example, write_plugin

from wds_tools.cli.main import COMMANDS, commands, main
from wds_tools.dataset.reader import read_manifest
from wds_tools.storage import open_store

NOTES = [
    ["title", "body", "url"],
    ["a", "one", "u1"],
    ["b", "", "u2"],
    ["c", "two\nlines", "u3"],
    ["d", "three"],
    ["e", "four", ""],
]
WRONG = "[wds_tools.converters]\ndclm = json:loads\nbroken = somebodys_nothing:Config\nwrong = json:loads"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example package, installed."""
    return write_example(tmp_path_factory.mktemp("site"))


@pytest.fixture
def plugged_in(site: Path) -> Iterator[None]:
    with installed(site, MODULE):
        yield


def write_csv(path: Path, rows: Sequence[Sequence[str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def settings_of(url: Path) -> Any:
    return read_manifest(open_store(str(url))).source["plan"]["settings"]


@pytest.mark.slow
@pytest.mark.usefixtures("plugged_in")
def test_a_converter_of_a_package_is_a_command_with_options_rejects_and_workers(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_csv(tmp_path / "in" / "a.csv", NOTES)
    write_csv(tmp_path / "in" / "b.csv", NOTES[:2])
    args = [
        "convert",
        "notes",
        "--input",
        str(tmp_path / "in"),
        "--keep",
        "url",
        "--max-rejects",
        "100%",
        "--min-characters",
        "2",
    ]
    assert main([*args, "--output", str(tmp_path / "one"), "--quiet"]) == 0
    wds_tools(*args, "--output", tmp_path / "two", "--workers", "2")
    assert tree(tmp_path / "two") == tree(tmp_path / "one")
    samples = read_samples(tmp_path / "one")
    assert [(sample.key, sample.text) for sample in samples] == [
        ("000000-00000000", "a\n\none"),
        ("000000-00000002", "c\n\ntwo\nlines"),
        ("000000-00000004", "e\n\nfour"),
        ("000001-00000000", "a\n\none"),
    ]
    assert samples[0].provenance == {"url": "u1"}
    assert [(reject["line"], reject["reason"]) for reject in read_rejects(tmp_path / "one")] == [(3, "too_short"), (6, "bad_csv")]
    assert settings_of(tmp_path / "one")["min_characters"] == 2


@pytest.mark.usefixtures("plugged_in")
def test_a_source_of_a_package_feeds_a_converter_of_ours_and_its_tokenizer_fills_the_codes(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "in", 2)
    records = [json.loads(line) for line in pairs.read_text().splitlines()]
    names = ["image_path", "text_prompt"]
    table = write_csv(pairs.parent / "pairs.csv", [names, *([record[name] for name in names] for record in records)])
    common = ["--source", "csv", "--min-side", "8", "--encode", "colours", "--device", "cpu", "--quiet"]
    assert main(["convert", "pairs", "--input", str(table), "--output", str(tmp_path / "out"), *common]) == 0
    samples = read_samples(tmp_path / "out")
    assert [sample.text for sample in samples] == [record["text_prompt"] for record in records]
    assert {sample.codes["vqcode_512"].shape for sample in samples} == {(32, 32)}
    assert read_manifest(open_store(str(tmp_path / "out"))).codes["vqcode_512"]["tokenizer"] == "colours"
    assert settings_of(tmp_path / "out")["source"] == "csv"


@pytest.mark.usefixtures("plugged_in")
def test_help_and_completion_know_the_commands_of_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "convert notes" in capsys.readouterr().out
    assert main(["completion", "bash"]) == 0
    assert "--min-characters" in capsys.readouterr().out
    assert main(["convert", "notes", "--help"]) == 0
    assert "Notes with a shorter body are rejected." in " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("plugged_in")
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--source", "xml"], "unknown source 'xml': installed packages have csv"),
        (["--source", "csv", "--task-lines", "7"], "--task-lines has no effect with --source csv, which cuts the input itself"),
    ],
)
def test_a_source_that_is_not_there_or_would_ignore_an_option_is_refused(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", "pairs", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), *more]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_with_a_converter_is_said_in_one_line_and_a_name_of_ours_stays_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with installed(write_plugin(tmp_path, "somebodys_mistakes", "", WRONG), "somebodys_mistakes"):
        assert commands()["convert", "documents"] == COMMANDS["convert", "documents"]
        assert main(["convert", "broken"]) == 1
        assert "converter 'broken' of somebodys_nothing:Config can't be imported (ModuleNotFoundError" in capsys.readouterr().err
        assert main(["convert", "wrong"]) == 1
        assert "converter 'wrong': its entry point is <function loads" in capsys.readouterr().err
        assert main(["convert", "nothing"]) == 2
