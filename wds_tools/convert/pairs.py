"""Image-caption pairs (jsonl) -> image_text or image_text_multi samples that carry the source image.

    lines, cut into ranges -> record -> fetch the image's bytes -> look at its header -> Sample(text, image) -> shards

Format, size and aspect ratio are looked at here; what only an encoder finds in the pixels is a reject there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wds_tools.convert.images import NUM_AHEAD, ImageOptions, ImageReader
from wds_tools.convert.options import kept_fields
from wds_tools.format.schema import Sample
from wds_tools.images import PAIR_TYPES, Mode, crop_for
from wds_tools.records.fields import CAPTION, required_text


@dataclass(frozen=True, kw_only=True)
class PairsConfig(ImageOptions):
    """Convert image-caption pairs to shards; the images go in byte for byte, codes come with `wds-tools encode`."""

    input: tuple[str, ...]
    """.jsonl files, folders of them or brace patterns; one object a line with image_path and text_prompt (or text)."""
    mode: Mode = "cc512"
    """cc512: 512 px centre crop, for images up to 2:1. multi768: nearest of many shapes of about 768 x 768 pixels, up to 4:1."""

    command = "convert pairs"

    def make_converter(self) -> Pairs:
        """The caption and the image of a record."""
        return Pairs(self.mode, ImageReader(self), self.keep)

    @property
    def settings(self) -> dict[str, Any]:
        """See ConvertOptions."""
        return {"mode": self.mode, **super().settings}

    @property
    def image_types(self) -> Sequence[str]:
        """See ConvertOptions."""
        return (PAIR_TYPES[self.mode],)


@dataclass(frozen=True)
class Pairs:
    """Records with a caption and an image path -> pairs."""

    mode: Mode
    images: ImageReader
    keep: tuple[str, ...]
    num_ahead = NUM_AHEAD

    def convert(self, key: str, fields: Mapping[str, Any], source: str) -> Sample:
        """See Converter."""
        text = required_text(fields, CAPTION)
        image, info = self.images.read(source, required_text(fields, ("image_path",)))
        crop_for(self.mode, info.width, info.height)
        return Sample(
            key=key,
            data_type=PAIR_TYPES[self.mode],
            text=text,
            image=image,
            image_extension=info.extension,
            provenance=kept_fields(fields, self.keep),
        )
