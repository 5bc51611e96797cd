"""What an input is, and what would become of it: `wds-tools inspect`. Nothing is written.

    input -> files -> first records -> their fields -> a converter -> its field map, first samples, and the command to type

The converter is the first in the order of CONVERTERS that has something to read in most of the records. Cost: as the survey's,
twice, and NUM_SAMPLES records are converted.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import islice
from typing import Any, Final

from wds_tools.convert.coded import CODE_NAMES, CodedConfig
from wds_tools.convert.conversations import ConversationsConfig
from wds_tools.convert.documents import DocumentsConfig
from wds_tools.convert.interleaved import InterleavedConfig
from wds_tools.convert.options import ConvertOptions
from wds_tools.convert.pairs import PairsConfig
from wds_tools.convert.select import Selection
from wds_tools.convert.survey import Read, place_of, shown, survey_records
from wds_tools.errors import Reject, UsageError
from wds_tools.format.codes import CODE_COLUMNS
from wds_tools.format.schema import DATA_TYPES, IMAGE_MARK
from wds_tools.records.conversations import FIELDS as TURN_FIELDS
from wds_tools.records.edits import EDITED, INSTRUCTIONS
from wds_tools.records.field_map import FieldMap
from wds_tools.records.interleaved import TEXT_LISTS
from wds_tools.sources.composite import kind_of_task
from wds_tools.sources.inputs import expand_inputs
from wds_tools.terminal import counted

CONVERTERS: Final[Mapping[str, type[ConvertOptions]]] = {
    "conversations": ConversationsConfig,
    "interleaved": InterleavedConfig,
    "coded": CodedConfig,
    "pairs": PairsConfig,
    "documents": DocumentsConfig,
}
NUM_SAMPLES: Final = 3


def inspect_input(patterns: Sequence[str], *, converter: str | None = None, **settings: Any) -> dict[str, Any]:
    """Look at an input.

    Args:
        patterns: files, folders or patterns, as --input has them.
        converter: one of CONVERTERS; None: the one that fits.
        settings: options of the converter, by name, such as `where`.

    Returns:
        JSON values: `input`, what is read; `left_out` as in a manifest; `num_records` that were looked at, and `rejects`, those
        that can't be used, by reason; `fields`, name -> `types` (-> records) and an `example`; `converter`, which fits, and
        its `field_map`; `problem`, why a run would stop before it writes, or None; `samples`, a line for each of the first
        records; `command`, what to type, or None where a run would stop.

    Raises:
        UsageError, NotFound: the input can't be read; or the converter has no such option.
    """
    look = _FirstLook(patterns, converter)
    source, tasks, survey, name = look.source, look.tasks, look.survey, look.converter
    options = _options(name, patterns, settings)
    selection = Selection.of(options, options.make_converter())
    mapped = survey_records(source.read, tasks, selection.roles, options.named_fields)
    problem = None
    try:
        mapped.check()
    except UsageError as error:
        problem = str(error)
    samples = _first_samples(source.read, tasks, options, selection)
    said_options: list[str] = []
    for option, value in settings.items():
        said_options += [f"--{option.replace('_', '-')}", *([value] if isinstance(value, str) else value)]
    if samples and "image_root" not in settings and all(": a reject, missing_image" in line for line in samples):
        said_options += ["--image-root", "FOLDER"]
    words = ["wds-tools", "convert", name, "--input"]
    found = {
        field: {"types": dict(types), "example": survey.examples.get(field, "null")} for field, types in survey.fields.items()
    }
    return {
        **{"input": look.said, "left_out": look.inputs.source.get("left_out")},
        **{"num_records": survey.num_records, "rejects": dict(mapped.rejects), "fields": found},
        **{"converter": name, "field_map": mapped.field_map(), "problem": problem},
        "samples": samples,
        "command": None if problem else shlex.join([*words, *patterns, *said_options, "--output", "OUTPUT"]),
    }


def fitting_converter(patterns: Sequence[str]) -> str:
    """The converter that fits an input: one of CONVERTERS. Arguments and errors: see inspect_input."""
    return _FirstLook(patterns, None).converter


class _FirstLook:
    """The files of an input, and the converter of most of its first records. Arguments and errors: see inspect_input."""

    def __init__(self, patterns: Sequence[str], converter: str | None) -> None:
        self.source = _options(converter or "pairs", patterns, {}).make_source()
        self.inputs = expand_inputs(patterns, self.source.choose)
        self.tasks, _ = self.source.plan(self.inputs.files)
        self.said = self.inputs.describe(map(kind_of_task, self.tasks))
        self.survey = survey_records(
            self.source.read, self.tasks, lambda fields: {"converter": converter or _fitting(fields)}, {}
        )
        if not self.survey.fields:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.survey.rejects.items())
            raise UsageError(f"{self.said}: no record in it can be read ({reasons or 'there is none'})")
        self.converter = self.survey.roles["converter"].most_common(1)[0][0]


def _options(name: str, patterns: Sequence[str], settings: Mapping[str, Any]) -> ConvertOptions:
    kind = CONVERTERS[name]
    if unknown := sorted(settings.keys() - {field.name for field in fields(kind)}):
        raise UsageError(f"--{unknown[0].replace('_', '-')} is no option of convert {name}: say with --as what it is to become")
    return kind(input=tuple(patterns), output=os.devnull, quiet=True, **settings)


def _fitting(fields: Mapping[str, Any]) -> str:
    """The converter for a record."""
    if fields.get("data_type") in DATA_TYPES and "length" in fields:  # an export, or Liquid's: of any kind of sample
        return "coded"
    if any(isinstance(turns := fields.get(name), list) and turns and isinstance(turns[0], dict) for name in TURN_FIELDS):
        return "conversations"
    if any(fields.get(name) for name in EDITED) and any(fields.get(name) for name in INSTRUCTIONS):
        return "conversations"
    if any(fields.get(name) not in (None, "no") for name in (*CODE_COLUMNS, *CODE_NAMES)):
        return "coded"
    if any(isinstance(fields.get(name), list) for name in TEXT_LISTS) or IMAGE_MARK in str(fields.get("text")):
        return "interleaved"
    return "documents" if FieldMap().image_field(fields) is None else "pairs"


def _first_samples(read: Read, tasks: Sequence[Any], options: ConvertOptions, selection: Selection) -> list[str]:
    """A line for each of the first records."""
    lines: list[str] = []
    for task in tasks:
        for record in islice(read(task), NUM_SAMPLES - len(lines)):
            try:
                if isinstance(record.fields, Reject):
                    raise record.fields
                sample = selection.convert(f"{record.number:08d}", record.fields, record.source)
            except Reject as cause:
                lines.append(f"{place_of(record)}: a reject, {cause}")
                continue
            facts = {} if options.image_facts is None else options.image_facts(sample)
            size = [f"{facts['image_width']} x {facts['image_height']} {facts['image_format']}"] if facts else []
            more = [counted(len(sample.more_images), "more image")] if sample.more_images else []
            codes = [f"{column} of {' x '.join(map(str, grid_HW.shape))}" for column, grid_HW in sample.codes.items()]
            text = sample.text or " / ".join(turn["value"] for turn in sample.conversations or ())
            lines.append(f"{place_of(record)}: {', '.join([sample.data_type, *size, *more, *codes, shown(text)])}")
        if len(lines) >= NUM_SAMPLES:
            break
    return lines
