"""The data that a state or a receipt is of: its sources, wherever they lie now, in the order of the run; and what it excluded.

    Record -> open_order -> SampleOrder;   its masks, the file of keys -> read_masks -> Mask of each source

Invariant: data is recognised by its fingerprint, keys by their hash, so an answer is never about others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loaders.config import Source
from loaders.order.generations import Origin
from loaders.order.mask import Held, Mask
from loaders.order.samples import OpenSource, SampleOrder, open_source
from loaders.proof.state import Record
from wds_tools.errors import FormatError, NotFound, UsageError


def open_order(record: Record, moved: Sequence[str], name: str) -> SampleOrder:
    """The order of a run.

    Args:
        record: a state or receipt.
        moved: URLs of sources that are no longer where the record has them.
        name: where the record was read, for messages.

    Raises:
        UsageError: the data is not that of the run.
        FormatError: the record or a manifest is damaged.
        NotFound: a source has no manifest.
    """
    origins = record.generations[-1].sources
    elsewhere = {each.origin.fingerprint: each for each in (open_source(Source(url)) for url in moved)}
    for fingerprint in elsewhere.keys() - {origin.fingerprint for origin in origins}:
        data = ", ".join(f"{origin.url} {origin.fingerprint[:19]}" for origin in origins)
        raise UsageError(f"{elsewhere[fingerprint].store.url} has {fingerprint[:19]}, which is not data of the run ({data})")
    sources = [elsewhere.get(origin.fingerprint) or _open_unmoved(origin) for origin in origins]
    for generation in record.generations:
        for origin, opened in zip(generation.sources, sources, strict=False):
            if opened.first(origin.num_shards).origin.fingerprint != origin.fingerprint:
                raise FormatError(f"{name}: the first {origin.num_shards} shards of {opened.store.url} are not its data")
    try:
        return SampleOrder(sources, record.generations[-1].spec, record.generations)
    except UsageError as error:
        raise FormatError(f"{name}: the spec of its order does not fit its data ({error})") from error


def read_masks(held_masks: Sequence[Held], order: SampleOrder, exclude: str) -> dict[int, Mask]:
    """The masks of a run, by the number of their source.

    Args:
        held_masks: those of its states or receipts.
        order: of the run.
        exclude: the file of keys.

    Raises:
        UsageError: the run excluded others.
    """
    origins, masks = order.generations[-1].sources, {}
    for held in held_masks:
        if held.source >= len(origins):
            raise UsageError(
                f"the run has {len(origins)} sources, none of number {held.source}, of which it says to exclude some"
            )
        opened, origin = order.sources[held.source], origins[held.source]
        if held.source not in masks:
            source = replace(opened.source, exclude=exclude, url=origin.url, name=origin.name)
            masks[held.source] = replace(opened, source=source).mask
        if masks[held.source].hash(held.num_ids) != held.hash:
            raise UsageError(f"{exclude} is not what the run excluded: its first {held.num_ids:,} keys of {opened.name} differ")
    return masks


def _open_unmoved(origin: Origin) -> OpenSource:
    hint = "if the data of the run lies elsewhere now, say where with --source"
    try:
        opened = open_source(Source(origin.url))
    except NotFound as error:
        raise NotFound(f"{error}; {hint}") from error
    fingerprint = opened.manifest.fingerprint()
    if fingerprint != origin.fingerprint:
        raise UsageError(
            f"{origin.url} is not the data of the run: it has {fingerprint[:19]}, the run {origin.fingerprint[:19]}; {hint}"
        )
    return opened
