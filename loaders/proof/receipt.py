"""Receipts: proof of which samples a run handed over.

Every sample has a 128-bit hash, keyed by its source's fingerprint; a run keeps the sum of those that it handed over, modulo
2**128, and their count. Sums add up over ranks and resumes, in any order. Beside them stand the spans of positions that were
handed over: since the order is a pure function, they say which samples these were, so that what is missing can be named.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any

import numpy as np

from loaders.config import LastBatch
from loaders.order.generations import Epochs, epochs_of
from loaders.order.mask import Substitution
from loaders.order.partition import BatchPartition
from loaders.order.plan import Ints, mix64
from loaders.proof.state import Record, read_record
from wds_tools.errors import FormatError
from wds_tools.format.typed_json import Count, read_json

MODULUS = 1 << 128
MAX_RANGE = 1024
"""Samples of a range of substitutions."""
RECEIPT_VERSION = 5
"""1: last_batch="short" dealt the last step out so that ranks could come away empty. 2: the order spec stood in two places.
3: a run could not change. 4: it did not say which steps its positions are."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


_Epoch = Annotated[int, range(1 << 20)]
Span = tuple[int, int, int, int]
"""(epoch, low, high, batch_size): positions of whole steps, of which this rank got its share."""


@dataclass(frozen=True, kw_only=True)
class EpochSubstitution(Substitution):
    """A substitution, and where it was; in the document also of samples one after the other with one stand-in."""

    epoch: Count
    num_samples: Annotated[int, range(1, MAX_RANGE + 1)] = 1


@dataclass(frozen=True, kw_only=True)
class Receipt(Record):
    """What one rank has handed over."""

    run: str
    """Name that no other loader has: of the receipts of one loader, the last contains the earlier ones."""
    rank: Annotated[int, range(1 << 24)]
    world_size: Annotated[int, range(1 << 24)]
    last_batch: LastBatch
    spans: tuple[tuple[_Epoch, Count, Count, Count], ...]
    """Positions that were handed over, in time order; see Span."""
    num_samples: Count
    hash_total: str
    """Sum of the hashes of the samples, substituted ones aside: 32 hexadecimal digits."""
    substitutions: tuple[EpochSubstitution, ...]
    name: str = ""
    """Where it was read, for messages."""

    @cached_property
    def epochs(self) -> Epochs:
        """The epochs that spans lie in."""
        return epochs_of(self.generations)

    def steps(self, span: Span) -> tuple[BatchPartition, int]:
        """The steps that begin with those of a span, and the number of steps of the span."""
        epoch, low, high, batch_size = span
        steps = BatchPartition(self.epochs.length(epoch), low, batch_size, self.last_batch, self.world_size)
        return steps, min(-((low - high) // batch_size), len(steps))


def parse_receipt(data: bytes, name: str) -> Receipt:
    """Read a receipt.

    Args:
        data: the JSON document.
        name: where it was read, for messages.

    Raises:
        FormatError: it is not a receipt, or its numbers contradict each other.
        UsageError: it is of another version, or of an order that this release does not have.
    """
    what = f"{name}: not the receipt of a loader"
    receipt = replace(read_record(Receipt, read_json(dict[str, Any], data, what), what, RECEIPT_VERSION), name=name)
    runs = ((bad, step) for bad in receipt.substitutions for step in range(bad.num_samples))
    each = (replace(bad, sample_index=bad.sample_index + step, num_samples=1) for bad, step in runs)
    receipt = replace(receipt, substitutions=tuple(each))
    if receipt.rank >= receipt.world_size:
        raise FormatError(f"{what}: rank={receipt.rank} is not in 0 ... world_size - 1 = {receipt.world_size - 1}")
    if not re.fullmatch("[0-9a-f]{32}", receipt.hash_total):
        raise FormatError(f"{what}: hash_total is {receipt.hash_total[:40]!r}, expected 32 hexadecimal digits")
    for span in receipt.spans:
        if span[3] < receipt.world_size or span[1] >= span[2]:
            raise FormatError(f"{what}: {list(span)} is not a span (epoch, low, high, batch size)")
        steps, count = receipt.steps(span)
        if not count or steps.end(count - 1) != span[2]:
            raise FormatError(f"{what}: the span {list(span)} does not end with a step of an epoch of {steps.length} samples")
    return receipt


def substitutions_to_json(substitutions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Substitutions, of one sample each, as a receipt lists them: in ranges, where neighbours have one stand-in."""
    ranges: list[dict[str, Any]] = []
    for bad in sorted(substitutions, key=lambda bad: tuple(bad.values())):
        last = ranges[-1] if ranges else {}
        num_samples = last.get("num_samples", 1)
        following = {**bad, "sample_index": bad["sample_index"] - num_samples}
        if num_samples < MAX_RANGE and {**last, "num_samples": 1} == {**following, "num_samples": 1}:
            last["num_samples"] = num_samples + 1
        else:
            ranges.append(dict(bad))
    return ranges


class SampleHash:
    """The hashes of a source's samples.

    Args:
        fingerprint: fingerprint of its manifest.
    """

    def __init__(self, fingerprint: str) -> None:
        digest = hashlib.sha256(f"sample {fingerprint}".encode()).digest()
        self._high, self._low = (np.uint64(int.from_bytes(digest[start : start + 8], "little")) for start in (0, 8))

    def total(self, shard: Ints, sample_index: Ints) -> int:
        """The sum of these samples' hashes modulo 2**128."""
        words = mix64((shard.astype(np.uint64) << np.uint64(32)) + sample_index.astype(np.uint64) + _GOLDEN)
        high, low = mix64(words ^ self._high), mix64(words + self._low)
        return ((_sum(high) << 64) + _sum(low)) % MODULUS


def total_of(hashes: Sequence[SampleHash], source: Ints, shard: Ints, sample_index: Ints) -> int:
    """The sum of the hashes of these samples of several sources, modulo 2**128."""
    if len(hashes) == 1:
        return hashes[0].total(shard, sample_index)
    total = 0
    for number, source_hash in enumerate(hashes):
        chosen = source == number
        if chosen.any():
            total += source_hash.total(shard[chosen], sample_index[chosen])
    return total % MODULUS


def _sum(words: np.ndarray[Any, np.dtype[np.uint64]]) -> int:
    low = int((words & np.uint64(0xFFFFFFFF)).sum())
    return low + (int((words >> np.uint64(32)).sum()) << 32)
