"""What several threads want at the same time is made once: the first makes it, the others wait for it, and share its error.

    SingleFlight().get(key, make)    keeps nothing
    Recent(max_size, size_of)        keeps what was used last, by total size

Belongs to one process. Cost: a lock, 0.3 us a call.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from threading import Lock
from typing import Generic, TypeVar

_K = TypeVar("_K")
_V = TypeVar("_V")


class SingleFlight(Generic[_K, _V]):
    """Runs one `make` for each key at a time."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._making: dict[_K, Future[_V]] = {}

    def get(self, key: _K, make: Callable[[_K], _V]) -> _V:
        """What `make(key)` gives, here or in the thread that began it. Raises what that raised; the next call tries again."""
        with self._lock:
            found = self._found(key)
            if found is not None:
                return found
            future = self._making.get(key)
            if is_mine := future is None:
                future = self._making[key] = Future()
        if not is_mine:
            return future.result()
        try:
            value = make(key)
        except BaseException as error:
            with self._lock:
                del self._making[key]
            future.set_exception(error)
            raise
        with self._lock:
            del self._making[key]
            self._keep(key, value)
        future.set_result(value)
        return value

    def _found(self, key: _K) -> _V | None:  # noqa: ARG002
        return None

    def _keep(self, key: _K, value: _V) -> None:
        pass


class Recent(SingleFlight[_K, _V]):
    """The same, and a cache of what was used last. The newest stays, whatever its size.

    Args:
        max_size: of all values together.
        size_of: the size of one.
    """

    def __init__(self, max_size: int, size_of: Callable[[_V], int] = lambda _: 1) -> None:
        super().__init__()
        self._max_size = max_size
        self._size_of = size_of
        self.size = 0
        """Of all values."""
        self._values: OrderedDict[_K, _V] = OrderedDict()

    def _found(self, key: _K) -> _V | None:
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def _keep(self, key: _K, value: _V) -> None:
        self._values[key] = value
        self.size += self._size_of(value)
        while self.size > self._max_size and len(self._values) > 1:
            self.size -= self._size_of(self._values.popitem(last=False)[1])
