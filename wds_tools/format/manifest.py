"""The manifest of a dataset: one entry a shard, totals, what was rejected, and where everything came from.

`manifest.json` is written last; its existence means that the dataset is complete. `fingerprint()` hashes what training
depends on (schema version, shard names, sample counts and content hashes, in order) and nothing else, so a dataset that was
copied elsewhere keeps it and one that was changed does not.
`manifest_hash` is over the file itself, with its own 64 digits as zeros; `rejects_hash` over the files of rejects.
Invariant: inputs = samples + rejects; what is serialized can be parsed. Cost of a shard: about 350 bytes, in memory 100.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from itertools import chain
from operator import lt
from typing import Annotated, Any, BinaryIO, Literal

import numpy as np

from wds_tools.errors import FormatError, UsageError
from wds_tools.format.codes import HW, CodeGrid, is_code_column
from wds_tools.format.manifest_json import NO_HASH, ManifestText, manifest_text
from wds_tools.format.schema import ANY_MEMBERS, SCHEMA_VERSION
from wds_tools.format.shards import ShardInfo, Shards, total
from wds_tools.format.typed_json import Count, read_json, shape

FORMAT = "wds-tools"
INDEX_COMMAND = "index"
"""As `source["command"]`: see Manifest.is_indexed."""
PASSED_OVER = "members_passed_over"
"""Of the counts in `source`: members of tars that are no part of a sample (links, hidden files, those without a suffix)."""
IMAGES, ENLARGED = "images", "enlarged_images"
"""Of the counts in `source`: images of the samples, and those of them that are smaller than what they are scaled to."""
FILTERED = ("filtered", "filtered_missing", "not_chosen", "duplicate")
"""Reasons of records that the user drops (--where; keys, shares and splits; --unique): counted among the rejects, without a line
under rejects/."""
_ONE_TOKENIZER = ("tokenizer", "weights_hash", "layout", "codebook_size", "dtype", "stride", "preprocessing_version")
"""Of a code column's provenance, what has to be the same for codes to be mixed."""
_GROUP_BYTES = 32 << 10
_LEAST_SAMPLE_BYTES = 512
"""In a tar: one header."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRows:
    """Rows of tokens, as the manifest describes them."""

    length: Annotated[int, range(1, 1 << 31)]
    """Tokens of a row."""
    vocabulary_size: Annotated[int, range(1, 1 << 32)]
    text_size: Count
    """Ids of the text tokenizer."""
    version: Count = 1
    """Version of the way from a sample to its tokens."""
    template: str = "liquid"
    template_version: Count = 1
    code_ids: tuple[tuple[Count, Count], ...] = ()
    """Of a template whose codes are tokens of the tokenizer: runs of their ids in the order of the codes, (first id, length)."""


def hash_rejects(digests: Mapping[str, str]) -> str:
    """ "sha256:<hex>" over the files of rejects, name -> SHA-256 of the bytes: that of the lines which `sha256sum` prints."""
    lines = "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A complete dataset."""

    shards: Shards
    """A sequence of ShardInfo; made of any other one."""
    inputs: int
    """Records read: samples + rejects."""
    rejects: Mapping[str, int] = field(default_factory=dict)
    """Records not taken, by reason; each has a line under rejects/, but for those of FILTERED."""
    codes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Code column -> its provenance: layout, codebook_size and dtype (see CodeGrid), stride (None: there is none), tokenizer,
    weights_hash, preprocessing_version, precision, ..."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """Origin: command, settings, input files; of a job over a dataset, that one's fingerprint and own source."""
    schema_version: int = SCHEMA_VERSION
    """The newest that a sample needs (see Sample.schema_version); ANY_MEMBERS if they are WebDataset samples of other kinds: then
    nothing is counted but them."""
    rejects_hash: str | None = hash_rejects({})
    """See hash_rejects. None: an earlier release wrote the manifest, and no hash protects it or the rejects."""
    offsets_hash: str | None = None
    """Of offsets.safetensors (see offsets.py); None: there is none, and samples are found by the indices alone."""

    def __post_init__(self) -> None:
        if not isinstance(self.shards, Shards):
            object.__setattr__(self, "shards", Shards.of(self.shards))

    @cached_property
    def samples(self) -> int:
        """Samples over all shards."""
        return total(self.shards.num_samples)

    @cached_property
    def bytes(self) -> int:
        """Bytes of all tars."""
        return total(self.shards.num_bytes)

    @cached_property
    def num_codes(self) -> int:
        """Codes of all images."""
        return total(self.shards.num_codes)

    @cached_property
    def group_samples(self) -> int:
        """Samples of a group: the largest power of two of them that has 32 KiB on average, at least 1. What is read together is
        whole groups of a shard, counted from its first sample."""
        return 1 << max((_GROUP_BYTES * self.samples // max(self.bytes, 1)).bit_length() - 1, 0)

    @cached_property
    def data_types(self) -> dict[str, int]:
        """Samples by data type over all shards."""
        return self.shards.data_types()

    @property
    def members(self) -> tuple[str, ...]:
        """Suffixes over all shards, in the order of their first shard."""
        return tuple(dict.fromkeys(member for members, _ in self.shards.kinds for member in members))

    @property
    def code_columns(self) -> list[str]:
        """Columns of codes that its samples have, whether or not `codes` says of what."""
        return [member.removesuffix(".npy") for member in self.members if is_code_column(member)]

    @cached_property
    def layouts(self) -> dict[str, CodeGrid]:
        """Code column -> what its arrays are."""
        return code_layouts(self.codes)

    def layout(self, column: str) -> CodeGrid:
        """What the arrays of a code column are; (h, w) if nothing is said of it.

        Args:
            column: its name, such as "vqcode_512".
        """
        return self.layouts.get(column, HW)

    @property
    def is_indexed(self) -> bool:
        """Whether `wds-tools index` found the tars and wrote this manifest for them: no job of this project made them."""
        return self.source.get("command") == INDEX_COMMAND

    @property
    def token_rows(self) -> Mapping[str, Any] | None:
        """Length, vocabulary_size and text_size of rows of tokens, which `wds-tools pack` made; None for samples."""
        return self.source.get("rows") if self.schema_version == ANY_MEMBERS else None

    def fingerprint(self) -> str:
        """The identity of the data: "sha256:<hex>" over what training depends on."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(f"{FORMAT} {self.schema_version}\n".encode())
        for part in self.shards.parts():
            lines = [f"{name} {samples} {xxh128}\n" for name, samples, xxh128 in self.shards.lines(*part)]
            digest.update("".join(lines).encode())
        return f"sha256:{digest.hexdigest()}"


@dataclass(frozen=True, kw_only=True)
class _Document:
    """The fields of manifest.json."""

    format: Literal["wds-tools"]
    schema_version: Literal[0, 1, 2]
    fingerprint: str
    inputs: Count
    samples: int
    bytes: int
    data_types: Mapping[str, Count]
    rejects: Mapping[str, Count]
    codes: Mapping[str, Mapping[str, Any]]
    source: Mapping[str, Any]
    shards: list[Any]
    manifest_hash: str | None = None
    rejects_hash: str | None = None
    offsets_hash: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Source:
    """The fields of `source` that are read again."""

    command: str = ""
    part: str = ""
    plan: Mapping[str, Any] = field(default_factory=dict)
    counts: Mapping[str, Count] = field(default_factory=dict)
    inputs: tuple[Mapping[str, Any], ...] = ()
    rows: TokenRows | None = None


def serialize_manifest(manifest: Manifest) -> bytes:
    """The bytes of manifest.json: indented, keys in a fixed order.

    Raises:
        FormatError: they could not be read again: see parse_manifest.
    """
    hashes = {} if manifest.rejects_hash is None else {"manifest_hash": NO_HASH}
    record = {
        "format": FORMAT,
        **hashes,
        "schema_version": manifest.schema_version,
        "fingerprint": manifest.fingerprint(),
        "inputs": manifest.inputs,
        "samples": manifest.samples,
        "bytes": manifest.bytes,
        "data_types": manifest.data_types,
        "rejects": dict(sorted(manifest.rejects.items())),
        **({"rejects_hash": manifest.rejects_hash} if hashes else {}),
        **({"offsets_hash": manifest.offsets_hash} if manifest.offsets_hash is not None else {}),
        "codes": manifest.codes,
        "source": manifest.source,
    }
    data = manifest_text(record, manifest.shards)
    parse_manifest(data)
    return data


def parse_manifest(data: bytes | BinaryIO, name: str = "manifest.json") -> Manifest:
    """Read a manifest.

    Args:
        data: its bytes, or a stream of them, which are then not all in memory.
        name: of the file, for messages.

    Raises:
        FormatError: not a manifest, of a newer schema, one that contradicts itself, or not the bytes that its hash was made of.
        StorageError: they can't be read.
    """
    what = f"{name}: not a manifest that this release reads"
    text = ManifestText(io.BytesIO(data) if isinstance(data, bytes) else data, what)
    try:
        shards = Shards.join(text.shards())
    except FormatError:
        read_json(_Document, text.head, what)  # what is wrong there comes first
        raise
    document = read_json(_Document, text.document, what)
    if shards and document.shards:  # laid out by hand, so that this reader and others would see different ones
        raise FormatError(f"{what} (it has shards in two places)")
    shards = shards or Shards.of_json(document.shards, what, 0)
    shape(_Source, document.source, f"{what}: source")
    code_layouts(document.codes, f"{what}: codes")
    others = {entry.name: getattr(document, entry.name) for entry in fields(Manifest) if entry.name != "shards"}
    manifest = Manifest(shards=shards, **others)
    _check_counts(manifest, name)
    for key in ("samples", "bytes", "data_types"):
        _check_stated(name, key, getattr(document, key), getattr(manifest, key))
    _check_stated(name, "fingerprint", document.fingerprint, manifest.fingerprint())
    if (document.manifest_hash is None) != (document.rejects_hash is None):
        raise FormatError(f"{name}: has one of manifest_hash and rejects_hash, which are written together: it was damaged")
    if document.manifest_hash is not None:
        _check_stated(name, "manifest_hash", document.manifest_hash, text.hash())
    return manifest


def code_layouts(codes: Mapping[str, Mapping[str, Any]], what: str = "codes") -> dict[str, CodeGrid]:
    """Code column -> what its arrays are, from their provenance. Raises FormatError, which names `what` and the column."""
    return {column: shape(CodeGrid, made, f"{what}.{column}") for column, made in codes.items()}


def check_one_code_set(what: str, kinds: Iterable[Iterable[str]], known: Collection[str], first: Sequence[str], how: str) -> None:
    """Raise UsageError for samples that have codes of `known`, but none of `first`, which are those of one code set.

    Args:
        what, how: the message begins and ends so.
        kinds: names of all that samples of a kind have.
        known, first: names of all codes, and of those that are read.
    """
    for kind in kinds:
        if (others := sorted({*kind}.intersection(known))) and {*others}.isdisjoint(first):
            raise UsageError(
                f"{what} has samples with {', '.join(others)} beside others with {', '.join(first)}: codes of different "
                f"tokenizers; {how}"
            )


def check_one_tokenizer(datasets: Iterable[tuple[str, Manifest, Iterable[str]]]) -> None:
    """Hold that what is made of several datasets can say of each column of codes what they are.

    Args:
        datasets: URL, manifest, and the code columns that are used, of each.

    Raises:
        UsageError: in columns of one name they are of several tokenizers, or lie otherwise.
    """
    seen: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for url, manifest, columns in datasets:
        for column in columns:
            made = {**manifest.codes.get(column, {}), **asdict(manifest.layout(column))}
            first, before = seen.setdefault(column, (url, made))
            if differs := [name for name in _ONE_TOKENIZER if before.get(name) != made.get(name)]:
                raise UsageError(
                    f"{column} of {url} is of another {differs[0]} ({made.get(differs[0])}) than that of {first} "
                    f"({before.get(differs[0])}): codes of different image tokenizers don't go into one column"
                )


def ancestors(source: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a manifest's `source`, in which anything may stand, says of the datasets that it was made of, and of theirs in turn.

    The nearest come first; each has `rejects`, by reason, and may have `url` and `source`.
    """
    found: list[Mapping[str, Any]] = [{"source": source}]
    for made in found:  # which grows meanwhile
        if isinstance(earlier := made.get("source"), Mapping):
            several = earlier.get("inputs")
            inputs = [earlier.get("input"), *(several if isinstance(several, list | tuple) else ())]
            found += [each for each in inputs if isinstance(each, Mapping) and isinstance(each.get("rejects"), Mapping)]
    return found[1:]


def shard_info_from_json(record: Mapping[str, Any]) -> ShardInfo:
    """A ShardInfo from its JSON form. Raises FormatError: a field is missing, unknown, or of another type."""
    return shape(ShardInfo, record, "not the row of a shard")


def _check_stated(name: str, key: str, stated: object, actual: object) -> None:
    if stated != actual:
        raise FormatError(f"{name}: states {key} {stated!r}, but its contents make it {actual!r}: it was edited or damaged")


def _check_counts(manifest: Manifest, name: str) -> None:
    """Raise FormatError unless every input is accounted for and every shard has a name of its own and could be as it says."""
    shards, last, are_ascending = manifest.shards, "", True
    for part in shards.parts():
        names = shards.names_of(*part)
        if not are_plain_names(names):
            odd = next(each for each in names if not are_plain_names([each]))
            raise FormatError(f"{name}: the shard name {odd!r} is not a plain relative path, such as shard-000000-0000.tar")
        are_ascending = are_ascending and all(map(lt, [last, *names], names))
        last = names[-1]
    typed = np.append(0, np.cumsum(shards.counts.values))[shards.counts.bounds]
    is_odd = (np.diff(shards.counts.bounds) > 0) & (np.diff(typed) != shards.num_samples)
    for number in np.flatnonzero(is_odd | (shards.num_samples * _LEAST_SAMPLE_BYTES > shards.num_bytes)).tolist():
        shard = shards[number]
        if shard.samples * _LEAST_SAMPLE_BYTES > shard.bytes:
            problem = f"samples={shard.samples} can't be in {shard.bytes} bytes: each has {_LEAST_SAMPLE_BYTES} or more"
        else:
            problem = f"data_types={shard.data_types!r} do not add up to {shard.samples} samples"
        raise FormatError(f"{name}: {shard.name}: {problem}")
    rejects = sum(manifest.rejects.values())
    if manifest.inputs != manifest.samples + rejects:
        raise FormatError(
            f"{name}: {manifest.inputs} inputs are not {manifest.samples} samples + {rejects} rejects: "
            f"{manifest.inputs - manifest.samples - rejects} records are unaccounted for"
        )
    counts = Counter(() if are_ascending else chain.from_iterable(shards.names_of(*part) for part in shards.parts()))
    if repeated := next((each for each, count in counts.items() if count > 1), None):
        raise FormatError(f"{name}: names the shard {repeated} more than once")


def are_plain_names(names: Iterable[str]) -> bool:
    """Whether each can name a shard: it leads nowhere but to a file inside the dataset, on every backend."""
    text = f"/{'/'.join(names)}/"
    return text.isprintable() and not any(each in text for each in ("\\", "//", "/./", "/../"))
