"""`wds-tools convert dclm`."""

from wds_tools.cli.summary import print_data_set
from wds_tools.convert.dclm import DclmConfig as Config
from wds_tools.convert.dclm import convert_dclm

__all__ = ["EXAMPLE", "Config", "run"]

EXAMPLE = "wds-tools convert dclm --input dclm/ --output s3://bucket/dclm --workers 8"


def run(config: Config) -> int:
    """Convert, and say what came of it."""
    print_data_set(config.output, convert_dclm(config))
    return 0
