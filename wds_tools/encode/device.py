"""A tokenizer's device at work: pixels go there, codes come back, and it has its next batch before it is done with one.

On a GPU, pixels are copied from pinned memory on a stream of their own while the batch before is computed, and codes go back
into pinned memory, where a second thread waits for them. On a CPU the same steps follow each other. A batch that does not fit
the memory is cut in halves, and so are those that come after it.
Invariant: every outcome that is handed in is set, to codes of the codebook (or NO_CODE, which the image_encoder refuses) or to an
exception. A tokenizer that gives one code for all of its first pictures is reported, once: that is how NaN looks from outside.
Cost: the memory of `_BATCHES` batches.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock, Semaphore
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wds_tools.errors import Reject, TokenizerError, WdsToolsError, in_one_line
from wds_tools.run.progress import Advance
from wds_tools.terminal import say
from wds_tools.vq.base import ImageTokenizer, codes_shape, layout_of
from wds_tools.vq.quantize import NO_CODE, CodebookTokenizer

Pixels = NDArray[np.uint8]
Outcome = NDArray[Any] | Reject | None
"""Codes in the tokenizer's layout, int64, or floats as they are stored; or why not; None where there was no image."""

_BATCHES = 2
"""On the device at once: one that is computed and one that is copied."""
_ALIKE = 8
"""So many pictures with one and the same code everywhere are no chance."""
_PICTURE_LEVELS = 64
"""From its darkest value to its brightest, at least: an empty page may have one code."""


class Device:
    """Encodes batches, for one thread at a time. What a tokenizer does wrong is a TokenizerError that names it.

    Args:
        tokenizer: what encodes.
    """

    def __init__(self, tokenizer: ImageTokenizer) -> None:
        self.tokenizer = tokenizer
        self.layout = layout_of(tokenizer)
        """What the arrays of codes are."""
        self.takes_any_size = tokenizer.device.type == "cpu" and isinstance(tokenizer, CodebookTokenizer)
        """Whether a batch may have images of several sizes: on a CPU ours go through the network one by one, side by side."""
        self._deliver = ThreadPoolExecutor(1, "deliver")
        is_cuda = tokenizer.device.type == "cuda"
        self._copies: Any = torch.cuda.Stream(tokenizer.device) if is_cuda else None  # type: ignore[no-untyped-call]
        self._most_pixels = sys.maxsize
        self._room = Semaphore(_BATCHES)
        self._lock = Lock()
        self._num_there = 0
        self._begun: float | None = None
        self._free_since = 0.0
        self._waited_s = 0.0
        self._num_images = 0
        self._alike: tuple[int, int] | None = (0, NO_CODE)
        """How many pictures had this one code only; None once there was another, or it was said."""
        self._use = Advance()

    def new_use(self) -> Advance:
        """`times`, and how many images were encoded, since this was asked last."""
        before, (device_s, waited_s) = self._use, self.times()
        self._use = Advance(images=self._num_images, device_s=device_s, waited_s=waited_s)
        return self._use - before

    def times(self) -> tuple[float, float]:
        """Seconds since the first batch came, and how many of them the device had nothing to do."""
        with self._lock:
            now = time.monotonic()
            if self._begun is None:
                return 0.0, 0.0
            return now - self._begun, self._waited_s + (0.0 if self._num_there else now - self._free_since)

    def encode(self, outcomes: Sequence[Future[Outcome]], images: Sequence[Pixels]) -> None:
        """Encode images, of one size unless it takes any. Their outcomes are set once the codes are there, perhaps after this.

        An outcome raises TokenizerError if a single image does not fit the device's memory.
        """
        if isinstance(self.tokenizer, CodebookTokenizer) and self.takes_any_size:
            self._encode_each(self.tokenizer, outcomes, images)
            return
        at_once = max(1, self._most_pixels // (images[0].shape[0] * images[0].shape[1]))
        for first in range(0, len(images), at_once):
            self._encode(outcomes[first : first + at_once], images[first : first + at_once])

    def _encode(self, outcomes: Sequence[Future[Outcome]], images: Sequence[Pixels], *, is_alone: bool = False) -> None:
        self._come()
        try:
            codes_B, wait = self._launch(images)
        except torch.OutOfMemoryError:
            self._go()
        except BaseException as error:  # noqa: BLE001  raised where the outcomes are asked for
            self._go()
            _fail(outcomes, self._named(error, images))
            return
        else:
            self._deliver.submit(self._set, outcomes, images, codes_B, wait)
            return
        # Out of memory, and out of the handler, so that what the failed pass held is free.
        for _ in range(_BATCHES):
            self._room.acquire()
        self._room.release(_BATCHES)
        torch.cuda.empty_cache()
        H, W, _ = images[0].shape
        half = -(-len(images) // 2)
        if half < len(images):
            self._most_pixels = half * H * W
            self._encode(outcomes[:half], images[:half])
            self._encode(outcomes[half:], images[half:])
        elif not is_alone:
            self._encode(outcomes, images, is_alone=True)
        else:
            where = f"the memory of {self.tokenizer.device}"
            _fail(outcomes, TokenizerError(f"{self.tokenizer.name}: a single image of {W} x {H} pixels does not fit {where}"))

    def _encode_each(self, tokenizer: CodebookTokenizer, outcomes: Sequence[Future[Outcome]], images: Sequence[Pixels]) -> None:
        self._come()
        try:
            codes = tokenizer.encode_each(list(map(torch.from_numpy, images)))
            for outcome, image, codes_hw in zip(outcomes, images, codes, strict=True):
                outcome.set_result(self._check(codes_hw[None], [image])[0].copy())
                self._num_images += 1
        except BaseException as error:  # noqa: BLE001  raised where the outcomes are asked for
            _fail(outcomes, self._named(error, images))
        finally:
            self._go()

    def _launch(self, images: Sequence[Pixels]) -> tuple[Tensor, Callable[[], None]]:
        """Begin with a batch: where its codes will be, and what to call to wait for them."""
        if self._copies is None:
            return self.tokenizer.encode(torch.from_numpy(np.stack(images))).cpu(), lambda: None
        device = self.tokenizer.device
        with torch.cuda.device(device):
            pinned_BHWC = torch.empty((len(images), *images[0].shape), dtype=torch.uint8, pin_memory=True)
            np.stack(images, out=pinned_BHWC.numpy())
            with torch.cuda.stream(self._copies):
                pixels_BHWC = pinned_BHWC.to(device, non_blocking=True)
            computing = torch.cuda.current_stream()
            computing.wait_stream(self._copies)
            pixels_BHWC.record_stream(computing)
            codes_B = self.tokenizer.encode(pixels_BHWC)
            here_B = torch.empty(codes_B.shape, dtype=codes_B.dtype, pin_memory=True)
            here_B.copy_(codes_B, non_blocking=True)
            done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(computing)
        return here_B, done.synchronize

    def _set(
        self, outcomes: Sequence[Future[Outcome]], images: Sequence[Pixels], codes_B: Tensor, wait: Callable[[], None]
    ) -> None:
        try:
            wait()
            for outcome, codes in zip(outcomes, self._check(codes_B, images).copy(), strict=True):
                outcome.set_result(codes)
                self._num_images += 1
        except BaseException as error:  # noqa: BLE001  raised where the outcomes are asked for
            _fail(outcomes, self._named(error, images))
        finally:
            self._go()

    def _check(self, codes_B: Tensor, images: Sequence[Pixels]) -> NDArray[Any]:
        """The codes as they may be stored: int64, or floats of the layout's type, of bfloat16 the bit patterns.

        Raises TokenizerError unless these are codes of those images: others would be cut to fit, and nobody would see it.
        """
        layout, (H, W, _) = self.layout, images[0].shape
        expected = len(images), *codes_shape(self.tokenizer, H, W)
        array = (codes_B.view(torch.uint16) if codes_B.dtype == torch.bfloat16 else codes_B).numpy()
        low, high = (array.min(), array.max()) if array.size else (0, 0)
        is_good = array.shape == expected and layout.is_shape(expected[1:])
        if layout.is_float:
            kind = f"{layout.dtype} {expected}"
            is_good = is_good and str(codes_B.dtype) == f"torch.{layout.dtype}"
        else:
            most = max(layout.sizes, default=np.iinfo(layout.npy_dtype).max + 1) - 1
            kind = f"integers {expected} from 0 to {most}" + (f": {layout}" if layout.schema_version > 1 else "")
            is_good = is_good and array.dtype.kind in "iu" and low >= NO_CODE and high <= most
            is_good = is_good and all(size is None or codes_N.max() < size for _, codes_N, size in layout.by_codebook("", array))
        if not is_good:
            got = f"{codes_B.dtype} {array.shape} from {low} to {high}"
            raise TokenizerError(
                f"tokenizer {self.tokenizer.name} gave codes of {got} for {len(images)} images of {W} x {H} pixels: "
                f"expected {kind}"
            )
        if self._alike is not None and low >= 0 and not layout.is_float and array[0].size > 1:
            self._compare(int(low), int(high), sum(int(np.ptp(image)) >= _PICTURE_LEVELS for image in images))
        return array

    def _compare(self, low: int, high: int, num_pictures: int) -> None:
        """Say it once if all pictures so far have one code, and whether that may be NaN inside, which can't be seen from here."""
        assert self._alike is not None
        count, code = self._alike
        self._alike = (count + num_pictures, low) if low == high and (low == code or not count) else None
        if self._alike is not None and self._alike[0] >= _ALIKE:
            self._alike = None
            say(
                f"wds-tools: tokenizer {self.tokenizer.name} gave code {low} for every place of {count + num_pictures} pictures: "
                "it may have NaN inside (--precision fp16?) or damaged weights: look at the pictures in `wds-tools view`",
                error=True,
            )

    def _named(self, error: BaseException, images: Sequence[Pixels]) -> BaseException:
        """The error, or one that says which tokenizer it is from and in what."""
        if isinstance(error, WdsToolsError) or not isinstance(error, Exception):
            return error
        H, W, _ = images[0].shape
        named = TokenizerError(
            f"tokenizer {self.tokenizer.name} failed on {len(images)} images of {W} x {H} pixels ({in_one_line(error)})"
        )
        named.__cause__ = error
        return named

    def _come(self) -> None:
        self._room.acquire()
        with self._lock:
            now = time.monotonic()
            if self._begun is None:
                self._begun = now
            elif self._num_there == 0:
                self._waited_s += now - self._free_since
            self._num_there += 1

    def _go(self) -> None:
        with self._lock:
            self._num_there -= 1
            self._free_since = time.monotonic()
        self._room.release()


def _fail(outcomes: Sequence[Future[Outcome]], error: BaseException) -> None:
    for outcome in outcomes:
        if not outcome.done():
            outcome.set_exception(error)
