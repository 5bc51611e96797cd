"""Samples that a run no longer hands over: a file of keys, which may grow at its end while the run trains.

    ids.txt -> read_mask -> Mask -> Decoder: another sample stands in for each;   -> Held -> state, receipt, audit

The source keeps its order, length and fingerprint. In the stead of an excluded sample comes the next one of its shard that is
not, round to its first; of a shard that has none left, one of the next shards in manifest order that has.
Cost: where keys ascend, as this project writes them, about 2 log2(N) small reads a key; one that is not found so takes a look at
the header of every sample, once for all of them.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain
from typing import Annotated, NamedTuple

import numpy as np
from numpy.typing import NDArray

from loaders.order.generations import Position
from loaders.order.plan import Ints
from wds_tools.dataset.samples import SampleReader
from wds_tools.errors import UsageError
from wds_tools.format.manifest import Manifest
from wds_tools.format.typed_json import Count
from wds_tools.sources.text.keys import OTHER, read_keys
from wds_tools.storage import Store

EXCLUDED = "excluded"
"""Reason of a Substitution."""
UNUSED = "unused"
"""How the reason begins where a transform made nothing of the sample."""
_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Substitution:
    """A sample that could not be read or is excluded, and the one that stood in for it."""

    source: Count
    """Number of the source."""
    shard: Count
    """Number of the shard in the source."""
    sample_index: Count
    """Number of the sample in the shard."""
    reason: str
    """excluded, crc32, json, format, why a sample makes no token row, or unused and the transform's reason."""
    substitute_shard: Count = 0
    """Number of the shard of its substitute: the same, but where that has none left that is not excluded."""
    substitute_index: Count = 0
    """Number of its substitute in that shard."""


class Held(NamedTuple):
    """A mask as states and receipts name it."""

    source: Annotated[int, range(1 << 20)]
    """Number of the source."""
    position: Position
    """Position of the stream from which it holds."""
    num_ids: Count
    """Number of its keys: the first ones of the file."""
    hash: str
    """Mask.hash of these."""


class Mask:
    """Keys of a source that are excluded, and where their samples lie.

    Args:
        ids: keys, each once.
        codes: (C,) shard << 32 | sample index of each sample of each key in turn.
        samples: (S,) samples of each shard.
        ends: (I,) how many codes are of each key and those before; None: one of each. Third-party tars may repeat a key.
    """

    def __init__(
        self, ids: Sequence[str] = (), codes: Ints | None = None, samples: Ints | None = None, ends: Ints | None = None
    ) -> None:
        self.ids = ids
        self._codes = np.zeros(0, np.int64) if codes is None else codes
        self._ends = np.concatenate([[0], np.arange(len(ids)) + 1 if ends is None else ends])
        self._rows = self.rows(len(ids))
        self._samples = np.zeros(0, np.int64) if samples is None else samples

    def first(self, num_ids: int) -> Mask:
        """It as it was before it grew."""
        ends = self._ends[: num_ids + 1]
        return Mask(self.ids[:num_ids], self._codes[: ends[-1]], self._samples, ends[1:])

    def rows(self, num_ids: int) -> Ints:
        """Ascending shard << 32 | sample index of the samples of the first keys."""
        return np.unique(self._codes[: self._ends[num_ids]])

    def hash(self, num_ids: int) -> str:
        """SHA-256 of the first keys, a line each."""
        return hashlib.sha256("".join(f"{key}\n" for key in self.ids[:num_ids]).encode()).hexdigest()

    def holds(self, shard: Ints, sample_index: Ints) -> NDArray[np.bool_]:
        """Whether these samples are excluded."""
        return np.isin((shard << 32) + sample_index, self._rows) if len(self._rows) else np.zeros(len(shard), bool)

    def after(self, shard: int, sample_index: int) -> Iterator[tuple[int, int]]:
        """Shard and sample index of the samples that may stand in for one: of the next shard that has any, its own at first."""
        for step in range(len(self._samples) + 1):
            number = (shard + step) % len(self._samples)
            low, high = np.searchsorted(self._rows, [number << 32, number + 1 << 32])
            allowed = np.delete(np.arange(self._samples[number]), self._rows[low:high] - (number << 32))
            begin = int(np.searchsorted(allowed, sample_index, "right")) if not step else 0
            found = [(number, index) for index in np.roll(allowed, -begin).tolist() if step or index != sample_index]
            if found:
                yield from found
                return

    def replaced_by(self, shard: int, sample_index: int) -> list[tuple[int, int]]:
        """Shard and sample index of the excluded samples that one stands in for."""
        shards = self._rows >> 32
        is_gone = np.bincount(shards, minlength=len(self._samples)) == self._samples
        rows = self._rows[(shards == shard) | is_gone[shards]].tolist()
        places = ((row >> 32, row & 0xFFFFFFFF) for row in rows)
        return [place for place in places if next(self.after(*place)) == (shard, sample_index)]


def held_masks(held: Sequence[Held], masks: Sequence[Mask | None], position: int) -> tuple[Held, ...]:
    """The masks of a run that goes on from a position, with those that are larger than what it held so far; None: as before.

    Raises:
        UsageError: one does not begin with the keys of the one before.
    """
    for number, mask in enumerate(masks):
        if mask is None:
            continue
        before = [each for each in held if each.source == number][-1:] or [Held(number, 0, 0, Mask().hash(0))]
        if mask.hash(before[0].num_ids) != before[0].hash or len(mask.ids) < before[0].num_ids:
            raise UsageError(
                f"the run has excluded {before[0].num_ids:,} keys of source {number} since position {before[0].position:,}, and "
                f"they are not the first of the {len(mask.ids):,} of its exclude=: a mask grows at its end; give the whole file"
            )
        if len(mask.ids) > before[0].num_ids:
            held = (*held, Held(number, position, len(mask.ids), mask.hash(len(mask.ids))))
    return tuple(held)


def read_mask(url: str, store: Store, manifest: Manifest, names: Collection[str]) -> Mask:
    """The mask of a source.

    Args:
        url: the file: a key a line; or `DATASET<tab>KEY`, of which those of other datasets are passed over.
        store, manifest: the source.
        names: what it is called as a DATASET.

    Raises:
        NotFound: there is no such file.
        UsageError: a line is no text, or all samples are excluded.
    """
    others: dict[str, None] = {}
    keys: dict[str, None] = {}
    for number, key in read_keys(url, list(names), "exclude="):
        (others if number == OTHER else keys)[key] = None
    if others and not keys:
        what = f"{url} excludes nothing of {store.url}: all its lines are of other datasets, such as {min(others)}"
        warnings.warn(what, stacklevel=2)
    elif misspelt := [other for other in others if get_close_matches(other, names, 1, 0.8)]:
        what = f"{url}: lines of {', '.join(misspelt[:_SHOWN])} are passed over, which is much like {store.url}: a misspelling?"
        warnings.warn(what, stacklevel=2)
    ids = list(keys)
    found = _find(store, manifest, ids)
    if missing := [key for key in ids if key not in found]:
        listing = f"{', '.join(missing[:_SHOWN])}{', ...' if len(missing) > _SHOWN else ''}"
        warnings.warn(f"{len(missing):,} of {len(ids):,} keys of {url} are not in {store.url}: {listing}", stacklevel=2)
    samples = manifest.shards.num_samples
    rows = [found.get(key, []) for key in ids]
    mask = Mask(ids, np.array(list(chain(*rows)), np.int64), samples, np.cumsum(list(map(len, rows)), dtype=np.int64))
    if len(mask.rows(len(ids))) == manifest.samples:
        raise UsageError(f"{url} excludes all {manifest.samples:,} samples of {store.url}: leave the source out")
    return mask


def _find(store: Store, manifest: Manifest, ids: Sequence[str]) -> dict[str, list[int]]:
    """Key -> shard << 32 | sample index of each of its samples, of those that the dataset has."""
    reader = SampleReader(store, manifest)
    try:
        is_few = len(ids) * 2 * manifest.samples.bit_length() < manifest.samples
        found = find_quickly(reader, ids) if is_few else {}
        return found | find_in_headers(reader, set(ids) - found.keys())
    finally:
        reader.close()


def find_quickly(reader: SampleReader, keys: Iterable[str]) -> dict[str, list[int]]:
    """Key -> [shard << 32 | sample index], of those that are found by bisection: all where keys ascend."""
    numbers = {} if reader.manifest.is_indexed else {key: reader.number_of(key) for key in keys}
    located = {key: reader.locate(number) for key, number in numbers.items() if number is not None}
    return {key: [(shard << 32) + sample_index] for key, (shard, sample_index) in located.items()}


def find_in_headers(reader: SampleReader, keys: Collection[str]) -> dict[str, list[int]]:
    """Key -> shard << 32 | sample index of each of its samples, by a look at the header of every sample."""
    found: dict[str, list[int]] = {}
    for shard in range(len(reader.manifest.shards)) if keys else ():
        for piece in reader.scan(shard, 0, lambda _: False):
            for sample in piece:
                if (key := sample.key) in keys:
                    found.setdefault(key, []).append((shard << 32) + sample.sample_index)
    return found
