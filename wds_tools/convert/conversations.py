"""Conversations, in any convention that `records.conversations` reads -> visual_sft samples that carry their source images.

    record -> turns, and an image for each mark in them -> fetch the images -> look at their headers -> Sample -> shards

Roles become system, human and gpt, a system prompt the first turn. A conversation is taken whole or not at all: its turns
alternate and end with an answer, and the `<image>` marks of its turns are as many as its images. An edit is a conversation whose
answer is an image. Nothing is guessed and no text is changed. What gpt says before anybody asked is no answer to train on, and
LLaVA's trainers leave it out: it is kept beside the turns, as first_answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from wds_tools.convert.images.reader import NUM_AHEAD, ImageReader, MarkedImages
from wds_tools.format.schema import Sample
from wds_tools.records.conversations import TalkReader

_SOURCE_ID, _FIRST_ANSWER = "source_id", "first_answer"


@dataclass(frozen=True, kw_only=True)
class ConversationsConfig(MarkedImages):
    """Convert conversations about images to shards. Images are stored byte for byte; `wds-tools encode` adds codes later. With
    --encode, codes are stored instead of images, in one step."""

    help_group = "input"

    input: tuple[str, ...]
    """Files of records with turns or edits (JSON, .jsonl, Parquet, tars), their folders or patterns; paths or URLs."""
    conversations: str | None = None
    """Field with the turns. Default: conversations, messages, conversation or texts."""
    image: str | None = None
    """Field with the images. Default: image, images, or another well-known name, and images in the turns."""
    edited: str | None = None
    """For edits, which have no turns: field with the edited image; --image is the source. Default: well-known names."""
    instruction: str | None = None
    """For edits: field with the instruction. Default: well-known names."""
    image_marks: Literal["written", "first"] = "written"
    """first: in a record without <image> marks, images go before the first question; otherwise the record is rejected."""
    keep: tuple[str, ...] = ()
    """Fields of the record to keep as provenance. Its id is always kept, as source_id."""

    command = "convert conversations"
    field_options = ("conversations", "image", "edited", "instruction")

    def make_converter(self) -> Conversations:
        """The turns and the images of a record."""
        named = {"field": self.conversations, "image": self.image, "instruction": self.instruction, "edited": self.edited}
        return Conversations(TalkReader(**named, marks=self.image_marks, left_out=tuple(self.spared)), ImageReader(self))

    @property
    def settings(self) -> dict[str, Any]:
        """See ConvertOptions."""
        said = {"conversations": self.conversations, "image": self.image, "image_marks": self.image_marks}
        return {**said, **super().settings}

    @property
    def modes(self) -> Mapping[str, str]:
        """See ConvertOptions."""
        return {"visual_sft": self.sft_mode}


@dataclass(frozen=True)
class Conversations:
    """Records with turns, and perhaps images -> conversations."""

    reader: TalkReader
    images: ImageReader
    num_ahead = NUM_AHEAD

    def roles(self, fields: Mapping[str, Any]) -> Mapping[str, str]:
        """See Converter."""
        return self.reader.roles(fields)

    def convert(self, key: str, fields: Mapping[str, Any], source: str) -> Sample:
        """See Converter."""
        talk = self.reader.read(fields)
        source_id = fields.get("id")
        provenance = {_SOURCE_ID: None if source_id is None else str(source_id)[:300]}
        if talk.first_answer is not None:
            provenance[_FIRST_ANSWER] = talk.first_answer
        return Sample(
            key=key,
            data_type="visual_sft",
            text="",
            conversations=talk.turns,
            provenance=provenance,
            **self.images.read_all(source, talk.images),
        )
