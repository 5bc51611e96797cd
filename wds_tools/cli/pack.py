"""`wds-tools pack`."""

from __future__ import annotations

from wds_tools.cli.summary import print_data_set
from wds_tools.pack.rows import PackConfig as Config
from wds_tools.pack.rows import pack

__all__ = ["EXAMPLE", "Config", "run"]

EXAMPLE = "wds-tools pack --input s3://bucket/pairs s3://bucket/dclm --tokenizer tok/ --seq-len 4096 --output s3://bucket/rows"


def run(config: Config) -> int:
    """Pack, and say what came of it."""
    manifest = pack(config)
    print_data_set(config.output, manifest)
    counts, rows = manifest.source.get("counts", {}), manifest.source["rows"]
    total = manifest.samples * rows["length"]
    print(
        f"tokens       {counts.get('tokens', 0):,} of {counts.get('samples', 0):,} samples, {counts.get('shortened', 0):,} with "
        f"a shortened text; padding {counts.get('padding', 0) / max(total, 1):.2%}; the model needs vocab_size >= "
        f"{rows['vocabulary_size']:,}"
    )
    return 0
