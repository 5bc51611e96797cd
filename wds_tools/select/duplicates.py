"""All samples of equal text or equal codes, written down by their keys.

    hashes of the fields -> sorted on disk -> groups, 2^20 samples at a time -> their keys -> a line of JSON each

Cost: that of the fields and the sort; the keys of the groups, once for each 2^20 samples in them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import orjson

from wds_tools.dataset.external_sort import ExternalSort
from wds_tools.dataset.reader import read_manifest
from wds_tools.select.choose import RECORD_BYTES, UNIQUE, add_hashes, groups
from wds_tools.select.fields import KEY, Fields, values_of
from wds_tools.storage import open_store, split_url

_AT_ONCE = 1 << 20


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
    store = open_store(url)
    manifest = read_manifest(store, any_members=True)
    fields = Fields.make(store, manifest, workers=workers, quiet=quiet)
    firsts = np.cumsum([0, *(shard.samples for shard in manifest.shards)])
    home, name = split_url(target)
    counts = dict.fromkeys(UNIQUE, 0)

    def keys_of(found: list[list[int]]) -> Iterator[list[str]]:
        shards: dict[int, list[str]] = {}
        keys: dict[int, str] = {}
        for number in sorted(chain.from_iterable(found)):
            shard = int(np.searchsorted(firsts, number, side="right")) - 1
            if shard not in shards:
                shards = {shard: values_of(fields.read(manifest.shards[shard], [KEY]), KEY)}
            keys[number] = shards[shard][number - int(firsts[shard])]
        return ([keys[number] for number in numbers] for numbers in sorted(found))

    with tempfile.TemporaryDirectory(prefix="wds-tools-") as folder, open_store(home).write(name) as file:
        for what, column in UNIQUE.items():
            sort = ExternalSort.of_size(Path(folder) / what, manifest.samples * RECORD_BYTES)
            for shard, first in zip(manifest.shards, firsts.tolist(), strict=False):
                add_hashes(sort, values_of(fields.read(shard, [column]), column), first)
            found: list[list[int]] = []
            num_held = 0
            for numbers in chain(groups(sort), [[]]):
                found += [numbers] * bool(numbers)
                num_held += len(numbers)
                if num_held >= _AT_ONCE or not numbers:
                    file.write(b"".join(orjson.dumps({"same": what, "keys": keys}) + b"\n" for keys in keys_of(found)))
                    counts[what] += len(found)
                    found, num_held = [], 0
    return counts
