"""Hugging Face map-style, codes as JSON strings: what Liquid writes and how its trainer reads.

`save_to_disk` of its seven columns, `load_from_disk`, `shuffle(seed=42)`, one row at a time, `json.loads` on the codes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import torch

from benchmarks.loader_workload import Text, read_source
from benchmarks.peers.measure import BATCH, main, stack_codes
from wds_tools.records.coded import ABSENT, COLUMNS

FORMAT = "hf-json"


def write(folder: Path) -> None:
    """The reference's seven columns: strings, but for the length."""
    datasets.disable_progress_bars()
    rows = {name: [] for name in COLUMNS}
    for text, codes in read_source(folder):
        rows["data_type"].append("text_pretrain" if codes is None else "image_text")
        rows["text"].append(text)
        rows["length"].append(len(text) + (0 if codes is None else 4 * codes.size))
        rows["vqcode_512"].append(ABSENT if codes is None else json.dumps(codes.ravel().tolist()))
        for name in ("vqcode_multi768", "width", "height"):
            rows[name].append(ABSENT)
    datasets.Dataset.from_dict(rows).save_to_disk(folder / FORMAT)


def samples(folder: Path) -> Iterator[Text]:
    """Row by row, as torch's DataLoader asks a map-style dataset."""
    rows = datasets.load_from_disk(folder).shuffle(seed=42)
    for number in range(len(rows)):
        yield decode(rows[number])


def batches(folder: Path) -> Iterator[tuple[list[str], torch.Tensor]]:
    """`iter(batch_size)`, which gathers a batch's rows with one call."""
    rows = datasets.load_from_disk(folder).shuffle(seed=42)
    for batch in rows.iter(batch_size=BATCH):
        yield collate(batch)


def decode(row: dict) -> Text:
    """A row's text and codes."""
    return row["text"], None if row["vqcode_512"] == ABSENT else np.array(json.loads(row["vqcode_512"]), np.uint16)


def collate(batch: dict[str, list[str]]) -> tuple[list[str], torch.Tensor]:
    """A batch of rows, which arrive as columns."""
    return batch["text"], stack_codes([np.array(json.loads(codes), np.int32) for codes in batch["vqcode_512"]])


if __name__ == "__main__":
    main(globals())
