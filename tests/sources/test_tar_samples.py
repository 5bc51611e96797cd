"""The container of WebDataset tars: what becomes a record, what is passed over, and what damage costs."""

from __future__ import annotations

import gc
import gzip
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import webdataset
import zstandard
from commands import SHARED, tar_bytes
from memory import grown_mb
from s3 import S3Server

from wds_tools.errors import Reject
from wds_tools.format.tar import BLOCK
from wds_tools.sources import tars as tars_module
from wds_tools.sources.record import InputFile, Record
from wds_tools.sources.tars import Tars
from wds_tools.sources.text.compression import compression_of
from wds_tools.storage import open_store, split_url

Files = Sequence[tuple[str, bytes]]
FILES: Files = [
    (f"00000/{number:09d}.{suffix}", content)
    for number in range(4)
    for suffix, content in (
        ("jpg", b"\xff\xd8" + bytes(700 * number)),
        ("txt", f"caption {number}".encode()),
        ("json", json.dumps({"url": f"http://x/{number}", "txt": "of json", "similarity": 0.25}).encode()),
    )
]


def read(path: Path | str) -> list[Record[Any]]:
    root, name = split_url(str(path))
    with open_store(root).open(name) as stream:
        tars = Tars(compression_of(stream.read(4)))
    (unit,) = tars.units([InputFile(str(path), open_store(root).size(name))])
    records = list(tars.read(unit))
    assert [record.number for record in records] == list(range(len(records)))
    assert sum(record.num_units for record in records) in (unit.num_bytes, 0)
    return records


def read_bytes(archive: bytes, folder: Path, name: str = "a.tar") -> list[Record[Any]]:
    (folder / name).write_bytes(archive)
    return read(folder / name)


def reasons(records: Sequence[Record[Any]]) -> list[str]:
    return [record.fields.reason if isinstance(record.fields, Reject) else str(record.key) for record in records]


def test_a_sample_has_its_members_by_suffix_and_the_fields_of_its_json(tmp_path: Path) -> None:
    records = read_bytes(tar_bytes(FILES), tmp_path)
    assert [record.key for record in records] == [f"00000/{number:09d}" for number in range(4)]
    assert records[1].fields == {
        "jpg": b"\xff\xd8" + bytes(700),
        "txt": "caption 1",
        "json": {"url": "http://x/1", "txt": "of json", "similarity": 0.25},
        "url": "http://x/1",
        "similarity": 0.25,
    }
    assert all(record.num_passed_over == 0 for record in records)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_suffixes_are_those_of_webdataset_in_lower_case(tmp_path: Path) -> None:
    files = [
        ("s.v1/a.JPG", b"1"),
        ("s.v1/a.0.Txt", b"2"),
        ("s.v1/a.Cls", b"7"),
        ("s.v1/a.meta.json", b'{"b": 1}'),
        ("s.v1/a.npy", b"5"),
    ]
    (record,) = read_bytes(tar_bytes(files), tmp_path)
    assert record.fields == {"jpg": b"1", "0.txt": "2", "cls": "7", "meta.json": {"b": 1}, "npy": b"5"}
    (theirs,) = webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)
    gc.collect()  # it leaves its file open
    assert set(record.fields) == {name for name in theirs if not name.startswith("__")}
    assert record.key == theirs["__key__"]


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_read(tmp_path: Path, tar_format: int) -> None:
    stem = "k" * 60 + "/" + "é" * 20
    assert reasons(read_bytes(tar_bytes([(f"{stem}.jpg", b"1"), (f"{stem}.txt", b"2")], tar_format), tmp_path)) == [stem]


def test_a_name_that_is_not_utf8_costs_nothing(tmp_path: Path) -> None:
    archive = tar_bytes([("AAAA.jpg", b"1"), ("AAAA.txt", b"2"), ("b.txt", b"3")], tarfile.GNU_FORMAT)
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(archive)) as old, tarfile.open(fileobj=out, mode="w", encoding="latin-1") as new:
        new.format = tarfile.GNU_FORMAT
        for member in old:
            member.name = member.name.replace("AAAA", "é")
            new.addfile(member, old.extractfile(member))
    assert reasons(read_bytes(out.getvalue(), tmp_path)) == ["\\xe9", "b"]


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "a.tar.gz": gzip.compress,
    "a.tgz": lambda data: gzip.compress(data[:3000]) + gzip.compress(data[3000:]),
    "a.tar.zst": zstandard.compress,
    "a.tar": gzip.compress,
}


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_compressed_tar_is_read_as_it_is(tmp_path: Path, name: str) -> None:
    expected = [record.fields for record in read_bytes(tar_bytes(FILES), tmp_path, "plain.tar")]
    assert [record.fields for record in read_bytes(COMPRESSORS[name](tar_bytes(FILES)), tmp_path, name)] == expected


# ---- What is no part of a sample ----


def test_stray_members_are_passed_over_and_counted(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x"}) as archive:
        for name in ("LICENSE", "0.txt", "__MACOSX/._0.txt", "._0.jpg", "0.jpg", ".DS_Store", "1.txt", "1.", "set/.hidden"):
            archive.addfile(tarfile.TarInfo(name))
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
            other = tarfile.TarInfo("2.jpg")
            other.type, other.linkname = kind, "../../etc/passwd"
            archive.addfile(other)
    records = read_bytes(out.getvalue(), tmp_path)
    assert [sorted(record.fields) for record in records] == [["jpg", "txt"], ["txt"]]
    assert sum(record.num_passed_over for record in records) == 6 + 5  # a folder is no member


def test_a_tar_of_nothing_but_strays_is_a_reject_and_an_empty_one_is_not(tmp_path: Path) -> None:
    (record,) = read_bytes(tar_bytes([("LICENSE", b""), (".a.jpg", b"")]), tmp_path)
    assert (reasons([record]), record.num_passed_over) == (["no_samples"], 2)
    assert read_bytes(tar_bytes([]), tmp_path) == []


# ---- Samples that can't be used ----


def test_a_bad_sample_is_a_reject_and_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars_module, "MAX_SAMPLE_BYTES", 3 << 20)
    files = [
        *(("a.txt", b"1"), ("a.TXT", b"2")),
        *(("b.txt", b"1"), ("b.jpg", bytes(4 << 20))),
        *(("c.0.jpg", bytes(2 << 20)), ("c.1.jpg", bytes(2 << 20))),
        *(("d.json", b'{"a": '), ("d.jpg", b"1")),
        *(("e.txt", b"\xff"), ("e.jpg", b"1")),
        *(("f.json", b"[1]"), ("f.jpg", b"1")),
        ("g.txt", b"fine"),
    ]
    expected = ["duplicate_member", "sample_too_large", "sample_too_large", "bad_json", "invalid_utf8", "not_an_object", "g"]
    records = read_bytes(tar_bytes(files), tmp_path)
    assert reasons(records) == expected
    assert [record.key for record in records] == list("abcdefg")


@pytest.mark.parametrize("size", range(0, len(tar_bytes(FILES[:6])), BLOCK // 2))
def test_of_a_tar_that_was_cut_the_rest_is_one_reject(tmp_path: Path, size: int) -> None:
    whole = tar_bytes(FILES[:6])
    end = 13 * BLOCK
    found = reasons(read_bytes(whole[:size], tmp_path))
    if size >= end + BLOCK:
        assert found == ["00000/000000000", "00000/000000001"]
    else:  # a sample may go on where the tar ends
        assert found[-1] == "truncated_tar"
        assert found[:-1] == [key for key in ("00000/000000000",) if size >= 9 * BLOCK]


def test_of_a_damaged_tar_the_rest_is_one_reject(tmp_path: Path) -> None:
    archive = bytearray(tar_bytes(FILES))
    archive[archive.index(b"00000/000000002.txt")] ^= 1
    records = read_bytes(bytes(archive), tmp_path)
    assert reasons(records) == ["00000/000000000", "00000/000000001", "corrupt_tar"]
    assert records[-1].key == "00000/000000002"
    assert reasons(read_bytes(tar_bytes(FILES) + tar_bytes(FILES), tmp_path))[4:] == ["corrupt_tar"]


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_a_compressed_tar_that_was_cut_gives_what_lies_before(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    files = [(f"{number}.jpg", bytes(number % 251 for number in range(9000)) * 20) for number in range(9)]
    found = reasons(read_bytes(compress(tar_bytes(files))[:-9], tmp_path))
    assert found[:-1] == [str(number) for number in range(len(found) - 1)]
    assert found[-1].startswith("truncated")


@pytest.mark.skipif(not (SHARED / "malformed/tars").exists(), reason="the malformed tars are not here")
def test_no_malformed_tar_ends_in_an_error(tmp_path: Path) -> None:
    for path in (SHARED / "malformed/tars").iterdir():
        read(path)


def test_a_member_that_claims_gigabytes_and_a_bomb_take_no_memory(tmp_path: Path) -> None:
    zeros = bytes(16 << 20)
    member = tarfile.TarInfo("a.jpg")
    member.size = 512 << 20
    packer = zstandard.ZstdCompressor().compressobj()
    with (tmp_path / "a.tar.zst").open("wb") as out:
        out.write(packer.compress(tar_bytes([("0.txt", b"1")])[: 2 * BLOCK] + member.tobuf()))
        for _ in range(32):
            out.write(packer.compress(zeros))
        out.write(packer.compress(tar_bytes([("b.txt", b"2")])) + packer.flush())
    setup = "from wds_tools.sources.tars import Tars, Unit"
    grown = grown_mb(
        setup, f"print([getattr(r.fields, 'reason', r.key) for r in Tars('zst').read(Unit({str(tmp_path / 'a.tar.zst')!r}, 1))])"
    )
    assert grown < 100
    assert reasons(read(tmp_path / "a.tar.zst")) == ["0", "sample_too_large", "b"]


def test_tars_are_read_from_object_storage(tmp_path: Path, s3: S3Server) -> None:
    url = f"s3://{s3.bucket}/source-tars"
    open_store(url).put("a.tar", tar_bytes(FILES))
    assert [record.fields for record in read(f"{url}/a.tar")] == [
        record.fields for record in read_bytes(tar_bytes(FILES), tmp_path)
    ]


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
@pytest.mark.parametrize("order", [("0.json", "0.jpg", "1.json"), ("0.jpg", "0.json", "1.json"), ("1.json", "0.jpg", "0.json")])
def test_a_sample_of_which_a_member_is_a_link_is_a_reject_and_others_are_not(
    kind: bytes, order: tuple[str, ...], tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in order:
            member = tarfile.TarInfo(name)
            if name == "0.jpg":
                member.type, member.linkname = kind, "elsewhere.jpg"
            else:
                member.size = len(b'{"text": "t"}')
            archive.addfile(member, io.BytesIO(b'{"text": "t"}'))
    assert sorted(reasons(read(tmp_path / "a.tar"))) == ["1", "link_member"]
