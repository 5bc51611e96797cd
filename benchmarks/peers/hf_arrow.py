"""Hugging Face map-style with the codes as a column of uint16, read as Arrow tables: its fastest way that we found.

`shuffle`, `with_format("arrow")` and `iter(batch_size)`; Arrow hands the codes of a batch to numpy without a copy. Faster than
`with_format("numpy")` on the same files. Not what the reference stores: the format has to be changed for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch

from benchmarks.loader_workload import GRID, Text, read_source
from benchmarks.peers.measure import BATCH, main

FORMAT = "hf-uint16"


def write(folder: Path) -> None:
    """A text column, and one of 1,024 uint16."""
    datasets.disable_progress_bars()
    texts, codes = zip(*read_source(folder), strict=True)
    columns = {"text": pa.array(texts)}
    if codes[0] is not None:
        columns["codes"] = pa.FixedSizeListArray.from_arrays(np.concatenate(codes, axis=None), codes[0].size)
    datasets.Dataset(pa.table(columns)).save_to_disk(folder / FORMAT)


def samples(folder: Path) -> Iterator[Text]:
    """The rows of each table, one by one."""
    for table in _tables(folder):
        texts = table["text"].to_pylist()
        yield from zip(texts, _codes(table) if "codes" in table.column_names else [None] * len(texts), strict=True)


def batches(folder: Path) -> Iterator[tuple[list[str], torch.Tensor]]:
    """A table is a batch."""
    for table in _tables(folder):
        yield table["text"].to_pylist(), torch.from_numpy(_codes(table).astype(np.int32)).view(-1, *GRID)


def _tables(folder: Path) -> Iterator[pa.Table]:
    yield from datasets.load_from_disk(folder).shuffle(seed=42).with_format("arrow").iter(batch_size=BATCH)


def _codes(table: pa.Table) -> np.ndarray:
    return table["codes"].combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1)


if __name__ == "__main__":
    main(globals())
