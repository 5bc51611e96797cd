"""Datasets -> typed Parquet with everything that they hold, in their order; `convert coded` takes it back, member for member.

samples of all inputs -> all columns (`typed`) -> equal files (`output`)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice

import numpy as np

from wds_tools.dataset.reader import read_shard
from wds_tools.export.options import ExportOptions, ExportSummary, ParquetConfig
from wds_tools.export.output import Round, Source, Table, open_sources, write_export
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
    rounds = partial(_one_round, sources, config)
    return write_export(config, sources, Table(schema, typed_columns, size_of, rounds, None, data_types), made_of)


@contextmanager
def _one_round(sources: Sequence[Source], config: ExportOptions, bounds: Sequence[int]) -> Iterator[Iterator[Round]]:
    with Progress("export", bounds[-1], quiet=config.quiet) as progress:
        yield iter([Round(range(len(bounds) - 1), _InOrder(sources), progress)])


class _InOrder:
    """The samples of datasets by their number, over all of them; picklable.

    Where a file begins within a shard, the shard is read from its start; to its end by the file that has its last sample, which
    is where its hash is compared.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._ends = [np.cumsum([row.samples for row in manifest.shards], dtype=np.int64) for _, manifest in sources]

    def __call__(self, low: int, high: int) -> Iterator[Sample]:
        begin = 0
        for (store, manifest), ends in zip(self._sources, self._ends, strict=True):
            for shard in range(int(np.searchsorted(ends, low - begin, side="right")), len(ends)):
                row = manifest.shards[shard]
                start = begin + int(ends[shard]) - row.samples
                if start >= high:
                    return
                first, last = max(low - start, 0), high - start
                yield from islice(read_shard(store, row, first), None if last >= row.samples else last - first)
            begin += manifest.samples
