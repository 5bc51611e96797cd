"""`wds-tools pack`."""

from __future__ import annotations

from dataclasses import dataclass

from wds_tools.cli.summary import Printed, dataset_record, describe_dataset, show
from wds_tools.pack.rows import PackConfig, pack

EXAMPLE = "wds-tools pack --input s3://bucket/pairs s3://bucket/dclm --tokenizer tok/ --max-length 4096 --output s3://bucket/rows"


@dataclass(frozen=True, kw_only=True)
class Config(Printed, PackConfig):
    """Pack datasets into shards of token rows of one length, so that training does not tokenize."""


def run(config: Config) -> int:
    """Pack, and say what came of it."""
    manifest = pack(config)
    counts, rows = manifest.source.get("counts", {}), manifest.token_rows or {}
    total = manifest.samples * rows["length"]
    split = f", {counts['split']:,} interleaved in pieces" if "split" in counts else ""
    tokens = (
        f"tokens       {counts.get('tokens', 0):,} of {counts.get('samples', 0):,} samples, {counts.get('shortened', 0):,} with "
        f"a shortened text{split}; padding {counts.get('padding', 0) / max(total, 1):.2%}; the model needs vocab_size >= "
        f"{rows['vocabulary_size']:,}"
    )
    record = {**dataset_record(config.output, manifest), "counts": counts, "rows": rows}
    show(config, record, [*describe_dataset(config.output, manifest), tokens])
    return 0
