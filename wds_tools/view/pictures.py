"""Codes -> pictures, as PNG files.

    decoded    the picture that the tokenizer makes of a grid; the tokenizer is the one that the manifest names
    code_map   one pixel a code, coloured by its number: what can be shown when there is no tokenizer

Decoding has a process of its own, started by the first picture: importing torch takes seconds and half a GiB, and the pages
must not wait for either. Invariant: a picture is shown only if the tokenizer's weights are those that made the codes (their hash
is in the manifest). Weights come from the command line, never from the data.
Cost: one decode at a time, on all cores but one; the last CACHE_BYTES of pictures are kept.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wds_tools.check.stats.png import png_bytes
from wds_tools.errors import DataError, UsageError, WorkerDied
from wds_tools.format.codes import CodeGrid
from wds_tools.format.manifest import code_layouts
from wds_tools.run.local import exit_with_parent, stops_held
from wds_tools.storage.recent import Recent

if TYPE_CHECKING:
    from wds_tools.vq import ImageTokenizer

CACHE_BYTES = 48 << 20
_HUE_STEP = 0.618033988749895
"""The golden ratio's: neighbours in number get colours far apart."""


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """Which tokenizer decodes a column; equal ones are loaded once."""

    name: str
    """Name of the tokenizer, as load_tokenizer takes it, like the next two."""
    weights: str | None
    device: str
    weights_hash: str | None
    """Hash of the weights that made the codes; None if the manifest does not say."""
    layout: CodeGrid
    """Of the codes."""


class _NotWanted(Exception):
    """Nobody waits for the picture any more."""


class Pictures:
    """Makes and keeps pictures, for many threads.

    Args:
        codes: the manifest's provenance of the code columns.
        weights: path of the tokenizer's weights; None for those that come with it.
        device: what decodes, as load_tokenizer takes it.
    """

    def __init__(self, codes: Mapping[str, Mapping[str, Any]], weights: str | None, device: str) -> None:
        self._codes, self._layouts = codes, code_layouts(codes)
        self._weights = weights
        self._device = device
        self._turn = threading.Lock()
        self._process: ProcessPoolExecutor | None = None
        self._is_closed = False
        self._pictures: Recent[Hashable, bytes] = Recent(CACHE_BYTES, len)

    def decoded(
        self,
        grid: tuple[int, str, int],
        codes: NDArray[Any],
        *,
        is_small: bool = False,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> bytes:
        """The picture of a sample's codes.

        Args:
            grid: number of the sample, column, and which of its images; by this the picture is kept.
            codes: of the image, as they are stored.
            is_small: at half the size, for lists.
            is_wanted: asked when it is this picture's turn; if not, there is none: b"".

        Raises:
            UsageError: the manifest names no tokenizer for the column, or one that needs other weights.
            DataError: a code is outside the codebook.
            TokenizerError, MissingPackage: the tokenizer can't be loaded.
            WorkerDied: the process that decodes was killed; the next picture starts another.
        """
        decoder = self._decoder(grid[1])

        def decode(_: object) -> bytes:
            with self._turn:
                if self._is_closed or not is_wanted():
                    raise _NotWanted
                return self._ask(decoder, codes, is_small)

        while not self._is_closed and is_wanted():  # again, if it was another request for this picture that was given up
            with suppress(_NotWanted):
                return self._pictures.get((grid, is_small), decode)
        return b""

    def close(self) -> None:
        """End the process that decodes, when its picture is done."""
        with self._turn:
            self._is_closed = True
            if self._process is not None:
                self._process.shutdown()

    def _decoder(self, column: str) -> Decoder:
        provenance = self._codes.get(column) or {}
        name, weights_hash = provenance.get("tokenizer"), provenance.get("weights_hash")
        if not isinstance(name, str):
            raise UsageError(f"the manifest does not say which tokenizer made {column}: its pictures can't be decoded")
        stated = None if weights_hash is None else str(weights_hash)
        return Decoder(name=name, weights=self._weights, device=self._device, weights_hash=stated, layout=self._layouts[column])

    def _ask(self, decoder: Decoder, codes: NDArray[Any], is_small: bool) -> bytes:
        if self._process is None:
            self._process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin)
        with stops_held():  # they are the viewer's, and a process is started here
            future = self._process.submit(_picture, decoder, codes, is_small)
        try:
            return future.result()
        except BrokenProcessPool as error:
            self._process = None
            raise WorkerDied(
                "the process that decodes pictures was killed, or memory ran out: look again to start it again"
            ) from error


def code_map(codes_hw: NDArray[Any]) -> bytes:
    """A picture of one pixel a code. Equal codes have equal colours; close numbers have different ones."""
    hue = codes_hw.astype(np.float64) * _HUE_STEP % 1.0
    phase_hw3 = (hue[..., None] + np.array([0.0, 1 / 3, 2 / 3])) * (2 * np.pi)
    return png_bytes((150 + 70 * np.cos(phase_hw3)).astype(np.uint8))


def _begin() -> None:
    """In the new process: a core is left to the pages, and it ends with the viewer, however that ends."""
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) - 1))
    exit_with_parent()


@lru_cache(maxsize=2)
def _load(decoder: Decoder) -> ImageTokenizer:
    from wds_tools.vq import load_tokenizer

    tokenizer = load_tokenizer(decoder.name, weights=decoder.weights, device=decoder.device)
    if decoder.weights_hash not in (None, tokenizer.weights_hash):
        raise UsageError(
            f"the codes were made with the weights {str(decoder.weights_hash)[:20]}..., these are "
            f"{tokenizer.weights_hash[:20]}...: give those that made them with --weights"
        )
    return tokenizer


def _picture(decoder: Decoder, codes: NDArray[Any], is_small: bool) -> bytes:
    from wds_tools.vq.base import to_tensor

    if codes.size == 0:
        raise DataError("an empty grid has no picture")
    decoder.layout.shapes_of("the picture", codes, None)  # codes in a row of tokens have lost theirs
    pixels_HW3: NDArray[np.uint8] = _load(decoder).decode(to_tensor(codes, decoder.layout)[None])[0].cpu().numpy()
    if is_small:  # the mean of every 2 x 2 pixels; sides are even, as multiples of a stride
        H, W, _ = pixels_HW3.shape
        pixels_HW3 = pixels_HW3.reshape(H // 2, 2, W // 2, 2, 3).mean(axis=(1, 3)).astype(np.uint8)
    return png_bytes(pixels_HW3)
