"""ArrayRecord by itself: a random permutation read in batches of 1,024 records with `__getitems__`.

One file a shard, `group_size:1` as its docs ask for random access, not compressed. A record is the length of the text in four
bytes, the text, and the codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from benchmarks.loader_workload import SAMPLES_PER_SHARD, Text, read_source
from benchmarks.peers.measure import BATCH, main, stack_codes

FORMAT = "array_record"


def write(folder: Path) -> None:
    """Files of 10,000 records; Grain reads the same ones."""
    (folder / FORMAT).mkdir()
    sink = None
    for number, (text, codes) in enumerate(read_source(folder)):
        if number % SAMPLES_PER_SHARD == 0:
            if sink is not None:
                sink.close()
            sink = ArrayRecordWriter(str(folder / FORMAT / f"{number:09d}.array_record"), "group_size:1,uncompressed")
        data = text.encode()
        sink.write(len(data).to_bytes(4, "little") + data + (b"" if codes is None else codes.tobytes()))
    sink.close()


def samples(folder: Path) -> Iterator[Text]:
    """The records of each batch, one by one."""
    for records in _record_batches(folder):
        for record in records:
            yield decode(record)


def batches(folder: Path) -> Iterator[tuple[list[str], torch.Tensor]]:
    """A batch of records is a batch."""
    for records in _record_batches(folder):
        yield collate([decode(record) for record in records])


def _record_batches(folder: Path) -> Iterator[list[bytes]]:
    source = ArrayRecordDataSource(sorted(map(str, folder.glob("*.array_record"))))
    order = np.random.default_rng(42).permutation(len(source)).tolist()
    for at in range(0, len(order), BATCH):
        yield source.__getitems__(order[at : at + BATCH])


def decode(record: bytes) -> Text:
    """A record's text and codes."""
    end = 4 + int.from_bytes(record[:4], "little")
    return record[4:end].decode(), np.frombuffer(record, "<u2", offset=end) if end < len(record) else None


def collate(pairs: list[Text]) -> tuple[list[str], torch.Tensor]:
    """Texts and stacked codes."""
    texts, codes = zip(*pairs, strict=True)
    return list(texts), stack_codes(codes)


if __name__ == "__main__":
    main(globals())
