"""DCLM documents (`*.jsonl.zst`, `*.json.zst`, `*.zstd`) -> text_pretrain samples.

    files, grouped into tasks -> decompress -> lines -> records -> Sample(text) -> shards

Memory does not grow with the input. Cost: see benchmarks/; about half the time is decompression and JSON parsing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wds_tools.convert.options import ConvertOptions, kept_fields
from wds_tools.format.schema import Sample
from wds_tools.records.fields import required_text
from wds_tools.sources.text.lines import CompressedLines


@dataclass(frozen=True, kw_only=True)
class DocumentsConfig(ConvertOptions):
    """Convert DCLM-style documents to shards."""

    input: tuple[str, ...]
    """Folders (searched for *.jsonl.zst, *.json.zst and *.zstd of both), files or brace patterns; local paths or URLs."""
    task_bytes: int = 16 << 20
    """Small input files are taken together up to this many compressed bytes; a worker, and a resumed run, takes them whole."""

    command = "convert documents"

    def make_source(self) -> CompressedLines:
        """Lines of zstd files."""
        return CompressedLines(self.task_bytes)

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
