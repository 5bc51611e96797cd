"""`wds-tools convert hf`."""

from dataclasses import dataclass

from wds_tools.cli.summary import Printed, print_dataset
from wds_tools.convert.coded import HfConfig, convert_hf

EXAMPLE = "wds-tools convert hf --input liquid-data/ --output s3://bucket/liquid --workers 8"


@dataclass(frozen=True, kw_only=True)
class Config(Printed, HfConfig):
    """Convert Hugging Face datasets that hold codes, Liquid's or those of `export hf`, to shards."""


def run(config: Config) -> int:
    """Convert, and say what came of it."""
    print_dataset(config.output, convert_hf(config), json=config.json)
    return 0
