"""`wds-tools export parquet`."""

from __future__ import annotations

from dataclasses import dataclass

from wds_tools.cli.export_hf import show_export
from wds_tools.cli.summary import Printed
from wds_tools.export.options import ParquetConfig
from wds_tools.export.parquet import export_parquet

EXAMPLE = "wds-tools export parquet --input s3://bucket/pages s3://bucket/edits --output parquet --num-shards 64"


@dataclass(frozen=True, kw_only=True)
class Config(Printed, ParquetConfig):
    """Write datasets as typed Parquet with all of their content, in their order; `convert coded` reads it back."""


def run(config: Config) -> int:
    """Export, and say what came of it."""
    show_export(config, export_parquet(config), 'load_dataset("parquet", ...), pandas and others', json=config.json)
    return 0
