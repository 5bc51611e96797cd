"""litData: chunks of 64 MB made by `optimize`, read by `StreamingDataset(shuffle=True)` and `StreamingDataLoader`.

The codes are stored as a flat numpy array, which litData keeps without a header: its leanest form for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import litdata
import torch

from benchmarks.loader_workload import Text, read_source
from benchmarks.peers.measure import BATCH, main, stack_codes

FORMAT = "litdata"


def write(folder: Path) -> None:
    """One worker, so that no chunk is cut short."""
    litdata.optimize(
        fn=_store,
        inputs=list(read_source(folder)),
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
    dataset = litdata.StreamingDataset(str(folder), shuffle=True, drop_last=False, seed=42)
    yield from litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0, collate_fn=_collate)


def _store(sample: Text) -> dict[str, Any]:
    text, codes = sample
    return {"text": text} if codes is None else {"text": text, "codes": codes.ravel()}


def _collate(samples: list[dict]) -> tuple[list[str], torch.Tensor]:
    return [sample["text"] for sample in samples], stack_codes([sample["codes"] for sample in samples])


if __name__ == "__main__":
    main(globals())
