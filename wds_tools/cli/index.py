"""`wds-tools index`."""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from wds_tools.dataset.index import rebuild_indices
from wds_tools.storage import open_store

EXAMPLE = "wds-tools index s3://bucket/pairs"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Rebuild the index files (.tar.idx) of a data set from its shards."""

    input: tyro.conf.Positional[str]
    """The data set: a directory or URL."""


def run(config: Config) -> int:
    """Rebuild, and say how many."""
    count = rebuild_indices(open_store(config.input))
    print(f"index: rebuilt {count} index files of {config.input}")
    return 0
