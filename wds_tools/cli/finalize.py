"""`wds-tools finalize`."""

from dataclasses import dataclass

from wds_tools.cli.summary import Printed, print_dataset
from wds_tools.jobs.finalize import FinalizeConfig, finalize

EXAMPLE = "wds-tools finalize --output s3://bucket/pairs"


@dataclass(frozen=True, kw_only=True)
class Config(Printed, FinalizeConfig):
    """Write the manifest of a dataset that was made in parts, or name the missing parts."""


def run(config: Config) -> int:
    """Write the manifest, and say what the dataset holds."""
    print_dataset(config.output, finalize(config), json=config.json)
    return 0
