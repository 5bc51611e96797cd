"""`wds-tools convert hf`."""

from wds_tools.cli.summary import print_data_set
from wds_tools.convert.hf import HfConfig as Config
from wds_tools.convert.hf import convert_hf

__all__ = ["EXAMPLE", "Config", "run"]

EXAMPLE = "wds-tools convert hf --input liquid-data/ --output s3://bucket/liquid --workers 8"


def run(config: Config) -> int:
    """Convert, and say what came of it."""
    print_data_set(config.output, convert_hf(config))
    return 0
