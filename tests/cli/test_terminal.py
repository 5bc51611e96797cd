"""What commands print: names and messages of hostile files can't steer a terminal, nor make up lines of their own."""

from __future__ import annotations

import ast
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from factory import image_sample, make_dataset, text_sample

from loaders import LoaderConfig, Source, build_loader
from wds_tools.cli.main import main
from wds_tools.dataset import lease
from wds_tools.dataset.layout import LEASES
from wds_tools.storage import open_store
from wds_tools.terminal import printable, say

EVIL = "\x1b]0;owned\x07\x1b[31m\x9b2J\u202egpj\u2028\r\nverify: all is well\n\udcff"
EVIL_KEY = EVIL.replace("\udcff", "").replace(".", "")
PACKAGE = Path(__file__).parents[2] / "wds_tools"


def run(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The status, and all that was printed, which is lines of printable characters."""
    capsys.readouterr()
    status = main(list(words))
    said = capsys.readouterr()
    for text in (said.out, said.err):
        assert all(line.isprintable() for line in text.split("\n"))
    return status, said.out + said.err


def test_everything_but_printable_characters_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    assert printable("日本 é 🙂 ok") == "日本 é 🙂 ok"
    assert printable("a\x1b[2J\n\x85\u202e\udcff\U000e0041") == "a\\u001b[2J\\u000a\\u0085\\u202e\\udcff\\udb40\\udc41"
    say("one\ntwo", "three")
    say("four\r", error=True)
    assert capsys.readouterr() == ("one\\u000atwo\nthree\n", "four\\u000d\n")


def test_a_hostile_dataset_is_described_in_printable_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = EVIL.replace("\udcff", "")
    codes = {"vqcode_512": {"tokenizer": evil, "codebook_size": 8192, "precision": evil, "weights_hash": evil, "resize": evil}}
    make_dataset(tmp_path / "set", [image_sample(1), text_sample(2, evil), text_sample(3, evil)], codes=codes)
    (tmp_path / "set" / "rejects").mkdir()
    (tmp_path / "set" / "rejects" / "task-000000.jsonl").write_text(json.dumps({"reason": evil}) + "\n")
    (tmp_path / "set" / evil.replace("/", "")).write_bytes(b"")
    set_at = str(tmp_path / "set")
    status, said = run(["verify", set_at, "--quiet"], capsys)
    assert (status, "verify: all is well\n" in said) == (1, False)
    assert "\\u001b[31m" in said
    assert run(["stats", set_at, "--quiet"], capsys)[0] == 0
    status, said = run(["verify", set_at, "--quiet", "--json"], capsys)
    assert json.loads(said)["codes"]["vqcode_512"]["tokenizer"] == evil
    assert run(["index", set_at, "--quiet"], capsys)[0] == 0
    _, said = run(["export", "hf", "--input", set_at, "--output", f"{tmp_path}/{EVIL_KEY}", "--quiet"], capsys)
    assert "1b[31m" in said


def test_a_hostile_tar_is_refused_in_printable_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for suffix in ("txt", "txt"):
            tar.addfile(tarfile.TarInfo(f"{EVIL_KEY}.{suffix}"), io.BytesIO(b""))
    status, said = run(["index", str(tmp_path), "--quiet"], capsys)
    assert (status, "1b[31m" in said) == (1, True)


def test_hostile_receipts_and_leases_are_told_of_in_printable_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = EVIL.replace("\udcff", "")
    make_dataset(tmp_path / "set", map(text_sample, range(8)))
    loader = build_loader(LoaderConfig(sources=(Source(str(tmp_path / "set")),), batch_size=4))
    next(iter(loader))
    (generation,) = loader.receipt()["generations"]
    (origin,) = generation["sources"]
    for number, change in enumerate(
        (
            {"generations": [{**generation, "sources": [{**origin, "url": evil, "fingerprint": evil}]}]},
            {"last_batch": evil},
            {"version": evil},
            {"generations": [{**generation, "spec": {**generation["spec"], "seed": evil}}]},
        )
    ):
        path = tmp_path / f"receipt-{number}.json"
        path.write_text(json.dumps({**loader.receipt(), **change}))
        status, said = run(["audit", str(path), "--quiet"], capsys)
        assert (status > 0, "1b[31m" in said) == (True, True)
    monkeypatch.setattr(lease, "LEASE_TIMEOUT_S", 0.05)
    store = open_store(str(tmp_path / "out"))
    store.put(f"{LEASES}0.json", json.dumps({"host": evil, "pid": evil}).encode())
    with lease.Lease(store):
        said = capsys.readouterr().err
    assert "has a lease of process \\u001b]0;owned" in said
    assert said.count("\n") == 1
    assert said.rstrip("\n").isprintable()


def test_nothing_but_say_prints() -> None:
    others = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert sorted(name.partition(":")[0] for name in others) == ["run/progress.py", "terminal.py"]
