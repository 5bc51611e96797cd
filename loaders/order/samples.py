"""The whole order of a run: sources opened, their plans, and the mixture over them.

    config + manifests -> order_spec -> OrderSpec;   OrderSpec + manifests -> SampleOrder
    SampleOrder.locate(epoch, positions) -> source, shard and sample index of each;   SampleOrder.positions_of: the inverse

Sources without weights are one pool: the chunks of all are shuffled together, so an epoch has every sample exactly `repeat`
times. Sources with weights have a plan each, and a Mixture draws from them. An epoch is `length` positions; the next one goes
on where it ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loaders.config import LoaderConfig, Source
from loaders.order.generations import Generation, Origin, epochs_of, first_generation, schedule_of
from loaders.order.group import Group, plan_group
from loaders.order.mask import Mask, read_mask
from loaders.order.mix import Mixture
from loaders.order.plan import Ints, default_order
from loaders.order.shares import mean_tokens_of
from loaders.order.spec import OrderSpec, SourceSpec
from wds_tools.dataset.reader import read_manifest
from wds_tools.errors import UsageError
from wds_tools.format.manifest import Manifest
from wds_tools.format.schema import ANY_MEMBERS
from wds_tools.format.shards import Shards
from wds_tools.sequences.choices import Weights, text_weights
from wds_tools.storage import Store, open_store

_BLOCK_BITS = 40
_PLAN_EPOCH_BITS = 23
"""Bits that name a plan and its epoch; with those of a shuffle block they fill a positive int64. They wrap around: blocks in
use at one time lie a few epochs apart."""


@dataclass(frozen=True)
class OpenSource:
    """A source whose manifest was read. Reading processes inherit what was counted over its shards."""

    source: Source
    store: Store
    manifest: Manifest
    removed: Origin | None = None
    """Of a source that the run went on without: what it was. Its manifest is empty."""

    @property
    def part(self) -> SourceSpec:
        """What it is in the order."""
        source = self.source
        return SourceSpec(repeat=source.repeat, max_samples=self.max_samples, code_set=source.code_set, texts=self.texts)

    @cached_property
    def origin(self) -> Origin:
        """What states and receipts say of it."""
        manifest, url = self.manifest, self.store.url
        return self.removed or Origin(
            url=url,
            fingerprint=manifest.fingerprint(),
            num_samples=manifest.samples,
            num_shards=len(manifest.shards),
            name=self.source.name,
        )

    def first(self, num_shards: int) -> OpenSource:
        """It with the first of its shards only, as it was before it grew."""
        is_whole = num_shards >= len(self.shards)
        return self if is_whole else replace(self, manifest=replace(self.manifest, shards=self.shards[:num_shards]))

    @property
    def shards(self) -> Shards:
        """Those of the manifest."""
        return self.manifest.shards

    @property
    def name(self) -> str:
        """Value of `__source__` in batches."""
        return self.source.name or self.store.url

    @cached_property
    def texts(self) -> Weights:
        """Which of several texts are used, and how often."""
        return text_weights(self.name, self.source.texts or {})

    @cached_property
    def mask(self) -> Mask:
        """Its samples that are not handed over. Read in the main process, from which reading processes have it."""
        source, names = self.source, {self.name, self.source.url, self.store.url}
        return read_mask(source.exclude, self.store, self.manifest, names) if source.exclude else Mask()

    @property
    def has_schema(self) -> bool:
        """False for indexed tars of any members."""
        return self.manifest.schema_version != ANY_MEMBERS

    @property
    def max_samples(self) -> int | None:
        """Number of its samples that are used; None for all."""
        if self.source.fraction is not None:
            return max(1, round(self.source.fraction * self.manifest.samples))
        return self.source.max_samples


class Located(NamedTuple):
    """The samples at some positions of the order; arrays of one length. See plan.Planned for the rest."""

    source: Ints
    shard: Ints
    sample_index: Ints
    key: Ints
    """Names the shuffle block over all sources and epochs."""
    first: Ints
    num_samples: Ints
    num_done: Ints
    num_in_run: Ints


def open_source(source: Source) -> OpenSource:
    """Read a source's manifest.

    Args:
        source: the dataset, and how it is used.

    Raises:
        NotFound: there is no manifest; says what makes one of what is there.
        FormatError: it is damaged.
    """
    store = open_store(source.url)
    return OpenSource(source, store, read_manifest(store, any_members=True))


def order_spec(
    sources: Sequence[OpenSource],
    config: LoaderConfig,
    saved: OrderSpec | None = None,
    counted: tuple[int, int, int] | None = None,
) -> OrderSpec:
    """What the order of a config depends on.

    Args:
        sources: the opened sources of the config.
        config: weights, schedule, stop_at, seed, shuffle, and the batch size of a run that begins.
        saved: spec of a run that goes on, whose first batch size, lanes, chunks and shuffle blocks are kept.
        counted: (position, step, samples of a step) from which steps of the schedule count; see Generation.

    Returns:
        The spec, whose length is the number of samples of an epoch.

    Raises:
        UsageError: the mixture never ends, or its weights can't be planned.
    """
    if saved is None:
        total_bytes = sum(opened.manifest.bytes * opened.source.repeat for opened in sources)
        spec = default_order(total_bytes, config.batch_size, config.seed, shuffle=config.shuffle)
    else:
        spec = replace(saved, seed=config.seed, shuffle=config.shuffle)
    spec = replace(spec, transform_id=config.transform_id)
    counts = [min(opened.max_samples or opened.manifest.samples, opened.manifest.samples) for opened in sources]
    length = sum(count * opened.source.repeat for count, opened in zip(counts, sources, strict=True))
    mean_tokens = cache(lambda number: mean_tokens_of(sources[number], config))

    def in_samples(weights: Iterable[float]) -> tuple[float, ...]:
        return tuple(float(weight) and weight / mean_tokens(number) for number, weight in enumerate(weights))

    weights = in_samples(source.weight for source in config.sources if source.weight is not None)
    steps = [(at, in_samples(changed)) for at, changed in config.schedule]
    position, begun, step_samples = counted or (0, 0, spec.batch_size)
    held = [changed for at, changed in steps if at <= begun]
    changes = [(position + (at - begun) * step_samples, changed) for at, changed in steps if at > begun]
    schedule = ((0, held[-1] if held else weights), *changes) if weights else ()
    if isinstance(config.stop_at, int):
        length = config.stop_at
    elif schedule:
        mixture = Mixture(counts, spec.lanes, ((0, weights), *((at * spec.batch_size, changed) for at, changed in steps)))
        are_drawn = [any(column) for column in zip(*(drawn for _, drawn in schedule), strict=True)]
        length = _end_of(mixture, sources, are_drawn, config)
    return replace(spec, sources=tuple(opened.part for opened in sources), schedule=schedule, length=length)


def _end_of(mixture: Mixture, sources: Sequence[OpenSource], are_drawn: Sequence[bool], config: LoaderConfig) -> int:
    """Where an epoch of a mixture ends. Raises UsageError: a source that decides on it is never seen in full."""
    ends = []
    for number, opened in enumerate(sources):
        try:
            ends += [mixture.exhausted_at(number, opened.source.repeat)] if are_drawn[number] else []
        except UsageError as error:
            if config.stop_at != "first_exhausted":
                raise UsageError(f"{error}: stop_at=NUMBER ends the epoch after so many samples") from error
    if not ends:
        raise UsageError("no source is ever seen in full: stop_at=NUMBER ends the epoch after so many samples")
    return min(ends) if config.stop_at == "first_exhausted" else max(ends)


class SampleOrder:
    """Which sample stands at which position of a run.

    Twelve samples in shards of 5, 5 and 2, without shuffling and shuffled in 2 lanes:

    >>> from loaders.cost.simulate import imagined_source
    >>> source = imagined_source(samples=12, sample_bytes=1000, shard_samples=5)
    >>> spec = order_spec([source], LoaderConfig(sources=(source.source,), batch_size=4, shuffle=False))
    >>> located = SampleOrder([source], spec).locate(0, np.arange(3, 8))
    >>> list(zip(located.shard.tolist(), located.sample_index.tolist()))
    [(0, 3), (0, 4), (1, 0), (1, 1), (1, 2)]
    >>> spec = OrderSpec(seed=42, batch_size=2, lanes_per_sample=1, block_bytes=2000, chunk_bytes=4000, length=12)
    >>> located = SampleOrder([source], spec).locate(epoch=0, positions=np.arange(12))
    >>> [f"{shard}:{index}" for shard, index in zip(located.shard.tolist(), located.sample_index.tolist())]
    ['1:3', '0:4', '1:0', '0:2', '1:1', '0:1', '1:2', '0:3', '1:4', '2:1', '0:0', '2:0']

    Args:
        sources: the opened sources.
        spec: what the order depends on beside them, from the last change on.
        generations: all of a run that changed, up to that of `spec`.

    Raises:
        UsageError: the spec does not fit the sources.
    """

    def __init__(self, sources: Sequence[OpenSource], spec: OrderSpec, generations: Sequence[Generation] = ()) -> None:
        if len(sources) != len(spec.sources):
            raise UsageError(f"{len(sources)} sources, but an order of {len(spec.sources)}")
        self.sources = tuple(sources)
        self.spec = spec
        self.generations = tuple(generations) or (first_generation(spec, [opened.origin for opened in sources]),)
        self.epochs = epochs_of(self.generations)
        self._earlier: dict[int, SampleOrder] = {}
        schedule = schedule_of(self.generations)
        numbers = range(len(sources))
        first_seen = (next(each for each in self.generations if number < len(each.sources)) for number in numbers)
        self.fingerprints = tuple(each.sources[number].fingerprint for number, each in enumerate(first_seen))
        """Of each source, as it was when the run first had it."""
        is_drawn = [any(weights[number] for _, weights in schedule) for number in numbers]
        stages = (
            [self._stages([number]) if is_drawn[number] else [] for number in numbers] if schedule else [self._stages(numbers)]
        )
        sizes = [stage[0][1].plan.num_samples if stage else 0 for stage in stages]
        self._mixture = Mixture(sizes, spec.lanes, schedule or ((0, (1.0,)),))
        self._groups: list[list[tuple[int, Group]]] = []
        """Of each plan: (epoch from which it holds, its shards)."""
        for number, stage in enumerate(stages):
            groups = [(0, group) for _, group in stage[:1]]
            for position, group in stage[1:]:
                first = self._mixture.grow(number, position, group.plan.num_samples)
                groups = [*(earlier for earlier in groups if earlier[0] < first), (first, group)]
            self._groups.append(groups)
        for first, group in [] if schedule else self._groups[0]:
            if self.epochs.length(first) != group.plan.num_samples:
                raise UsageError(
                    f"an epoch of {self.epochs.length(first)} samples, but the sources have {group.plan.num_samples}"
                )

    def before(self, num_generations: int) -> SampleOrder:
        """The order as it was until its later changes: what filled up the last batch before one may be another since."""
        if num_generations == len(self.generations):
            return self
        if num_generations not in self._earlier:
            generations = self.generations[:num_generations]
            sources = self.sources[: len(generations[-1].sources)]
            self._earlier[num_generations] = SampleOrder(sources, generations[-1].spec, generations)
        return self._earlier[num_generations]

    @property
    def length(self) -> int:
        """Samples of an epoch that begins after the last change."""
        return self.spec.length

    @property
    def latest_epoch(self) -> int:
        """The first epoch that begins no earlier than the last change."""
        epoch, place = self.epochs.at(self.generations[-1].position)
        return epoch + (place > 0)

    @property
    def total_bytes(self) -> int:
        """Bytes of all sources' shards."""
        return sum(opened.manifest.bytes for opened in self.sources)

    @property
    def num_chunks(self) -> int:
        """Chunks of an epoch of every source that is drawn from."""
        return sum(group.plan.num_chunks for groups in self._groups for _, group in groups[-1:] if not group.sources[0].removed)

    @property
    def weights_error(self) -> float:
        """How far the share of a source is from its weight, at most, as a part of the weight."""
        return self._mixture.error

    def locate(self, epoch: int, positions: Ints) -> Located:
        """The samples at these positions of an epoch; beyond `length` lies the next epoch.

        Args:
            epoch: from 0.
            positions: (K,) from 0, in any order.

        Returns:
            Arrays (K,).
        """
        draws = self._mixture.locate(self.epochs.start(epoch) + positions)
        plan_epochs = draws.source + len(self._groups) * draws.epoch
        distinct = np.unique(plan_epochs)
        if len(distinct) == 1:
            return self._locate(int(distinct[0]), draws.position)
        out = [np.empty_like(positions) for _ in Located._fields]
        for plan_epoch in distinct.tolist():
            chosen = np.flatnonzero(plan_epochs == plan_epoch)
            for column, values in zip(out, self._locate(plan_epoch, draws.position[chosen]), strict=True):
                column[chosen] = values
        return Located(*out)

    def positions_of(self, source: Ints, shard: Ints, sample_index: Ints, low: int, high: int) -> tuple[Ints, Ints]:
        """Where samples stand in a part of the stream: the inverse of `locate`.

        Args:
            source, shard, sample_index: (K,) of each sample.
            low, high: positions of the stream, through all epochs.

        Returns:
            Number of the sample among the K, and a position in low ... high - 1; (M,) each, by position.
        """
        found = [np.zeros((2, 0), np.int64)]
        for number in range(len(self._groups)):
            members = np.flatnonzero(source == number) if self.spec.schedule else np.arange(len(source))
            for epoch in self._mixture.epochs_between(number, low, high) if len(members) and self._groups[number] else ():
                group = self._group_of(number, epoch)
                shards = [np.flatnonzero((group.source == source[each]) & (group.shard == shard[each])) for each in members]
                sample = np.repeat(members, list(map(len, shards)))  # without weights, a source that is repeated has several
                which, places = group.plan.positions_of(epoch, np.concatenate(shards), sample_index[sample])
                positions = self._mixture.positions_of(number, epoch, places, high)
                is_inside = (low <= positions) & (positions < high)
                found.append(np.stack([sample[which[is_inside]], positions[is_inside]]))
        which, positions = np.concatenate(found, axis=1)
        ascending = np.argsort(positions, kind="stable")
        return which[ascending], positions[ascending]

    def source_epochs(self, epoch: int, positions: Ints) -> Ints:
        """Which epoch of its source each of these positions is in; see `locate`."""
        return self._mixture.locate(self.epochs.start(epoch) + positions).epoch

    def is_excluded(self, located: Located) -> NDArray[np.bool_]:
        """Whether each of these samples is no longer handed over."""
        excluded = np.zeros(len(located.source), bool)
        for number, opened in enumerate(self.sources):
            if opened.mask.ids:
                excluded |= (located.source == number) & opened.mask.holds(located.shard, located.sample_index)
        return excluded

    def sources_in(self, number: int, epoch: int) -> Sequence[OpenSource]:
        """A source as it is in an epoch of its own; without weights, all sources in an epoch of the order."""
        return self._group_of(number, epoch).sources

    def _locate(self, plan_epoch: int, positions: Ints) -> Located:
        epoch, number = divmod(plan_epoch, len(self._groups))
        group = self._group_of(number, epoch)
        shard, sample_index, block, *rest = group.plan.locate(epoch, positions)
        key = block + (plan_epoch % (1 << _PLAN_EPOCH_BITS) << _BLOCK_BITS)
        return Located(group.source[shard], group.shard[shard], sample_index, key, *rest)

    def _group_of(self, number: int, epoch: int) -> Group:
        return next(group for first, group in reversed(self._groups[number]) if first <= epoch)

    def _stages(self, members: Sequence[int]) -> list[tuple[int, Group]]:
        """(position of the stream, what is planned together from then on), each time that these sources have other shards."""
        stages: list[tuple[int, Group]] = []
        before: list[int] = []
        for generation in self.generations:
            num_shards = [origin.num_shards for origin in generation.sources[members[0] : members[-1] + 1]]
            if num_shards and num_shards != before:
                opened = [self.sources[number].first(count) for number, count in zip(members, num_shards, strict=True)]
                stages.append((generation.position, plan_group(self.spec, members, opened)))
                before = num_shards
        return stages
