"""Records with a text -> text_pretrain samples.

    records -> Sample(text) -> shards

Cost: see benchmarks/; about half the time is decompression and JSON parsing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from wds_tools.convert.options import ConvertOptions
from wds_tools.format.schema import Sample
from wds_tools.records.field_map import TEXT_NAMES, FieldMap
from wds_tools.records.where import RECORD


@dataclass(frozen=True, kw_only=True)
class DocumentsConfig(ConvertOptions):
    """Convert documents to shards."""

    help_group = "input"

    input: tuple[str, ...]
    """Files (lines of JSON, JSON lists, CSV, TSV, plain or compressed; Parquet), folders or patterns; paths or URLs."""
    text: tuple[str, ...] = ()
    """Fields with the text: the first that is there. Default: well-known names in a documented order."""

    command = "convert documents"
    field_options = ("text",)

    def make_converter(self) -> Documents:
        """The text of a record."""
        return Documents(FieldMap(text=self.text, spared=self.spared))

    @property
    def columns(self) -> tuple[str, ...]:
        """See ConvertOptions."""
        condition = self.condition
        names = [*(self.text or TEXT_NAMES), *(field.removeprefix(RECORD) for _, field in self.kept), *self.drop]
        names += condition.names if condition else ()
        return tuple(sorted({part for name in names for part in accumulate(name.split("."), "{}.{}".format)}))


@dataclass(frozen=True)
class Documents:
    """Records with text -> documents."""

    field_map: FieldMap
    num_ahead = 0

    def roles(self, fields: Mapping[str, Any]) -> Mapping[str, str]:
        """See Converter."""
        self.field_map.check_unused(fields, None)
        field = self.field_map.text_field(fields)
        return {} if field is None else {"text": field}

    def convert(self, key: str, fields: Mapping[str, Any], _source: str) -> Sample:
        """See Converter."""
        self.field_map.check_unused(fields, None)
        return Sample(key=key, data_type="text_pretrain", text=self.field_map.required_text(fields))
