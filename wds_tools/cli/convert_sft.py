"""`wds-tools convert sft`."""

from dataclasses import dataclass

from wds_tools.cli.summary import Printed, print_dataset
from wds_tools.convert.conversations import SftConfig, convert_sft

EXAMPLE = "wds-tools convert sft --input llava.json --image-root images/ --output s3://bucket/sft-raw --workers 8"


@dataclass(frozen=True, kw_only=True)
class Config(Printed, SftConfig):
    """Convert conversations about images to shards; the images go in byte for byte, codes come with `wds-tools encode`."""


def run(config: Config) -> int:
    """Convert, and say what came of it."""
    print_dataset(config.output, convert_sft(config), json=config.json)
    return 0
