"""`wds-tools convert dclm`."""

from dataclasses import dataclass

from wds_tools.cli.summary import Printed, print_dataset
from wds_tools.convert.documents import DclmConfig, convert_dclm

EXAMPLE = "wds-tools convert dclm --input dclm/ --output s3://bucket/dclm --workers 8"


@dataclass(frozen=True, kw_only=True)
class Config(Printed, DclmConfig):
    """Convert DCLM-style documents to shards."""


def run(config: Config) -> int:
    """Convert, and say what came of it."""
    print_dataset(config.output, convert_dclm(config), json=config.json)
    return 0
