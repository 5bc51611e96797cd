"""`wds-tools index`."""

from __future__ import annotations

import time
from dataclasses import dataclass

from wds_tools.cli.options import Positional
from wds_tools.cli.summary import Printed, dataset_record, describe_samples, show
from wds_tools.dataset.layout import MANIFEST
from wds_tools.format.manifest import PASSED_OVER
from wds_tools.jobs.index_tars import index_tars, rebuild_indices
from wds_tools.pack.count import count_tokens
from wds_tools.run.local import OnWorkers
from wds_tools.select.fields import Fields
from wds_tools.storage import open_store
from wds_tools.terminal import counted, sized

EXAMPLE = "wds-tools index s3://bucket/tars --workers 8"


@dataclass(frozen=True, kw_only=True)
class Config(Printed, OnWorkers):
    """Write the index files (.tar.index) of a dataset again; for a folder of any WebDataset tars, write index files and a
    manifest."""

    input: Positional[str]
    """The dataset, or the folder or prefix of the tars: a directory or URL. Everything is written there, beside the tars."""
    fields: bool = False
    """Also make the fields of the samples, which `select`, `relabel` and `stats --duplicates` read, if they are missing."""
    tokens: str | None = None
    """Also count the tokens of the texts, with the Hugging Face tokenizer in this folder, for LoaderConfig(unit="tokens")."""


def run(config: Config) -> int:
    """Index, and say what was found and how fast."""
    store = open_store(config.input)
    begun = time.monotonic()
    is_set = store.exists(MANIFEST)
    manifest = (rebuild_indices if is_set else index_tars)(store, workers=config.workers, quiet=config.quiet)
    if config.fields:
        Fields.make(store, manifest, workers=config.workers, quiet=config.quiet)
    counted_tokens = None
    if config.tokens is not None:
        counted_tokens = count_tokens(store, manifest, config.tokens, workers=config.workers, quiet=config.quiet).text_tokens
    elapsed_s = time.monotonic() - begun
    what = f"{'rebuilt' if is_set else 'indexed'} {counted(len(manifest.shards), 'index file' if is_set else 'tar')}"
    passed_over = manifest.source.get("counts", {}).get(PASSED_OVER)
    lines = [
        f"index: {what} of {config.input}: {counted(manifest.samples, 'sample')}, {sized(manifest.bytes)}, "
        f"{manifest.samples / elapsed_s:,.0f} samples/s",
        f"schema: {describe_samples(manifest)}",
    ]
    record = dataset_record(config.input, manifest)
    if counted_tokens is not None:
        record |= {"text_tokens": counted_tokens, "image_tokens": manifest.num_codes}
        lines.append(f"tokens: {counted_tokens:,} of texts, {record['image_tokens']:,} of images")
    if passed_over:
        what = counted(passed_over, "member that is", "members that are")
        lines.append(f"passed over: {what} no part of a sample: hidden ones, without a suffix, or links")
    show(config, record, lines)
    return 0
