"""What was not converted: the lines under rejects/, a few at a time.

    files      names and sizes, listed once (or none: a web server can't list)
    read(...)  from (file, byte) on, PIECE_BYTES at a time, until enough lines match or the time is up

Invariant: only files that the listing names are read; a line that is no reject is shown as one that isn't. Memory is one piece.
"""

from __future__ import annotations

import time
from functools import cached_property
from typing import Any

from wds_tools.dataset.writer import REJECTS
from wds_tools.errors import FormatError, StorageError
from wds_tools.format.typed_json import read_json
from wds_tools.storage import Entry, Store

PIECE_BYTES = 1 << 20
_READ_S = 0.25
_MAX_FIELD_CHARS = 2000
FIELDS = ("reason", "detail", "source", "line", "key")


class Rejects:
    """The rejects of a dataset, in order.

    Args:
        store: the dataset.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    @cached_property
    def files(self) -> list[Entry]:
        """The files that list them."""
        try:
            return list(self._store.list(REJECTS))
        except StorageError:
            return []

    def read(self, reason: str, file: int, byte: int, limit: int) -> dict[str, Any]:
        """The next rejects.

        Args:
            reason: only these; "" for all.
            file, byte: where to go on: a position in `files`, and a byte there at which a line begins.
            limit: at most so many.

        Returns:
            `rejects`; `next` as [file, byte], None at the end.
        """
        deadline = time.monotonic() + _READ_S
        rejects: list[dict[str, str]] = []
        while file < len(self.files) and len(rejects) < limit and time.monotonic() < deadline:
            name, size = self.files[file]
            data = bytes(self._store.read_range(name, byte, min(byte + PIECE_BYTES, size))) if byte < size else b""
            whole = data if byte + len(data) >= size else data[: data.rfind(b"\n") + 1] or data
            used = 0
            for line in whole.splitlines(keepends=True):
                used += len(line)
                reject = _parse(line)
                if reason in ("", reject["reason"]):
                    rejects.append(reject)
                    if len(rejects) >= limit:
                        break
            byte += used
            if byte >= size:
                file, byte = file + 1, 0
        return {"rejects": rejects, "next": [file, byte] if file < len(self.files) else None}


def _parse(line: bytes) -> dict[str, str]:
    try:
        record = read_json(dict[str, Any], line, "not a reject")
        return {name: str(record.get(name, ""))[:_MAX_FIELD_CHARS] for name in FIELDS}
    except FormatError:
        text = line[:_MAX_FIELD_CHARS].decode(errors="replace").rstrip("\n")
        return dict.fromkeys(FIELDS, "") | {"reason": "?", "detail": text}
