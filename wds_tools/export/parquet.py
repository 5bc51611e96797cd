"""Datasets -> typed Parquet with everything that they hold, in their order; `convert coded` takes it back, member for member.

samples of all inputs -> all columns (`typed`) -> equal files (`output`)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain

from wds_tools.dataset.reader import read_shard
from wds_tools.export.options import ExportOptions, ExportSummary, ParquetConfig
from wds_tools.export.output import Source, Table, counted, open_sources, write_export
from wds_tools.export.typed import size_of, typed_columns, typed_schema
from wds_tools.format.manifest import check_one_tokenizer
from wds_tools.format.schema import Sample
from wds_tools.run.progress import Progress
from wds_tools.sources.arrow import load_pyarrow


def export_parquet(config: ParquetConfig) -> ExportSummary:
    """Export everything, in order.

    Args:
        config: what is exported, and where it goes.

    Returns:
        What was written, once it is complete.

    Raises:
        WdsToolsError: see export_hf.
    """
    pa = load_pyarrow("exporting")
    sources = open_sources(config)
    check_one_tokenizer((store.url, manifest, manifest.code_columns) for store, manifest in sources)
    data_types = dict(sorted(sum((Counter(manifest.data_types) for _, manifest in sources), Counter[str]()).items()))
    made_of = ["wds-tools export parquet 1", *(manifest.fingerprint() for _, manifest in sources)]
    schema = typed_schema(pa, [manifest for _, manifest in sources])
    records = partial(_in_order, sources, config, sum(data_types.values()))
    return write_export(config, sources, Table(schema, typed_columns, size_of, records, None, data_types), made_of)


@contextmanager
def _in_order(sources: Sequence[Source], config: ExportOptions, rows: int) -> Iterator[Iterator[Sample]]:
    """The samples."""
    with Progress("export", rows, quiet=config.quiet) as progress:
        shards = (read_shard(store, row) for store, manifest in sources for row in manifest.shards)
        yield counted(chain.from_iterable(shards), progress)
