"""What the page shows of samples, as JSON values: pages of cards, one sample in full, a search.

    page(first, count)     a few index reader and one range        card: number, key, type, the text's beginning, sizes
    sample(number)         one sample without its source image   card + whole text, turns, code grids, members, CRC
    search(query, after)   shards from a number on, piece by piece, for a quarter of a second; says where to go on
    cards(numbers)         of any samples, in this order

Invariant: every value is data. Nothing is markup; the page puts texts into text nodes only. A sample that breaks the schema
is shown as one that does, with the reason, and its neighbours as usual.
Cost: memory is a page, or two pieces of a search; texts beyond MAX_TEXT_CHARS and members beyond MAX_MEMBER_BYTES are left out.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from wds_tools.dataset.samples import PartialSample, SampleReader, Wanted, is_image, is_small, is_text
from wds_tools.errors import DataError, FormatError
from wds_tools.format.checksum import crc32
from wds_tools.format.codes import CodeGrid
from wds_tools.format.manifest import Manifest
from wds_tools.format.schema import ANY_MEMBERS, Sample, validate
from wds_tools.format.shard import sample_from_members
from wds_tools.view.filters import Chosen, Tables
from wds_tools.view.token_rows import COLUMN, TokenRows

MAX_MEMBER_BYTES = 16 << 20
"""Of a text or a code grid that is fetched to be shown."""
MAX_TEXT_CHARS = 200_000
MAX_GRID_CODES = 1 << 16
"""A picture of 4096 x 4096 px at stride 16: larger grids are neither drawn nor decoded."""
MAX_GRIDS = 16
"""Of a conversation's images, those whose codes are shown."""
CARD_TEXT_CHARS = 400
_BINARY = re.compile(r"[\x00-\x08\x0e-\x1f]")
"""Characters that no text has."""
MAX_COUNT = 200
SEARCH_S = 0.25


@dataclass(frozen=True, kw_only=True)
class Query:
    """Conditions of a search; empty fields match everything."""

    text: str = ""
    """Contained in the text or a turn, whatever the case."""
    key: str = ""
    """Contained in the key."""
    data_type: str = ""
    where: str = ""
    """A condition on fields, as `select --where` takes it."""

    @property
    def reads_samples(self) -> bool:
        """Whether fields alone do not say what matches."""
        return bool(self.text or self.key or self.data_type)


def page(reader: SampleReader, first: int, count: int, needle: str = "", rows: TokenRows | None = None) -> dict[str, Any]:
    """The cards of `count` samples from number `first` on; see `card`."""
    samples = reader.page(first, min(count, MAX_COUNT), is_small, max_member_bytes=MAX_MEMBER_BYTES)
    shown = [card(partial, reader.manifest, needle, rows) for partial in samples]
    return {"first": first, "total": len(reader), "samples": shown}


def sample(reader: SampleReader, number: int, rows: TokenRows | None = None) -> dict[str, Any]:
    """One sample in full, but for its source image; of `rows`, a row of tokens."""
    is_of_others = reader.manifest.schema_version == ANY_MEMBERS and rows is None
    wanted: Wanted = (lambda suffix: not is_image(suffix)) if is_of_others else is_small
    partial = reader.sample(number, wanted, max_member_bytes=MAX_MEMBER_BYTES)
    shown = card(partial, reader.manifest, rows=rows)
    shown |= {
        "shard": partial.shard,
        "sample_index": partial.sample_index,
        "start": partial.start,
        "members": [_member(partial, suffix, is_of_others=is_of_others) for suffix in partial.spans],
        "intact": _is_intact(reader, partial),
        "total": len(reader),
    }
    parsed, _ = _parse(partial, reader.manifest)
    if parsed is not None:
        shown |= {
            "text": parsed.text[:MAX_TEXT_CHARS],
            "turns": _turns(parsed),
            "provenance": {name: _value(value) for name, value in parsed.provenance.items()},
            "width": parsed.width,
            "height": parsed.height,
            "length": parsed.length,
        }
    if rows is not None and "problem" not in shown:
        shown |= rows.shown(partial) | {"text": ""}
    if "problem" not in shown:
        drawn = (found for found in _grids(partial, parsed, reader.manifest, rows) if found[1].size <= MAX_GRID_CODES)
        shown["grids"] = [at | _grid(codes, layout) for at, codes, layout in islice(drawn, MAX_GRIDS)]
    return shown


def card(partial: PartialSample, manifest: Manifest, needle: str = "", rows: TokenRows | None = None) -> dict[str, Any]:
    """A sample as it stands in a list: with the beginning of its text, or with what stands around `needle` in it."""
    shown: dict[str, Any] = {"number": partial.number, "key": "", "bytes": partial.size, "codes": partial.num_codes}
    shown |= {"chars": partial.text_chars, "images": partial.images, "columns": {}, "type": None, "text": "", "turns_count": 0}
    try:
        shown["key"] = partial.key
    except FormatError as error:
        return shown | {"problem": str(error)}
    if rows is not None:
        try:
            return shown | rows.card(partial)
        except FormatError as error:
            return shown | {"problem": str(error)}
    parsed, problem = _parse(partial, manifest)
    if parsed is None:
        text = "\n".join(_decode(payload) for suffix, payload in partial.payloads.items() if is_text(suffix))
        shown |= {"text": _excerpt(text, needle), "chars": len(text)}
        return shown | ({"problem": problem} if problem else {})
    turns = _turns(parsed)
    text = parsed.text or "\n".join(turn["value"] for turn in turns)
    return shown | {
        "type": parsed.data_type,
        "text": _excerpt(text, needle),
        "chars": len(text),
        "turns_count": len(turns),
        "columns": {column: grids[0].shape for column in parsed.codes if (grids := parsed.grids_of(column))},
    }


def codes_of(reader: SampleReader, number: int, column: str, image: int = 0, rows: TokenRows | None = None) -> NDArray[Any]:
    """The codes of a sample, or of one of several images, as they are stored; or of one in a row of tokens.

    Raises:
        UsageError: there is no such sample.
        DataError: it has no such grid, or one too large to be drawn.
    """
    partial = reader.sample(number, is_small, max_member_bytes=MAX_MEMBER_BYTES)
    parsed, problem = _parse(partial, reader.manifest)
    grids = [codes for at, codes, _ in _grids(partial, parsed, reader.manifest, rows) if at["column"] == column]
    if image >= len(grids):
        raise DataError(problem or f"sample {number:,} has {len(grids)} grids in {column}")
    codes = grids[image]
    if codes.size > MAX_GRID_CODES:
        raise DataError(f"a grid of {' x '.join(map(str, codes.shape))} codes; at most {MAX_GRID_CODES:,} codes are drawn")
    return codes


def search(
    reader: SampleReader,
    tables: Tables,
    query: Query,
    after: int,
    limit: int,
    budget_s: float = SEARCH_S,
    rows: TokenRows | None = None,
) -> dict[str, Any]:
    """The next samples that match, as many as are found in the time that there is.

    Args:
        reader: the dataset.
        tables: its fields.
        query: what to look for.
        after: the number of the first sample to look at.
        limit: at most so many.
        budget_s: when it is used up, the piece at hand is finished and no other begun.
        rows: that its samples are, if they are rows of tokens.

    Returns:
        Cards; `next`, the number to go on from, None at the end; `looked_at`, how many samples this call has passed; with a
        condition on fields, `absent` and `wrong_type` as Chosen has them, of the shards that this call is the first to look at.
    """
    deadline = time.monotonic() + budget_s
    numbers: list[int] = []
    verdicts: dict[int, Chosen] = {}
    end = after
    for found, end in _found(reader, tables, query, after, verdicts):
        numbers += found[: limit - len(numbers)]
        if len(numbers) >= limit:
            end = numbers[-1] + 1
        if len(numbers) >= limit or time.monotonic() >= deadline:
            break
    else:
        end = len(reader)
    begun = [chosen for shard, chosen in verdicts.items() if reader.first_of(shard) >= after]
    return {
        "samples": cards(reader, numbers, query.text, rows),
        "next": None if end >= len(reader) else end,
        "looked_at": end - after,
        "total": len(reader),
        "absent": sorted(frozenset.intersection(*(chosen.absent for chosen in begun))) if begun else None,
        "wrong_type": sum(chosen.num_wrong_type for chosen in begun),
    }


def cards(reader: SampleReader, numbers: Sequence[int], needle: str = "", rows: TokenRows | None = None) -> list[dict[str, Any]]:
    """The cards of these samples, in this order; neighbours are read together."""
    shown: list[dict[str, Any]] = []
    for _, run in groupby(enumerate(numbers), lambda numbered: numbered[1] - numbered[0]):
        members = list(run)
        shown += page(reader, members[0][1], len(members), needle, rows)["samples"]
    return shown


def _found(
    reader: SampleReader, tables: Tables, query: Query, after: int, verdicts: dict[int, Chosen]
) -> Iterator[tuple[list[int], int]]:
    """The samples of each piece that match, and the number after its last; into `verdicts`, what `query.where` says of a shard.

    Shards without the data type asked for, and those of which no sample is chosen, are passed unread.
    """
    if after >= len(reader):
        return
    shard, first = reader.locate(after)
    for number in range(shard, len(reader.manifest.shards)):
        described, begin = reader.manifest.shards[number], reader.first_of(number)
        rows = np.arange(first, described.samples)
        if query.data_type and described.data_types and query.data_type not in described.data_types:
            rows = rows[:0]
        elif query.where:
            verdicts[number] = tables.chosen(query.where, number)
            rows = np.intersect1d(rows, verdicts[number].rows)
        if query.reads_samples and len(rows):
            for piece in reader.scan(number, first, is_text):
                chosen = [piece[at] for at in np.flatnonzero(np.isin([one.sample_index for one in piece], rows))]
                matching = [one.number for one in chosen if _matches(one, query, reader.manifest.schema_version)]
                yield matching, piece[-1].number + 1
        else:
            yield (rows + begin).tolist(), begin + described.samples
        first = 0


def _matches(partial: PartialSample, query: Query, schema_version: int) -> bool:
    if query.key:
        try:
            if query.key not in partial.key:
                return False
        except FormatError:
            return False
    if not (query.text or query.data_type):
        return True
    needle = query.text.lower()
    if schema_version == ANY_MEMBERS:
        return not query.data_type and any(needle in _decode(payload).lower() for payload in partial.payloads.values())
    try:
        record = orjson.loads(partial.payloads["json"])
        texts = [record["text"], *(turn["value"] for turn in record.get("conversations") or ())]
        if query.data_type and record["data_type"] != query.data_type:
            return False
        return any(needle in text.lower() for text in texts)
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        return False


def _parse(partial: PartialSample, manifest: Manifest) -> tuple[Sample | None, str | None]:
    """The sample, or why it is none; neither for WebDataset samples of other kinds."""
    if manifest.schema_version == ANY_MEMBERS:
        return None, None
    if too_large := [suffix for suffix in partial.lengths if is_small(suffix) and suffix not in partial.payloads]:
        return None, f"{too_large[0]} is larger than the {MAX_MEMBER_BYTES >> 20} MiB that are shown here"
    try:
        parsed = sample_from_members(partial.key, partial.payloads)
        validate(parsed, manifest.layouts)
    except DataError as error:
        return None, str(error)
    return parsed, None


def _grids(
    partial: PartialSample, parsed: Sample | None, manifest: Manifest, rows: TokenRows | None
) -> Iterator[tuple[dict[str, Any], NDArray[Any], CodeGrid]]:
    """Column and number, codes and layout of each image in a sample, or in a row of tokens. Raises FormatError."""
    if rows is not None:
        for number, (codes, is_guess) in enumerate(rows.grids(partial)):
            yield {"column": COLUMN, "image": number, "is_guess": is_guess}, codes, rows.layout
    elif parsed is not None:
        for column in parsed.codes:
            for number, codes in enumerate(parsed.grids_of(column)):
                yield {"column": column, "image": number}, codes, manifest.layout(column)


def _member(partial: PartialSample, suffix: str, *, is_of_others: bool) -> dict[str, Any]:
    """What is said of a member: `image`, its number among the images, or `text`, if it is one of them and not too large."""
    shown: dict[str, Any] = {"suffix": suffix, "bytes": partial.lengths[suffix]}
    if is_image(suffix):
        return shown | {"image": partial.images.index(suffix)}
    if suffix in partial.payloads and (is_of_others or is_text(suffix)):
        with suppress(UnicodeDecodeError):
            text = bytes(partial.payloads[suffix]).decode(errors="replace" if is_text(suffix) else "strict")
            if is_text(suffix) or not _BINARY.search(text):
                shown["text"] = text[:MAX_TEXT_CHARS]
    return shown


def _turns(parsed: Sample) -> list[dict[str, str]]:
    return [{"from": turn["from"], "value": turn["value"][:MAX_TEXT_CHARS]} for turn in parsed.conversations or ()]


def _grid(codes: NDArray[Any], layout: CodeGrid) -> dict[str, Any]:
    shown: dict[str, Any] = {"layout": str(layout), "shape": codes.shape, "distinct": len(np.unique(codes))}
    try:
        cells = layout.cells(codes)
    except DataError as error:
        return {**shown, "height": 0, "width": 0, "codes": [], "problem": str(error)}
    return {**shown, "height": cells.shape[0], "width": cells.shape[1], "codes": cells.ravel().tolist()}


def _is_intact(reader: SampleReader, partial: PartialSample) -> bool | None:
    """Whether the sample's bytes have the CRC-32 of its index; None if they are too many to read for this."""
    if partial.size > MAX_MEMBER_BYTES:
        return None
    data = reader.store.read_range(partial.shard, partial.start, partial.start + partial.size)
    return int(crc32(data)) == partial.crc32


def _excerpt(text: str, needle: str) -> str:
    start = text.lower().find(needle.lower()) if needle else 0
    if start < CARD_TEXT_CHARS // 4:
        return text[:CARD_TEXT_CHARS]
    return "… " + text[start - CARD_TEXT_CHARS // 8 :][:CARD_TEXT_CHARS]


def _value(value: Any) -> str:
    """A field of provenance as a line of text."""
    if isinstance(value, str):
        return value[:CARD_TEXT_CHARS]
    try:
        return orjson.dumps(value).decode()[:CARD_TEXT_CHARS]
    except TypeError:  # nested deeper than orjson writes
        return "..."


def _decode(payload: memoryview) -> str:
    return bytes(payload).decode(errors="replace")
