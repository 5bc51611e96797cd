"""`wds-tools convert image-pairs`."""

from dataclasses import dataclass

from wds_tools.cli.summary import Printed, print_data_set
from wds_tools.convert.image_pairs import ImagePairsConfig, convert_image_pairs

EXAMPLE = "wds-tools convert image-pairs --input pairs.jsonl --output s3://bucket/pairs-raw --workers 8"


@dataclass(frozen=True, kw_only=True)
class Config(Printed, ImagePairsConfig):
    """Convert image-caption pairs to shards; the images go in byte for byte, codes come with `wds-tools encode`."""


def run(config: Config) -> int:
    """Convert, and say what came of it."""
    print_data_set(config.output, convert_image_pairs(config), json=config.json)
    return 0
