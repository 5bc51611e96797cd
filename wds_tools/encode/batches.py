"""Images of one size, a batch at a time; results in the order in which the images came.

    jobs -> prepare in threads (decode, scale, crop) -> group by size -> tokenizer.encode -> outcomes, in order

Pillow releases the GIL, so threads decode ahead while the tokenizer computes. Work goes window by window: within a window of
`_WINDOW_BATCHES` batches equal sizes are encoded together, so memory is bounded however sizes are mixed. An image that can't
be used is left out of its batch and sinks nobody else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from wds_tools.errors import Reject
from wds_tools.vq.base import ImageTokenizer

Item = TypeVar("Item")
Prepare = Callable[[], NDArray[np.uint8]]
Outcome = NDArray[np.int64] | Reject | None
"""Codes (h, w), or why there are none, or None where there was no image."""

_WINDOW_BATCHES = 4


def encode_in_batches(
    jobs: Iterable[tuple[Item, Prepare | None]], tokenizer: ImageTokenizer, *, batch_size: int, threads: int
) -> Iterator[tuple[Item, Outcome]]:
    """Encode a stream of images.

    Args:
        jobs: (item, prepare): prepare() gives the image's pixels (H, W, 3) uint8 or raises Reject, and is called in a thread;
            None for an item without an image.
        tokenizer: encodes (B, H, W, 3) uint8.
        batch_size: images per call, at most.
        threads: that prepare images.

    Yields:
        (item, outcome) in the order of `jobs`.
    """
    stream = iter(jobs)
    with ThreadPoolExecutor(threads) as pool:
        ahead = _start(pool, stream, _WINDOW_BATCHES * batch_size)
        while ahead:
            window, ahead = ahead, _start(pool, stream, _WINDOW_BATCHES * batch_size)
            yield from _encode_window(window, tokenizer, batch_size)


_Window = list[tuple[Item, Future[NDArray[np.uint8]] | None]]


def _start(pool: ThreadPoolExecutor, stream: Iterator[tuple[Item, Prepare | None]], count: int) -> _Window[Item]:
    return [(item, pool.submit(prepare) if prepare else None) for item, prepare in islice(stream, count)]


def _encode_window(window: _Window[Item], tokenizer: ImageTokenizer, batch_size: int) -> Iterator[tuple[Item, Outcome]]:
    outcomes: list[Outcome] = [None] * len(window)
    by_size: defaultdict[tuple[int, ...], list[tuple[int, NDArray[np.uint8]]]] = defaultdict(list)

    def run(batch: list[tuple[int, NDArray[np.uint8]]]) -> None:
        codes_Bhw = tokenizer.encode(torch.from_numpy(np.stack([pixels for _, pixels in batch]))).cpu().numpy()
        for (place, _), codes_hw in zip(batch, codes_Bhw, strict=True):
            outcomes[place] = codes_hw
        batch.clear()

    for place, (_, pixels_to_come) in enumerate(window):
        if pixels_to_come is None:
            continue
        try:
            pixels_HWC = pixels_to_come.result()
        except Reject as cause:
            outcomes[place] = cause
            continue
        batch = by_size[pixels_HWC.shape]
        batch.append((place, pixels_HWC))
        if len(batch) == batch_size:
            run(batch)
    for batch in by_size.values():
        if batch:
            run(batch)
    for (item, _), outcome in zip(window, outcomes, strict=True):
        yield item, outcome
