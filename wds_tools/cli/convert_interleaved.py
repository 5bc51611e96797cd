"""`wds-tools convert interleaved`."""

from wds_tools.cli.convert import convert_command
from wds_tools.convert.interleaved import InterleavedConfig

EXAMPLE = "wds-tools convert interleaved --input mmc4.jsonl --image-root images/ --output s3://bucket/pages-raw --workers 8"
Config, run = convert_command(InterleavedConfig)
