"""`wds-tools convert dclm`."""

from wds_tools.cli.convert import convert_command
from wds_tools.convert.documents import DclmConfig

EXAMPLE = "wds-tools convert dclm --input dclm/ --output s3://bucket/dclm --workers 8"
Config, run = convert_command(DclmConfig)
