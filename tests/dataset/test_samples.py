"""Reading an index in runs: what any part of it says, once for all threads, and never of another tar."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from factory import image_sample, make_dataset
from hypothesis import given
from hypothesis import strategies as st
from properties import tries

from wds_tools.dataset import samples
from wds_tools.dataset.reader import read_manifest
from wds_tools.dataset.samples import IndexReader
from wds_tools.errors import FormatError, NotFound
from wds_tools.format.index import parse_index
from wds_tools.storage import open_store

NUM_SAMPLES = 20
COLUMNS = ("start", "size", "lengths", "offsets", "crc32", "text_chars", "num_codes")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("samples") / "set"
    make_dataset(folder, map(image_sample, range(NUM_SAMPLES)))
    return str(folder)


@tries(30)
@given(run_samples=st.integers(1, NUM_SAMPLES + 1), first=st.integers(0, NUM_SAMPLES), count=st.integers(0, NUM_SAMPLES))
def test_any_part_of_an_index_is_that_of_the_whole(url: str, run_samples: int, first: int, count: int) -> None:
    store = open_store(url)
    manifest = read_manifest(store)
    last = min(first + count, NUM_SAMPLES)
    whole = parse_index(store.read(f"{manifest.shards[0].name}.index"))
    fetched: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "RUN_SAMPLES", run_samples)
        reader = IndexReader(store, manifest, fetched.append)
        for _ in range(2):
            part = reader.read(0, first, last)
            assert len(part) == last - first
            for name in COLUMNS:
                assert np.array_equal(getattr(part, name), getattr(whole, name)[first:last])
    assert len(fetched) == 1


def test_an_index_of_another_tar_and_one_that_is_missing_are_refused_by_name(url: str, tmp_path: Path) -> None:
    store = open_store(url)
    manifest = read_manifest(store)
    other = replace(manifest, shards=(replace(manifest.shards[0], xxh128="0" * 32),))
    with pytest.raises(FormatError, match=r"shard-000000-0000\.tar\.index: the index is stale"):
        IndexReader(store, other).read(0, 0, 1)
    with pytest.raises(NotFound, match=r"shard-000000-0000\.tar\.index: the index is missing: write it with `wds-tools index`"):
        IndexReader(open_store(str(tmp_path)), manifest).read(0, 0, 1)
