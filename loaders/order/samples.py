"""The whole order of a run: sources opened, their plans, and the mixture over them.

    config + manifests -> SampleOrder;   SampleOrder.locate(epoch, positions) -> source, shard, row of each

Sources without weights are one pool: their shards form one tape, so an epoch has every sample exactly `repeat` times. Sources
with weights have a plan each, and a Mixture draws from them. An epoch of the stream is `length` positions; the next one goes
on where it ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from loaders.config import LoaderConfig, Source
from loaders.order.mix import Mixture
from loaders.order.plan import Ints, OrderSpec, Rows, SourcePlan, default_order
from wds_tools.dataset.layout import MANIFEST
from wds_tools.errors import NotFound, UsageError
from wds_tools.format.manifest import Manifest, parse_manifest
from wds_tools.format.schema import ANY_MEMBERS
from wds_tools.storage import Store, open_store

_PIECE_BITS = 40
_MOST_SHARDS = 1 << 24
_KIND_BITS = 23
"""With the bits of a piece they fill a positive int64. Sources x epochs go round in them: pieces that are in use at one time
lie a few epochs apart."""


@dataclass(frozen=True)
class OpenSource:
    """A source whose manifest was read. What was once counted over its shards, reading processes inherit."""

    source: Source
    store: Store
    manifest: Manifest

    @property
    def name(self) -> str:
        """What `__source__` says."""
        return self.source.name or self.store.url

    @cached_property
    def samples(self) -> Ints:
        """(S,) samples of each shard."""
        return np.array([row.samples for row in self.manifest.shards], np.int64)

    @cached_property
    def sizes(self) -> Ints:
        """(S,) bytes of each shard."""
        return np.array([row.bytes for row in self.manifest.shards], np.int64)

    @property
    def has_schema(self) -> bool:
        """False for indexed tars of any members."""
        return self.manifest.schema_version != ANY_MEMBERS

    @property
    def max_samples(self) -> int | None:
        """How many of its samples are used, if not all."""
        if self.source.fraction is not None:
            return max(1, round(self.source.fraction * self.manifest.samples))
        return self.source.max_samples


class Located(NamedTuple):
    """Where positions of the stream lead; arrays of one length. See plan.Rows for the rest."""

    source: Ints
    shard: Ints
    row: Ints
    key: Ints
    """Names the piece over all sources and epochs."""
    first: Ints
    num_rows: Ints
    done: Ints
    run: Ints


def open_source(source: Source) -> OpenSource:
    """Read a source's manifest.

    Raises:
        NotFound: there is none: `wds-tools index` makes one for third-party tars.
        FormatError: it is damaged.
    """
    store = open_store(source.url)
    try:
        data = store.read(MANIFEST)
    except NotFound as error:
        raise NotFound(
            f"{store.url} has no {MANIFEST}: not a dataset, or one that is not finished; "
            "for WebDataset tars made elsewhere, `wds-tools index` makes it"
        ) from error
    return OpenSource(source, store, parse_manifest(data, f"{store.url}/{MANIFEST}"))


class SampleOrder:
    """What a run reads, as a function of position.

    Args:
        sources: the opened sources of the config.
        config: weights, length, seed, shuffle, lanes.
        order: of a saved run, kept when it goes on with another batch size; None for a new one.
        step_samples: samples of a step in the schedule: the run's first batch size.
    """

    def __init__(
        self, sources: Sequence[OpenSource], config: LoaderConfig, spec: OrderSpec | None = None, step_samples: int | None = None
    ) -> None:
        self.sources = tuple(sources)
        self.fingerprints = tuple(opened.manifest.fingerprint() for opened in sources)
        self.step_samples = step_samples or config.batch_size
        if spec is None:
            total = sum(opened.manifest.bytes * opened.source.repeat for opened in sources)
            spec = default_order(total, config.batch_size, config.seed, lanes=config.lanes, shuffle=config.shuffle)
        self.spec = spec
        weighted = config.sources[0].weight is not None
        groups = [[number] for number in range(len(sources))] if weighted else [list(range(len(sources)))]
        self._groups = [self._group(members, repeat=not weighted) for members in groups]
        plans = [group.plan for group in self._groups]
        weights = [tuple(float(source.weight or 0) for source in config.sources)] if weighted else [(1.0,)]
        schedule = [(0, weights[0]), *((step * self.step_samples, changed) for step, changed in config.schedule)]
        self._mixture = Mixture([plan.num_samples for plan in plans], spec.lanes, schedule)
        self.length = self._length(config) if weighted else plans[0].num_samples
        self._recipe: dict[str, Any] = {
            "weights": [list(changed) for _, changed in schedule] if weighted else None,
            "from_positions": [start for start, _ in schedule],
            "length": self.length,
            "repeat": [opened.source.repeat for opened in sources],
            "max_samples": [opened.max_samples for opened in sources],
        }
        if any(opened.source.codes for opened in sources):
            self._recipe["codes"] = [opened.source.codes for opened in sources]

    @property
    def recipe(self) -> Mapping[str, Any]:
        """What the order depends on beside `order` and the data, as plain JSON values."""
        return self._recipe

    @property
    def total_bytes(self) -> int:
        """Bytes of all sources' shards."""
        return sum(opened.manifest.bytes for opened in self.sources)

    def rare(self) -> Iterator[str]:
        """A sentence about each source that is absent for long."""
        for number, opened in enumerate(self.sources if self.recipe["weights"] else ()):
            if absence := self._mixture.absence(number):
                lanes = self.spec.lanes
                yield (
                    f"source {opened.name} is so rare that none of it comes for up to {absence:,} samples, then {lanes:,} of it "
                    f"within {lanes * lanes:,}: all lanes are at nearly the same place of the mixture. A weight of 1 in "
                    f"{lanes:,} or more, or fewer lanes (lanes=...), brings it sooner; see docs/order.md"
                )

    def locate(self, epoch: int, positions: Ints) -> Located:
        """Where these positions of an epoch of the stream lead; beyond `length` lies the next epoch.

        Args:
            epoch: from 0.
            positions: (K,) from 0, in any order.
        """
        draws = self._mixture.locate(epoch * self.length + positions)
        place = draws.source + len(self._groups) * draws.epoch
        kinds = np.unique(place)
        if len(kinds) == 1:
            return self._rows(int(kinds[0]), draws.position)
        out = [np.empty_like(positions) for _ in Located._fields]
        for kind in kinds.tolist():
            here = np.flatnonzero(place == kind)
            for column, values in zip(out, self._rows(kind, draws.position[here]), strict=True):
                column[here] = values
        return Located(*out)

    def source_epochs(self, epoch: int, positions: Ints) -> Ints:
        """Which epoch of its source each of these positions is in; see `locate`."""
        return self._mixture.locate(epoch * self.length + positions).epoch

    def _rows(self, kind: int, positions: Ints) -> Located:
        epoch, number = divmod(kind, len(self._groups))
        group = self._groups[number]
        rows: Rows = group.plan.locate(epoch, positions)
        key = rows.piece + (kind % (1 << _KIND_BITS) << _PIECE_BITS)
        return Located(
            group.source[rows.shard],
            group.shard[rows.shard],
            rows.row,
            key,
            rows.first,
            rows.num_rows,
            rows.done,
            rows.run,
        )

    def _group(self, members: Sequence[int], *, repeat: bool) -> _Group:
        repeats = [self.sources[number].source.repeat if repeat else 1 for number in members]
        num_shards = sum(len(self.sources[one].manifest.shards) * times for one, times in zip(members, repeats, strict=True))
        if len(members) > 1 and num_shards > _MOST_SHARDS:
            raise UsageError(f"the sources, each repeated, have {num_shards:,} shards: at most {_MOST_SHARDS:,} can be planned")
        sources, by_plan = list(members), 1
        if len(members) == 1:
            (by_plan,) = repeats  # behind its choice of max_samples
        else:
            sources = np.repeat(members, repeats).tolist()
        counts = [len(self.sources[number].manifest.shards) for number in sources]
        limited = [self.sources[number] for number in members if self.sources[number].max_samples is not None]
        if limited and len(members) > 1:
            raise UsageError(
                f"source {limited[0].store.url}: max_samples and share are for one source, or for sources with weights: "
                "give every source a weight"
            )
        try:
            plan = SourcePlan(
                np.concatenate([self.sources[number].samples for number in sources]),
                np.concatenate([self.sources[number].sizes for number in sources]),
                self.spec,
                limited[0].max_samples if limited else None,
                repeat=by_plan,
            )
        except UsageError as error:
            raise UsageError(f"{', '.join(self.sources[number].store.url for number in members)}: {error}") from error
        return _Group(plan, np.repeat(sources, counts), np.concatenate([np.arange(count) for count in counts]))

    def _length(self, config: LoaderConfig) -> int:
        if not isinstance(config.length, str):
            return config.length
        ends = [
            self._mixture.seen_once(number, opened.source.repeat)
            for number, opened in enumerate(self.sources)
            if opened.source.weight or any(weights[number] for _, weights in config.schedule)
        ]
        return min(ends) if config.length == "first" else max(ends)


class _Group(NamedTuple):
    """Sources that share a plan."""

    plan: SourcePlan
    source: NDArray[np.int64]
    """(S,) source of each of the plan's shards."""
    shard: NDArray[np.int64]
    """(S,) its number in that source."""
