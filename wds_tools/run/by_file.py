"""A value for processes that are spawned: its large arrays go through a file that all of them map, the rest by pickle.

    ByFile(value), as an argument of several processes -> in each of them, the value

The file has no name, so that nothing of it is left however they end; and one array is written once, for all of them.
Cost: one write of the arrays, into the page cache; a process holds those of their pages that it has touched.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import tempfile
import weakref
from multiprocessing.context import get_spawning_popen
from multiprocessing.reduction import DupFd, ForkingPickler
from typing import Any

import numpy as np

_LEAST_BYTES = 1 << 20
"""Of an array that goes by file."""
_Place = tuple[int, str, tuple[int, ...]]
"""Of an array: where it begins, dtype, shape."""


class ByFile:
    """Pickled for a process that is being spawned, it comes out as the value; so it does elsewhere, but without a file."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self._file: Any = None
        self._places: dict[int, tuple[Any, _Place]] = {}
        """By id, which stays as long as the array does."""

    def __reduce__(self) -> tuple[Any, ...]:
        if get_spawning_popen() is None:
            return _same, (self.value,)
        pickled = io.BytesIO()
        _Pickler(pickled, self).dump(self.value)
        return _read, (pickled.getvalue(), DupFd(self._file.fileno()) if self._file else None)

    def place(self, array: Any) -> _Place:
        """Where an array lies in the file."""
        if id(array) not in self._places:
            if self._file is None:
                self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (it stays as long as this)
                weakref.finalize(self, self._file.close)
            self._places[id(array)] = array, (self._file.seek(0, os.SEEK_END), array.dtype.str, array.shape)
            left = memoryview(array).cast("B")
            while left:
                left = left[self._file.write(left) :]
        return self._places[id(array)][1]


class _Pickler(ForkingPickler):
    def __init__(self, out: io.BytesIO, by_file: ByFile) -> None:
        super().__init__(out, pickle.HIGHEST_PROTOCOL)
        self._by_file = by_file

    def persistent_id(self, value: Any) -> _Place | None:
        is_large = isinstance(value, np.ndarray) and value.nbytes >= _LEAST_BYTES
        return self._by_file.place(value) if is_large and value.flags.c_contiguous and value.dtype.kind in "biuf" else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, mapped: Any) -> None:
        super().__init__(io.BytesIO(data))
        self._mapped = mapped

    def persistent_load(self, place: _Place) -> Any:
        begin, dtype, shape = place
        return np.ndarray(shape, dtype, self._mapped, begin)


def _read(pickled: bytes, descriptor: Any) -> Any:
    mapped = None
    if descriptor is not None:
        number = descriptor.detach()
        mapped = mmap.mmap(number, 0, access=mmap.ACCESS_COPY)
        os.close(number)
    return _Unpickler(pickled, mapped).load()


def _same(value: Any) -> Any:
    return value
