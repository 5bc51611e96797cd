"""`wds-tools convert coded`."""

from wds_tools.cli.convert import convert_command
from wds_tools.convert.coded import CodedConfig

EXAMPLE = "wds-tools convert coded --input liquid-data/ --output s3://bucket/liquid --workers 8"
Config, run = convert_command(CodedConfig)
