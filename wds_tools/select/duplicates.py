"""All samples of equal text or equal codes, written down by their keys.

    hashes of the fields -> sorted on disk -> groups -> a line of JSON each

Cost: that of the fields and the sort. Memory: the keys of the dataset, about 25 bytes a sample, and a bucket of the sort.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import orjson

from wds_tools.dataset.external_sort import ExternalSort
from wds_tools.dataset.reader import read_manifest
from wds_tools.select.choose import RECORD_BYTES, UNIQUE, add_hashes, groups
from wds_tools.select.fields import KEY, Fields, values_of
from wds_tools.sources.arrow import load_pyarrow
from wds_tools.storage import open_store, split_url


def write_duplicates(url: str, target: str, *, workers: int = 1, quiet: bool = True) -> dict[str, int]:
    """Write a line for each text, and for the codes of each image, that several samples of a dataset have.

    Args:
        url: the dataset.
        target: the file, a path or URL: {"same": "text" or "codes", "keys": [...]} a line, keys in the order of the dataset.
        workers: processes to use.
        quiet: show no progress.

    Returns:
        Lines by "text" and "codes".

    Raises:
        MissingPackage: pyarrow is not installed.
        UsageError: another run is writing to the dataset.
    """
    pa, store = load_pyarrow("comparing samples"), open_store(url)
    manifest = read_manifest(store, any_members=True)
    fields = Fields.make(store, manifest, workers=workers, quiet=quiet)
    tables = [fields.read(shard, [KEY]) for shard in manifest.shards]
    keys = pa.chunked_array([chunk for table in tables for chunk in table[KEY].chunks], pa.string())
    home, name = split_url(target)
    counts = dict.fromkeys(UNIQUE, 0)
    with tempfile.TemporaryDirectory(prefix="wds-tools-") as folder, open_store(home).write(name) as file:
        for what, column in UNIQUE.items():
            sort, first = ExternalSort(Path(folder) / what, manifest.samples * RECORD_BYTES), 0
            for shard in manifest.shards:
                add_hashes(sort, values_of(fields.read(shard, [column]), column), first)
                first += shard.samples
            for numbers in groups(sort):
                counts[what] += 1
                file.write(orjson.dumps({"same": what, "keys": keys.take(pa.array(numbers)).to_pylist()}) + b"\n")
    return counts
