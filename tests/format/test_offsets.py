"""The offsets file: what it says is where the samples are, however large they are and however they are cut into shards."""

from __future__ import annotations

import uuid
from itertools import pairwise

import numpy as np
import pytest
import safetensors.numpy
from factory import make_dataset, text_sample
from hypothesis import given
from hypothesis import strategies as st
from properties import tries

from wds_tools.dataset.layout import OFFSETS, index_name
from wds_tools.dataset.offsets import OffsetsReader, Place
from wds_tools.errors import FormatError
from wds_tools.format.index import parse_index
from wds_tools.format.manifest import Manifest, parse_manifest
from wds_tools.format.offsets import Groups, hash_offsets, marked, serialize_offsets
from wds_tools.format.shard import ShardBuilder
from wds_tools.format.tar.scan import scan_run, scan_runs
from wds_tools.storage import Store, open_store


def dataset(sizes: list[int], shard_samples: int) -> tuple[Store, Manifest]:
    """Documents of so many characters."""
    url = f"memory://offsets/{uuid.uuid4().hex}"
    manifest = make_dataset(
        url, (text_sample(number, "a" * size) for number, size in enumerate(sizes)), shard_samples=shard_samples
    )
    return open_store(url), manifest


@tries(25)
@given(st.lists(st.integers(0, 60_000), min_size=1, max_size=60), st.integers(1, 40), st.data())
def test_any_samples_lie_between_the_bounds_of_their_groups(sizes: list[int], shard_samples: int, data: st.DataObject) -> None:
    store, manifest = dataset(sizes, shard_samples)
    reader = OffsetsReader(store, manifest, store.read_range)
    shard = data.draw(st.integers(0, len(manifest.shards) - 1))
    info = manifest.shards[shard]
    first = data.draw(st.integers(0, info.samples - 1))
    last = data.draw(st.integers(first + 1, info.samples))
    place = reader.locate(shard, first, last)
    start = parse_index(store.read(index_name(info.name))).start.tolist()
    assert place.first <= first < last <= place.last
    assert first - place.first < place.group_samples
    assert place.last - last < place.group_samples
    assert place.bounds[:-1] == start[place.first : place.last : place.group_samples]
    assert place.bounds[-1] == (info.bytes if place.last == info.samples else start[place.last])
    run = memoryview(store.read_range(info.name, place.bounds[0], place.bounds[-1]))
    found = scan_run(run, info.members, place.last - place.first, info.name)
    assert (found.start + place.bounds[0]).tolist() == start[place.first : place.last]
    groups = [run[low - place.bounds[0] : high - place.bounds[0]] for low, high in pairwise(place.bounds)]
    runs = scan_runs(groups)
    assert runs is not None
    assert np.diff(runs.first).tolist() == [len(found.start[at : at + place.group_samples]) for at in group_starts(place)]
    base = np.repeat(place.bounds[:-1], np.diff(runs.first)) - place.bounds[0]
    assert (runs.start + base).tolist() == found.start.tolist()
    assert (runs.end + base).tolist() == (found.start + found.size).tolist()
    assert runs.suffixes == ("json",)
    assert (runs.offset + base[runs.sample] - found.start).tolist() == found.offsets[:, 0].tolist()
    assert runs.length.tolist() == found.lengths[:, 0].tolist()


def group_starts(place: Place) -> range:
    return range(0, place.last - place.first, place.group_samples)


def test_the_file_is_what_safetensors_reads_and_its_hash_is_in_the_manifest() -> None:
    store, manifest = dataset([1000 * number for number in range(60)], 25)
    data = store.read(OFFSETS)
    assert parse_manifest(store.read("manifest.json")).offsets_hash == manifest.offsets_hash == hash_offsets(data)
    column = safetensors.numpy.load(data)["offsets"]
    assert len(column) == len(Groups(manifest))
    firsts = [index for index, offset in enumerate(column.tolist()) if not offset]
    assert len(firsts) == len(manifest.shards)


def test_shards_of_small_samples_among_large_ones_have_groups_of_16_kib_at_most() -> None:
    """Their task did not know that the others would be large, and kept an offset for as many of its own."""
    store, manifest = dataset([10] * 200 + [900_000] * 10, 200)
    assert manifest.group_samples == 1
    place = OffsetsReader(store, manifest, store.read_range).locate(0, 17, 18)
    assert (place.first, place.last, place.group_samples) == (16, 24, 8)
    assert place.bounds == [16 * 1024, 24 * 1024]


def test_offsets_that_do_not_ascend_within_the_shard_are_refused() -> None:
    store, manifest = dataset([20_000] * 20, 10)
    data = bytearray(store.read(OFFSETS))
    data[-4:] = (1 << 31).to_bytes(4, "little")
    with pytest.raises(FormatError, match=r"offsets.safetensors: groups of shard-000000-0001.tar, \d+ bytes, begin at"):
        OffsetsReader(store, manifest, lambda _name, begin, end, _size: bytes(data[begin:end])).locate(1, 9, 10)


def test_offsets_of_other_shards_than_the_manifest_has_are_not_written() -> None:
    _, manifest = dataset([20_000] * 20, 10)
    with pytest.raises(FormatError, match="offsets of 10 groups, the manifest makes it 20"):
        serialize_offsets(manifest, [np.arange(10, dtype="<u4")])


@pytest.mark.parametrize("start", [np.array([0, 700]), np.array([0, 512 << 32])])
def test_what_an_offset_cannot_say_is_refused(start: np.ndarray) -> None:
    with pytest.raises(FormatError, match="expected whole blocks of 512 bytes, fewer than"):
        marked(start, 40_000)


@pytest.mark.parametrize("at", [0, 100, 130, 150, 156, 257, 345, 1024, 1124, 1200])
def test_a_byte_that_was_changed_in_a_header_is_noticed(at: int) -> None:
    builder = ShardBuilder()
    good = b"".join(builder.add_members(f"key{number}", [("txt", b"abc"), ("cls", b"1")]) for number in range(2))
    bad = bytearray(good)
    bad[at] ^= 4
    assert scan_runs([memoryview(good)]) is not None
    found = scan_runs([memoryview(good), memoryview(bytes(bad))])
    assert found is None or np.diff(found.first).tolist() != [2, 2] or not {*found.suffixes} <= {"txt", "cls"}
    with pytest.raises(FormatError):
        scan_run(memoryview(bytes(bad)), ("txt", "cls"), 2, "damaged.tar")
