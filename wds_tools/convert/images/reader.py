"""The images that records name: the options that bound them, and their bytes. Only headers are looked at here.

Pixels are first decoded by the encoder. An image that can't be read, or is not what the options allow, is a reject.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from wds_tools.convert.images.tars import TarImages
from wds_tools.convert.options import ConvertOptions
from wds_tools.errors import Reject, UsageError
from wds_tools.format.schema import Sample, SourceImage, image_fields
from wds_tools.images import ImageInfo, ImageLimits, probe
from wds_tools.records.images import ImageSource, read_image
from wds_tools.sources.inputs import by_suffix, expand_inputs

NUM_AHEAD = 16
"""Records whose images are fetched at the same time."""
MAX_SAMPLE_BYTES = 256 << 20
"""Of all images of a sample, or those of one if `max_image_bytes` is more."""
_PACKED = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")


def image_facts(sample: Sample) -> dict[str, Any]:
    """What --where and --keep may ask of a sample's first image, by name: see records.where.FACTS. {} if it has none."""
    if sample.image is None:
        return {}
    info = probe(sample.image)
    size = {"image_width": info.width, "image_height": info.height}
    return {**size, "image_bytes": len(sample.image), "image_format": info.format.lower()}


@dataclass(frozen=True, kw_only=True)
class ImageOptions(ConvertOptions):
    """Where the images of records are, and what they may be."""

    help_group = "images"

    image_root: tuple[str, ...] = ()
    """Folder that image paths are relative to, and may not leave; or .tar files (and patterns) whose members they name. Default:
    the folder of the records; then paths may leave it."""
    max_pixels: int = ImageLimits.max_pixels
    """Images with more pixels are rejected, as decompression bombs."""
    max_image_bytes: int = ImageLimits.max_bytes
    """Image files with more bytes are rejected."""
    min_side: int = ImageLimits.min_side
    """Images with a shorter side than this, in pixels, are rejected."""

    image_facts = staticmethod(image_facts)

    def __post_init__(self) -> None:
        super().__post_init__()
        if packed := [root for root in self.image_root if root.lower().endswith(_PACKED)]:
            unpack = "`gunzip --keep FILE.tgz`, which makes FILE.tar"
            raise UsageError(f"--image-root {packed[0]} can't be read from the middle: unpack it first, as with {unpack}")
        root = (*self.image_root, "")[0]
        if os.path.isdir(root) and (names := os.listdir(root)) and all(name.lower().endswith(".tar") for name in names):  # noqa: PTH112, PTH208
            raise UsageError(f"--image-root {root} holds nothing but tars: name them, as --image-root '{root.rstrip('/')}/*.tar'")
        if len(self.image_root) > 1 and not self.are_tars:
            raise UsageError(f"--image-root {' '.join(self.image_root[:3])}: expected one folder, or .tar files and nothing else")

    @property
    def are_tars(self) -> bool:
        """Whether the image root is tars, not a folder."""
        return bool(self.image_root) and all(
            root.lower().endswith(".tar") and not os.path.isdir(root)  # noqa: PTH112  a path or a URL
            for root in self.image_root
        )

    @property
    def limits(self) -> ImageLimits:
        """What an image may be."""
        return ImageLimits(max_pixels=self.max_pixels, max_bytes=self.max_image_bytes, min_side=self.min_side)

    @property
    def settings(self) -> dict[str, Any]:
        """See ConvertOptions."""
        root = {"image_root": list(self.image_root), "strict_links": self.strict_links}
        return {**root, "keep": self.keep, **asdict(self.limits), **self.said_fields}


@dataclass(frozen=True, kw_only=True)
class PairImages(ImageOptions):
    """The images of pairs."""

    help_group = "images"

    mode: str = "cc512"
    """ccN: centre square of N px, for images up to 2:1. multiN: nearest of many shapes of about N x N px, up to 4:1. fitN: the
    image's own shape, of at most N x N px, up to 4:1. Whole images are stored, so `encode` may use another mode, or another N of
    64 to 4096."""


@dataclass(frozen=True, kw_only=True)
class MarkedImages(ImageOptions):
    """The images of samples that have any number of them."""

    help_group = "images"

    sft_mode: str = "cc512"
    """With --encode: size of the images, as in `convert pairs --mode`: ccN, multiN or fitN."""


class ImageReader:
    """Reads the images of records.

    Args:
        options: where they are, and what they may be.
    """

    def __init__(self, options: ImageOptions) -> None:
        self._root, self._strict_links, self.limits = next(iter(options.image_root), None), options.strict_links, options.limits
        self._tars: TarImages | None = None
        if options.are_tars:
            tars = expand_inputs(options.image_root, by_suffix(".tar"), strict_links=options.strict_links).files
            self._tars = TarImages(tars, quiet=options.quiet)
        self._source: tuple[str, ImageSource] | None = None

    def read(self, records_url: str, value: Any) -> tuple[bytes, ImageInfo]:
        """An image's bytes and header. Called in threads.

        Args:
            records_url: the file of the record.
            value: what the record has for it: see read_image.

        Raises:
            Reject: as read_image, ImageSource.read and probe.
        """
        data = read_image(value, self.limits.max_bytes, lambda path, max_bytes: self._read_file(records_url, path, max_bytes))
        return data, probe(data, self.limits)

    def read_all(self, records_url: str, values: Sequence[Any]) -> dict[str, Any]:
        """The fields of a Sample that hold these images, in their order.

        Raises:
            Reject: as `read`, with the number of the image; "too_many_bytes": see MAX_SAMPLE_BYTES.
        """
        images: list[SourceImage] = []
        num_bytes, most = 0, max(MAX_SAMPLE_BYTES, self.limits.max_bytes)
        for number, value in enumerate(values, 1):
            try:
                data, info = self.read(records_url, value)
                if (num_bytes := num_bytes + len(data)) > most:
                    raise Reject("too_many_bytes", f"{num_bytes:,} with those before, at most {most:,} are allowed")
            except Reject as cause:
                raise Reject(cause.reason, f"image {number} of {len(values)}: {cause.detail}") from cause
            images.append(SourceImage(data, info.extension))
        return image_fields(images)

    def _read_file(self, records_url: str, path: str, max_bytes: int) -> bytes:
        if self._tars is not None:
            return self._tars.read(path, max_bytes)
        source = self._source
        if source is None or source[0] != records_url:
            source = self._source = records_url, ImageSource(records_url, self._root, self._strict_links)
        return source[1].read(path, max_bytes)
