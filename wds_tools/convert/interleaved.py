"""Documents with images between their texts, in any layout that `records.interleaved` reads -> interleaved samples.

    record -> text with marks, and an image for each -> fetch the images -> look at their headers -> Sample -> shards

A document is taken whole or not at all: one image that can't be read rejects it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wds_tools.convert.images.reader import NUM_AHEAD, ImageReader, MarkedImages
from wds_tools.format.schema import Sample
from wds_tools.records.interleaved import PageReader


@dataclass(frozen=True, kw_only=True)
class InterleavedConfig(MarkedImages):
    """Convert documents with images between their texts to shards. Images are stored byte for byte; `wds-tools encode` adds codes
    later. With --encode, codes are stored instead of images, in one step."""

    help_group = "input"

    input: tuple[str, ...]
    """Files of records with texts and images (.jsonl, Parquet, tars), their folders or patterns; paths or URLs."""
    text: str | None = None
    """Field with the text, or the list of texts or parts. Default: texts, text_list, or another well-known name."""
    image: str | None = None
    """Field with the images. Default: images, image_info, another well-known name, or the members jpg, 1.jpg ... of a tar."""

    command = "convert interleaved"
    field_options = ("text", "image")

    def make_converter(self) -> Interleaved:
        """The text and the images of a record."""
        return Interleaved(PageReader(self.text, self.image, tuple(self.spared)), ImageReader(self))

    @property
    def modes(self) -> Mapping[str, str]:
        """See ConvertOptions."""
        return {"interleaved": self.sft_mode}


@dataclass(frozen=True)
class Interleaved:
    """Records with texts and images in order -> interleaved documents."""

    reader: PageReader
    images: ImageReader
    num_ahead = NUM_AHEAD

    def roles(self, fields: Mapping[str, Any]) -> Mapping[str, str]:
        """See Converter."""
        return self.reader.roles(fields)

    def convert(self, key: str, fields: Mapping[str, Any], source: str) -> Sample:
        """See Converter."""
        page = self.reader.read(fields)
        return Sample(key=key, data_type="interleaved", text=page.text, **self.images.read_all(source, page.images))
