"""Nothing in an input vanishes: what is not taken is counted and named, or refused; and nothing that data names hangs a run."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from commands import captions, image_bytes, read_rejects, read_samples, shared, write_documents, write_jsonl, write_pairs

from wds_tools.cli.main import main
from wds_tools.convert import run_conversion
from wds_tools.convert.documents import DocumentsConfig
from wds_tools.convert.pairs import PairsConfig
from wds_tools.errors import NotFound, StorageError
from wds_tools.format.manifest import Manifest
from wds_tools.images import damage


def pairs(folder: Path, output: Path, **options: Any) -> Manifest:
    return run_conversion(
        PairsConfig(input=(str(folder),), output=str(output), **{"quiet": True, "max_rejects": "100%", **options})
    )


def dclm(folder: Path, output: Path, **options: Any) -> Manifest:
    return run_conversion(DocumentsConfig(input=(str(folder),), output=str(output), quiet=True, **options))


# ---- cases: what people really have, and what is said of it ----

DCLM, PAIRS, SFT = "convert documents --input", "convert pairs --input", "convert conversations --input"
CASES = [
    (
        "folder-mixed-suffixes",
        f"{DCLM} in",
        0,
        "18 of 18 inputs",
    ),
    ("symlinks-silently-skipped", f"{DCLM} in", 0, "4 of 4 inputs"),
    (
        "symlinks-silently-skipped",
        f"{DCLM} in --strict-links",
        0,
        "2 of 2 inputs.*2 files of the input folders are not read as records, such as in/b.jsonl.zst",
    ),
    ("hf-cache-symlinks", f"{DCLM} snapshots/rev/*.zst", 0, "3 of 3 inputs"),
    ("hf-cache-symlinks", f"{DCLM} snapshots/rev/shard_00000000.jsonl.zst", 0, "3 of 3 inputs"),
    ("hf-cache-symlinks", f"{PAIRS} pairs.jsonl --image-root snapshots/rev", 0, "1 of 1 inputs"),
    ("hf-cache-symlinks", f"{PAIRS} pairs.jsonl --image-root snapshots/rev --strict-links", 1, "1 outside_root"),
    ("hf-cache-symlinks", "index snapshots/rev", 0, "indexed 1 tar of"),
    ("sft-image-in-other-field", f"{SFT} in.json", 2, "element 2: image_url holds an image that is not used"),
    ("sft-image-empty-string", f"{SFT} in.json", 0, "2 of 2 inputs"),
    ("sft-system-field", f"{SFT} in.json", 0, "2 of 2 inputs"),
    ("sft-messages", f"{SFT} in.json", 0, "3 of 3 inputs"),
    ("json-nan", f"{DCLM} v.jsonl.zst --max-rejects 50%", 0, "2 of 3 inputs.*1 invalid_utf8"),
    ("tar-stray-files", "index mac", 0, "indexed 1 tar.* 1 sample,.*passed over: [1-9] members?"),
    ("tar-stray-files", "index lic", 0, "indexed 1 tar.* 1 sample,.*passed over: 1 member that is"),
    (
        "text-gz-jsonl-parquet",
        f"{DCLM} .",
        0,
        "6 of 6 inputs.*1 file of the input folders is not read as a record",
    ),
    ("text-gz-jsonl-parquet", f"{DCLM} a.json.gz", 0, "2 of 2 inputs"),
    ("text-gz-jsonl-parquet", f"{DCLM} c.parquet", 0, "2 of 2 inputs"),
    ("img2dataset-tars", "encode --input in", 2, "in is indexed WebDataset data of any members"),
    ("img2dataset-tars", f"{PAIRS} in/00000.tar", 0, "3 of 3 inputs"),
    ("pairs-other-field-names", f"{PAIRS} journeydb.jsonl", 0, "1 of 1 inputs"),
    ("pairs-other-field-names", f"{PAIRS} metadata.jsonl", 0, "1 of 1 inputs"),
    ("parquet-image-bytes", "convert coded --input one.parquet", 1, "2 missing_codes"),
    ("parquet-image-bytes", f"{SFT} one.parquet", 0, "2 of 2 inputs"),
]


@pytest.mark.parametrize(("case", "line", "status", "said"), CASES, ids=[f"{case}: {line}" for case, line, _, _ in CASES])
def test_no_case_is_silent_or_crashes_or_says_what_is_not_so(
    case: str,
    line: str,
    status: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = Path(shutil.copytree(shared("cases") / case, tmp_path / "case", copy_function=_copy, symlinks=True))
    monkeypatch.chdir(folder)
    words = line.split()
    assert main(words if words[0] == "index" else [*words, "--output", str(tmp_path / "out")]) == status
    out, err = capfd.readouterr()
    assert re.search(said, f"{out}{err}", re.DOTALL), f"{out}{err}"
    assert "under a .zst name" not in "".join(reject["detail"] for reject in read_rejects(tmp_path / "out"))


def _copy(source: str, target: str) -> None:
    """A file that can be changed; a symlink that went through an archive that keeps none, as a text of where it leads, is one."""
    data = Path(source).read_bytes()
    if data.startswith(b"../") and len(data) < 100:
        Path(target).symlink_to(data.decode())
    else:
        Path(target).write_bytes(data)


# ---- folders ----


def test_what_a_folder_holds_beside_its_inputs_is_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.jsonl.zst", "b.json.zst", "C.JSONL.ZSTD"):
        write_documents(tmp_path / "in" / name, [{"text": name}])
    for name in ("x.md", "y.md", "notes", "n\udce9.txt"):
        (tmp_path / "in" / name).write_bytes(b"")
    folder = tmp_path / "in"
    dclm(folder, tmp_path / "out")
    manifest = (tmp_path / "out/manifest.json").read_bytes()
    assert captions(read_samples(tmp_path / "out")) == ["C.JSONL.ZSTD", "a.jsonl.zst", "b.json.zst"]
    left_out = {"files": 4, "such_as": ", ".join(f"{folder}/{name}" for name in ("notes", "n?.txt", "x.md"))}
    assert json.loads(manifest)["source"]["left_out"] == left_out
    assert (
        capsys.readouterr().err
        == f"wds-tools: 4 files of the input folders are not read as records, such as {left_out['such_as']}\n"
    )
    dclm(folder, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out/manifest.json").read_bytes() == manifest
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "out"), "--quiet"]) == 0
    assert f"left out     4 files, not read as records, such as {folder}/notes" in capsys.readouterr().out


def test_a_link_to_nothing_among_the_inputs_is_an_error_before_anything_is_written(tmp_path: Path) -> None:
    write_documents(tmp_path / "in/a.jsonl.zst", [{"text": "a"}])
    (tmp_path / "in/b.jsonl.zst").symlink_to("../blobs/b")
    with pytest.raises(NotFound, match=r"in/b\.jsonl\.zst: can't look at, it is a symlink to \.\./blobs/b, where nothing is"):
        dclm(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_datasets_that_are_made_of_links_are_read_as_any_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pairs(tmp_path / "in", 2)
    pairs(tmp_path / "in/pairs.jsonl", tmp_path / "blobs")
    (tmp_path / "set").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "set" / path.name).symlink_to(f"../blobs/{path.name}")
    assert main(["verify", str(tmp_path / "set"), "--quiet"]) == 0
    assert (
        main(["encode", "--input", str(tmp_path / "set"), "--output", str(tmp_path / "codes"), "--quiet", "--device", "cpu"]) == 0
    )
    assert "2 of 2 inputs" in capsys.readouterr().out


# ---- images that a record names ----


@pytest.mark.parametrize("is_fenced", [True, False])
def test_an_image_that_is_no_regular_file_is_a_reject_and_nobody_waits_for_it(tmp_path: Path, is_fenced: bool) -> None:
    root = tmp_path / "in"
    write_pairs(root, 1)
    os.mkfifo(root / "fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(root / "socket"))
    system = [
        "/proc/kmsg",
        "/proc/self/mem",
        "/proc/self/environ",
        "/dev/zero",
        "/dev/tty",
        "/proc/self/fd/0",
        "/sys/power/state",
    ]
    for number, path in enumerate(system):
        (root / f"link{number}").symlink_to(path)
    names = ["fifo", "socket", "images", *(f"link{number}" for number in range(len(system)))]
    paths = [*names, *([] if is_fenced else system)]
    source = write_jsonl(root / "odd.jsonl", [{"image_path": path, "text": "x"} for path in ["images/0.jpg", *paths]])
    manifest = pairs(source, tmp_path / "out", image_root=(str(root),) if is_fenced else ())
    assert (manifest.samples, sum(manifest.rejects.values())) == (1, len(paths))
    assert set(manifest.rejects) <= {"missing_image", "empty_image", "not_an_image", "unreadable_image"}
    found = {reject["line"]: reject for reject in read_rejects(tmp_path / "out")}
    for line in (2, 3, 4):
        assert found[line]["detail"].endswith("a folder, a device or a pipe, not a file")


def test_links_below_the_image_root_and_paths_as_the_root_is_named_are_followed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/hash").write_bytes(image_bytes(1))
    (tmp_path / "real").mkdir()
    (tmp_path / "real/a.jpg").symlink_to("../blobs/hash")
    (tmp_path / "real/folder").symlink_to("../blobs")
    (tmp_path / "root").symlink_to("real")
    paths = ["a.jpg", "folder/hash", str(tmp_path / "root/a.jpg"), str(tmp_path / "real/a.jpg"), "folder/../../blobs/hash"]
    source = write_jsonl(tmp_path / "in/a.jsonl", [{"image_path": path, "text": "x"} for path in paths])
    assert pairs(source, tmp_path / "out", image_root=(str(tmp_path / "root"),)).rejects == {"outside_root": 1}
    strict = pairs(source, tmp_path / "strict", image_root=(str(tmp_path / "root"),), strict_links=True)
    assert strict.rejects == {"outside_root": 5}


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.EINVAL, errno.EBADMSG])
def test_one_unreadable_image_is_a_reject(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_pairs(tmp_path, 3)
    fail(monkeypatch, "1.jpg", code)
    assert pairs(source, tmp_path / "out").rejects == {"unreadable_image": 1}
    assert read_rejects(tmp_path / "out")[0]["detail"] == f"images/1.jpg: {os.strerror(code)}"


@pytest.mark.parametrize("code", [errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EMFILE, errno.ENOMEM])
def test_a_mount_that_is_gone_or_a_machine_that_is_at_its_limits_is_an_error(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_pairs(tmp_path, 3)
    fail(monkeypatch, "1.jpg", code)
    with pytest.raises(StorageError, match=os.strerror(code)):
        pairs(source, tmp_path / "out")


def fail(monkeypatch: pytest.MonkeyPatch, name: str, code: int) -> None:
    """Make opening this file fail."""
    real = os.open

    def opened(path: Any, *args: Any, **kwargs: Any) -> int:
        if str(path).endswith(name):
            raise OSError(code, os.strerror(code))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", opened)


def test_a_file_of_mode_000_is_unreadable(tmp_path: Path) -> None:
    source = write_pairs(tmp_path, 2)
    (tmp_path / "images/1.jpg").chmod(0)
    if os.access(tmp_path / "images/1.jpg", os.R_OK):
        pytest.skip("this user may read everything")
    assert pairs(source, tmp_path / "out").rejects == {"unreadable_image": 1}


# ---- what is said of bytes ----


def test_only_a_cursor_is_called_one() -> None:
    header = bytes(12) + (32).to_bytes(2, "little") * 2
    for kind in (2, 3, 10, 11):
        assert damage.other_image(b"\0\0" + bytes([kind]) + header[3:] + b"\x18\0" + bytes(99)) == "TGA"
    assert damage.other_image(b"\x05\0\x02hello" + bytes(99) + b"TRUEVISION-XFILE.\0") == "TGA"
    assert damage.other_image(b"\0\0\2\0\1\0\x20\x20\0\0" + bytes(99)) == "a CUR cursor"
