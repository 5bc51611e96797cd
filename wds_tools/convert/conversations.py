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
    """Convert conversations about images to shards. The images go in byte for byte, and codes come with `wds-tools encode`; or
    codes instead of images in one go, with --encode."""

    help_group = "input"

    input: tuple[str, ...]
    """Files of records with turns or edits (JSON, .jsonl, Parquet, tars), their folders or patterns; paths or URLs."""
    conversations: str | None = None
    """Field with the turns. Default: conversations, messages, conversation or texts."""
    image: str | None = None
    """Field with the images. Default: image, images, or another well-known name; and those that stand in the turns."""
    edited: str | None = None
    """Of edits, which have no turns: field with the edited image. --image has the source. Default: well-known names."""
    instruction: str | None = None
    """Of edits, field with what was to be done. Default: well-known names."""
    image_marks: Literal["written", "first"] = "written"
    """first: images of a record without an <image> mark are put before its first question; else such a record is a reject."""
    keep: tuple[str, ...] = ()
    """Fields of the record to keep as provenance. Its id is kept always, as source_id."""

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
