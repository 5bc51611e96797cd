"""One data set as a torch IterableDataset on webdataset's pipeline: shuffled, decoded samples, each once an epoch.

    plan (blocks, permuted) -> dealt to ranks and workers -> BlockReader -> dicts -> .map / .shuffle / .batched / WebLoader

Blocks and the rows in them are permuted by (seed, epoch); webdataset's own `.shuffle(n)` may follow for a wider mix. Blocks are
dealt round robin to rank x worker, so an epoch sees every sample exactly once, but ranks may get different numbers of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import webdataset as wds
from torch.utils.data import get_worker_info

from loaders.plan import cut_blocks, epoch_order, row_order
from loaders.read import BlockReader, read_manifest
from wds_tools.errors import UsageError
from wds_tools.format.schema import Sample
from wds_tools.storage import open_store

_BLOCK_BYTES = 4 << 20


class ShardDataset(wds.DataPipeline, wds.compat.FluidInterface):  # type: ignore[misc]  # webdataset has no types
    """Samples of a data set, as dicts.

    A sample has `__key__`, `__url__`, `data_type`, `text`, and what it has of: `codes` (int32 tensor (h, w) of codebook
    indices), `width` and `height` (pixels), `conversations`, `image` (encoded bytes), and its provenance fields.

    Args:
        url: the data set: a directory or URL.
        shuffle: permute blocks and rows; else the order of the shards.
        seed: of the permutation.
        epoch: of the permutation; see `set_epoch`.
        rank: this process among `world_size`.
        world_size: training processes; each sample goes to one of them.
        block_bytes: how much is read, and permuted, at a time.
        check_crc: compare every sample's bytes with its CRC-32.

    Raises:
        NotFound: there is no manifest at the URL.
        UsageError: rank and world_size don't fit.
    """

    def __init__(
        self,
        url: str,
        *,
        shuffle: bool = True,
        seed: int = 42,
        epoch: int = 0,
        rank: int = 0,
        world_size: int = 1,
        block_bytes: int = _BLOCK_BYTES,
        check_crc: bool = False,
    ) -> None:
        if not 0 <= rank < world_size:
            raise UsageError(f"rank={rank} is not in 0 ... world_size - 1 = {world_size - 1}")
        self._source = _Samples(url, shuffle, seed, epoch, rank, world_size, block_bytes, check_crc)
        super().__init__(self._source)

    @property
    def num_samples(self) -> int:
        """Samples of an epoch over all ranks."""
        return self._source.manifest.samples

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration takes. Call it before the workers start."""
        self._source.epoch = epoch


class _Samples:
    """The first stage of the pipeline: called for each iteration, in the process that iterates."""

    def __init__(
        self, url: str, shuffle: bool, seed: int, epoch: int, rank: int, world_size: int, block_bytes: int, check_crc: bool
    ) -> None:
        self._url = url
        self._shuffle = shuffle
        self._seed = seed
        self.epoch = epoch
        self._rank = rank
        self._world_size = world_size
        self._check_crc = check_crc
        self._store = open_store(url)
        self.manifest = read_manifest(self._store)
        self._blocks = cut_blocks(self.manifest.shards, block_bytes)

    def __call__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        worker_id, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        part, num_parts = self._rank * num_workers + worker_id, self._world_size * num_workers
        reader = BlockReader(self._store, self.manifest, check_crc=self._check_crc)
        num_blocks = len(self._blocks)
        order = epoch_order(num_blocks, self._seed, self.epoch).tolist() if self._shuffle else range(num_blocks)
        for number in order[part::num_parts]:
            block = self._blocks[number]
            num_rows = block.last - block.first
            rows = row_order(number, num_rows, self._seed, self.epoch).tolist() if self._shuffle else range(num_rows)
            url = f"{self._url.rstrip('/')}/{self.manifest.shards[block.shard].name}"
            for sample in reader.read(block, rows):
                yield _as_dict(sample, url)


def _as_dict(sample: Sample, url: str) -> dict[str, Any]:
    record: dict[str, Any] = {"__key__": sample.key, "__url__": url, "data_type": sample.data_type, "text": sample.text}
    for codes_hw in sample.codes.values():
        record["codes"] = torch.from_numpy(codes_hw.astype("i4"))
    for name in ("width", "height", "conversations", "image"):
        value = getattr(sample, name)
        if value is not None:
            record[name] = value
    record.update(sample.provenance)
    return record
