"""Samples of third-party tars have the key of their members, whatever the headers look like and however the members lie."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from commands import tar_bytes

from loaders import ShardDataset
from wds_tools.jobs.index_tars import index_tars
from wds_tools.storage import open_store


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("folder", ["", "./", "a.b/c/", f"{'d' * 90}/"])
def test_a_sample_has_the_key_of_its_members_in_whatever_order_they_lie(tmp_path: Path, tar_format: int, folder: str) -> None:
    members = [(f"{folder}one.jpg", b"1"), (f"{folder}one.seg.txt", b"first"), (f"{folder}two-{'x' * 60}.seg.txt", b"second")]
    members += [(f"{folder}two-{'x' * 60}.jpg", b"2"), (f"{folder}three.jpg", b"path=3")]
    (tmp_path / "a.tar").write_bytes(tar_bytes(members, tar_format))
    index_tars(open_store(str(tmp_path)))
    samples = list(ShardDataset(str(tmp_path), shuffle=False))
    key = folder.removeprefix("./")
    assert [sample["__key__"] for sample in samples] == [f"{key}one", f"{key}two-{'x' * 60}", f"{key}three"]
    assert [sample.get("seg.txt") for sample in samples] == [b"first", b"second", None]
    assert [sample["jpg"] for sample in samples] == [b"1", b"2", b"path=3"]
