"""How well orders mix a dataset that is sorted by label: positions only, no data is written.

    an order of samples 0 ... N - 1 -> labels of its batches -> how far their counts are from what chance gives

Beside ours: a permutation, MosaicML Streaming's py1e and webdataset's shuffle buffer behind shuffled shards, each as its authors
describe it, written here in a few lines of numpy with their defaults. Samples of 4,100 bytes in shards of 10,000; 1,000 labels.
    variance     of a label's count in 1, 8 or 10 batches in a row, over that of as many independent draws, mean of all labels:
                 1 is chance, less is more even than chance
    correlation  of the label counts of batches k apart, k being the batches after which our lanes come again
    neighbours   samples between two that are neighbours in a shard, median
Usage: make bench-mixing (10 minutes on 2 cores); ARGS="--gigabytes 1.6 --batch-sizes 256" for less.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from loaders.config import LoaderConfig, Source
from loaders.cost.simulate import imagined_source
from loaders.order.samples import SampleOrder, order_spec

SAMPLE_BYTES, SHARD_SAMPLES, LABELS, SEED = 4100, 10_000, 1000, 42
WINDOW = 1 << 22
"""Samples that are looked at, from the middle of the order."""
Ints = NDArray[np.int64]


def middle(count: int) -> Ints:
    """The positions that are looked at of an epoch of so many."""
    low = max(count - WINDOW, 0) // 2
    return np.arange(low, min(low + WINDOW, count))


def ours(count: int, batch_size: int) -> Ints:
    """The samples of those positions in the order of build_loader."""
    sources = [imagined_source(count, SAMPLE_BYTES, SHARD_SAMPLES)]
    config = LoaderConfig(sources=(Source("imagined"),), batch_size=batch_size, seed=SEED)
    located = SampleOrder(sources, order_spec(sources, config)).locate(0, middle(count))
    return located.shard * SHARD_SAMPLES + located.sample_index


def lanes_per_sample(count: int, batch_size: int) -> int:
    """The k of build_loader."""
    sources = [imagined_source(count, SAMPLE_BYTES, SHARD_SAMPLES)]
    return order_spec(sources, LoaderConfig(sources=(Source("imagined"),), batch_size=batch_size)).lanes_per_sample


def permutation(count: int, batch_size: int) -> Ints:  # noqa: ARG001
    """Any order as likely as any other."""
    random = np.random.default_rng(SEED)
    return random.permutation(count)[middle(count)] if count < 1 << 26 else random.integers(0, count, WINDOW)


def py1e(count: int, batch_size: int) -> Ints:  # noqa: ARG001
    """Shuffled shards; each sample moves by up to half of (block - shard) at random, but no shard beyond an end; a block is
    4,000,000 samples, of each shard more or less by up to a quarter; one node."""
    random, shard_samples = np.random.default_rng(SEED), SHARD_SAMPLES
    shards = random.permutation(-(-count // shard_samples))
    sizes = np.minimum(count - shards * shard_samples, shard_samples)
    begins = np.cumsum(sizes) - sizes
    most = np.maximum(random.integers(3_000_000, 5_000_000, len(shards)) - sizes, 0) / 2
    low, high = begins - np.minimum(most, begins), begins + np.minimum(most, count - begins - sizes)
    inside = np.arange(count) - np.repeat(begins, sizes)
    places = random.uniform(np.repeat(low, sizes), np.repeat(high, sizes)) + inside
    return (np.repeat(shards * shard_samples, sizes) + inside)[np.argsort(places)][middle(count)]


def buffered(size: int) -> Callable[[int, int], Ints]:
    """Shuffled shards, then webdataset's .shuffle(size): a random one of the buffer leaves, the next sample takes its place."""

    def order(count: int, batch_size: int) -> Ints:  # noqa: ARG001
        random = np.random.default_rng(SEED)
        shards = random.permutation(-(-count // SHARD_SAMPLES))[: WINDOW // SHARD_SAMPLES]
        samples = (shards[:, None] * SHARD_SAMPLES + np.arange(SHARD_SAMPLES)).ravel()
        samples = samples[samples < count]
        leaving = random.integers(0, size, len(samples)).tolist()
        buffer, out = samples[:size].tolist(), []
        for at, sample in zip(leaving, samples[size:].tolist(), strict=False):
            out.append(buffer[at])
            buffer[at] = sample
        return np.array(out)

    return order


WAYS: dict[str, Callable[[int, int], Ints]] = {
    "permutation": permutation,
    "wds-tools": ours,
    "MosaicML py1e": py1e,
    "webdataset + 1,000": buffered(1000),
    "webdataset + 10,000": buffered(10_000),
}


def measure(samples: Ints, count: int, batch_size: int, apart: int) -> Iterator[str]:
    """Entropy, variances, correlation and neighbours of an order; see the module."""
    labels = samples * LABELS // count
    steps = len(samples) // batch_size
    step = np.arange(steps * batch_size) // batch_size
    counts = np.bincount(step * LABELS + labels[: len(step)], minlength=steps * LABELS).reshape(steps, LABELS)
    shares = np.where(counts, counts, 1) / batch_size
    yield f"{-(counts / batch_size * np.log2(shares)).sum(1).mean():.2f}"
    chance = 1 / LABELS * (1 - 1 / LABELS)
    for batches in (1, 8, 10):
        whole = steps // batches * batches
        sums = counts[:whole].reshape(-1, batches, LABELS).sum(1)
        size = batches * batch_size
        yield f"{((sums - size / LABELS) ** 2).mean() / (size * chance):.2f}"
    off = counts - batch_size / LABELS
    yield f"{(off[:-apart] * off[apart:]).mean() / (off**2).mean():.2f}"
    ascending = np.argsort(samples, kind="stable")
    beside = (np.diff(samples[ascending]) == 1) & (samples[ascending][1:] % SHARD_SAMPLES != 0)
    yield f"{np.median(np.abs(np.diff(ascending))[beside]):,.0f}"


def main() -> None:
    """Print a table for each size and batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1.6, 16, 66])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    args = parser.parse_args()
    print("| data | batch | order | entropy | variance: 1 batch | 8 | 10 | correlation k apart | neighbours |")
    print("|---|---|---|---|---|---|---|---|---|")
    for gigabytes in args.gigabytes:
        count = round(gigabytes * 1e9 / SAMPLE_BYTES)
        for batch_size in args.batch_sizes:
            apart = lanes_per_sample(count, batch_size)
            for way in args.ways:
                found = measure(WAYS[way](count, batch_size), count, batch_size, apart)
                print(f"| {gigabytes:g} GB | {batch_size:,} | {way} | {' | '.join(found)} |", flush=True)


if __name__ == "__main__":
    main()
