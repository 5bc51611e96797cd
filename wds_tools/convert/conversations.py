"""LLaVA-style conversations (JSON lists, or one object a line) -> visual_sft samples that carry their source images.

    records, cut into ranges -> record -> turns and image paths -> fetch the images -> look at their headers -> Sample -> shards

Roles become system, human and gpt, a system prompt the first turn. A conversation is taken whole or not at all: its turns
alternate and end with an answer, and the `<image>` marks of its questions are as many as its images. Nothing is guessed and no
text is changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wds_tools.convert.images import NUM_AHEAD, ImageOptions, ImageReader
from wds_tools.convert.options import kept_fields
from wds_tools.errors import Reject
from wds_tools.format.schema import Sample, SourceImage
from wds_tools.records.conversations import image_paths, turns_of
from wds_tools.sources.text.elements import JsonRecords

_SOURCE_ID = "source_id"


@dataclass(frozen=True, kw_only=True)
class ConversationsConfig(ImageOptions):
    """Convert conversations about images to shards; the images go in byte for byte, codes come with `wds-tools encode`."""

    input: tuple[str, ...]
    """.json or .jsonl files, folders of them, or brace patterns; records with conversations, and paths in image."""
    keep: tuple[str, ...] = ()
    """Fields of the record to keep as provenance. Its id is kept always, as source_id."""
    task_records: int = 2000
    """A worker, and a resumed run, takes this many records at a time; a shard holds no more."""

    command = "convert conversations"

    def make_source(self) -> JsonRecords:
        """JSON lists, or lines."""
        return JsonRecords(self.task_records)

    def make_converter(self) -> Conversations:
        """The turns and the images of a record."""
        return Conversations(ImageReader(self), self.keep)

    @property
    def image_types(self) -> Sequence[str]:
        """See ConvertOptions."""
        return ("visual_sft",)


@dataclass(frozen=True)
class Conversations:
    """Records with turns, and perhaps image paths -> conversations."""

    images: ImageReader
    keep: tuple[str, ...]
    num_ahead = NUM_AHEAD

    def convert(self, key: str, fields: Mapping[str, Any], source: str) -> Sample:
        """See Converter."""
        turns = turns_of(fields)
        paths = image_paths(fields, turns, self.keep)
        images = []
        for number, path in enumerate(paths, 1):
            try:
                data, info = self.images.read(source, path)
            except Reject as cause:
                raise Reject(cause.reason, f"image {number} of {len(paths)}: {cause.detail}") from cause
            images.append(SourceImage(data, info.extension))
        source_id = fields.get("id")
        return Sample(
            key=key,
            data_type="visual_sft",
            text="",
            conversations=turns,
            image=images[0].data if images else None,
            image_extension=images[0].extension if images else None,
            more_images=tuple(images[1:]),
            provenance={_SOURCE_ID: None if source_id is None else str(source_id)[:300], **kept_fields(fields, self.keep)},
        )
