"""`wds-tools convert image-pairs`."""

from wds_tools.cli.summary import print_data_set
from wds_tools.convert.image_pairs import ImagePairsConfig as Config
from wds_tools.convert.image_pairs import convert_image_pairs

__all__ = ["EXAMPLE", "Config", "run"]

EXAMPLE = "wds-tools convert image-pairs --input pairs.jsonl --output s3://bucket/pairs-raw --workers 8"


def run(config: Config) -> int:
    """Convert, and say what came of it."""
    print_data_set(config.output, convert_image_pairs(config))
    return 0
