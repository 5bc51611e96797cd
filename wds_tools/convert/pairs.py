"""Image-caption pairs (jsonl) -> image_text or image_text_multi samples that carry the source image.

    lines, cut into ranges -> record -> fetch the image's bytes -> look at its header -> Sample(text, image) -> shards

Format, size and aspect ratio are looked at here; what only an encoder finds in the pixels is a reject there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wds_tools.convert.images import NUM_AHEAD, ImageOptions, ImageReader
from wds_tools.convert.options import kept_fields
from wds_tools.format.schema import Sample
from wds_tools.images import Mode, parse_mode
from wds_tools.records.fields import CAPTION, required_text
from wds_tools.sources.text.lines import Lines


@dataclass(frozen=True, kw_only=True)
class PairsConfig(ImageOptions):
    """Convert image-caption pairs to shards. The images go in byte for byte, and codes come with `wds-tools encode`; or
    codes instead of images in one go, with --encode."""

    input: tuple[str, ...]
    """.jsonl files, folders of them or brace patterns; one object a line with image_path and text_prompt (or text)."""
    mode: str = "cc512"
    """ccN: centre square of N px, for images up to 2:1. multiN: nearest of many shapes of about N x N px, up to 4:1. fitN: their
    own shape, of N x N px at most, up to 4:1. The images stay whole, so `encode` may take another N of 64 to 4096, or mode."""
    task_lines: int = 2000
    """A worker, and a resumed run, takes this many lines at a time; a shard holds no more."""

    command = "convert pairs"

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_mode(self.mode)

    def make_source(self) -> Lines:
        """Lines of jsonl files."""
        return Lines(self.task_lines, self.quiet)

    def make_converter(self) -> Pairs:
        """The caption and the image of a record."""
        return Pairs(parse_mode(self.mode), ImageReader(self), self.keep)

    @property
    def settings(self) -> dict[str, Any]:
        """See ConvertOptions."""
        return {"mode": self.mode, **super().settings}

    @property
    def modes(self) -> Mapping[str, str]:
        """See ConvertOptions."""
        return {parse_mode(self.mode).data_type: self.mode}


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
        self.mode.crop_for(info.width, info.height)
        return Sample(
            key=key,
            data_type=self.mode.data_type,
            text=text,
            image=image,
            image_extension=info.extension,
            provenance=kept_fields(fields, self.keep),
        )
