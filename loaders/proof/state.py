"""Where a run stands, as a small JSON object that is the same on every rank, and how it goes on from there.

    SampleOrder, position -> state_to_json -> state;   state -> read_state -> resumed(config, sources, change) -> SampleOrder

It holds the position in the endless stream, and what the position means: the generations of the order that it counts in, with
the fingerprints of the data, and the masks. Data that was moved resumes. What changed is refused with what differs, or, where
the caller asks for it, holds from here on as a new generation. Nothing that concerns the past can change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from loaders.config import LastBatch, LoaderConfig, Source
from loaders.order.generations import (
    MAX_GENERATIONS,
    Generation,
    Origin,
    Position,
    generations_to_json,
    parse_generations,
    schedule_of,
)
from loaders.order.mask import Held
from loaders.order.samples import OpenSource, SampleOrder, order_spec
from loaders.order.spec import ORDER_VERSION, OrderSpec, SourceSpec
from wds_tools.errors import FormatError, UsageError, WdsToolsError
from wds_tools.format.manifest import Manifest
from wds_tools.format.shards import ShardInfo, Shards
from wds_tools.format.typed_json import shape
from wds_tools.storage import open_store

STATE_VERSION = 3
"""2: starts did not say ranks and last batch, and nothing could be skipped."""
_NO_STATE = "not the state of a loader"
_MAX_STARTS, _MAX_MASKS, _MAX_SKIPS = 1 << 16, 1 << 12, 1 << 10
_FUTURE = "; load_state_dict(state, change='future') has it hold from here on"
Change = Literal["future"] | None
_Some = Annotated[int, range(1, 1 << 40)]


class Start(NamedTuple):
    """Where a run began, went on, or went on behind what it skipped."""

    position: Position
    """Position of the stream."""
    step: Position
    """Batches handed over before."""
    batch_size: _Some
    """Samples of a batch over all ranks, from here on."""
    world_size: _Some
    """Number of ranks."""
    last_batch: LastBatch


@dataclass(frozen=True, kw_only=True)
class Versions:
    """Versions of a state or a receipt, which are read first."""

    version: int
    """Version of its form."""
    order_version: int
    """Version of the order in which its positions count."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What states and receipts share: where the run stands, how it came there, and what positions mean."""

    position: Position
    """Samples handed over over all ranks, through all epochs, those left out at their ends or skipped among them; rows, where
    they are packed on the fly."""
    step: Position
    """Batches handed over."""
    starts: tuple[Start, ...]
    """Where the run began and went on."""
    skips: tuple[tuple[Position, Position], ...]
    """(step, step) between which batches are left out, ascending. Those at or before the step of the last start are done."""
    masks: tuple[Held, ...]
    """What was excluded, in the order in which that began."""
    generations: tuple[Generation, ...] = ()
    """The order that positions count in."""


_Record = TypeVar("_Record", bound=Record)


@dataclass(frozen=True, kw_only=True)
class State(Record):
    """A state of this version."""

    epoch: Position | None = None
    """Of a ShardDataset: its epoch, at whose end a worker may stand while others have not done their part."""


def state_to_json(
    order: SampleOrder,
    position: int,
    step: int,
    starts: Sequence[Start],
    skips: Sequence[tuple[int, int]] = (),
    masks: Sequence[Held] = (),
) -> dict[str, Any]:
    """The state of a run, and the fields of a receipt that it shares; see Record."""
    return {
        "version": STATE_VERSION,
        "order_version": ORDER_VERSION,
        "generations": generations_to_json(order.generations),
        "masks": list(map(list, masks)),
        "position": position,
        "step": step,
        "starts": list(map(list, starts)),
        "skips": list(map(list, skips)),
    }


def read_record(
    kind: type[_Record], record: Mapping[str, Any], what: str, version: int, error: type[WdsToolsError] = FormatError
) -> _Record:
    """A record as anybody may have written it.

    Args:
        kind: State or Receipt.
        record: JSON values.
        what: how the message begins.
        version: of its form, that this release reads.
        error: what is raised where it is damaged.

    Raises:
        UsageError: it is of another version, or of an order that this release does not have.
    """
    versions = shape(Versions, record, what, error)
    if (versions.version, versions.order_version) != (version, ORDER_VERSION):
        raise UsageError(
            f"{what} of this release: version {versions.version}, order version {versions.order_version}; this release reads "
            f"{version} and {ORDER_VERSION}: the same positions would be other samples; use the release that wrote it"
        )
    fields = {name: value for name, value in record.items() if name != "generations"}
    read = replace(shape(kind, fields, what, error), generations=parse_generations(record, what, error))
    steps, positions = [start.step for start in read.starts], [start.position for start in read.starts]
    is_ascending = steps[:1] == [0] and steps == sorted(set(steps)) and positions == sorted(positions)
    if not is_ascending or len(steps) > _MAX_STARTS or read.step < steps[-1]:
        raise error(f"{what} (its {len(steps):,} starts are not 1 to {_MAX_STARTS:,} that ascend from step 0 to {read.step:,})")
    if len(read.masks) > _MAX_MASKS or len(read.skips) > _MAX_SKIPS:
        raise error(
            f"{what} (it has {len(read.masks):,} masks and {len(read.skips):,} skips, at most {_MAX_MASKS:,} and {_MAX_SKIPS:,} "
            "are read)"
        )
    return read


def read_state(state: Mapping[str, Any]) -> State:
    """A state as anybody may have written it.

    Raises:
        UsageError: it is damaged, or of another version.
    """
    return read_record(State, state, _NO_STATE, STATE_VERSION, UsageError)


def next_starts(saved: State, start: Start) -> tuple[Start, ...]:
    """The starts of a run that goes on from a state; one from which nothing was handed over is replaced."""
    starts = [earlier for earlier in saved.starts if earlier.step != start.step]
    if len(starts) >= _MAX_STARTS - 1:  # those that go on as before say nothing new
        skipped = {first for first, _ in saved.skips}
        pairs = zip((None, *starts), starts, strict=False)
        starts = [each for before, each in pairs if each.step in skipped or before is None or before[2:] != each[2:]]
    return (*starts, start)


def resumed(
    saved: State, config: LoaderConfig, opened: Sequence[OpenSource], change: Change = None, deepest: int | None = None
) -> SampleOrder:
    """The order of a run that goes on.

    Args:
        saved: where it stands.
        config: settings of the run that goes on.
        opened: sources of the config.
        change: "future": what is different holds from here on.
        deepest: with rows packed on the fly: cursor behind the last sample that any lane has read.

    Returns:
        The order, whose sources are those of all generations.

    Raises:
        UsageError: the data or the order is another one, or the change is not of the future; says what differs.
    """
    if change not in (None, "future"):
        raise UsageError(f"change={change!r} is not 'future' or None")
    last = saved.generations[-1]
    config, sources = _arranged(config, opened, last, change, is_packed=deepest is not None)
    origins = tuple(each.origin for each in sources)
    spec = _spec_of(sources, config, last)
    if spec == last.spec and [each.fingerprint for each in origins] == [each.fingerprint for each in last.sources]:
        generations = (*saved.generations[:-1], replace(last, sources=origins))
        return SampleOrder(sources, spec, generations)
    future = replace(spec, schedule=last.spec.schedule, length=last.spec.length, sources=spec.sources[: len(last.sources)])
    future = replace(future, transform_id=last.spec.transform_id)
    may_change = future == last.spec and bool(spec.schedule) == bool(last.spec.schedule)
    for name, before, now in last.spec.differences(spec if change is None else future):
        raise UsageError(
            f"the state was saved under another order: {name} was {before!r}, is {now!r}: keep the settings of the run, or "
            f"start a new one{_FUTURE if may_change else ''}"
        )
    if not may_change:
        raise UsageError("the state was saved without weights or with, the config is not: the order of the past would change")
    if len(saved.generations) == MAX_GENERATIONS:
        raise UsageError(f"the run has changed {MAX_GENERATIONS - 1} times: it can't change any more")
    position, step, samples = saved.position, saved.step, config.batch_size
    if deepest is not None:
        samples = last.step_samples
        ahead = -(-max(deepest * spec.lanes - last.position, 0) // samples)
        position, step = last.position + ahead * samples, last.step + ahead
    begun = replace(last, position=position, step=step, step_samples=samples)
    generation = replace(begun, spec=_spec_of(sources, config, begun), sources=origins)
    generations = (*saved.generations, generation)
    if deepest is not None:
        announced = (*saved.generations[:-1], replace(last, spec=spec, sources=origins))
        if _until(position, announced) != _until(position, generations):
            raise UsageError(
                f"rows are packed from what lanes have read ahead: the weights may change from step {step} on, as in "
                f"schedule=(({step}, weights), ...), with those of the run until then"
            )
    return SampleOrder(sources, generation.spec, generations)


def _until(position: int, generations: Sequence[Generation]) -> list[tuple[int, tuple[float, ...]]]:
    return [entry for entry in schedule_of(generations) if entry[0] < position]


def _spec_of(sources: Sequence[OpenSource], config: LoaderConfig, begun: Generation) -> OrderSpec:
    """The spec of a config with the lanes and steps of a generation; of a source that was removed, its old part."""
    spec = order_spec(sources, config, begun.spec, (begun.position, begun.step, begun.step_samples))
    parts = zip((*begun.spec.sources, *spec.sources[len(begun.spec.sources) :]), spec.sources, sources, strict=True)
    return replace(spec, sources=tuple(before if each.removed else part for before, part, each in parts))


def _is_meant(opened: OpenSource, origin: Origin, part: SourceSpec) -> bool:
    """Whether it is this source of the run by its name, or by where it lies and how it is used."""
    if opened.origin.fingerprint != origin.fingerprint or opened.origin.name != origin.name:
        return False
    return origin.name is not None or (opened.origin.url == origin.url and opened.part == part)


def _arranged(
    config: LoaderConfig, opened: Sequence[OpenSource], last: Generation, change: Change, *, is_packed: bool
) -> tuple[LoaderConfig, list[OpenSource]]:
    """The config and its sources in the order of a run's, then those that were added; stand-ins for those removed.

    Raises:
        UsageError: the data is not that of the run, nor may it change so.
    """
    left = dict(enumerate(opened))
    columns: list[int | None] = []
    meant: dict[int, int] = {}  # where several have the same data
    for place, pair in enumerate(zip(last.sources, last.spec.sources, strict=True)):
        if (number := next((number for number in left if _is_meant(left[number], *pair)), None)) is not None:
            meant[place] = number
            left.pop(number)
    for place, (origin, part) in enumerate(zip(last.sources, last.spec.sources, strict=True)):
        if place in meant:
            columns.append(meant[place])
            continue
        same = [number for number, each in left.items() if each.origin.fingerprint == origin.fingerprint]
        same += [number for number, each in left.items() if change and _has_grown(each, origin)]
        if same and left[same[0]].origin.fingerprint != origin.fingerprint and part.max_samples is not None:
            raise UsageError(
                f"{origin.url} has grown, but only {part.max_samples} of its samples are used: another choice of them"
            )
        columns.append(same[0] if same else None)
        left.pop(columns[-1], None)  # type: ignore[arg-type]  # None is no key
    weights = [] if is_packed else [held for _, held in last.spec.schedule]
    gone = [
        origin
        for number, origin in enumerate(last.sources)
        if columns[number] is None and (not weights or any(held[number] for held in weights))
    ]
    if change is None and len(gone) != len(left):
        raise UsageError(f"the state is of {len(last.sources)} sources, the config has {len(opened)}{_FUTURE}")
    for origin, each in product(gone, left.values()):
        if change is None or each.store.url == origin.url:
            hint = _FUTURE if _has_grown(each, origin) else ": use the data of the run, or start a new one"
            raise UsageError(
                f"the state was saved with other data: {origin.url} had {origin.num_samples} samples, {origin.fingerprint[:19]}; "
                f"{each.store.url} has {each.manifest.samples}, {each.origin.fingerprint[:19]}{hint}"
            )
    if (gone or left) and not last.spec.schedule:
        raise UsageError("sources without weights are shuffled as one: none can be added or removed in a run; they may grow")
    if gone and is_packed:
        raise UsageError(f"rows that wait may hold samples of {gone[0].url}: leave it in the config, at weight 0 from a step on")
    taken = [*columns, *left]
    sources = [opened[column] if column is not None else _stand_in(last.sources[number]) for number, column in enumerate(taken)]
    schedule = tuple(
        (step, tuple(0.0 if column is None else weights[column] for column in taken)) for step, weights in config.schedule
    )
    return replace(config, sources=tuple(each.source for each in sources), schedule=schedule), sources


def _has_grown(opened: OpenSource, origin: Origin) -> bool:
    """Whether its first shards are all that it had."""
    is_longer = len(opened.shards) > origin.num_shards
    return is_longer and opened.first(origin.num_shards).manifest.fingerprint() == origin.fingerprint


def _stand_in(origin: Origin) -> OpenSource:
    """A source of weight 0 that nobody reads any more."""
    shard = ShardInfo(
        name="removed", samples=origin.num_samples, bytes=1, xxh128="0" * 32, members=(), data_types={}, text_chars=0, num_codes=0
    )
    manifest = Manifest(shards=Shards.of([shard]), inputs=origin.num_samples)
    return OpenSource(Source(origin.url, weight=0.0), open_store(origin.url), manifest, origin)
