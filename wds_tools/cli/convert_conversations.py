"""`wds-tools convert conversations`."""

from wds_tools.cli.convert import convert_command
from wds_tools.convert.conversations import ConversationsConfig

EXAMPLE = "wds-tools convert conversations --input llava.json --image-root images/ --output s3://bucket/sft-raw --workers 8"
Config, run = convert_command(ConversationsConfig)
