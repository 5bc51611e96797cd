"""Read ahead, as far as the caller needs it.

    ahead(fetch, items) -> fetch(item), ...    in order

Two are under way while the caller works on one, and twice as many each time that the caller has to wait, up to eight: of 8 MiB
each, at 100 ms and 50 MB/s a connection, these are 250 MB/s. A caller who is slower holds no more than it needs. Cost: a thread
for each that is under way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

READ_AHEAD = 2
MOST_AHEAD = 8
_Item = TypeVar("_Item")
_Found = TypeVar("_Found")


def ahead(fetch: Callable[[_Item], _Found], items: Iterable[_Item]) -> Generator[_Found, None, None]:
    """What `fetch` gives for each item, in order; READ_AHEAD to MOST_AHEAD are fetched in threads before it is their turn.

    Raises what `fetch` does, when it is that item's turn.
    """
    pool = ThreadPoolExecutor(MOST_AHEAD, "wds-read")
    rest, pending, num_ahead = iter(items), deque[Future[_Found]](), READ_AHEAD

    def ask() -> None:
        pending.extend(pool.submit(fetch, item) for item in islice(rest, num_ahead - len(pending)))

    try:
        ask()
        while pending:
            if not pending[0].done():
                num_ahead = min(2 * num_ahead, MOST_AHEAD)
                ask()
            found = pending.popleft().result()
            ask()
            yield found
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
