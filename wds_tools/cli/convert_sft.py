"""`wds-tools convert sft`."""

from wds_tools.cli.convert import convert_command
from wds_tools.convert.conversations import SftConfig

EXAMPLE = "wds-tools convert sft --input llava.json --image-root images/ --output s3://bucket/sft-raw --workers 8"
Config, run = convert_command(SftConfig)
