"""`wds-tools relabel`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from wds_tools.cli.options import Named
from wds_tools.cli.summary import Printed, print_dataset
from wds_tools.select.relabel import RelabelConfig, relabel

EXAMPLE = "wds-tools relabel --input laion --with captions.parquet --on key --texts recap=caption --output laion-recap"


@dataclass(frozen=True, kw_only=True)
class Config(Printed, RelabelConfig):
    """Put other texts and fields into the samples of a dataset, from tables."""

    labels: Annotated[tuple[str, ...], Named("with")]
    """Tables with the texts and fields: files of any kind that conversions read, folders or patterns."""


def run(config: Config) -> int:
    """Join and write, and say what came of it."""
    print_dataset(config.output, relabel(config), json=config.json)
    return 0
