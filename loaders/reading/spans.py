"""Where samples lie, and the members of them that are wanted: a row of numbers a sample.

(S, 2 + 2 W) int64: begin and end of the sample; then those of each of W members, of which each is the first that the sample
has of some suffixes; 0, 0 if it has none
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loaders.order.plan import Ints
from wds_tools.format.index import ABSENT, ShardIndex
from wds_tools.format.tar.scan import Runs


def spans_of_index(index: ShardIndex, base: int, wanted: Sequence[Sequence[str]]) -> Ints:
    """Of the samples of an index.

    Args:
        index: of S samples.
        base: byte of the shard that spans count from.
        wanted: members, see the module.
    """
    start = index.start.astype(np.int64) - base
    out = np.zeros((len(start), 2 + 2 * len(wanted)), np.int64)
    out[:, 0], out[:, 1] = start, start + index.size
    for low, names in zip(range(2, out.shape[1], 2), wanted, strict=True):
        for column, suffix in reversed(list(enumerate(index.members))):
            if suffix in names:
                lengths, offsets = (numbers[:, column].astype(np.int64) for numbers in (index.lengths, index.offsets))
                present = lengths != ABSENT
                out[present, low] = (start + offsets)[present]
                out[present, low + 1] = (start + offsets + lengths)[present]
    return out


def spans_of_runs(runs: Runs, begins: Sequence[int], wanted: Sequence[Sequence[str]]) -> Ints:
    """Of the samples of runs.

    Args:
        runs: of S samples in all.
        begins: where each run begins in what spans count from.
        wanted: members, see the module.
    """
    base = np.repeat(np.array(begins, np.int64), np.diff(runs.first))
    out = np.zeros((len(runs.start), 2 + 2 * len(wanted)), np.int64)
    out[:, 0], out[:, 1] = base + runs.start, base + runs.end
    for low, names in zip(range(2, out.shape[1], 2), wanted, strict=True):
        for name in reversed([name for name in names if name in runs.suffixes]):
            members = np.flatnonzero(runs.suffix == runs.suffixes.index(name))
            sample = runs.sample[members]
            out[sample, low] = base[sample] + runs.offset[members]
            out[sample, low + 1] = out[sample, low] + runs.length[members]
    return out
