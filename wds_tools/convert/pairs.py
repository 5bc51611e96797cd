"""Image-caption pairs -> image_text or image_text_multi samples that carry the source image.

    record -> which field is what -> fetch the image's bytes -> look at its header -> Sample(text, texts, image) -> shards

Format, size and aspect ratio are looked at here; what only an encoder finds in the pixels is a reject there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from wds_tools.convert.images.reader import NUM_AHEAD, ImageReader, PairImages
from wds_tools.format.schema import Sample
from wds_tools.images import Mode, parse_mode
from wds_tools.records.field_map import FieldMap, parse_pairs, path_of
from wds_tools.records.fields import lacks, value_of


@dataclass(frozen=True, kw_only=True)
class PairsConfig(PairImages):
    """Convert image-caption pairs to shards. Images are stored byte for byte; `wds-tools encode` adds codes later. With --encode,
    codes are stored instead of images, in one step."""

    help_group = "input"

    input: tuple[str, ...]
    """Folders of images, or files of records (.jsonl, JSON, CSV, Parquet, tars), their folders or patterns; paths or URLs."""
    image: str | None = None
    """Field with the image: a path, bytes, or any other form of image. Default: well-known names in a documented order."""
    text: tuple[str, ...] = ()
    """Fields with the caption: the first that is there. Default: those of --texts, else well-known names, in order."""
    texts: tuple[str, ...] = ()
    """Several captions, NAME=FIELD each. All are kept under these names; null if a record has none."""

    command = "convert pairs"
    field_options = ("image", "text")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.field_map, parse_mode(self.mode)

    @property
    def field_map(self) -> FieldMap:
        """Which field is what."""
        texts = parse_pairs("--texts", self.texts, needs_name=True)
        return FieldMap(image=self.image, text=self.text, texts=texts, spared=self.spared)

    def make_converter(self) -> Pairs:
        """The caption and the image of a record."""
        return Pairs(parse_mode(self.mode), ImageReader(self), self.field_map)

    @property
    def settings(self) -> dict[str, Any]:
        """See ConvertOptions."""
        return {"mode": self.mode, **super().settings, **({"texts": self.texts} if self.texts else {})}

    @property
    def modes(self) -> Mapping[str, str]:
        """See ConvertOptions."""
        return {parse_mode(self.mode).data_type: self.mode}

    @property
    def named_fields(self) -> Mapping[str, Iterable[str]]:
        """See ConvertOptions."""
        return {**super().named_fields, "--texts": [field for _, field in self.field_map.texts]}


@dataclass(frozen=True)
class Pairs:
    """Records with a caption, or several, and an image -> pairs."""

    mode: Mode
    images: ImageReader
    field_map: FieldMap
    num_ahead = NUM_AHEAD

    def roles(self, fields: Mapping[str, Any]) -> Mapping[str, str]:
        """See Converter."""
        image, text = self.field_map.image_field(fields), self.field_map.text_field(fields)
        self.field_map.check_unused(fields, image)
        texts = {f"texts.{name}": field for name, field in self.field_map.texts if value_of(fields, field) is not None}
        found = {"image": image, "text": text, **texts}
        return {role: field for role, field in found.items() if field is not None}

    def convert(self, key: str, fields: Mapping[str, Any], source: str) -> Sample:
        """See Converter."""
        image_field = self.field_map.image_field(fields)
        self.field_map.check_unused(fields, image_field)
        text = self.field_map.required_text(fields)
        if image_field is None:
            urls = [
                name for name, value in fields.items() if isinstance(value, str) and value.startswith(("http://", "https://"))
            ]
            hint = f", or img2dataset downloads what {urls[0]} names" if urls else ""
            raise lacks(fields, "image", f"; --image FIELD names it{hint}")
        value = value_of(fields, image_field)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        image, info = self.images.read(source, value)
        crop = self.mode.crop_for(info.width, info.height)
        is_path = isinstance(value, str) and bool(path_of(value))
        return Sample(
            key=key,
            data_type=self.mode.data_type,
            text=text,
            image=image,
            image_extension=info.extension,
            texts=self.field_map.texts_of(fields),
            provenance={} if is_path else {"image_width": info.width, "image_height": info.height},
            num_enlarged=int(crop.enlarges(info.width, info.height)),
        )
