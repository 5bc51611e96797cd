"""Samples of object storage are found by offsets and headers, without an index; what is damaged, by the index as ever."""

from __future__ import annotations

import io
import tarfile
import uuid
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from factory import image_sample, make_dataset, text_sample

from loaders import LoaderConfig, Source, World, build_loader
from loaders.loader import Loader
from loaders.order.samples import open_source
from loaders.reading.source import SourceReader, bytes_of
from wds_tools.dataset.layout import OFFSETS
from wds_tools.errors import FormatError, NotFound, UsageError
from wds_tools.format.manifest import parse_manifest, serialize_manifest
from wds_tools.format.offsets import Groups
from wds_tools.jobs.index_tars import index_tars, rebuild_indices
from wds_tools.storage import open_store
from wds_tools.storage.objects import ObjectStore

COUNT = 300
SHARD = "shard-000000-0001.tar"


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> str:
    """Captions with codes, and documents, read in blocks of a few samples."""
    monkeypatch.setattr("loaders.order.plan.SMALL_BYTES", 0)
    monkeypatch.setattr("loaders.reading.planner.SMALL_BYTES", 0)
    monkeypatch.setattr("loaders.order.plan.MIN_BLOCK_BYTES", 12_000)
    url = f"memory://by-offsets/{uuid.uuid4().hex}"
    samples = (image_sample(number, side=16) if number % 4 else text_sample(number, "a" * 90 * number) for number in range(COUNT))
    make_dataset(url, samples, shard_samples=100)
    return url


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is fetched in order; the manifest, which is read as a stream, is not among them."""
    names: list[str] = []
    for way in ("read", "read_range"):
        original = getattr(ObjectStore, way)

        def noting(store: ObjectStore, name: str, *arguments: Any, original: Any = original) -> Any:
            names.append(name)
            return original(store, name, *arguments)

        monkeypatch.setattr(ObjectStore, way, noting)
    return names


def loader(url: str, **settings: Any) -> Loader:
    wanted = {"batch_size": 6, "last_batch": "short", "epochs": 1, **settings}
    return build_loader(LoaderConfig(sources=(Source(url),), **wanted), World())


def rows(batches: Loader) -> Iterator[tuple[Any, ...]]:
    for batch in batches:
        codes = [None if grid is None else grid.tolist() for grid in batch["codes"]]
        yield from zip(batch["__key__"], batch["text"], codes, strict=True)


def forget_offsets(url: str) -> None:
    """As the manifest of an earlier release: it knows of none."""
    store = open_store(url)
    manifest = parse_manifest(store.read("manifest.json"))
    store.put("manifest.json", serialize_manifest(replace(manifest, offsets_hash=None)))
    store.delete(OFFSETS)


@pytest.mark.parametrize("memory_bytes", [2 << 30, 200_000])
def test_an_epoch_without_any_index_is_that_with_indices(url: str, asked: list[str], memory_bytes: int) -> None:
    by_offsets = loader(url, memory_bytes=memory_bytes, scarce_memory=True)
    found = list(rows(by_offsets))
    assert len(found) == COUNT
    assert not [name for name in asked if name.endswith(".index")]
    assert asked.count(OFFSETS) == 1
    forget_offsets(url)
    assert list(rows(loader(url, memory_bytes=memory_bytes, scarce_memory=True))) == found
    assert [name for name in asked if name.endswith(".index")]
    assert by_offsets.stats()["misplaced"] == 0


def test_index_writes_the_offsets_of_a_dataset_that_has_none(url: str) -> None:
    store = open_store(url)
    data, manifest = store.read(OFFSETS), store.read("manifest.json")
    forget_offsets(url)
    assert rebuild_indices(store).offsets_hash is not None
    assert store.read(OFFSETS) == data
    assert store.read("manifest.json") == manifest


def test_a_missing_file_of_offsets_is_named_with_what_to_do(url: str) -> None:
    open_store(url).delete(OFFSETS)
    with pytest.raises(NotFound, match=rf"{url}/offsets\.safetensors is missing: copy it, or write it with `wds-tools index`"):
        list(rows(loader(url)))


def test_a_damaged_header_that_nobody_needs_costs_a_request_and_is_counted(url: str) -> None:
    store = open_store(url)
    good = list(rows(loader(url)))
    tar = bytearray(store.read(SHARD))
    tar[tar.index(b".vqcode_512.npy") // 512 * 512 + 140] ^= 1  # in its mtime: the checksum is wrong
    store.put(SHARD, bytes(tar))
    damaged = loader(url)
    assert list(rows(damaged)) == good
    assert damaged.stats()["misplaced"] > 0


@pytest.mark.parametrize("by", [2, 512])
def test_wrong_offsets_cost_requests_and_never_another_sample(url: str, by: int) -> None:
    store = open_store(url)
    good = list(rows(loader(url)))
    data = bytearray(store.read(OFFSETS))
    for at in range((128 + len(data)) // 8 * 4, len(data), 4):
        offset = int.from_bytes(data[at : at + 4], "little")
        data[at : at + 4] = (offset + by if offset else 0).to_bytes(4, "little")
    store.put(OFFSETS, bytes(data))
    wrong = loader(url, memory_bytes=200_000, scarce_memory=True)
    assert list(rows(wrong)) == good
    assert wrong.stats()["misplaced"] > 0


@pytest.mark.parametrize("num_requests", [1, 3])
def test_offsets_that_fit_whole_samples_of_other_numbers_are_not_taken(
    url: str, asked: list[str], monkeypatch: pytest.MonkeyPatch, num_requests: int
) -> None:
    url += "-even"
    manifest = make_dataset(url, (image_sample(number, side=16) for number in range(COUNT)), shard_samples=100)
    store = open_store(url)
    data = store.read(OFFSETS)
    first, second = (int.from_bytes(data[at : at + 4], "little") for at in (128, 132))
    per_sample = (second - first) // Groups(manifest).span(0, 0, 1).group_samples
    good = list(rows(loader(url)))
    later = (int.from_bytes(data[at : at + 4], "little") + per_sample for at in range(128, len(data), 4))
    store.put(OFFSETS, data[:128] + b"".join(offset.to_bytes(4, "little") for offset in later))
    monkeypatch.setattr("wds_tools.dataset.offsets.REQUEST_BYTES", (len(data) - 128) // num_requests + 1)
    asked.clear()
    wrong = loader(url)
    assert list(rows(wrong)) == good
    assert wrong.stats()["misplaced"] > 0
    assert asked.count(OFFSETS) == num_requests


def test_members_of_any_tar_are_those_that_its_index_says(asked: list[str]) -> None:
    """Also where a pax block stands before each member, as in tars of webdataset."""
    import io
    import tarfile

    from wds_tools.jobs.index_tars import index_tars

    url = f"memory://by-offsets/{uuid.uuid4().hex}"
    store = open_store(url)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(40):
            for suffix, size in (("jpg", 9000), ("cls", 1)):
                member = tarfile.TarInfo(f"a/{number}.{suffix}")
                member.size, member.mtime = size, 0.5
                tar.addfile(member, io.BytesIO(bytes([number]) * size))
    store.put("a.tar", packed.getvalue())
    assert index_tars(store).offsets_hash is not None
    asked.clear()
    batch = next(iter(loader(url)))
    assert batch["jpg"] == [bytes([int(key.removeprefix("a/"))]) * 9000 for key in batch["__key__"]]
    assert set(asked) == {OFFSETS, "a.tar"}


def test_what_lies_in_a_group_is_loaded_with_it_and_found_when_it_is_asked_for(url: str) -> None:
    reader = SourceReader(open_source(Source(url)))
    loaded = reader.load(0, 33, 35)
    assert loaded.first <= 33 < 35 <= loaded.last
    assert set(loaded.spans) == {0}
    (sample,) = bytes_of([loaded], [34]).samples()
    assert bytes(sample[:19]) == b"image-00000034.json"
    assert loaded.index.start.tolist() == [loaded.begin + start for start in loaded.spans[:: reader.span_width]]


def test_too_little_memory_is_refused_with_the_number_that_is_needed(url: str) -> None:
    with pytest.raises(UsageError, match=r"memory_bytes=200,000 does not hold a block of 12,000 .* give it 768,000, or use more"):
        next(iter(loader(url, memory_bytes=200_000)))
    assert len(next(iter(loader(url, memory_bytes=768_000)))["text"]) == 6


def test_statistics_say_what_the_storage_does(url: str) -> None:
    made = loader(url)
    list(rows(made))
    stats = made.stats()
    assert stats["sample_bytes"] == sum(shard.bytes - 1024 for shard in open_source(Source(url)).manifest.shards)
    assert stats["amplification"] == stats["bytes"] / stats["sample_bytes"]
    assert 1 < stats["amplification"] < 1.1
    assert stats["in_flight"] == 0
    assert stats["bytes_per_s"] > 0
    assert 0 <= stats["first_byte_s"] < 10


def test_a_key_that_changes_in_a_member_is_found(url: str) -> None:
    """Header and checksum are sound, but the member is not that of its sample."""
    store = open_store(url)
    good = list(rows(loader(url)))
    tar = bytearray(store.read(SHARD))
    at = tar.index(b".vqcode_512.npy") - 1
    tar[at] += 1
    checksum = at // 512 * 512 + 148
    stated = int(tar[checksum : checksum + 6], 8) + 1
    tar[checksum : checksum + 6] = b"%06o" % stated
    store.put(SHARD, bytes(tar))
    changed = loader(url)
    assert list(rows(changed)) == good  # by the index, which says where the codes are
    assert changed.stats()["misplaced"] > 0


def test_what_is_neither_by_headers_nor_by_the_index_is_an_error(url: str) -> None:
    store = open_store(url)
    tar = bytearray(store.read(SHARD))
    tar[0:1024] = bytes(1024)
    store.put(SHARD, bytes(tar))
    with pytest.raises(FormatError, match=SHARD):
        list(rows(loader(url)))


def test_samples_of_one_key_in_several_shards_keep_all_their_bytes() -> None:
    """As in third-party tars that number their samples from 0 in each; here the last of one is named as the first of the next."""
    store = open_store(f"memory://by-offsets/{uuid.uuid4().hex}")
    shards = [{"x.png": 20_000, "a.jpg": 60_000}, {"a.png": 30_000, "y.jpg": 40_000}]
    for shard, members in enumerate(shards):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for name, size in members.items():
                info = tarfile.TarInfo(name)
                info.size = size
                tar.addfile(info, io.BytesIO(bytes(size)))
        store.put(f"{shard}.tar", out.getvalue())
    index_tars(store)
    (batch,) = loader(store.url, shuffle=False)
    held = ((key, name, batch[name][number]) for number, key in enumerate(batch["__key__"]) for name in ("jpg", "png"))
    found = {f"{key}.{name}": len(data) for key, name, data in held if data is not None}
    assert found == shards[0] | shards[1]
