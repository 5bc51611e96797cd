"""The shards of a dataset as columns: about 100 bytes each, whatever they are asked for.

    Shards.of(rows), Shards.join(parts) -> Shards: a sequence of ShardInfo, each made when it is asked for; and its columns

Invariant: it gives the rows that it was made of, in their order. Cost: some microseconds for a row, nothing for a column.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from itertools import chain, islice, pairwise
from operator import attrgetter, itemgetter
from typing import Annotated, Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from wds_tools.errors import FormatError
from wds_tools.format.typed_json import Count, shape

Ints = NDArray[np.int64]
Kind = tuple[tuple[str, ...], tuple[str, ...]]
"""What many shards have in common: the suffixes of their samples, the names of their data types."""
_TOGETHER = 4096
"""Rows that are made at a time."""
_LOW = (1 << 32) - 1
_ODD = KeyError, TypeError, ValueError, OverflowError
_XXH128 = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardInfo:
    """One shard, as the manifest describes it."""

    name: str
    """File name relative to the dataset, such as "shard-000000-0000.tar"."""
    samples: Annotated[int, range(1 << 32)]
    bytes: Count
    """Size of the tar."""
    xxh128: str
    """XXH3-128 of the tar's bytes, as `xxh128sum` prints it: 32 digits. While it is not known, none."""
    members: tuple[str, ...]
    """Suffixes that its samples have, in file order."""
    data_types: Mapping[str, Count]
    """Samples by data type."""
    text_chars: Count
    num_codes: Count


FIELDS = [field.name for field in fields(ShardInfo)]


def total(column: Ints) -> int:
    """The sum of numbers from 0, which may be more than an int64 holds."""
    return (int((column >> 32).sum()) << 32) + int((column & _LOW).sum())


def spread(begins: Ints, lengths: Ints) -> Ints:
    """begin, begin + 1, ... begin + length - 1 for each begin and length."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(begins - ends + lengths, lengths)


class Ragged(NamedTuple):
    """Several values for each shard."""

    values: NDArray[Any]
    """Those of the first shard, then those of the second, ..."""
    bounds: Ints
    """(S + 1,) where those of each begin, from 0, and where the last end."""

    @classmethod
    def of(cls, values: NDArray[Any], lengths: Any) -> Ragged:
        """So many of each shard."""
        bounds = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=bounds[1:])
        return cls(values, bounds)

    def part(self, first: int, last: int) -> Ragged:
        """Those of the shards [first, last)."""
        bounds = self.bounds[first : last + 1]
        return Ragged(self.values[bounds[0] : bounds[-1]], bounds - bounds[0])


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Shards(Sequence[ShardInfo]):
    """S shards. Equal to any sequence of the same rows."""

    names: Ragged
    """UTF-8."""
    num_samples: Ints
    """(S,), as the others."""
    num_bytes: Ints
    hashes: NDArray[np.uint8]
    """(S, 16) XXH3-128."""
    text_chars: Ints
    num_codes: Ints
    kind: NDArray[np.int32]
    """Places in `kinds`."""
    kinds: Sequence[Kind]
    """In the order of their first shards."""
    counts: Ragged
    """Samples of each data type of a shard's kind."""

    @classmethod
    def of(cls, shards: Iterable[ShardInfo]) -> Shards:
        """The columns of rows, whose hashes are 32 hexadecimal digits each."""
        rows = map(attrgetter(*FIELDS), shards)
        return cls.join(map(cls._of, iter(lambda: list(islice(rows, _TOGETHER)), [])))

    @classmethod
    def of_json(cls, records: Sequence[Any], what: str, first: int) -> Shards:
        """The columns of JSON values that anybody may have written.

        Args:
            records: the values, as a parser gives them.
            what: how the message begins.
            first: number of the first in its document, for the message.

        Raises:
            FormatError: one is not the row of a shard.
        """
        with suppress(*_ODD):
            return cls._of(map(itemgetter(*FIELDS), records))
        for number, record in enumerate(records, first):
            way = f"shards[{number}]"
            row = shape(ShardInfo, record, what, way=way)
            if not _XXH128.fullmatch(row.xxh128):
                raise FormatError(f"{what} ({way}.xxh128 is {row.xxh128!r}, expected 32 hexadecimal digits)")
        raise AssertionError("rows that can be read have columns")

    @classmethod
    def _of(cls, rows: Iterable[tuple[Any, ...]]) -> Shards:
        """The columns of rows. Raises one of _ODD: a field is missing, or of another type or range."""
        names, samples, sizes, hashes, members, data_types, chars, codes = list(zip(*rows, strict=True)) or [()] * len(FIELDS)
        values = list(chain.from_iterable(map(dict.values, data_types)))
        numbers = np.array([samples, sizes, chars, codes], np.int64).reshape(4, len(names))
        counts, digits = np.array(values, np.int64), "".join(hashes)
        kinds: dict[Kind, int] = {}
        kind = [kinds.setdefault(each, len(kinds)) for each in zip(map(tuple, members), map(tuple, data_types), strict=True)]
        is_sound = (
            {*map(type, chain(samples, sizes, chars, codes, values))} <= {int}
            and {*map(type, members)} <= {list, tuple}
            and all(type(suffix) is str for suffixes, _ in kinds for suffix in suffixes)
            and min(numbers.min(initial=0), counts.min(initial=0)) == 0
            and max(numbers.max(initial=0), counts.max(initial=0)) < 1 << 53
            and numbers[0].max(initial=0) < 1 << 32
            and {*map(len, hashes)} <= {32}
            and bytes.fromhex(digits).hex() == digits
        )
        if not is_sound:
            raise ValueError("a field of another type or range")
        text = "".join(names)
        lengths = list(map(len, names)) if text.isascii() else [len(name.encode(errors="surrogatepass")) for name in names]
        return cls(
            names=Ragged.of(np.frombuffer(text.encode(errors="surrogatepass"), np.uint8), lengths),
            num_samples=numbers[0],
            num_bytes=numbers[1],
            hashes=np.frombuffer(bytes.fromhex(digits), np.uint8).reshape(-1, 16),
            text_chars=numbers[2],
            num_codes=numbers[3],
            kind=np.array(kind, np.int32),
            kinds=tuple(kinds),
            counts=Ragged.of(counts, list(map(len, data_types))),
        )

    @classmethod
    def join(cls, parts: Iterable[Shards]) -> Shards:
        """The shards of all parts, one part after the other; in memory grows what comes of them alone."""
        kinds: dict[Kind, int] = {}
        plain, ragged = {"num_samples", "num_bytes", "hashes", "text_chars", "num_codes"}, ("names", "counts")
        grown: defaultdict[str, bytearray] = defaultdict(bytearray)
        for part in parts:
            places = np.array([kinds.setdefault(kind, len(kinds)) for kind in part.kinds], np.int32)
            grown["kind"] += places[part.kind].tobytes()
            for name in plain:
                grown[name] += getattr(part, name).tobytes()
            for name in ragged:
                values, bounds = getattr(part, name)
                grown[name] += values.tobytes()
                grown[f"{name} of each"] += np.diff(bounds).tobytes()
        dtypes = {"kind": np.int32, "names": np.uint8, "hashes": np.uint8}
        columns: dict[str, Any] = {
            name: np.frombuffer(grown[name], dtypes.get(name, np.int64)) for name in ("kind", *plain, *ragged)
        }
        columns["hashes"] = columns["hashes"].reshape(-1, 16)
        for name in ragged:
            columns[name] = Ragged.of(columns[name], np.frombuffer(grown[f"{name} of each"], np.int64))
        return cls(kinds=tuple(kinds), **columns)

    def __len__(self) -> int:
        return len(self.num_samples)

    @overload
    def __getitem__(self, place: int) -> ShardInfo: ...

    @overload
    def __getitem__(self, place: slice) -> Shards: ...

    def __getitem__(self, place: int | slice) -> ShardInfo | Shards:
        chosen = range(len(self))[place]
        if isinstance(chosen, int):
            return self.rows(chosen, chosen + 1)[0]
        if chosen.step != 1 or chosen.start:
            return Shards.of(map(self.__getitem__, chosen))
        last = len(chosen)
        plain: dict[str, Any] = {name: column[:last] for name, column in vars(self).items() if isinstance(column, np.ndarray)}
        kinds = self.kinds[: plain["kind"].max(initial=-1) + 1]
        return replace(self, **plain, kinds=kinds, names=self.names.part(0, last), counts=self.counts.part(0, last))

    def __iter__(self) -> Iterator[ShardInfo]:
        return chain.from_iterable(self.rows(first, last) for first, last in self.parts())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(ShardInfo.__eq__, self, other))

    def parts(self) -> Iterator[tuple[int, int]]:
        """The shards [first, last) of which lists are made at a time, where all are."""
        for first in range(0, len(self), _TOGETHER):
            yield first, min(first + _TOGETHER, len(self))

    def names_of(self, first: int, last: int) -> list[str]:
        """The names of the shards [first, last)."""
        names, bounds = self.names.part(first, last)
        if (text := names.tobytes()).isascii() and b"\n" not in text:  # a third of the time
            is_name = np.ones(len(names) + last - first, bool)
            is_name[bounds[1:] + np.arange(last - first)] = False
            lines = np.full(len(is_name), ord("\n"), np.uint8)
            lines[is_name] = names
            return lines.tobytes().decode().split("\n")[:-1]
        places = pairwise(bounds.tolist())
        return [text[low:high].decode(errors="surrogatepass") for low, high in places]

    def lines(self, first: int, last: int) -> Iterable[tuple[str, int, str]]:
        """Name, samples and hash, in hexadecimal, of the shards [first, last), at least one."""
        hashes = self.hashes[first:last].tobytes().hex("\n", 16).split("\n")
        return zip(self.names_of(first, last), self.num_samples[first:last].tolist(), hashes, strict=True)

    def name(self, shard: int) -> str:
        """The name of one."""
        return self.names_of(shard, shard + 1)[0]

    def members(self, shard: int) -> tuple[str, ...]:
        """The suffixes of one."""
        suffixes, _ = self.kinds[int(self.kind[shard])]
        return suffixes

    def data_types(self) -> dict[str, int]:
        """Samples by data type."""
        named = {name: place for place, name in enumerate(sorted({name for _, types in self.kinds for name in types}))}
        places = Ragged.of(
            np.array([named[name] for _, types in self.kinds for name in types], np.int64),
            [len(types) for _, types in self.kinds],
        )
        of_counts = places.values[spread(places.bounds[self.kind], np.diff(self.counts.bounds))]
        sums = np.zeros((2, len(named)), np.int64)  # the upper bits and the lower ones, as in `total`
        np.add.at(sums[0], of_counts, self.counts.values >> 32)
        np.add.at(sums[1], of_counts, self.counts.values & _LOW)
        return {name: (high << 32) + low for name, high, low in zip(named, *sums.tolist(), strict=True)}

    def rows(self, first: int, last: int) -> list[ShardInfo]:
        """The shards [first, last), at least one."""
        counts = iter(self.counts.part(first, last).values.tolist())
        columns = (self.num_bytes, self.kind, self.text_chars, self.num_codes)
        return [
            ShardInfo(
                name=name,
                samples=samples,
                bytes=size,
                xxh128=xxh128,
                members=self.kinds[kind][0],
                data_types=dict(zip(self.kinds[kind][1], counts)),  # noqa: B905 (it takes as many as there are types)
                text_chars=chars,
                num_codes=codes,
            )
            for (name, samples, xxh128), size, kind, chars, codes in zip(
                self.lines(first, last), *(column[first:last].tolist() for column in columns), strict=True
            )
        ]
