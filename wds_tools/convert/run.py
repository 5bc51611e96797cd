"""A conversion: files -> records -> samples -> shards, by the source and the converter that its options name.

Before anything is written, the first records are looked at, and two lines say what is read and which field is what.
"""

from __future__ import annotations

from dataclasses import replace

from wds_tools.convert.options import ConvertOptions
from wds_tools.convert.select import Selection
from wds_tools.convert.survey import survey_records
from wds_tools.format.manifest import Manifest
from wds_tools.jobs import Job, run_job
from wds_tools.jobs.records import ConvertRecords, Encoder
from wds_tools.plugins import SOURCES, load_plugin
from wds_tools.sources.composite import Containers, kind_of_task
from wds_tools.sources.inputs import expand_inputs
from wds_tools.sources.record import Source


def run_conversion(options: ConvertOptions, encoder: Encoder | None = None) -> Manifest:
    """Convert files to a dataset.

    Args:
        options: what is read, and how it becomes samples.
        encoder: fills the codes of images on the way.

    Returns:
        The manifest of the finished dataset.

    Raises:
        UsageError, NotFound: the input can't be read by this source; or see Survey.check and run_job.
        MissingPackage: the source needs a package that is not installed.
    """
    source: Source = options.make_source() if options.source is None else load_plugin(SOURCES, options.source)()
    inputs = expand_inputs(options.input, source.choose, strict_links=options.strict_links)
    tasks, total = source.plan(inputs.files)
    settings, codes = options.settings, options.code_columns(inputs.files)
    if options.source is not None:
        settings["source"] = options.source
    if encoder is not None:
        settings["encode"], codes = encoder.provenance(options.modes)
        options = replace(options, workers=encoder.workers)
    settings |= {name: value for name in ("drop", "where") if (value := getattr(options, name))}
    converter = options.make_converter()
    selection = Selection.of(options, converter)
    survey = survey_records(source.read, tasks, selection.roles, options.named_fields)
    survey.check()
    if isinstance(source, Containers) and options.columns is not None:  # from here on: the survey has seen all
        source = replace(source, columns=options.columns)
    job = Job(
        command=options.command,
        settings=settings,
        tasks=tasks,
        work=ConvertRecords(source.read, selection.convert, converter.num_ahead, encoder),
        total=total,
        codes=codes,
        device="cpu" if encoder is None else encoder.runs_on,
        source=inputs.source,
        notes=[f"wds-tools: {inputs.describe(map(kind_of_task, tasks))}", f"wds-tools: {survey.field_map()}"],
        key_prefix=options.key_prefix,
    )
    return run_job(job, options)
