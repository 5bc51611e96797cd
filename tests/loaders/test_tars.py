"""TarDataset: WebDataset tars without an index, read as webdataset reads them."""

from __future__ import annotations

import gc
import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset as wds
from PIL import Image
from s3 import S3Server

from loaders import TarDataset
from wds_tools.errors import FormatError, NotFound, UsageError
from wds_tools.storage import open_store


def write_tars(folder: Path, shards: int = 5, samples: int = 7) -> list[str]:
    folder.mkdir()
    image = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 10, 10)).save(image, "PNG")
    for shard in range(shards):
        with wds.TarWriter(str(folder / f"part-{shard}.tar")) as writer:
            for number in range(samples):
                writer.write({"__key__": f"a.b/{shard}-{number}", "png": image.getvalue(), "txt": f"caption {shard} {number}"})
    return sorted(f"caption {shard} {number}" for shard in range(shards) for number in range(samples))


def texts(samples: Any) -> list[str]:
    return [bytes(sample["txt"]).decode() for sample in samples]


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_samples_are_those_that_webdataset_reads(tmp_path: Path) -> None:
    write_tars(tmp_path / "tars")
    ours = list(TarDataset(str(tmp_path / "tars"), shuffle=False))
    theirs = list(wds.WebDataset([str(path) for path in sorted((tmp_path / "tars").iterdir())], shardshuffle=False))
    gc.collect()  # it leaves its files open
    fields = ("__key__", "png", "txt")
    assert [[sample.get(name) for name in fields] for sample in ours] == [
        [sample.get(name) for name in fields] for sample in theirs
    ]
    assert {sample["__url__"] for sample in ours} == {sample["__url__"] for sample in theirs}


def test_webdatasets_stages_go_on_behind_it(tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    folder.mkdir()
    with wds.TarWriter(str(folder / "a.tar")) as writer:
        for number in range(4):
            writer.write({"__key__": str(number), "json": {"number": number}, "txt": f"text {number}"})
    pairs = list(TarDataset(str(folder)).decode().to_tuple("txt", "json").shuffle(2))
    assert sorted(pairs, key=str) == [(f"text {number}", {"number": number}) for number in range(4)]


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (1, 2), (3, 1), (9, 0)])
def test_an_epoch_has_every_sample_once_over_ranks_and_workers(tmp_path: Path, world_size: int, num_workers: int) -> None:
    expected = write_tars(tmp_path / "tars")
    seen: list[str] = []
    for rank in range(world_size):
        dataset = TarDataset(str(tmp_path / "tars"), rank=rank, world_size=world_size)
        seen += texts(torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=num_workers))
    assert sorted(seen) == expected


def test_shards_come_in_another_order_each_epoch_and_in_the_same_when_asked_again(tmp_path: Path) -> None:
    write_tars(tmp_path / "tars", shards=8, samples=1)
    dataset = TarDataset(str(tmp_path / "tars"))
    assert dataset.num_shards == 8
    first = texts(dataset)
    dataset.set_epoch(1)
    second = texts(dataset)
    dataset.set_epoch(0)
    assert texts(dataset) == first != second
    assert texts(TarDataset(str(tmp_path / "tars"), seed=1)) not in (first, second)


def test_tars_on_s3_are_read_too(s3: S3Server, tmp_path: Path) -> None:
    expected = write_tars(tmp_path / "tars", shards=3)
    store = open_store(f"s3://{s3.bucket}/tars")
    for path in (tmp_path / "tars").iterdir():
        store.put(path.name, path.read_bytes())
    assert sorted(texts(TarDataset(f"s3://{s3.bucket}/tars"))) == expected


def test_a_damaged_tar_is_named_with_the_byte(tmp_path: Path) -> None:
    write_tars(tmp_path / "tars", shards=1)
    path = tmp_path / "tars" / "part-0.tar"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(FormatError, match=r"part-0\.tar.*byte"):
        list(TarDataset(str(tmp_path / "tars")))


def test_a_folder_without_tars_and_a_rank_outside_the_world_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"no \*\.tar"):
        TarDataset(str(tmp_path))
    write_tars(tmp_path / "tars", shards=1)
    with pytest.raises(UsageError, match="rank=1"):
        TarDataset(str(tmp_path / "tars"), rank=1, world_size=1)


def test_members_that_are_no_part_of_a_sample_are_passed_over_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    for name in ("a.tar", "b.tar"):
        with tarfile.open(tmp_path / "tars" / name, "w") as archive:
            for member in ("LICENSE", "._0.txt", "0.txt", ".DS_Store", "1.txt"):
                archive.addfile(tarfile.TarInfo(member))
            link = tarfile.TarInfo("1.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(link)
    with pytest.warns(UserWarning, match=r"a\.tar: passed over 4 members") as warned:
        samples = list(TarDataset(str(tmp_path / "tars"), shuffle=False))
    assert len(warned) == 1
    assert [(sample["__key__"], sorted(sample)[2:]) for sample in samples] == 2 * [("0", ["txt"]), ("1", ["txt"])]
