"""The manifest of a data set: one row a shard, totals, what was rejected, and where everything came from.

`manifest.json` is written last; its existence means that the data set is complete. `fingerprint()` hashes what training
depends on (schema version, shard names, sample counts and content hashes, in order) and nothing else, so a data set that was
copied elsewhere keeps it and one that was changed does not.
Invariant: inputs = samples + rejects. Cost: about 250 bytes a shard.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import orjson

from wds_tools.errors import FormatError
from wds_tools.format.schema import ANY_MEMBERS, SCHEMA_VERSION

NAME = "manifest.json"
FORMAT = "wds-tools"
INDEX_COMMAND = "index"
"""As `source["command"]`: see Manifest.is_indexed."""
_XXH128 = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRow:
    """What the manifest says of one shard."""

    name: str
    """File name relative to the data set, such as "shard-000000-0000.tar"."""
    samples: int
    bytes: int
    """Size of the tar."""
    xxh128: str
    """XXH3-128 of the tar's bytes, as `xxh128sum` prints it."""
    members: tuple[str, ...]
    """Suffixes that its samples have, in file order."""
    data_types: Mapping[str, int]
    """Samples by data type."""
    text_chars: int
    num_codes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A complete data set."""

    shards: tuple[ShardRow, ...]
    inputs: int
    """Records read: samples + rejects."""
    rejects: Mapping[str, int] = field(default_factory=dict)
    """Records not taken, by reason; each has a line under rejects/."""
    codes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Code column -> its provenance: tokenizer, codebook_size, stride, weights_hash, preprocessing_version, precision, ..."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """What made it: command, settings, input files; for a pass over a data set, that one's fingerprint and own source."""
    schema_version: int = SCHEMA_VERSION
    """Of its samples; ANY_MEMBERS if they are WebDataset samples of other kinds: then nothing is counted but them."""

    @property
    def samples(self) -> int:
        """Samples over all shards."""
        return sum(row.samples for row in self.shards)

    @property
    def bytes(self) -> int:
        """Bytes of all tars."""
        return sum(row.bytes for row in self.shards)

    @property
    def data_types(self) -> dict[str, int]:
        """Samples by data type over all shards."""
        total: Counter[str] = Counter()
        for row in self.shards:
            total.update(row.data_types)
        return dict(sorted(total.items()))

    @property
    def members(self) -> tuple[str, ...]:
        """Suffixes over all shards, in the order of their first shard."""
        kinds = dict.fromkeys(row.members for row in self.shards)
        return tuple(dict.fromkeys(member for members in kinds for member in members))

    @property
    def is_indexed(self) -> bool:
        """Whether `wds-tools index` found the tars and wrote this manifest for them: no pass of this project made them."""
        return self.source.get("command") == INDEX_COMMAND

    @property
    def token_rows(self) -> Mapping[str, Any] | None:
        """Length, vocabulary_size and text_size of rows of tokens, which `wds-tools pack` made; None for samples."""
        rows = self.source.get("rows")
        return rows if isinstance(rows, Mapping) and self.schema_version == ANY_MEMBERS else None

    def fingerprint(self) -> str:
        """ "sha256:<hex>" over what training depends on."""
        digest = hashlib.sha256(f"{FORMAT} {self.schema_version}\n".encode())
        for row in self.shards:
            digest.update(f"{row.name} {row.samples} {row.xxh128}\n".encode())
        return f"sha256:{digest.hexdigest()}"


def pack_manifest(manifest: Manifest) -> bytes:
    """The bytes of manifest.json: indented, keys in a fixed order.

    Raises:
        FormatError: inputs are not samples + rejects, or a value is impossible (see check_counts).
    """
    check_counts(manifest)
    record = {
        "format": FORMAT,
        "schema_version": manifest.schema_version,
        "fingerprint": manifest.fingerprint(),
        "inputs": manifest.inputs,
        "samples": manifest.samples,
        "bytes": manifest.bytes,
        "data_types": manifest.data_types,
        "rejects": dict(sorted(manifest.rejects.items())),
        "codes": manifest.codes,
        "source": manifest.source,
        "shards": [asdict(row) for row in manifest.shards],
    }
    return orjson.dumps(record, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def unpack_manifest(data: bytes, name: str = NAME) -> Manifest:
    """Read a manifest.

    Raises:
        FormatError: not a manifest, of a newer schema, or one that contradicts itself.
    """
    try:
        record = orjson.loads(data)
        if record["format"] != FORMAT:
            raise FormatError(f"{name}: format {record['format']!r}, expected {FORMAT!r}")
        if record["schema_version"] not in (ANY_MEMBERS, SCHEMA_VERSION):
            raise FormatError(f"{name}: schema version {record['schema_version']}, this release reads {SCHEMA_VERSION}")
        manifest = Manifest(
            shards=tuple(row_from_json(row) for row in record["shards"]),
            inputs=record["inputs"],
            rejects=record["rejects"],
            codes=record["codes"],
            source=record["source"],
            schema_version=record["schema_version"],
        )
        stated = {key: record[key] for key in ("samples", "bytes", "data_types", "fingerprint")}
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{name}: not a manifest of this format ({type(error).__name__}: {error})") from error
    check_counts(manifest, name)
    found = {
        "samples": manifest.samples,
        "bytes": manifest.bytes,
        "data_types": manifest.data_types,
        "fingerprint": manifest.fingerprint(),
    }
    for key, value in stated.items():
        if value != found[key]:
            raise FormatError(
                f"{name}: states {key} {value!r}, but its shards add up to {found[key]!r}: it was edited or damaged"
            )
    return manifest


def row_from_json(record: Mapping[str, Any]) -> ShardRow:
    """A ShardRow from its JSON form; its values are checked by `check_counts`.

    Raises:
        KeyError, TypeError: a field is missing or unknown.
    """
    members = record["members"]
    if not isinstance(members, list | tuple):
        raise TypeError(f"members is a {type(members).__name__}, expected a list")
    return ShardRow(**{**record, "members": tuple(members)})


def check_counts(manifest: Manifest, name: str = NAME) -> None:
    """Raise FormatError unless every value can be meant, every input is accounted for and every shard has a name of its own."""
    for row in manifest.shards:
        _check_row(row, name)
    if not _is_count(manifest.inputs) or not _is_tally(manifest.rejects):
        raise FormatError(f"{name}: inputs={manifest.inputs!r} and rejects={manifest.rejects!r} are not numbers of records")
    if not isinstance(manifest.source, Mapping) or not isinstance(manifest.codes, Mapping):
        raise FormatError(f"{name}: source and codes are {manifest.source!r} and {manifest.codes!r}, expected objects")
    if not all(isinstance(provenance, Mapping) for provenance in manifest.codes.values()):
        raise FormatError(f"{name}: codes is {manifest.codes!r}, expected an object with one of fields per column")
    rejects = sum(manifest.rejects.values())
    if manifest.inputs != manifest.samples + rejects:
        raise FormatError(
            f"{name}: {manifest.inputs} inputs are not {manifest.samples} samples + {rejects} rejects: "
            f"{manifest.inputs - manifest.samples - rejects} records are unaccounted for"
        )
    if repeated := _repeated(row.name for row in manifest.shards):
        raise FormatError(f"{name}: names the shard {repeated} more than once")


def is_plain_name(name: object) -> bool:
    """Whether it can name a shard: it leads nowhere but to a file inside the data set, on every backend."""
    return (
        isinstance(name, str)
        and all(segment not in ("", ".", "..") for segment in name.split("/"))
        and name.isprintable()
        and "\\" not in name
    )


def _check_row(row: ShardRow, name: str) -> None:
    if not is_plain_name(row.name):
        raise FormatError(f"{name}: the shard name {row.name!r} is not a plain relative path, such as shard-000000-0000.tar")
    where = f"{name}: {row.name}"
    for what in ("samples", "bytes", "text_chars", "num_codes"):
        if not _is_count(getattr(row, what)):
            raise FormatError(f"{where}: {what}={getattr(row, what)!r} is not a number of {what}")
    if not isinstance(row.xxh128, str) or not _XXH128.fullmatch(row.xxh128):
        raise FormatError(f"{where}: xxh128={row.xxh128!r}, expected 32 hexadecimal digits")
    if not all(isinstance(member, str) for member in row.members):
        raise FormatError(f"{where}: members={row.members!r}, expected names")
    if not _is_tally(row.data_types) or (row.data_types and sum(row.data_types.values()) != row.samples):
        raise FormatError(f"{where}: data_types={row.data_types!r} do not add up to {row.samples} samples")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 53  # what every JSON reader keeps exact


def _is_tally(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) and _is_count(count) for key, count in value.items())


def _repeated(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)
