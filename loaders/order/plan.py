"""The order of one source: a bijection from positions to samples; pure numpy, no buffer, no history.

    samples of a shard -> chunks (neighbours, about `chunk_bytes`) -> permuted by (seed, epoch): the shuffled chunks
    shuffled chunks -> cut into `lanes` = k x B equal stretches (B: the first batch size; k: lanes_per_sample)
    position p -> lane c = p mod lanes, at cursor p div lanes; lane c reads stretch (c mod B) k + c div B: dealt crosswise
    shuffle block: `block_bytes` of a chunk, or what of them lies in one lane; its samples are permuted again

So a batch has a sample of every k-th stretch, a rank's lanes are neighbouring stretches, a lane reads its chunks from start to
end, and no more than one shuffle block of each lane is open at a time.
Invariant: for every epoch, `locate` maps [0, num_samples) one to one onto the samples, and `positions_of` is its inverse.
Cost: 12 bytes a chunk and epoch; a position takes no state, about 0.3 us when asked in arrays.
The chunks are sorted by keys from Philox (Salmon et al., SC 2011), whose stream numpy keeps fixed; samples go through a small
Feistel network (Black and Rogaway, CT-RSA 2002: cycle walking), mixed by MurmurHash3's finalizer as varied by D. Stafford.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from loaders.order.spec import OrderSpec
from wds_tools.errors import UsageError

MAX_CHUNK_BYTES = 4 << 20
MIN_BLOCK_BYTES = 128 << 10
OPEN_BYTES = 1 << 30
"""Size of the open shuffle blocks of all processes together, if the dataset is large and the lanes are not too many."""
_LANES_PER_SAMPLE = (8, 4)
"""The first where it leaves an open block of _GOOD_BLOCK_BYTES, else the second: with 2, means of 8 batches of a large dataset
would vary by 4 times as much as chance has it (docs/decisions/2026-11-26-order-version-2.md)."""
_GOOD_BLOCK_BYTES = 512 << 10
_NUM_CHUNKS = 1024
_MAX_CHUNKS = 1 << 28
"""Chunks of an epoch, at most: a petabyte in those of 4 MiB, planned in 4 GiB of memory."""
_EPOCH_STREAM, _SUBSET_STREAM = 0, 1
SMALL_BYTES = 256 << 20
"""Size of a dataset up to which it is permuted sample by sample: every process can hold it whole."""

Ints = NDArray[np.int64]
_Words = NDArray[np.uint64]


class Planned(NamedTuple):
    """The samples at some positions of a source; arrays of one length."""

    shard: Ints
    sample_index: Ints
    """Number of the sample in its shard."""
    block: Ints
    """Start of its shuffle block in the shuffled chunks, which names the block within an epoch."""
    first: Ints
    """Sample index of the first sample of the shuffle block."""
    num_samples: Ints
    """Samples of the shuffle block: first ... first + num_samples."""
    num_done: Ints
    """Samples of the shuffle block at earlier positions."""
    num_in_run: Ints
    """Samples from `first` to the end of the chunk or the lane, side by side in the shard: what the lane reads next."""


def default_order(total_bytes: int, batch_size: int, seed: int, *, shuffle: bool = True) -> OrderSpec:
    """The order of one source, by the size of the data and of the batch.

    Up to 256 MiB a chunk is a sample, and there are 8 lanes for each sample of the batch; above, there are about 1,024 chunks,
    until they have 4 MiB: small datasets are mixed finely, large ones are read in large requests. A shuffle block is what keeps
    all open blocks within 1 GiB, and at least 128 KiB; there are 8 lanes for each sample of the batch if that leaves blocks of
    512 KiB, else 4.

    Args:
        total_bytes: bytes of all shards.
        batch_size: samples of a batch over all ranks.
        seed: seed of the order.
        shuffle: False for the order of the manifest.
    """
    per_sample = _LANES_PER_SAMPLE[0]
    if total_bytes <= SMALL_BYTES or not shuffle:
        block_bytes = chunk_bytes = 1 if shuffle else MIN_BLOCK_BYTES
    else:
        if per_sample * batch_size * _GOOD_BLOCK_BYTES > OPEN_BYTES:
            per_sample = _LANES_PER_SAMPLE[1]
        chunk_bytes = min(max(total_bytes // _NUM_CHUNKS, MIN_BLOCK_BYTES), MAX_CHUNK_BYTES)
        block_bytes = min(max(OPEN_BYTES // (per_sample * batch_size), MIN_BLOCK_BYTES), chunk_bytes)
    return OrderSpec(
        seed=seed,
        batch_size=batch_size,
        lanes_per_sample=per_sample,
        block_bytes=block_bytes,
        chunk_bytes=chunk_bytes,
        shuffle=shuffle,
    )


def block_samples(samples: Ints, num_bytes: Ints, group_samples: Ints | int, spec: OrderSpec) -> Ints:
    """(S,) samples of a shuffle block, of shards with so many samples and bytes: whole groups; one sample if it has a byte."""
    group = np.asarray(group_samples if spec.block_bytes > 1 else 1, np.int64)
    sizes: Ints = np.maximum(spec.block_bytes * samples // (np.maximum(num_bytes, 1) * group), 1) * group
    return sizes


def chunk_samples(samples: Ints, num_bytes: Ints, group_samples: Ints | int, spec: OrderSpec) -> Ints:
    """(S,) samples of a chunk, of shards with so many samples and bytes: whole shuffle blocks."""
    block = block_samples(samples, num_bytes, group_samples, spec)
    sizes: Ints = block * np.maximum(spec.chunk_bytes * samples // (np.maximum(num_bytes, 1) * block), 1)
    return sizes


class SourcePlan:
    """The orders of all epochs of one source.

    Args:
        samples: (S,) samples of each shard.
        sizes: (S,) bytes of each shard.
        group_samples: samples of a group, of all shards or (S,) of each; see Manifest.
        spec: seed, lanes, sizes of chunks and shuffle blocks.
        max_samples: number of samples that are used, the same in every epoch: chunks chosen by the seed.
        repeat: passes over them in an epoch.

    Raises:
        UsageError: there are no samples, or max_samples is not in 1 ... their number.
    """

    def __init__(
        self,
        samples: Ints,
        sizes: Ints,
        group_samples: Ints | int,
        spec: OrderSpec,
        max_samples: int | None = None,
        repeat: int = 1,
    ) -> None:
        total = int(samples.sum())
        if not total:
            raise UsageError("the dataset has no samples: there is nothing to train on")
        if max_samples is not None and not 1 <= max_samples <= total:
            raise UsageError(f"max_samples={max_samples} is not in 1 ... {total}, the samples of the source")
        self.spec = spec
        used_samples = max_samples or total
        self.num_samples = used_samples * repeat
        self._block_samples = block_samples(samples, sizes, group_samples, spec)
        self._chunk_samples = chunk_samples(samples, sizes, group_samples, spec)
        counts = -(-samples // self._chunk_samples)
        if (needed := int(counts.sum()) * repeat) > _MAX_CHUNKS:
            raise UsageError(
                f"{total:,} samples, repeated {repeat:,} times, are {needed:,} chunks of {spec.chunk_bytes:,} bytes: a plan "
                f"holds {_MAX_CHUNKS:,} at most"
            )
        self._chunks_before = np.concatenate(([0], np.cumsum(counts)))
        num_chunks = int(self._chunks_before[-1])
        self._samples = samples
        self._chosen: tuple[Ints, Ints] | None = None
        """Chunks that max_samples leaves, and their sizes; None: all."""
        if used_samples < total:
            chunk_sizes = self._chunk_sizes()
            chosen = shuffled(num_chunks, spec.seed, 0, _SUBSET_STREAM)
            ends = np.cumsum(chunk_sizes[chosen])
            num_chosen = int(np.searchsorted(ends, used_samples)) + 1
            chunk_sizes[chosen[num_chosen - 1]] -= ends[num_chosen - 1] - used_samples
            chunks = np.sort(chosen[:num_chosen])
            self._chosen = chunks, chunk_sizes[chunks]
        self.num_chunks = repeat * (len(self._chosen[0]) if self._chosen else num_chunks)
        """Chunks of an epoch."""
        self._epochs: dict[int, tuple[NDArray[np.int32], Ints]] = {}

    def locate(self, epoch: int, positions: Ints) -> Planned:
        """The samples at these positions of an epoch.

        Args:
            epoch: from 0.
            positions: (K,) in 0 ... num_samples - 1, in any order.

        Returns:
            Arrays (K,).
        """
        chunks, starts = self._shuffled_chunks(epoch)
        lane, cursor = positions % self.spec.lanes, positions // self.spec.lanes
        lane_start, lane_end = self._lane_bounds(lane)
        ordinal = lane_start + cursor  # number of the sample in the shuffled chunks, as the starts of chunks and blocks
        number = ordinal if len(chunks) == self.num_samples else np.searchsorted(starts, ordinal, "right") - 1
        chunk, start, end = chunks[number], starts[number], starts[number + 1]
        shard = np.searchsorted(self._chunks_before, chunk, "right") - 1
        block, num_samples, end = self._block(shard, ordinal, start, end, lane_start, lane_end)
        first = (chunk - self._chunks_before[shard]) * self._chunk_samples[shard] + block - start
        num_done = ordinal - block
        inside = self._permuted(epoch, num_done, num_samples, block)
        return Planned(shard, first + inside, block, first, num_samples, num_done, end - block)

    def positions_of(self, epoch: int, shard: Ints, sample_index: Ints) -> tuple[Ints, Ints]:
        """Where samples stand in an epoch: the inverse of `locate`.

        Args:
            epoch: from 0.
            shard, sample_index: (K,) of each sample.

        Returns:
            Number of the sample among the K, and a position; (M,) each. One that is not used has none, a repeated one several.
        """
        chunks, starts = self._shuffled_chunks(epoch)
        wanted = self._chunks_before[shard] + sample_index // self._chunk_samples[shard]
        numbers = np.flatnonzero(np.isin(chunks, wanted))
        ascending = numbers[np.argsort(chunks[numbers], kind="stable")]
        low, high = (np.searchsorted(chunks[ascending], wanted, side) for side in ("left", "right"))  # several, where repeated
        which = np.repeat(np.arange(len(wanted)), high - low)
        number = ascending[np.arange(len(which)) + np.repeat(low - np.cumsum(high - low) + high - low, high - low)]
        shard, start, end = shard[which], starts[number], starts[number + 1]
        place = start + sample_index[which] % self._chunk_samples[shard]
        used = place < end  # of a chunk that max_samples cuts off
        which, shard, start, end, place = (column[used] for column in (which, shard, start, end, place))
        lane = self._lane_at(place)
        lane_start, lane_end = self._lane_bounds(lane)
        block, num_samples, _ = self._block(shard, place, start, end, lane_start, lane_end)
        ordinal = block + self._permuted(epoch, place - block, num_samples, block, back=True)
        return which, (ordinal - lane_start) * self.spec.lanes + lane

    def _block(
        self, shard: Ints, ordinal: Ints, start: Ints, end: Ints, lane_start: Ints, lane_end: Ints
    ) -> tuple[Ints, Ints, Ints]:
        """Start and size of the shuffle block of each sample of a chunk and a lane, and where the first of these two ends."""
        block_size = self._block_samples[shard]
        whole_block = start + (ordinal - start) // block_size * block_size
        block, end = np.maximum(whole_block, lane_start), np.minimum(end, lane_end)
        return block, np.minimum(whole_block + block_size, end) - block, end

    def _permuted(self, epoch: int, inside: Ints, num_samples: Ints, block: Ints, *, back: bool = False) -> Ints:
        """The place in its shuffle block that each gets, or, `back`, that it had."""
        if not self.spec.shuffle or num_samples.max(initial=1) <= 1:
            return inside
        return _permuted(inside, num_samples, _key(self.spec.seed, epoch), block, back=back)

    def _lane_bounds(self, lane: Ints) -> tuple[Ints, Ints]:
        """Number of the first sample of each lane in the shuffled chunks, and the one after its last."""
        short, num_longer = divmod(self.num_samples, self.spec.lanes)
        start = self._lane_start(lane, short, num_longer)
        return start, start + short + (lane < num_longer)

    def _lane_at(self, ordinal: Ints) -> Ints:
        """The lane that reads each sample of the shuffled chunks."""
        places, batches = (self.spec.batch_size, self.spec.lanes_per_sample) if self.spec.shuffle else (1, 1)
        low, high = np.zeros_like(ordinal), np.full_like(ordinal, self.spec.lanes)
        while (high - low > 1).any():  # the last stretch that begins no later
            middle = (low + high) // 2
            begins = self._lane_bounds(middle // batches + middle % batches * places)[0] <= ordinal
            low, high = np.where(begins, middle, low), np.where(begins, high, middle)
        lane: Ints = low // batches + low % batches * places
        return lane

    def _lane_start(self, lane: Ints, short: int, num_longer: int) -> Ints:
        """Number of the first sample of each lane in the shuffled chunks; the lanes before `num_longer` have short + 1 each."""
        place, batch = lane % self.spec.batch_size, lane // self.spec.batch_size
        batches, rest = divmod(num_longer, self.spec.batch_size)
        longer = batches * place + np.minimum(rest, place) + np.minimum(batch, batches + (place < rest))  # stretches before it
        start: Ints = (place * self.spec.lanes_per_sample + batch) * short + longer
        return start

    def _chunk_sizes(self) -> Ints:
        """Samples of each chunk of the shards: the last of a shard has what is left."""
        counts = np.diff(self._chunks_before)
        sizes = np.repeat(self._chunk_samples, counts)
        sizes[self._chunks_before[1:][counts > 0] - 1] = (self._samples - (counts - 1) * self._chunk_samples)[counts > 0]
        return sizes

    def _shuffled_chunks(self, epoch: int) -> tuple[NDArray[np.int32], Ints]:
        """(chunks in this epoch's order, number of samples before each, and at last of all)."""
        if epoch not in self._epochs:
            if len(self._epochs) > 1:  # the lanes of a mixture change epochs at slightly different steps
                del self._epochs[min(self._epochs)]
            chunks, sizes = self._chosen or (np.arange(self._chunks_before[-1]), self._chunk_sizes())
            order = shuffled(self.num_chunks, self.spec.seed, epoch) if self.spec.shuffle else np.arange(self.num_chunks)
            chunks, sizes = (column[order % len(chunks)] for column in (chunks, sizes))
            starts = np.zeros(len(sizes) + 1, np.int64)
            np.cumsum(sizes, out=starts[1:])
            self._epochs[epoch] = chunks.astype(np.int32), starts
        return self._epochs[epoch]


def shuffled(count: int, seed: int, epoch: int, domain: int = _EPOCH_STREAM) -> Ints:
    """A permutation of range(count), (count,): the order of as many 64-bit keys of Philox, keyed by (seed, epoch).

    Args:
        count: number of items, from 0.
        seed: 0 ... 2**64 - 1.
        epoch: 0 ... 2**64 - 1.
        domain: number that keeps permutations for different purposes apart.
    """
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


def _permuted(inside: Ints, num_samples: Ints, key: np.uint64, block: Ints, *, back: bool) -> Ints:
    """Where each sample goes in its shuffle block: for each (key, block) a permutation of range(num_samples), at `inside`; or,
    `back`, its inverse.

    A number is a pair (left, right) on a grid of at least num_samples cells, nearly square. Each round shifts one by a hash of
    the other, which can be undone, so the network permutes the grid; a cell beyond num_samples is sent through again.
    """
    keys = mix64(block.astype(np.uint64) * np.uint64(_GOLDEN) + key)
    count = num_samples.astype(np.uint64)
    height = np.ceil(np.sqrt(num_samples)).astype(np.uint64)
    width = (count + height - np.uint64(1)) // height
    out = inside.astype(np.uint64)
    todo: Any = slice(None)
    while True:
        rows, columns, mine = height[todo], width[todo], keys[todo]
        left, right = np.divmod(out[todo], columns)
        for number in reversed(range(_ROUNDS)) if back else range(_ROUNDS):
            salt = np.uint64((2 * number + 1) * _GOLDEN & _MASK)
            if back:
                right = (right + columns - (mix64(left + mine - salt) >> np.uint64(32)) % columns) % columns
                left = (left + rows - (mix64(right + mine + salt) >> np.uint64(32)) % rows) % rows
            else:
                left = (left + (mix64(right + mine + salt) >> np.uint64(32))) % rows
                right = (right + (mix64(left + mine - salt) >> np.uint64(32))) % columns
        out[todo] = left * columns + right
        outside = np.flatnonzero(out >= count)
        if not len(outside):
            return out.astype(np.int64)
        todo = outside
