"""`wds-tools convert pairs`."""

from wds_tools.cli.convert import convert_command
from wds_tools.convert.pairs import PairsConfig

EXAMPLE = "wds-tools convert pairs --input pairs.jsonl --output s3://bucket/pairs-raw --workers 8"
Config, run = convert_command(PairsConfig)
