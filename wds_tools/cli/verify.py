"""`wds-tools verify`."""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from wds_tools.check.verify import VerifyConfig, verify
from wds_tools.cli.summary import Printed, dataset_record, print_dataset, print_json
from wds_tools.terminal import say

EXAMPLE = "wds-tools verify s3://bucket/pairs --workers 8"


@dataclass(frozen=True, kw_only=True)
class Config(Printed, VerifyConfig):
    """Check that a dataset is complete, undamaged and what its manifest says. Exit status 1 if it is not."""

    input: tyro.conf.Positional[str]
    """The dataset: a directory or URL."""


def run(config: Config) -> int:
    """Check, and list what is wrong."""
    result = verify(config)
    if config.json:
        print_json({**dataset_record(config.input, result.manifest), "problems": result.problems, "notes": result.notes})
        return 1 if result.problems else 0
    print_dataset(config.input, result.manifest)
    for problem in result.problems:
        say(f"WRONG  {problem}")
    for note in result.notes:
        say(f"NOTE   {note}")
    say(f"verify: {len(result.problems)} problems" if result.problems else "verify: all is well")
    return 1 if result.problems else 0
