"""`wds-tools convert hf`."""

from wds_tools.cli.convert import convert_command
from wds_tools.convert.coded import HfConfig

EXAMPLE = "wds-tools convert hf --input liquid-data/ --output s3://bucket/liquid --workers 8"
Config, run = convert_command(HfConfig)
