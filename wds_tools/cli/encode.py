"""`wds-tools encode`."""

from dataclasses import dataclass

from wds_tools.cli.summary import Printed, print_dataset
from wds_tools.encode.encode import EncodeConfig, encode

EXAMPLE = "wds-tools encode --input pairs-raw --output pairs --tokenizer chameleon --weights vqgan/ --device cuda"


@dataclass(frozen=True, kw_only=True)
class Config(Printed, EncodeConfig):
    """Fill the codes of a dataset's images with an image tokenizer."""


def run(config: Config) -> int:
    """Encode, and say what came of it."""
    print_dataset(config.output, encode(config), json=config.json)
    return 0
