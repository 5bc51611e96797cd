"""What the encoding pass asks of an image tokenizer: pixels in, a grid of codes out, and back.

Legend: B images, H x W pixels, h x w codes with h = H / stride and w = W / stride.
A tokenizer is deterministic: equal pixels give equal codes, whatever else is in the batch.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor, device


@runtime_checkable
class ImageTokenizer(Protocol):
    """A VQ image tokenizer. Attributes are fixed once it is loaded."""

    name: str
    """What `--tokenizer` calls it; stored in the manifest."""
    codebook_size: int
    """Number of codebook entries; codes are in [0, codebook_size)."""
    stride: int
    """Pixels per code along each side; H and W must be multiples of it."""
    weights_hash: str
    """"sha256:<hex>" over the weights file(s) it was loaded from."""

    @property
    def device(self) -> device:
        """Where it computes: pixels that lie there already are not copied."""
        ...

    def encode(self, pixels_BHWC: Tensor) -> Tensor:
        """Turn pixels into codes.

        Args:
            pixels_BHWC: uint8 RGB in [0, 255], all images of one size. May lie on any device.

        Returns:
            codes_Bhw: int64 on the tokenizer's device, values in [0, codebook_size), row-major raster order; -1 where the network
            gave NaN or an infinite number, which ends a pass with an error. (To raise here would make a GPU wait.)

        Raises:
            UsageError: H or W is not a multiple of `stride`, or the dtype or shape is wrong.
        """
        ...

    def decode(self, codes_Bhw: Tensor) -> Tensor:
        """Turn codes into pixels.

        Args:
            codes_Bhw: any integer dtype, values in [0, codebook_size).

        Returns:
            pixels_BHWC: uint8 RGB on the tokenizer's device.

        Raises:
            DataError: a code is outside the codebook (names the value and the codebook size).
        """
        ...
