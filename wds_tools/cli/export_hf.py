"""`wds-tools export hf`."""

from __future__ import annotations

from wds_tools.export.hf import ExportConfig as Config
from wds_tools.export.hf import export_hf

__all__ = ["EXAMPLE", "Config", "run"]

EXAMPLE = "wds-tools export hf --input s3://bucket/pairs s3://bucket/dclm --output liquid-data --num-shards 256"


def run(config: Config) -> int:
    """Export, and say what came of it."""
    summary = export_hf(config)
    kinds = ", ".join(f"{count:,} {name}" for name, count in sorted(summary.data_types.items()))
    how = "datasets.load_from_disk" if config.format == "arrow" else 'load_dataset("parquet", ...)'
    print(f"exported   {config.output}\nrows       {summary.rows:,} ({kinds})\nfiles      {summary.files:,}, for {how}")
    return 0
