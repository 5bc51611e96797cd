"""Samples of a shard -> what is counted over them: texts, turns, sizes, grids, codes; and hashes of texts and codes.

Counts add up in any order, so they can be made in pieces, on any number of processes. Cost: about 10 us a sample. Memory: one
piece (8 MiB), a histogram a codebook, 16 bytes a hash.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from wds_tools.check.stats.drift import BUCKETS
from wds_tools.check.stats.histogram import Histogram
from wds_tools.dataset.samples import PartialSample, SampleReader, is_image, is_small
from wds_tools.errors import FormatError
from wds_tools.format.manifest import Manifest
from wds_tools.format.schema import ANY_MEMBERS
from wds_tools.format.shard import IN_COLUMNS, parse_npy
from wds_tools.run.local import Report
from wds_tools.run.progress import Advance

MAX_CODEBOOK = 1 << 22
"""Counts of more entries than this are not kept: no tokenizer has them, and a damaged grid may."""


@dataclass(kw_only=True)
class CodeUse:
    """How often each entry of a codebook was used."""

    codebook_size: int | None
    """Entries of the codebook, from the manifest; None if it does not say."""
    counts: NDArray[np.int64]
    """Occurrences of each entry; at least `codebook_size` numbers."""

    @property
    def size(self) -> int:
        """Entries: those of the codebook, or as many as the codes that were seen need."""
        return self.codebook_size or len(self.counts)

    @property
    def used(self) -> int:
        """Entries that occur."""
        return int((self.counts > 0).sum())

    @property
    def entropy_bits(self) -> float:
        """Of the distribution over entries: log2 of how many equally frequent ones would say as much."""
        total = self.counts.sum()
        share = self.counts[self.counts > 0] / max(int(total), 1)
        return float(-(share * np.log2(share)).sum()) + 0.0

    @property
    def perplexity(self) -> float:
        """2 to the entropy."""
        return float(2.0**self.entropy_bits)

    def merge(self, other: CodeUse) -> None:
        """Add another's counts."""
        short, long = sorted((self.counts, other.counts), key=len)
        self.counts = long.copy()
        self.counts[: len(short)] += short


@dataclass(kw_only=True)
class Count:
    """Counts over some samples. Two of these add up."""

    samples: int = 0
    data_types: Counter[str] = field(default_factory=Counter)
    text_chars: Histogram = field(default_factory=Histogram)
    """Characters of each text; of a conversation, over its turns."""
    turns: Histogram = field(default_factory=Histogram)
    """Turns of each conversation."""
    sample_bytes: Histogram = field(default_factory=Histogram)
    """Bytes of each sample in the tar, headers and padding included."""
    image_bytes: Histogram = field(default_factory=Histogram)
    """Bytes of each source image that was kept."""
    grids: Counter[str] = field(default_factory=Counter)
    """Code grids by "HEIGHT x WIDTH", or whatever their axes are."""
    codes: dict[str, CodeUse] = field(default_factory=dict)
    """By column; of several codebooks by column and number."""

    def merge(self, other: Count) -> None:
        """Add another's."""
        self.samples += other.samples
        self.data_types.update(other.data_types)
        for name in ("text_chars", "turns", "sample_bytes", "image_bytes"):
            getattr(self, name).merge(getattr(other, name))
        self.grids.update(other.grids)
        for column, use in other.codes.items():
            if column in self.codes:
                self.codes[column].merge(use)
            else:
                self.codes[column] = use


@dataclass(kw_only=True)
class ShardCount:
    """Counts over samples of one shard."""

    shard: int
    count: Count = field(default_factory=Count)
    texts: list[tuple[int, int]] = field(default_factory=list)
    """(hash, number of the sample), of all that have text."""
    codes: list[tuple[int, int]] = field(default_factory=list)
    """(hash, number of the sample), of all that have codes."""
    buckets: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BUCKETS, np.int64))
    """Codes by their number modulo BUCKETS."""

    def merge(self, other: ShardCount) -> None:
        """Add what was counted over other samples of the same shard."""
        self.count.merge(other.count)
        self.texts += other.texts
        self.codes += other.codes
        self.buckets += other.buckets


def count_samples(reader: SampleReader, shard: int, first: int, last: int, progress: Report) -> ShardCount:
    """Count the samples [first, last) of a shard.

    Raises:
        FormatError: a sample is damaged, or has a code outside its codebook.
    """
    counted = ShardCount(shard=shard)
    has_schema = reader.manifest.schema_version != ANY_MEMBERS
    for piece in reader.scan(shard, first, is_small if has_schema else lambda _: False, last):
        counted.count.samples += len(piece)
        counted.count.sample_bytes.add([sample.size for sample in piece])
        images = [length for sample in piece for suffix, length in sample.lengths.items() if is_image(suffix)]
        counted.count.image_bytes.add(images)
        if has_schema:
            _count_codes(counted, piece, _count_texts(counted, piece), reader.manifest)
        progress(Advance(units=len(piece), samples=len(piece)))
    return counted


def _count_texts(counted: ShardCount, piece: Sequence[PartialSample]) -> list[Mapping[str, Any]]:
    """Count texts and turns; returns the samples' records."""
    records: list[Mapping[str, Any]] = []
    chars: list[int] = []
    turns: list[int] = []
    for sample in piece:
        try:
            record = orjson.loads(sample.payloads["json"])
            records.append(record)
            texts = [record["text"]]
            if record.get("conversations") is not None:
                texts += [turn["value"] for turn in record["conversations"]]
                turns.append(len(texts) - 1)
            counted.count.data_types[record["data_type"]] += 1
            whole = "\x1f".join(texts).encode()
            chars.append(sum(map(len, texts)))
        except (orjson.JSONDecodeError, KeyError, TypeError, UnicodeEncodeError) as error:
            why = f"its json is none of this schema ({type(error).__name__}: {error})"
            raise FormatError(f"{sample.shard}, byte {sample.start}: {why}: `wds-tools verify` says more") from error
        if chars[-1]:
            counted.texts.append((xxh3_64_intdigest(whole), sample.number))
    counted.count.text_chars.add(chars)
    counted.count.turns.add(turns)
    return records


def _count_codes(
    counted: ShardCount, piece: Sequence[PartialSample], records: Sequence[Mapping[str, Any]], manifest: Manifest
) -> None:
    columns: dict[tuple[str, int | None], list[NDArray[Any]]] = {}
    for sample, record in zip(piece, records, strict=True):
        hashes = []
        for suffix, payload in sample.payloads.items():
            if not suffix.endswith(".npy"):
                continue
            codes = parse_npy(payload, f"{sample.shard}, byte {sample.start}: {suffix}", IN_COLUMNS)
            column = suffix.removesuffix(".npy")
            layout = manifest.layout(column)
            try:
                shapes = layout.shapes_of(column, codes, (record.get("grids") or {}).get(column))
            except (FormatError, AttributeError) as error:
                raise FormatError(f"{sample.shard}, byte {sample.start}: {error}: `wds-tools verify` says more") from error
            counted.count.grids.update(" x ".join(map(str, shape)) for shape in shapes)
            if codes.size:
                for called, codes_N, size in layout.by_codebook(column, codes):
                    columns.setdefault((called, size), []).append(codes_N)
                hashes.append(xxh3_64_intdigest(payload))
        if hashes:
            counted.codes.append((hashes[0] if len(hashes) == 1 else xxh3_64_intdigest(repr(hashes).encode()), sample.number))
    for (column, stated), grids in columns.items():
        codes = np.concatenate(grids)
        size = stated if stated is not None and stated <= MAX_CODEBOOK else None
        most = int(codes.max(initial=0))
        if most >= (size or MAX_CODEBOOK):
            raise FormatError(
                f"{piece[0].shard}: {column} holds the code {most:,}; the codebook has {size or MAX_CODEBOOK:,} entries: "
                "`wds-tools verify` says where"
            )
        use = CodeUse(codebook_size=size, counts=np.bincount(codes.astype(np.int64), minlength=size or 1).astype(np.int64))
        counted.count.merge(Count(codes={column: use}))
        counted.buckets += np.bincount(codes % BUCKETS, minlength=BUCKETS)
