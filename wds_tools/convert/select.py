"""Which records a converter gets, and what is kept of them beside the sample: --where and --keep, the same for every converter.

    fields -> --where without images -> converter -> Sample -> facts of its image -> the rest of --where -> + kept fields

A field that is missing is not kept; one that is null is kept as null.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from wds_tools.convert.options import Converter, ConvertOptions, ImageFacts
from wds_tools.format.schema import Sample
from wds_tools.records.field_map import Pairs
from wds_tools.records.fields import value_of
from wds_tools.records.where import FACTS, RECORD, Where


@dataclass(frozen=True)
class Selection:
    """A converter behind --where, with --keep."""

    converter: Converter
    where: Where | None
    keep: Pairs
    image_facts: ImageFacts | None
    """None: nobody asks for them."""

    @classmethod
    def of(cls, options: ConvertOptions, converter: Converter) -> Selection:
        """As the options say."""
        where, keep = options.condition, options.kept
        asked = {field for _, field in keep} | (where.facts if where else set())
        return cls(converter, where, keep, options.image_facts if asked & {*FACTS} else None)

    def roles(self, fields: Mapping[str, Any]) -> Mapping[str, str]:
        """See Converter; of records that --where drops nothing is asked. Raises Reject also as Where.check."""
        if self.where is not None:
            self.where.check(fields)
        return self.converter.roles(fields)

    def convert(self, key: str, fields: Mapping[str, Any], source: str) -> Sample:
        """See Converter. Raises Reject also as Where.check."""
        if self.where is not None:
            self.where.check(fields)
        sample = self.converter.convert(key, fields, source)
        facts = {} if self.image_facts is None else self.image_facts(sample)
        if self.where is not None and self.where.facts:
            self.where.check(fields, facts)
        if not self.keep:
            return sample
        kept = dict(sample.provenance)
        for name, path, is_fact in self._kept:
            values = facts if is_fact else fields
            if (value := value_of(values, path)) is not None or path in values:
                kept[name] = value
        return sample.with_provenance(kept)

    @cached_property
    def _kept(self) -> tuple[tuple[str, str, bool], ...]:
        """Of `keep`: the name, where the value is, and whether it is a fact of the image."""
        return tuple((name, field.removeprefix(RECORD), field in FACTS) for name, field in self.keep)
