"""A map-style data set over a jsonl file, for sets that are small or kept by hand.

    {"data_type": ..., "text": ..., "vq_code": [..] | "image_path": "..."}

Opening scans the file once for line ends and keeps 8 bytes a line; a record is read when it is asked for, by range, so a file of
many gigabytes opens in constant memory otherwise, may lie on object storage, and travels to workers as its offsets alone.
"""

from __future__ import annotations

import posixpath
from typing import Any, Literal

import numpy as np
import orjson
import torch
from torch.utils.data import Dataset

from loaders.fetch import end_with_trainer
from wds_tools.errors import FormatError, Reject, UsageError
from wds_tools.format.schema import DATA_TYPES
from wds_tools.storage import open_store, split_url

_READ_BYTES = 8 << 20


class JsonlDataset(Dataset[dict[str, Any]]):
    """Records of a jsonl file, by number.

    `dataset[i]` has `data_type` and `text`, and `codes` (int64 tensor (n,), the file's `vq_code`) or `pixels_CHW` (uint8 tensor
    (3, H, W), the image at the file's `image_path`) where the record has one of them. Blank lines are no records.

    Args:
        path: the file: a path or URL.
        image_root: folder or URL that image paths are relative to, and may not leave; by default the file's own folder.
        mode: how images are cropped: see docs/format.md. Needs Pillow.

    Raises:
        NotFound: no such file.
        UsageError: it holds no records.
    """

    def __init__(self, path: str, *, image_root: str | None = None, mode: Literal["cc512", "multi768"] = "cc512") -> None:
        self._path = path
        root, self._name = split_url(path)
        self._store = open_store(root)
        self._images = open_store(root if image_root is None else image_root)
        self._mode: Literal["cc512", "multi768"] = mode
        self._starts, self._ends, self._numbers = self._scan()
        if not len(self._starts):
            raise UsageError(f"{path} holds no records")

    def __len__(self) -> int:
        """Number of records."""
        return len(self._starts)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Record `number` (negative counts from the end).

        Raises:
            IndexError: out of range.
            FormatError: the line is no such record, or its image is unusable; names the file and the line.
        """
        end_with_trainer()
        start, end = int(self._starts[number]), int(self._ends[number])
        where = f"{self._path}, line {int(self._numbers[number])}"
        try:
            record = orjson.loads(self._store.read_range(self._name, start, end))
        except orjson.JSONDecodeError as error:
            raise FormatError(f"{where}: not JSON: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise FormatError(f"{where}: expected an object with a string `text`")
        if record.get("data_type") not in DATA_TYPES:
            raise FormatError(f"{where}: data_type={record.get('data_type')!r} is not one of {', '.join(DATA_TYPES)}")
        item: dict[str, Any] = {"data_type": record["data_type"], "text": record["text"]}
        if record.get("vq_code") is not None:
            item["codes"] = _codes(record["vq_code"], where)
        elif record.get("image_path") is not None:
            item["pixels_CHW"] = self._pixels(record["image_path"], where)
        return item

    def _pixels(self, image_path: Any, where: str) -> torch.Tensor:
        from wds_tools.images import prepare

        if not isinstance(image_path, str):
            raise FormatError(f"{where}: image_path is a {type(image_path).__name__}, expected a string")
        try:
            pixels_HWC = prepare(self._images.read(posixpath.normpath(image_path)), self._mode)
        except Reject as cause:
            raise FormatError(f"{where}: {image_path}: {cause}") from cause
        return torch.from_numpy(pixels_HWC).permute(2, 0, 1).contiguous()

    def _scan(self) -> tuple[Any, Any, Any]:
        """Start and end (without its newline) of each line that is not empty, and its number from 1."""
        newlines = [np.array([-1])]
        ends = []
        at, last = 0, b"\n"
        with self._store.open(self._name) as stream:
            while chunk := stream.read(_READ_BYTES):
                data = np.frombuffer(last + chunk, np.uint8)
                found = np.flatnonzero(data[1:] == ord("\n"))
                newlines.append(found + at)
                ends.append(found + at - (data[found] == ord("\r")))
                at += len(chunk)
                last = chunk[-1:]
        starts = np.concatenate(newlines) + 1
        stops = np.concatenate([*ends, np.array([at])])
        kept = stops > starts
        return starts[kept], stops[kept], np.flatnonzero(kept) + 1


def _codes(value: Any, where: str) -> torch.Tensor:
    if not isinstance(value, list) or not all(type(code) is int and 0 <= code < 1 << 32 for code in value):
        raise FormatError(f"{where}: vq_code is not a list of codebook indices")
    return torch.tensor(value, dtype=torch.int64)
