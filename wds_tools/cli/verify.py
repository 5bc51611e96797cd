"""`wds-tools verify`."""

from __future__ import annotations

from dataclasses import dataclass

from wds_tools.check.verify import VerifyConfig, verify
from wds_tools.cli.options import Positional
from wds_tools.cli.summary import Printed, dataset_record, describe_dataset, show
from wds_tools.terminal import counted

EXAMPLE = "wds-tools verify s3://bucket/pairs --workers 8"


@dataclass(frozen=True, kw_only=True)
class Config(Printed, VerifyConfig):
    """Check that a dataset is complete, undamaged and what its manifest says. Exit status 1 if it is not."""

    input: Positional[str]
    """The dataset: a directory or URL."""


def run(config: Config) -> int:
    """Check, and list what is wrong."""
    result = verify(config)
    lines = [
        *describe_dataset(config.input, result.manifest),
        *(f"WRONG  {problem}" for problem in result.problems),
        *(f"NOTE   {note}" for note in result.notes),
        f"verify: {counted(len(result.problems), 'problem')}" if result.problems else "verify: all is well",
    ]
    show(config, {**dataset_record(config.input, result.manifest), "problems": result.problems, "notes": result.notes}, lines)
    return 1 if result.problems else 0
