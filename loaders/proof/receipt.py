"""Receipts: proof of which samples a run handed over.

Every sample has a 128-bit hash, keyed by its source's fingerprint; a run keeps the sum of those that it handed over, modulo
2**128, and their count. Sums add up over ranks and resumes, in any order. Beside them stand the spans of positions that were
handed over: since the order is a pure function, they say which samples these were, so that what is missing can be named.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np

from loaders.config import LastBatch, World
from loaders.order.partition import BatchPartition
from loaders.order.plan import ORDER_VERSION, Ints, OrderSpec, mix64
from loaders.order.samples import SampleOrder
from loaders.proof.state import Versions
from wds_tools.errors import FormatError, UsageError
from wds_tools.format.typed_json import Count, read_json, shape

MODULUS = 1 << 128
RECEIPT_VERSION = 2
"""1: last_batch="short" dealt the last step out so that ranks could come away empty."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


_Epoch = Annotated[int, range(1 << 20)]
Span = tuple[int, int, int, int]
"""(epoch, low, high, batch_size): the positions of whole steps; this rank's part of each was handed over."""


def receipt_to_json(
    order: SampleOrder,
    world: World,
    last_batch: str,
    spans: Sequence[Span],
    num_samples: int,
    hash_total: int,
    substitutions: Sequence[Mapping[str, Any]],
    run: str = "",
) -> dict[str, Any]:
    """A rank's receipt as plain JSON values.

    Args:
        stream: what was read.
        world: by whom.
        last_batch: how the last step of an epoch is made up: with the spans it says which positions a rank had.
        spans: what was handed over, in time order.
        num_samples: how many samples that was.
        hash_total: the sum of their hashes, substituted ones aside.
        substitutions: positions that another sample filled.
        run: a name that no other loader has: of the receipts of one loader, the last contains the earlier ones.
    """
    return {
        "version": RECEIPT_VERSION,
        "order_version": ORDER_VERSION,
        "run": run,
        "rank": world.rank,
        "world_size": world.world_size,
        "spec": asdict(order.spec),
        "step_samples": order.step_samples,
        "recipe": dict(order.recipe),
        "last_batch": last_batch,
        "sources": [
            {"url": opened.store.url, "fingerprint": fingerprint}
            for opened, fingerprint in zip(order.sources, order.fingerprints, strict=True)
        ],
        "spans": [list(span) for span in spans],
        "samples": num_samples,
        "hash_total": f"{hash_total:032x}",
        "substitutions": [dict(one) for one in substitutions],
    }


@dataclass(frozen=True, kw_only=True)
class _Origin:
    """A source of a receipt."""

    url: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class _Substitution:
    """A sample that another one stood in for."""

    epoch: Count
    source: Count
    shard: Count
    row: Count
    reason: str
    by_row: Count = 0
    """Its substitute, in the same shard."""


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    """A sample order's recipe; see SampleOrder.recipe."""

    weights: tuple[tuple[float, ...], ...] | None
    from_positions: tuple[Count, ...]
    length: Annotated[int, range(1, 1 << 53)]
    repeat: tuple[Count, ...]
    max_samples: tuple[Count | None, ...]
    codes: tuple[str | None, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Document:
    """What a receipt of this version says."""

    run: str
    rank: Annotated[int, range(1 << 24)]
    world_size: Annotated[int, range(1 << 24)]
    last_batch: LastBatch
    spec: OrderSpec
    recipe: Mapping[str, Any]
    sources: tuple[_Origin, ...]
    spans: tuple[tuple[_Epoch, Count, Count, Count], ...]
    samples: Count
    hash_total: str
    substitutions: tuple[_Substitution, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """A receipt that was read. See receipt_to_json."""

    name: str
    """Where it was read, for messages."""
    run: str
    world: World
    last_batch: LastBatch
    spec: OrderSpec
    recipe: Mapping[str, Any]
    sources: tuple[tuple[str, str], ...]
    """(url, fingerprint) of each."""
    spans: tuple[Span, ...]
    num_samples: int
    hash_total: int
    substitutions: tuple[tuple[int, int, int, int, str], ...]
    """(epoch, source, shard, row, reason) of each sample that another one stood in for."""

    def steps(self, span: Span) -> tuple[BatchPartition, int]:
        """The steps of which a span is the first ones, and how many it is."""
        _, low, high, batch_size = span
        steps = BatchPartition(self.recipe["length"], low, batch_size, self.last_batch, self.world.world_size)
        return steps, min(-((low - high) // batch_size), len(steps))


def parse_receipt(data: bytes, name: str) -> Receipt:
    """Read a receipt.

    Raises:
        FormatError: it is none, or says what can't be.
        UsageError: it is of another version, or of an order that this release does not have.
    """
    what = f"{name}: not the receipt of a loader"
    record = read_json(dict[str, Any], data, what)
    versions = shape(Versions, record, what)
    if (versions.version, versions.order_version) != (RECEIPT_VERSION, ORDER_VERSION):
        raise UsageError(
            f"{name}: version {versions.version!r}, order version {versions.order_version!r}; this release reads "
            f"{RECEIPT_VERSION} and {ORDER_VERSION}: the same positions would be other samples; audit it with the release that "
            "wrote it"
        )
    document = shape(_Document, record, what)
    shape(_Recipe, document.recipe, f"{what}: recipe")
    if document.rank >= document.world_size:
        raise FormatError(f"{what}: rank={document.rank} is not in 0 ... world_size - 1 = {document.world_size - 1}")
    if not re.fullmatch("[0-9a-f]{32}", document.hash_total):
        raise FormatError(f"{what}: hash_total is {document.hash_total[:40]!r}, expected 32 hexadecimal digits")
    receipt = Receipt(
        name=name,
        run=document.run,
        world=World(rank=document.rank, world_size=document.world_size),
        last_batch=document.last_batch,
        spec=document.spec,
        recipe=document.recipe,
        sources=tuple((source.url, source.fingerprint) for source in document.sources),
        spans=document.spans,
        num_samples=document.samples,
        hash_total=int(document.hash_total, 16),
        substitutions=tuple((one.epoch, one.source, one.shard, one.row, one.reason) for one in document.substitutions),
    )
    for span in receipt.spans:
        if span[3] < receipt.world.world_size or span[1] >= span[2]:
            raise FormatError(f"{what}: {list(span)} is no span (epoch, low, high, batch size)")
        steps, count = receipt.steps(span)
        if not count or steps.end(count - 1) != span[2]:
            raise FormatError(f"{what}: the span {list(span)} does not end with a step of an epoch of {steps.length} samples")
    return receipt


class SampleHash:
    """The hashes of a source's samples.

    Args:
        fingerprint: of its manifest.
    """

    def __init__(self, fingerprint: str) -> None:
        digest = hashlib.sha256(f"sample {fingerprint}".encode()).digest()
        self._high, self._low = (np.uint64(int.from_bytes(digest[at : at + 8], "little")) for at in (0, 8))

    def total(self, shard: Ints, row: Ints) -> int:
        """The sum of these samples' hashes modulo 2**128."""
        place = mix64((shard.astype(np.uint64) << np.uint64(32)) + row.astype(np.uint64) + _GOLDEN)
        high, low = mix64(place ^ self._high), mix64(place + self._low)
        return ((_sum(high) << 64) + _sum(low)) % MODULUS


def total_of(hashes: Sequence[SampleHash], source: Ints, shard: Ints, row: Ints) -> int:
    """The sum of the hashes of these samples of several sources."""
    if len(hashes) == 1:
        return hashes[0].total(shard, row)
    total = 0
    for number, hashed in enumerate(hashes):
        here = source == number
        if here.any():
            total += hashed.total(shard[here], row[here])
    return total % MODULUS


def _sum(words: np.ndarray[Any, np.dtype[np.uint64]]) -> int:
    low = int((words & np.uint64(0xFFFFFFFF)).sum())
    return low + (int((words >> np.uint64(32)).sum()) << 32)
