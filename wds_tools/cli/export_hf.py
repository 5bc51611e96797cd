"""`wds-tools export hf`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from wds_tools.cli.options import Named
from wds_tools.cli.summary import Printed, itemize, show
from wds_tools.export.card import unknown_to_liquid
from wds_tools.export.hf import export_hf
from wds_tools.export.options import ExportConfig, ExportOptions, ExportSummary
from wds_tools.export.rows import TYPED_INSTEAD
from wds_tools.terminal import counted, say

EXAMPLE = "wds-tools export hf --input s3://bucket/pairs s3://bucket/dclm --output liquid-data --num-shards 256"


@dataclass(frozen=True, kw_only=True)
class Config(Printed, ExportConfig):
    """Shuffle datasets together and write them as a Hugging Face dataset."""

    help_group = "output"

    reader: Annotated[Literal["any", "liquid"], Named("for")] = "any"
    """liquid: leave out and count samples that Liquid's own trainer would treat as plain text: image_text_multi, visual_sft."""


def run(config: Config) -> int:
    """Export, and say what came of it."""
    summary = export_hf(config)
    if strange := unknown_to_liquid(summary.data_types):
        say(
            f"wds-tools: Liquid's own trainer would take {itemize(strange)} rows for plain text, without their images: "
            "for it, export with --for liquid",
            error=True,
        )
    if summary.passed_over:
        left_out = f"{itemize(summary.passed_over)} (samples that have it)"
        say(f"wds-tools: left out for want of a column: {left_out}; {TYPED_INSTEAD}", error=True)
    how = "datasets.load_from_disk" if config.format == "arrow" else 'load_dataset("parquet", ...)'
    show_export(config, summary, how, json=config.json)
    return 0


def show_export(config: ExportOptions, summary: ExportSummary, how: str, *, json: bool) -> None:
    """Say what an export wrote, and what loads it."""
    lines = [f"exported   {config.output}", f"rows       {summary.rows:,} ({itemize(summary.data_types)})"]
    lines += [f"left out   {itemize(summary.left_out)}: for Liquid's own trainer"] if summary.left_out else []
    lines.append(f"files      {summary.files:,}, for {how}")
    if summary.pushed is not None:
        lines.append(f"pushed     {counted(summary.pushed, 'file')} to hf://datasets/{config.push_to_hub}")
    show(Printed(json=json), {"output": config.output, "format": config.writes, **asdict(summary)}, lines)
