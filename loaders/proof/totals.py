"""The sums of sample hashes that epochs of sources come to, beside those of their manifests.

    positions of an epoch, each once, with their samples -> SourceTotals.add -> complete: (name, total, total by the manifest)

Invariant: a complete epoch of a source adds up to what its manifest does, whatever order it was in.
Cost: that of the hashes; of the manifest they are added up once for each source.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loaders.order.plan import Ints
from loaders.order.samples import OpenSource, SampleOrder
from loaders.proof.receipt import MODULUS, SampleHash, total_of

_WINDOW = 1 << 18


class SourceTotals:
    """Number and hashes of the samples that each epoch of each source has come to.

    Sources without weights are one, whose epochs are those of the order.
    """

    def __init__(self, order: SampleOrder, hashes: Sequence[SampleHash]) -> None:
        self._order = order
        self._hashes = hashes
        self._specs, self._is_mixture = order.spec.sources, bool(order.spec.schedule)
        self._sums: dict[tuple[int, int], tuple[int, int]] = {}
        """(source, epoch): number of samples, sum of their hashes."""

    def add(self, epoch: int, positions: Ints, source: Ints, shard: Ints, sample_index: Ints) -> None:
        """Positions of an epoch of the order, none of them twice, and the samples there."""
        if not self._is_mixture:
            self._add((0, epoch), len(source), total_of(self._hashes, source, shard, sample_index))
            return
        source_epochs = self._order.source_epochs(epoch, positions)
        for number, source_hash in enumerate(self._hashes):
            for source_epoch in np.unique(source_epochs[source == number]).tolist():
                chosen = (source == number) & (source_epochs == source_epoch)
                self._add((number, source_epoch), int(chosen.sum()), source_hash.total(shard[chosen], sample_index[chosen]))

    def _add(self, source_epoch: tuple[int, int], count: int, total: int) -> None:
        count_before, total_before = self._sums.get(source_epoch, (0, 0))
        self._sums[source_epoch] = count_before + count, (total_before + total) % MODULUS

    def complete(self) -> list[tuple[str, int, int]]:
        """(name, total, total by the manifest) of complete epochs of sources that are used in full."""
        complete = []
        totals: dict[tuple[int, int], int] = {}
        for (number, epoch), (count, total) in sorted(self._sums.items()):
            sources = self._order.sources_in(number, epoch)
            numbers = [number] if self._is_mixture else range(len(sources))
            times = [1 if self._is_mixture else self._specs[each].repeat for each in numbers]
            num_samples = sum(each * opened.manifest.samples for each, opened in zip(times, sources, strict=True))
            if count == num_samples and not any(self._specs[each].max_samples for each in numbers):
                keys = [(each, len(opened.shards)) for each, opened in zip(numbers, sources, strict=True)]
                missing = [(key, opened) for key, opened in zip(keys, sources, strict=True) if key not in totals]
                totals |= {key: self._total_of(key[0], opened) for key, opened in missing}
                expected = sum(each * totals[key] for each, key in zip(times, keys, strict=True))
                name = self._order.sources[number].name if self._is_mixture else "the order"
                complete.append((f"epoch {epoch} of {name}", total, expected % MODULUS))
        return complete

    def _total_of(self, number: int, opened: OpenSource) -> int:
        """The sum of the hashes of all samples of a source, by its manifest."""
        before = np.append(0, np.cumsum(opened.shards.num_samples))
        total = 0
        for begin in range(0, int(before[-1]), _WINDOW):
            samples = np.arange(begin, min(begin + _WINDOW, int(before[-1])))
            shard = np.searchsorted(before, samples, "right") - 1
            total += self._hashes[number].total(shard, samples - before[shard])
        return total
