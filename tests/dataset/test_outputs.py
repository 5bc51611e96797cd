"""Who may write to an output, what is published whole, and what a run that goes on believes of an earlier one."""

from __future__ import annotations

import ast
import importlib
import os
import re
import uuid
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import pyarrow.ipc as ipc
import pytest
from commands import ROOT, start, tree, write_documents
from factory import image_sample, make_dataset, text_sample
from s3 import S3Server
from tokens import write_tokenizer

from wds_tools import DatasetWriter, open_dataset
from wds_tools.check.verify import VerifyConfig, verify
from wds_tools.cli.main import COMMANDS, load_command, main
from wds_tools.dataset.lease import Lease
from wds_tools.errors import StorageError, UsageError
from wds_tools.export.options import ExportConfig
from wds_tools.export.output import FILES
from wds_tools.jobs.finalize import FinalizeConfig
from wds_tools.jobs.options import JobOptions
from wds_tools.storage import open_store

NUM_FILES = 6


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents for several tasks; each has a reject."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(NUM_FILES):
        write_documents(folder / f"{number}.jsonl.zst", ({"text": f"{number} {i}" if i else ""} for i in range(9)))
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets") / "pairs"
    make_dataset(folder, map(image_sample, range(60)), shard_samples=20)
    return folder


def convert(texts: Path, output: Path, *more: str, rejects: str = "100%") -> int:
    where = ["--input", str(texts), "--output", str(output), "--task-bytes", "1", "--quiet", "--max-rejects", rejects]
    return main(["convert", "documents", *where, *more])


def export(pairs: Path, output: str | Path, *more: str) -> list[str]:
    return ["export", "hf", "--input", str(pairs), "--output", str(output), "--num-shards", "3", "--quiet", *more]


# ---- One run at a time ----


def commands_with(*names: str) -> Iterator[tuple[tuple[str, ...], type]]:
    """The commands that have these options, and their configs."""
    for words in COMMANDS:
        config = load_command(words).Config
        if set(names) <= {field.name for field in fields(config)}:
            yield words, config


def test_a_command_that_has_an_output_is_a_pass_or_one_that_is_known_to_claim_it() -> None:
    others = {words for words, config in commands_with("output") if not issubclass(config, JobOptions)}
    assert others == {
        ("export", "hf"),
        ("export", "parquet"),
        ("finalize",),
        ("vocabulary",),
    }  # the last makes a new folder by one rename
    assert issubclass(importlib.import_module("wds_tools.cli.finalize").Config, FinalizeConfig)


@pytest.mark.parametrize("place", ["folder", "s3"])
@pytest.mark.parametrize("command", ["convert", "export arrow", "export parquet", "index", "index tars", "finalize"])
def test_what_writes_is_refused_while_another_run_does_and_changes_nothing(
    command: str,
    place: str,
    texts: Path,
    pairs: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url = str(tmp_path / "out")
    if place == "s3":
        request.getfixturevalue("s3")
        url = f"s3://tests/{uuid.uuid4().hex}"
    store = open_store(url)
    args = {
        "convert": ["convert", "documents", "--input", str(texts), "--output", url, "--resume", "--max-rejects", "100%"],
        "export arrow": export(pairs, url),
        "export parquet": export(pairs, url, "--format", "parquet"),
        "index": ["index", url],
        "index tars": ["index", url],
        "finalize": ["finalize", "--output", url, "--max-rejects", "100%"],
    }[command]
    if command == "finalize":
        assert main(["convert", "documents", f"--input={texts}", "--output", url, "--part", "1/1", "--max-rejects", "100%"]) == 0
    if command == "index":
        make_dataset(url, map(text_sample, range(3)))
    if command == "index tars":
        store.put("a.tar", (pairs / "shard-000000-0000.tar").read_bytes())
    with Lease(store):
        before = list(store.list())
        capsys.readouterr()
        assert main(args) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{url}: another run is writing there (process {os.getpid()} on " in line
        assert list(store.list()) == before
    assert main(args) == 0


@pytest.mark.slow
@pytest.mark.parametrize("place", ["folder", "s3"])
def test_of_exports_that_begin_together_one_goes_on_and_the_others_are_refused(
    place: str, pairs: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = str(tmp_path / "out")
    if place == "s3":
        s3: S3Server = request.getfixturevalue("s3")
        url = f"s3://{s3.bucket}/{uuid.uuid4().hex}"
    runs = [start(*export(pairs, url, "--seed", str(seed))) for seed in range(3)]
    said = [process.communicate(timeout=200)[1] for process in runs]
    assert sorted(process.returncode for process in runs) == [0, 2, 2], said
    for process, text in zip(runs, said, strict=True):
        assert process.returncode == 0 or re.search("another run is writing there|holds an export already", text), text
        assert len(text.splitlines()) == (process.returncode != 0)
    store = open_store(url)
    parts = [entry.name for entry in store.list("data-")]
    rows = [text for part in parts for text in ipc.open_stream(store.read(part)).read_all()["text"].to_pylist()]
    assert sorted(rows) == sorted(f"caption {number}" for number in range(60))


# ---- Published whole ----

WRITES = {"write_text", "write_bytes", "touch", "mkstemp", "copyfile"}
SCRATCH = {
    "wds_tools/dataset/external_sort.py": "a run's own temporary folder",
    "wds_tools/sequences/vocabulary.py": "a folder that is renamed when it is whole",
    "loaders/reading/cache.py": "a cache, whose files are renamed when they are whole, and checked when they are read",
    "wds_tools/run/ray_cluster.py": "/dev/null, for what Ray prints",
}


def test_files_are_written_by_storage_alone_which_publishes_them_whole() -> None:
    found = set()
    for path in [*ROOT.glob("wds_tools/**/*.py"), *ROOT.glob("loaders/**/*.py")]:
        text = path.read_text()
        for node in ast.walk(ast.parse(text)) if any(word in text for word in (*WRITES, "open(")) else ():
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            modes = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            creates = name == "open" and (
                any(re.fullmatch("[rbt+]*[wax][rbt+]*", mode) for mode in modes) or "os.O_CREAT" in ast.unparse(node)
            )
            if name in WRITES or creates or (name == "open" and "flags" in ast.unparse(node)):
                found.add(path.relative_to(ROOT).as_posix())
    assert {path for path in found if not path.startswith("wds_tools/storage/")} == set(SCRATCH)


# ---- What resume believes ----

SHARD = "shard-000002-0000.tar"


def flip(path: Path) -> None:
    """The same size, one byte changed."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


HARM: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a lost shard": (SHARD, Path.unlink, "is gone"),
    "a shard cut off": (SHARD, lambda path: os.truncate(path, 700), "has 700 bytes, "),
    "a lost index": (f"{SHARD}.index", Path.unlink, "is gone"),
    "an index cut off": (f"{SHARD}.index", lambda path: os.truncate(path, 0), "has 0 bytes, "),
    "lost rejects": ("rejects/task-000002.jsonl", Path.unlink, "is gone"),
    "rejects with more lines": (
        "rejects/task-000002.jsonl",
        lambda path: path.write_bytes(path.read_bytes() + b"{}\n"),
        " were written",
    ),
}
FLIPS = {f"a bit of {name}": (name, flip, "has other bytes") for name in (SHARD, f"{SHARD}.index", "rejects/task-000002.jsonl")}


@pytest.fixture(scope="module")
def peace(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes | None]:
    """What a run makes whose files nobody touches."""
    out = tmp_path_factory.mktemp("peace") / "out"
    assert convert(texts, out) == 0
    return tree(out)


@pytest.mark.parametrize(("harm", "how"), [*((harm, "resume") for harm in (*HARM, *FLIPS)), ("a lost shard", "part")])
def test_a_finished_task_whose_files_are_others_is_done_again(
    how: str, harm: str, texts: Path, peace: dict[str, bytes | None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert convert(texts, out, "--part", "1/1") == 0
    name, do, what = (HARM | FLIPS)[harm]
    do(out / name)
    capsys.readouterr()
    again = ["--part", "1/1"] if how == "part" else ["--resume"]
    assert convert(texts, out, *again, *(["--verify"] if harm in FLIPS else [])) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"wds-tools: {out}: 1 file is not what was written: {name} ")
    assert line.endswith("; 1 finished task is done again")
    assert what in line
    if how == "part":
        assert main(["finalize", "--output", str(out), "--max-rejects", "100%"]) == 0
    assert tree(out) == peace


@pytest.mark.parametrize("harm", ["a shard cut off", "a lost index", "lost rejects"])
def test_finalize_names_a_file_that_is_another_and_its_part_makes_it_again(
    harm: str, texts: Path, peace: dict[str, bytes | None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for part in ("1/2", "2/2"):
        assert convert(texts, out, "--part", part) == 0
    name, do, what = HARM[harm]
    do(out / name)
    capsys.readouterr()
    assert main(["finalize", "--output", str(out), "--max-rejects", "100%"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{out}: 1 file is not what was written: {name} " in line
    assert what in line
    assert not (out / "manifest.json").exists()
    assert convert(texts, out, "--part", "2/2") == 0  # which is 0/2: tasks 0, 2, 4
    assert main(["finalize", "--output", str(out), "--max-rejects", "100%"]) == 0
    assert tree(out) == peace


@pytest.mark.parametrize(
    ("name", "do", "more"),
    [(SHARD, Path.unlink, []), (f"{SHARD}.index", Path.unlink, []), (SHARD, flip, ["--verify"])],
    ids=["shard", "index", "bit"],
)
def test_a_complete_set_that_is_not_is_named_by_resume(
    name: str, do: Callable[[Path], object], more: list[str], texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert convert(texts, out) == 0
    assert convert(texts, out, "--resume", "--verify") == 0
    do(out / name)
    capsys.readouterr()
    assert convert(texts, out, "--resume", *more) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{out}: 1 file is not what was written: {name} " in line
    assert "but it has a manifest" in line


@pytest.mark.parametrize("file_format", ["arrow", "parquet"])
@pytest.mark.parametrize("harm", ["lost", "cut off", "flipped", "list"])
def test_a_finished_export_whose_files_are_others_is_made_again(
    harm: str, file_format: str, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, more = tmp_path / "out", ["--format", file_format]
    assert main(export(pairs, out, *more)) == 0
    whole = tree(out)
    part = next(name for name in whole if "00001-of-00003" in name)
    harmed, do, more = {
        "lost": (part, Path.unlink, more),
        "cut off": (part, lambda path: os.truncate(path, 2000), more),
        "flipped": (part, flip, [*more, "--verify"]),
        "list": (FILES, lambda path: path.write_bytes(b'{"x": 3}'), more),
    }[harm]
    do(out / harmed)
    capsys.readouterr()
    assert main(export(pairs, out, *more, "--resume")) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"wds-tools: {out}: 1 file is not what was written: {harmed} ")
    assert line.endswith("; the export is made again")
    assert tree(out) == whole


@pytest.mark.parametrize("words", [["convert", "documents"], ["export", "hf"]])
def test_verify_without_resume_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--input", "a", "--output", "b", "--verify"]) == 2
    assert "--verify is for --resume" in capsys.readouterr().err


# ---- Where it may be written ----


@pytest.mark.parametrize("words", [words for words, _ in commands_with("input", "output")], ids=" ".join)
@pytest.mark.parametrize("spelled", ["IN", "IN/", "IN/deeper/still", "link", "link/deeper", "file://IN/deeper", "s3://in/x"])
def test_an_output_that_is_an_input_or_lies_in_one_is_refused_by_every_command(
    words: tuple[str, ...], spelled: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_tokenizer(tmp_path / "in")
    (tmp_path / "link").symlink_to(folder)
    source = "s3a://in/" if spelled.startswith("s3") else str(folder)
    output = spelled.replace("IN", str(folder)).replace("link", str(tmp_path / "link"))
    before = tree(folder)
    more = {
        "relabel": ["--with", "labels.jsonl"],
        "pack": ["--tokenizer", "t", "--max-length", "8"],
        "hf": ["--tokenizer", "t", "--codebook-size", "8"],
    }
    options = more.get(words[-1], []) if words[0] != "export" else []
    inputs = [source] if words[0] == "vocabulary" else ["--input", source]
    if words[0] == "vocabulary" and spelled.startswith(("s3", "file")):
        pytest.skip("reads and writes folders only")
    assert main([*words, *inputs, "--output", output, *options]) == 2
    said = capsys.readouterr().err
    assert re.search(r"--output \S+ (is|lies in) the input \S+: choose a place of its own", said), said
    assert tree(folder) == before


def test_places_that_only_begin_alike_are_apart(texts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.symlink_to(texts)
    assert convert(folder, tmp_path / "in-2") == 0


def test_a_report_is_not_written_into_the_set_that_it_describes(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(pairs)
    assert main(["stats", str(pairs), "--html", str(pairs / "report.html")]) == 2
    assert "--html" in capsys.readouterr().err
    assert tree(pairs) == before


def test_a_tilde_is_home_also_behind_an_equals_sign(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").symlink_to(texts)
    assert main(["convert", "documents", "--input=~/in", "--output=~/out", "--quiet", "--max-rejects", "100%"]) == 0
    assert main(["stats", "~/out", "--html=~/a/report.html", "--quiet"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "in", "out"]
    assert "WRONG" not in capsys.readouterr().out


def test_a_tilde_in_python_is_refused_and_makes_no_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"~/set: ~ is your home folder in a shell only.*expanduser\('~/set'\)"):
        open_dataset("~/set")
    with pytest.raises(UsageError, match="~ is your home folder"):
        DatasetWriter("~/set").__enter__()
    assert list(tmp_path.iterdir()) == []
    assert open_store("./~").url == "./~"


# ---- What can't be read ----


def test_verify_goes_on_behind_what_it_cannot_read_and_says_all(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    make_dataset(folder, map(text_sample, range(30)), shard_samples=10)
    names = sorted(path.name for path in folder.glob("*.tar"))
    elsewhere = (folder / names[0]).rename(tmp_path / "elsewhere.tar")
    (folder / names[0]).symlink_to(names[0])  # leads to itself: an error of the storage, not of the data
    flip(folder / names[1])
    (folder / names[2]).unlink()
    (folder / "rejects").mkdir()
    (folder / "rejects/task-000000.jsonl").symlink_to(elsewhere)
    problems = verify(VerifyConfig(input=str(folder), quiet=True)).problems
    for name, what in zip(names, ["symbolic links", "the manifest says|CRC|damaged", "nothing is there"], strict=True):
        assert any(name in problem and re.search(what, problem) for problem in problems), (what, problems)


def test_verify_of_a_storage_that_is_gone_is_an_error_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dataset(tmp_path / "set", map(text_sample, range(3)), shard_samples=1)
    asked = []

    def gone(store: object, name: str) -> None:
        asked.append(name)
        raise StorageError("no answer")

    monkeypatch.setattr("wds_tools.storage.local.LocalStore.size", gone)
    monkeypatch.setattr("wds_tools.dataset.reader.ShardBytes.read", lambda self, store, name, likely: gone(store, name))  # noqa: ARG005
    with pytest.raises(StorageError, match="no answer"):
        verify(VerifyConfig(input=str(tmp_path / "set"), quiet=True))
    assert len(asked) == 2


def test_export_configs_and_passes_have_the_same_words_for_going_on() -> None:
    shared = {field.name for field in fields(ExportConfig)} & {field.name for field in fields(JobOptions)}
    assert {"resume", "verify", "overwrite", "output"} <= shared
