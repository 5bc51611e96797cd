"""The order of one source: a bijection from positions to samples; pure numpy, no buffer, no history.

    samples of a shard -> chunks (runs of about `chunk_bytes`) -> permuted by (seed, epoch): the epoch's tape
    tape -> cut into `lanes` equal parts; position p reads lane p mod lanes at depth p div lanes
    block: `block_bytes` of an chunk; the part of a block in one lane is a piece, and its rows are permuted again

So any `lanes` consecutive positions come from as many places of the tape, a lane reads its chunks from start to end, and no
more than a block of each lane is open at a time.
Invariant: for every epoch, `locate` maps [0, num_samples) one to one onto the samples.
Cost: 16 bytes an chunk and epoch; a position takes no state, about 0.3 us when asked in arrays.
The chunks are sorted by keys from Philox (Salmon et al., SC 2011), whose stream numpy keeps fixed; rows go through a small
Feistel network (Black and Rogaway, CT-RSA 2002: cycle walking), mixed by MurmurHash3's finalizer as varied by D. Stafford.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wds_tools.errors import UsageError

ORDER_VERSION = 1
"""Counts changes of the order. A state saved under another one is refused."""
MAX_CHUNK_BYTES = 4 << 20
MIN_BLOCK_BYTES = 128 << 10
OPEN_BYTES = 1 << 30
"""What the open blocks of all processes together take, if the dataset is large and the lanes are not too many."""
LANES_PER_BATCH = 8
_CHUNKS = 1024
_MOST_EXTENTS = 1 << 28
"""Of an epoch: a petabyte in those of 4 MiB, planned in 4 GiB of memory."""
_EPOCH_STREAM, _SUBSET_STREAM = 0, 1
SMALL_BYTES = 256 << 20
"""A dataset up to this size is permuted sample by sample: every process can hold it whole."""

Ints = NDArray[np.int64]
_Words = NDArray[np.uint64]


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderSpec:
    """What an order depends on beside the samples and the epoch. Kept in the state of a run."""

    seed: int
    """0 ... 2**64 - 1."""
    lanes: int
    """Parts of the tape that are read side by side; by default 8 x the global batch."""
    block_bytes: int
    """What is open in a lane at a time, and permuted."""
    chunk_bytes: int
    """What stays together on the tape, so that it can be fetched at once; whole blocks."""
    shuffle: bool = True
    """False: position p is sample p of the manifest."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 64:
            raise UsageError(f"seed={self.seed} is not in 0 ... 2**64 - 1")
        if not 1 <= self.lanes < 1 << 31:
            raise UsageError(f"lanes={self.lanes} is not in 1 ... 2**31 - 1")
        if not 1 <= self.block_bytes <= self.chunk_bytes < 1 << 40:
            raise UsageError(
                f"block_bytes={self.block_bytes}, chunk_bytes={self.chunk_bytes}: expected 1 <= block <= chunk < 2**40"
            )


class Rows(NamedTuple):
    """Where positions lead; arrays of one length."""

    shard: Ints
    row: Ints
    """Number of the sample in its shard."""
    piece: Ints
    """Where its piece starts on the tape: names the piece within an epoch."""
    first: Ints
    """First row of the piece in its shard."""
    num_rows: Ints
    """Rows of the piece: first ... first + num_rows."""
    done: Ints
    """How many of them an epoch hands out before this one."""
    run: Ints
    """Rows from `first` to the end of the chunk or the lane: what the lane reads next lies side by side."""


def default_order(total_bytes: int, batch_size: int, seed: int, *, lanes: int | None = None, shuffle: bool = True) -> OrderSpec:
    """The order of a dataset of this many bytes for a global batch of this many samples.

    Lanes: 8 x the batch, so that up to 8 workers of a rank have lanes of their own. Up to 256 MiB an chunk is a sample; above,
    there are about 1,024 chunks, until they have 4 MiB: small datasets are mixed finely, large ones are read in large
    requests. A block is what keeps all open blocks within 1 GiB, and at least 128 KiB.
    """
    if not shuffle:
        return OrderSpec(seed=seed, lanes=1, block_bytes=MIN_BLOCK_BYTES, chunk_bytes=MIN_BLOCK_BYTES, shuffle=False)
    lanes = lanes or LANES_PER_BATCH * batch_size
    if total_bytes <= SMALL_BYTES:
        return OrderSpec(seed=seed, lanes=lanes, block_bytes=1, chunk_bytes=1)
    chunk = min(max(total_bytes // _CHUNKS, MIN_BLOCK_BYTES), MAX_CHUNK_BYTES)
    block = min(max(OPEN_BYTES // lanes, MIN_BLOCK_BYTES), chunk)
    return OrderSpec(seed=seed, lanes=lanes, block_bytes=block, chunk_bytes=chunk)


def block_samples(samples: Ints, num_bytes: Ints, spec: OrderSpec) -> Ints:
    """(S,) rows of a block of shards with so many samples and bytes."""
    rows: Ints = np.maximum(spec.block_bytes * samples // np.maximum(num_bytes, 1), 1)
    return rows


def chunk_samples(samples: Ints, num_bytes: Ints, spec: OrderSpec) -> Ints:
    """(S,) rows of an chunk: whole blocks."""
    block = block_samples(samples, num_bytes, spec)
    rows: Ints = block * np.maximum(spec.chunk_bytes * samples // (np.maximum(num_bytes, 1) * block), 1)
    return rows


class SourcePlan:
    """The orders of all epochs of one source.

    Args:
        samples: (S,) samples of each shard.
        sizes: (S,) bytes of each shard.
        order: the recipe.
        max_samples: use this many samples only, the same in every epoch: chunks chosen by the seed.
        repeat: how often an epoch has each of them.

    Raises:
        UsageError: there are no samples, or max_samples is not in 1 ... their number.
    """

    def __init__(self, samples: Ints, sizes: Ints, spec: OrderSpec, max_samples: int | None = None, repeat: int = 1) -> None:
        total = int(samples.sum())
        if not total:
            raise UsageError("the dataset has no samples: there is nothing to train on")
        if max_samples is not None and not 1 <= max_samples <= total:
            raise UsageError(f"max_samples={max_samples} is not in 1 ... {total}, the samples of the source")
        self.spec = spec
        chosen_samples = max_samples or total
        self.num_samples = chosen_samples * repeat
        self._block_samples = block_samples(samples, sizes, spec)
        self._chunk_samples = chunk_samples(samples, sizes, spec)
        counts = -(-samples // self._chunk_samples)
        if (needed := int(counts.sum()) * repeat) > _MOST_EXTENTS:
            raise UsageError(
                f"{total:,} samples, repeated {repeat:,} times, are {needed:,} chunks of {spec.chunk_bytes:,} bytes: a plan "
                f"holds {_MOST_EXTENTS:,} at most"
            )
        self._chunks_before = np.concatenate(([0], np.cumsum(counts)))
        num_chunks = int(self._chunks_before[-1])
        rows = np.repeat(self._chunk_samples, counts)
        last = self._chunks_before[1:][counts > 0] - 1
        rows[last] = (samples - (counts - 1) * self._chunk_samples)[counts > 0]
        self._chunks = np.arange(num_chunks)
        if chosen_samples < total:
            chosen = shuffled(num_chunks, spec.seed, 0, _SUBSET_STREAM)
            ends = np.cumsum(rows[chosen])
            keep = int(np.searchsorted(ends, chosen_samples)) + 1
            rows[chosen[keep - 1]] -= ends[keep - 1] - chosen_samples
            self._chunks = np.sort(chosen[:keep])
            rows = rows[self._chunks]
        self._chunks, self._rows = np.tile(self._chunks, repeat), np.tile(rows, repeat)
        self._epochs: dict[int, tuple[Ints, Ints]] = {}

    @property
    def num_chunks(self) -> int:
        """Chunks of an epoch."""
        return len(self._chunks)

    def locate(self, epoch: int, positions: Ints) -> Rows:
        """Where these positions of an epoch lead.

        Args:
            epoch: from 0.
            positions: (K,) in 0 ... num_samples - 1, in any order.
        """
        spec = self.spec
        chunks, tape = self._tape(epoch)
        lane, depth = positions % spec.lanes, positions // spec.lanes
        short, num_longer = divmod(self.num_samples, spec.lanes)
        lane_start = lane * short + np.minimum(lane, num_longer)
        lane_end = lane_start + short + (lane < num_longer)
        at = lane_start + depth
        number = np.searchsorted(tape, at, "right") - 1
        chunk, start, end = chunks[number], tape[number], tape[number + 1]
        shard = np.searchsorted(self._chunks_before, chunk, "right") - 1
        rows = self._block_samples[shard]
        block = start + (at - start) // rows * rows
        piece = np.maximum(block, lane_start)
        end = np.minimum(end, lane_end)
        num_rows = np.minimum(block + rows, end) - piece
        first = (chunk - self._chunks_before[shard]) * self._chunk_samples[shard] + piece - start
        inside = at - piece
        if spec.shuffle and num_rows.max(initial=1) > 1:
            inside = _permuted(inside, num_rows, _key(spec.seed, epoch), piece)
        return Rows(shard, first + inside, piece, first, num_rows, at - piece, end - piece)

    def _tape(self, epoch: int) -> tuple[Ints, Ints]:
        """(chunks in this epoch's order, where each starts on the tape, and at last its end)."""
        if epoch not in self._epochs:
            if len(self._epochs) > 1:  # the lanes of a mixture change epochs at slightly different steps
                del self._epochs[min(self._epochs)]
            if self.spec.shuffle:
                turn = shuffled(len(self._chunks), self.spec.seed, epoch)
                chunks, rows = self._chunks[turn], self._rows[turn]
            else:
                chunks, rows = self._chunks, self._rows
            tape = np.zeros(len(rows) + 1, np.int64)
            np.cumsum(rows, out=tape[1:])
            self._epochs[epoch] = chunks, tape
        return self._epochs[epoch]


def shuffled(count: int, seed: int, epoch: int, domain: int = _EPOCH_STREAM) -> Ints:
    """A permutation of range(count), (count,): the order of as many 64-bit keys of Philox, keyed by (seed, epoch)."""
    keys: _Words = np.random.Philox(
        key=np.array([seed, epoch], np.uint64), counter=np.array([0, 0, 0, domain], np.uint64)
    ).random_raw(count)
    return np.argsort(keys, kind="stable")


_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_ROUNDS = 3


def _key(seed: int, epoch: int) -> np.uint64:
    return np.uint64(int(mix64(np.array([seed], np.uint64))[0]) + epoch * _GOLDEN & _MASK)


def mix64(words: _Words) -> _Words:
    """A bijection on 64-bit words that changes half of the bits (MurmurHash3's finalizer, Stafford's variant 13)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _permuted(inside: Ints, num_rows: Ints, key: np.uint64, piece: Ints) -> Ints:
    """Where each row goes in its piece: for each (key, piece) a permutation of range(num_rows), evaluated at `inside`.

    A row is a pair (left, right) on a grid of at least num_rows cells, nearly square. Each round shifts one by a hash of
    the other, which can be undone, so the network permutes the grid; a cell beyond num_rows is sent through again.
    """
    keys = mix64(piece.astype(np.uint64) * np.uint64(_GOLDEN) + key)
    count = num_rows.astype(np.uint64)
    height = np.ceil(np.sqrt(num_rows)).astype(np.uint64)
    width = (count + height - np.uint64(1)) // height
    out = inside.astype(np.uint64)
    todo: Any = slice(None)
    while True:
        left, right = np.divmod(out[todo], width[todo])
        for turn in range(_ROUNDS):
            salt = np.uint64((2 * turn + 1) * _GOLDEN & _MASK)
            left = (left + (mix64(right + keys[todo] + salt) >> np.uint64(32))) % height[todo]
            right = (right + (mix64(left + keys[todo] - salt) >> np.uint64(32))) % width[todo]
        out[todo] = left * width[todo] + right
        outside = np.flatnonzero(out >= count)
        if not len(outside):
            return out.astype(np.int64)
        todo = outside
