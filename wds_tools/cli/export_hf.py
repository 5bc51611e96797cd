"""`wds-tools export hf`."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from wds_tools.cli.summary import Printed, print_json
from wds_tools.export.hf import ExportConfig, export_hf
from wds_tools.terminal import say

EXAMPLE = "wds-tools export hf --input s3://bucket/pairs s3://bucket/dclm --output liquid-data --num-shards 256"


@dataclass(frozen=True, kw_only=True)
class Config(Printed, ExportConfig):
    """Shuffle data sets together and write them as a Hugging Face data set."""


def run(config: Config) -> int:
    """Export, and say what came of it."""
    summary = export_hf(config)
    if config.json:
        print_json({"output": config.output, "format": config.format, **asdict(summary)})
        return 0
    kinds = ", ".join(f"{count:,} {name}" for name, count in sorted(summary.data_types.items()))
    how = "datasets.load_from_disk" if config.format == "arrow" else 'load_dataset("parquet", ...)'
    say(f"exported   {config.output}", f"rows       {summary.rows:,} ({kinds})", f"files      {summary.files:,}, for {how}")
    if summary.pushed is not None:
        say(f"pushed     {summary.pushed:,} files to hf://datasets/{config.push_to_hub}")
    return 0
