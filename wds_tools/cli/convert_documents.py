"""`wds-tools convert documents`."""

from wds_tools.cli.convert import convert_command
from wds_tools.convert.documents import DocumentsConfig

EXAMPLE = "wds-tools convert documents --input dclm/ --output s3://bucket/dclm --workers 8"
Config, run = convert_command(DocumentsConfig)
