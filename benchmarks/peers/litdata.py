"""litData: chunks of 64 MB made by `optimize`, read by `StreamingDataset(shuffle=True)` and `StreamingDataLoader`.

The codes are stored as a flat numpy array, which litData keeps without a header: its leanest form for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import litdata
import torch
from litdata.streaming import downloader

from benchmarks.loader_workload import Text, read_source
from benchmarks.peers.measure import BATCH, Remote, main, stack_codes

FORMAT = "litdata"


def write(folder: Path) -> None:
    """One worker, so that no chunk is cut short. Texts go in as bytes: it parses each str of its inputs as a URL to fetch, and
    ends with a ValueError at a text such as "//[somebody]"."""
    litdata.optimize(
        fn=_store,
        inputs=[(text.encode(), codes) for text, codes in read_source(folder)],
        output_dir=str(folder / FORMAT),
        num_workers=1,
        chunk_bytes="64MB",
    )


def samples(folder: Path) -> Iterator[Text]:
    """One pass in the main process."""
    for sample in litdata.StreamingDataset(str(folder), shuffle=True, drop_last=False, seed=42):
        yield sample["text"], sample.get("codes")


def batches(folder: Path) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Its own DataLoader in the main process."""
    yield from _batches(litdata.StreamingDataset(str(folder), shuffle=True, drop_last=False, seed=42))


def remote(place: Remote) -> Iterator[tuple[list[str], torch.Tensor]]:
    """The same through its cache of chunks. The server has no TLS, which litData's client must be told."""
    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
    where = {"cache_dir": str(place.scratch), "storage_options": {"endpoint_url": place.endpoint}}
    yield from _batches(litdata.StreamingDataset(place.s3, shuffle=True, drop_last=False, seed=42, **where))


def _batches(dataset: litdata.StreamingDataset) -> Iterator[tuple[list[str], torch.Tensor]]:
    yield from litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0, collate_fn=_collate)


def _store(sample: tuple[bytes, Any]) -> dict[str, Any]:
    text, codes = sample
    return {"text": text.decode()} if codes is None else {"text": text.decode(), "codes": codes.ravel()}


def _collate(samples: list[dict]) -> tuple[list[str], torch.Tensor]:
    return [sample["text"] for sample in samples], stack_codes([sample["codes"] for sample in samples])


if __name__ == "__main__":
    main(globals())
