"""A folder of images, with a text beside each -> records.

    a/b.jpg  a/b.txt  a/b.json  ->  {"jpg": ImageFile, "txt": str, "json": {...}, and the fields of the json}

A sidecar has the name of its image, with another suffix (b.txt) or with one more (b.jpg.txt). Images below a folder that holds
records (metadata.jsonl, metadata.csv, a Parquet file) belong to these, which name them: only the records are read then.
An image without a sidecar is a record too, of nothing but the image; a text without an image is none. Images are not read here.
Memory: the texts of some records.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from wds_tools.errors import Reject
from wds_tools.format.schema import IMAGE_EXTENSIONS
from wds_tools.records.images import ImageFile
from wds_tools.sources.containers import Unit
from wds_tools.sources.detect import suffix_of
from wds_tools.sources.record import InputFile, Record
from wds_tools.sources.tars import sample_fields
from wds_tools.storage import join, open_store, split_url

IMAGE_SUFFIXES = frozenset((*IMAGE_EXTENSIONS, "jpeg", "tiff", "avif"))
_ABOUT, _STATS = ".parquet", "_stats.json"
SIDECAR_SUFFIXES = frozenset(("txt", "caption", "json"))
_MAX_SIDECAR_BYTES = 4 << 20
_UNIT_RECORDS, _UNIT_BYTES = 500, 64 << 20
_PARALLEL_READS = 16


def pictures_of(names: Iterable[str]) -> set[str]:
    """The images among the files of a folder, by their names, and their sidecars."""
    images = {name for name in names if _suffix(name) in IMAGE_SUFFIXES and not posixpath.basename(name).startswith(".")}
    stems = images | {posixpath.splitext(name)[0] for name in images}
    return images | {name for name in names if _suffix(name) in SIDECAR_SUFFIXES and posixpath.splitext(name)[0] in stems}


def named_by_records(pictures: Iterable[str], records: Iterable[str]) -> set[str]:
    """Those of `pictures_of` that belong to files of records: which lie in their folder, or in one above. Tars name no others."""
    claimed = {posixpath.dirname(name) for name in records if suffix_of(name)[0] != "tar"}
    return {name for name in pictures if any(folder in claimed for folder in _folders(name))}


def companions(names: Iterable[str], pictures: Iterable[str]) -> set[str]:
    """What img2dataset writes about its output, and nobody needs to read it: X.parquet and X_stats.json beside X.tar, or both
    beside a folder X of pictures."""
    names = {*names}
    tars = {name[:-4] for name in names if name.lower().endswith(".tar")}
    folders = {folder for folder in map(posixpath.dirname, pictures) if {folder + _ABOUT, folder + _STATS} <= names}
    return {stem + suffix for suffix in (_ABOUT, _STATS) for stem in tars | folders} & names


@dataclass(frozen=True)
class Folders:
    """Container of images with their sidecars; a unit is some samples, one after the other by name, with the files of each.

    A record's key is the name of its image without the suffix.
    """

    def units(self, files: Sequence[InputFile]) -> Iterator[Unit]:
        """See Container."""
        images = {file.url: posixpath.splitext(file.url)[0] for file in files if _suffix(file.url) in IMAGE_SUFFIXES}
        samples: dict[str, list[InputFile]] = {}
        for file in files:
            stem = posixpath.splitext(file.url)[0]
            samples.setdefault(images.get(stem, stem), []).append(file)
        unit: list[list[InputFile]] = []
        num_bytes = 0
        for stem in sorted(samples):
            sample = sorted(samples[stem])
            sample_bytes = sum(file.size for file in sample)
            if unit and (len(unit) >= _UNIT_RECORDS or num_bytes + sample_bytes > _UNIT_BYTES):
                yield _unit(unit, num_bytes)
                unit, num_bytes = [], 0
            unit.append(sample)
            num_bytes += sample_bytes
        if unit:
            yield _unit(unit, num_bytes)

    def read(self, unit: Unit) -> Iterator[Record[Mapping[str, Any]]]:
        """See Container."""
        with ThreadPoolExecutor(_PARALLEL_READS, "sidecar") as pool:
            for first in range(0, len(unit.place), _PARALLEL_READS):
                some = unit.place[first : first + _PARALLEL_READS]
                for number, fields in enumerate(pool.map(lambda names: _fields(unit.url, names), some), first):
                    names = unit.place[number]
                    key = posixpath.splitext(min(names, key=len))[0]
                    num_units = unit.num_bytes * (number + 1) // len(unit.place) - unit.num_bytes * number // len(unit.place)
                    yield Record(number, fields, join(unit.url, names[0]), key=key, num_units=num_units)


def _unit(samples: Sequence[Sequence[InputFile]], num_bytes: int) -> Unit:
    """Of these samples; names are relative to the folder that all have in common."""
    folder = posixpath.commonprefix([file.url for sample in samples for file in sample]).rpartition("/")[0]
    names = tuple(tuple(file.url[len(folder) :].lstrip("/") for file in sample) for sample in samples)
    return Unit(folder or ("/" if samples[0][0].url.startswith("/") else "."), num_bytes, len(samples), names)


def _fields(folder: str, names: Sequence[str]) -> dict[str, Any] | Reject:
    members: dict[str, Any] = {}
    for name in names:
        suffix, url = _suffix(name), join(folder, name)
        if suffix in members:
            return Reject("duplicate_member", f"two files with the suffix {suffix}: {name[:300]}")
        members[suffix] = ImageFile(url) if suffix in IMAGE_SUFFIXES else _text(url)
        if members[suffix] is None:
            return Reject("sample_too_large", f"{name[:300]} has more than {_MAX_SIDECAR_BYTES} bytes")
    return sample_fields(members)


def _text(url: str) -> bytes | None:
    root, name = split_url(url)
    with open_store(root).open(name) as stream:
        data = stream.read(_MAX_SIDECAR_BYTES + 1)
    return data if len(data) <= _MAX_SIDECAR_BYTES else None


def _suffix(name: str) -> str:
    return posixpath.splitext(name)[1][1:].lower()


def _folders(name: str) -> Iterator[str]:
    """The folders that a file lies in, up to "" or "/"."""
    while (folder := posixpath.dirname(name)) != name:
        yield folder
        name = folder
