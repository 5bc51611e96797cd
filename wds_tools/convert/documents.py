"""Records with a text -> text_pretrain samples.

    records -> Sample(text) -> shards

Cost: see benchmarks/; about half the time is decompression and JSON parsing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wds_tools.convert.options import ConvertOptions, kept_fields
from wds_tools.format.schema import Sample
from wds_tools.records.fields import required_text


@dataclass(frozen=True, kw_only=True)
class DocumentsConfig(ConvertOptions):
    """Convert documents to shards."""

    input: tuple[str, ...]
    """Files (lines of JSON, JSON lists, CSV, TSV, plain or compressed; Parquet), folders or patterns; paths or URLs."""

    command = "convert documents"

    def make_converter(self) -> Documents:
        """The text of a record."""
        return Documents(self.keep)


@dataclass(frozen=True)
class Documents:
    """Records with text -> documents."""

    keep: tuple[str, ...] = ()
    num_ahead = 0

    def convert(self, key: str, fields: Mapping[str, Any], _source: str) -> Sample:
        """See Converter."""
        text = required_text(fields, ("text",))
        return Sample(key=key, data_type="text_pretrain", text=text, provenance=kept_fields(fields, self.keep))
