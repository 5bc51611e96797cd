"""`wds-tools seen`."""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack, closing
from dataclasses import dataclass

from loaders.order.mask import find_in_headers, find_quickly
from loaders.proof.history import Place, Run, Seen
from wds_tools.cli.options import Positional
from wds_tools.cli.summary import Printed, show
from wds_tools.dataset.samples import SampleReader
from wds_tools.errors import UsageError
from wds_tools.select.choose import KeyList

EXAMPLE = "wds-tools seen 000012-00000007 --state checkpoints/state-60000.json"


@dataclass(frozen=True, kw_only=True)
class Config(Printed):
    """Show when a training run used samples: every epoch, step and rank, up to a state.

    Exit status 1 if a key is of no sample."""

    input: Positional[tuple[str, ...]] = ()
    """Keys."""
    keys: str | None = None
    """File of keys, one a line; DATASET<tab>KEY if several datasets of the run have the key."""
    state: str
    """A state, a save or a receipt of the run, as JSON."""
    source: tuple[str, ...] = ()
    """Where data of the run lies that is no longer at the URL in the state. It is recognised by its fingerprint."""
    exclude: str | None = None
    """File of keys that the run excluded, as its Source(exclude=...), if it did."""

    def __post_init__(self) -> None:
        if not self.input and self.keys is None:
            raise UsageError("name the samples: keys, or --keys FILE")


def run(config: Config) -> int:
    """Find the samples, and when they were handed over."""
    history = Run.open(config.state, config.source, config.exclude)
    samples, is_all = find(config, history)
    times: dict[int, list[Seen]] = defaultdict(list)
    for one in history.seen([place for _, place in samples]):
        times[one.sample].append(one)
    step = history.record.step
    found, lines = [], []
    for number, (key, place) in enumerate(samples):
        name, seen = history.names[place.source], [one._asdict() for one in times[number]]
        shard = history.order.sources[place.source].manifest.shards[place.shard].name
        found.append({"key": key, "source": name, "shard": shard, "sample_index": place.sample_index, "seen": seen})
        steps = [f"epoch {one.epoch}, step {one.step:,}, rank {one.rank} of {one.world_size}" for one in times[number]]
        lines += [f"{key} of {name}: {what}" for what in steps or [f"in none of the {step:,} steps"]]
    show(config, {"step": step, "samples": found}, lines)
    return 0 if is_all else 1


def find(config: Config, history: Run) -> tuple[list[tuple[str, Place]], bool]:
    """The samples of the keys that are asked about, and whether each key is of one.

    By bisection; only what no dataset has there is looked for in the headers of all samples.

    Raises:
        UsageError: several datasets have a key that is given without its dataset.
    """
    opened, urls = history.order.sources, [origin.url for origin in history.origins]
    named_as = [*urls, *history.names, *(each.store.url for each in opened)]
    listed = KeyList((), frozenset()) if config.keys is None else KeyList.read(config.keys, named_as, "--keys")
    named = tuple(frozenset().union(*listed.named[number :: len(urls)]) for number in range(len(urls)))
    asked = KeyList(named, listed.bare.union(config.input))
    with ExitStack() as stack:
        readers = [stack.enter_context(closing(SampleReader(each.store, each.manifest))) for each in opened]
        found = [find_quickly(reader, keys | asked.bare) for reader, keys in zip(readers, named, strict=True)]
        lost = asked.bare.difference(*found)
        for each, keys, reader in zip(found, named, readers, strict=True):
            each |= find_in_headers(reader, (keys | lost) - each.keys())
    asked.check(list(map(set, found)), urls, "seen" if config.keys is None else "--keys")
    is_all = asked.bare <= set().union(*found) and all(keys <= each.keys() for keys, each in zip(named, found, strict=True))
    items = [(number, key, codes) for number, each in enumerate(found) for key, codes in sorted(each.items())]
    return [(key, Place(number, code >> 32, code & 0xFFFFFFFF)) for number, key, codes in items for code in codes], is_all
