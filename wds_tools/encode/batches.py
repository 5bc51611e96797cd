"""Images in, codes out in the order in which they came, while everything else goes on at the same time.

    jobs -> prepare (threads: decode, scale, crop) -> batches -> the device (a thread) -> deliver (a thread)

A batch has images of one size, but for our tokenizers on a CPU, which take them one by one (`Device.takes_any_size`).
Pillow and torch release the GIL. Which images make a batch depends on their order and sizes alone, and in fp32 codes do not
depend on it: a batch is full at a number of pixels, and no image waits for more than `_WAIT_BATCHES` batches' worth of
images behind it, which bounds the memory however sizes are mixed. An image that can't be used sinks nobody else.
Memory: `_WAIT_BATCHES` + `_AHEAD_BATCHES` batches of items and pixels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from wds_tools.encode.device import Device, Outcome, Pixels
from wds_tools.errors import Reject

Item = TypeVar("Item")
Prepare = Callable[[], NDArray[np.uint8]]

_IMAGE_PIXELS = 512 * 512
_WAIT_BATCHES = 8
_AHEAD_BATCHES = 4


@dataclass
class _Ticket(Generic[Item]):
    item: Item
    pixels: Future[Pixels] | None
    outcome: Future[Outcome] = field(default_factory=Future)


def encode_in_batches(
    jobs: Iterable[tuple[Item, Prepare | None]], device: Device, *, batch_size: int, threads: int
) -> Iterator[tuple[Item, Outcome]]:
    """Encode a stream of images.

    Args:
        jobs: (item, prepare): prepare() gives the image's pixels (H, W, 3) uint8 or raises Reject, and is called in a thread;
            None for an item without an image.
        device: encodes.
        batch_size: images of 512 x 512 pixels in a batch, at most; fewer of larger ones.
        threads: that prepare images.

    Yields:
        (item, outcome) in the order of `jobs`.

    Raises:
        TokenizerError: a single image does not fit the device's memory.
        Exception: what `jobs`, a prepare() or the tokenizer raised.
    """
    stream = iter(jobs)
    under_way: deque[_Ticket[Item]] = deque()
    batcher = _Batcher(device, batch_size)
    most = (_WAIT_BATCHES + _AHEAD_BATCHES) * batch_size + threads
    is_flushed = False
    preparing, batching = ThreadPoolExecutor(threads, "prepare"), ThreadPoolExecutor(1, "batch")
    try:
        while True:
            for item, prepare in islice(stream, most - len(under_way)):
                ticket = _Ticket(item, preparing.submit(prepare) if prepare else None)
                under_way.append(ticket)
                batching.submit(batcher.take, ticket)
            if len(under_way) < most and not is_flushed:  # that was the last of them
                batching.submit(batcher.flush)
                is_flushed = True
            if not under_way:
                return
            ticket = under_way.popleft()
            yield ticket.item, ticket.outcome.result()
    finally:
        for pool in (preparing, batching):
            pool.shutdown(cancel_futures=True)


class _Batcher:
    """Gathers images of one size, or of any where the device takes these, until they make a batch. In the device's thread."""

    def __init__(self, device: Device, batch_size: int) -> None:
        self._device = device
        self._batch_pixels = batch_size * _IMAGE_PIXELS
        self._most_behind = _WAIT_BATCHES * batch_size
        self._num_taken = 0
        self._groups: dict[tuple[int, ...], tuple[int, list[_Ticket[Any]], list[Pixels]]] = {}
        """By size, or all under one where the device takes any: when it was begun, and what it has. The first began first."""

    def take(self, ticket: _Ticket[Any]) -> None:
        """Wait for the pixels of the next ticket, and encode what has become a batch with them."""
        self._num_taken += 1
        try:
            pixels_HWC = None if ticket.pixels is None else ticket.pixels.result()
        except Reject as cause:
            ticket.outcome.set_result(cause)
        except BaseException as error:  # noqa: BLE001  raised where the outcome is asked for
            ticket.outcome.set_exception(error)
        else:
            if pixels_HWC is None:
                ticket.outcome.set_result(None)
            else:
                self._add(ticket, pixels_HWC)
        oldest = next(iter(self._groups), None)
        if oldest is not None and self._num_taken - self._groups[oldest][0] >= self._most_behind:
            self._run(oldest)

    def flush(self) -> None:
        """Encode what is left."""
        for size in list(self._groups):
            self._run(size)

    def _add(self, ticket: _Ticket[Any], pixels_HWC: Pixels) -> None:
        size = () if self._device.takes_any_size else pixels_HWC.shape
        _, tickets, images = self._groups.setdefault(size, (self._num_taken, [], []))
        tickets.append(ticket)
        images.append(pixels_HWC)
        if sum(image[..., 0].size for image in (*images, pixels_HWC)) > self._batch_pixels:
            self._run(size)

    def _run(self, size: tuple[int, ...]) -> None:
        _, tickets, images = self._groups.pop(size)
        self._device.encode([ticket.outcome for ticket in tickets], images)
