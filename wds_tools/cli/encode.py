"""`wds-tools encode`."""

from wds_tools.cli.summary import print_data_set
from wds_tools.encode.fill import EncodeConfig as Config
from wds_tools.encode.fill import encode

__all__ = ["EXAMPLE", "Config", "run"]

EXAMPLE = "wds-tools encode --input pairs-raw --output pairs --tokenizer chameleon --weights vqgan/ --device cuda"


def run(config: Config) -> int:
    """Encode, and say what came of it."""
    print_data_set(config.output, encode(config))
    return 0
