"""What the encoding pass asks of an image tokenizer: pixels in, codes out, and back.

Legend: B images, H x W pixels, h x w codes with h = H / stride and w = W / stride, unless it is a `LayoutTokenizer`.
A tokenizer is deterministic: equal pixels give equal codes, whatever else is in the batch.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, device

from wds_tools.format.codes import CodeGrid, Shape


@runtime_checkable
class ImageTokenizer(Protocol):
    """A VQ image tokenizer. Attributes are fixed once it is loaded."""

    name: str
    """What `--tokenizer` calls it; stored in the manifest."""
    stride: int
    """Pixels per code along each side; H and W must be multiples of it."""
    weights_hash: str
    """"sha256:<hex>" over the weights file(s) it was loaded from."""

    @property
    def codebook_size(self) -> int | tuple[int, ...] | None:
        """Number of codebook entries; codes are in [0, codebook_size). Only a `LayoutTokenizer` may have a tuple, the entries of
        each codebook along the last axis, or None: it gives floats."""
        ...

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


@runtime_checkable
class LayoutTokenizer(ImageTokenizer, Protocol):
    """One whose codes are no (h, w): its `encode` gives, and its `decode` takes, (B, *codes_shape(H, W)).

    Floats in place of codes are of `code_dtype`, on which NaN and infinity end a pass with an error.
    """

    layout: str
    """A letter for each axis of an image's codes: "n", "hwk" (several codebooks, the last axis); see CodeGrid."""
    code_dtype: str | None
    """Of what is stored: uint8 ... uint64, bfloat16, float16 or float32; None: as the codebook needs."""

    def codes_shape(self, height: int, width: int) -> tuple[int, ...]:
        """The shape of the codes of an image; the letters of `layout` say what its axes are.

        Args:
            height, width: of the image, in pixels.
        """
        ...


def layout_of(tokenizer: ImageTokenizer) -> CodeGrid:
    """What the arrays of its codes are. Raises UsageError: there are no such arrays."""
    if isinstance(tokenizer, LayoutTokenizer):
        declared: Any = {"layout": tokenizer.layout, "dtype": tokenizer.code_dtype}
        return CodeGrid(codebook_size=tokenizer.codebook_size, **declared)
    return CodeGrid(codebook_size=tokenizer.codebook_size)


def codes_shape(tokenizer: ImageTokenizer, height: int, width: int) -> Shape:
    """Shape of the codes that it gives for an image of this size, in pixels."""
    if isinstance(tokenizer, LayoutTokenizer):
        return tuple(tokenizer.codes_shape(height, width))
    return height // tokenizer.stride, width // tokenizer.stride


def to_tensor(codes: NDArray[Any], layout: CodeGrid) -> Tensor:
    """Codes as they are stored -> int64, or floats of the layout's dtype, as `decode` takes them."""
    if not layout.is_float:
        return torch.from_numpy(codes.astype(np.int64))
    floats = torch.from_numpy(codes.copy())
    return floats.view(torch.bfloat16) if layout.dtype == "bfloat16" else floats
