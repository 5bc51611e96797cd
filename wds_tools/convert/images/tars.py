"""Images in plain tars, by the names that records have for them: `--image-root 'images/{000..199}.tar'`.

    headers of each tar, once, in the process that starts the run -> arrays, sorted by the hash of the name -> workers
    path in a record -> hash -> place -> one read of header and image; the header's name has to be the path

Memory: 28 bytes an image. Cost: one small read a member, of object stores one of 1 MiB where images are smaller than that.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from wds_tools.errors import FormatError, Reject, UsageError
from wds_tools.format.tar import MAX_MEMBER_BYTES, Member, first_name, member_places
from wds_tools.run.progress import Advance, Progress
from wds_tools.storage import LocalStore, open_store, split_url
from wds_tools.terminal import counted, say

_THREADS = 16
_PAGE_BYTES = 4 << 10
_REQUEST_BYTES = 1 << 20
_EXAMPLES = 3
_PLACE = np.dtype([("tar", "<u4"), ("start", "<u8"), ("header_bytes", "<u4"), ("num_bytes", "<u4")])


class TarImages:
    """Finds and reads images. A value that is pickled to workers.

    Args:
        tars: URL and size in bytes of each; of images of one name the first is meant.
        quiet: show no progress.

    Raises:
        UsageError: one is no tar.
        StorageError: one can't be read.
    """

    def __init__(self, tars: Sequence[tuple[str, int]], *, quiet: bool = True) -> None:
        self._tars = tuple(tars)
        scans = []
        with (
            Progress("scan", sum(size for _, size in tars), quiet=quiet, unit="images") as progress,
            ThreadPoolExecutor(_THREADS) as pool,
        ):
            for (_, size), (hashes, places, fault) in zip(tars, pool.map(self._scan, range(len(tars))), strict=True):
                if fault is not None:
                    say(f"wds-tools: {fault}; the {len(places):,} images before that are used", error=True)
                scans.append((hashes, places))
                progress(Advance(units=size, samples=len(places)))
        all_hashes, all_places = map(np.concatenate, zip(*scans, strict=True))
        order = np.argsort(all_hashes, kind="stable")
        self._hashes, self._places = all_hashes[order], all_places[order]
        self._say_repeated()

    def read(self, image_path: str, max_bytes: int) -> bytes:
        """The image's bytes, one more than max_bytes at most.

        Raises:
            Reject: "missing_image" or "outside_root".
            StorageError: a tar can't be read, or is no longer the one whose headers were read.
        """
        name = _plain(image_path)
        if name.startswith("../") or "://" in image_path:
            raise Reject("outside_root", f"{image_path[:300]}: not a path inside the tars of --image-root")
        hash_ = _hash(name)
        first, last = (int(np.searchsorted(self._hashes, np.uint64(hash_), side)) for side in ("left", "right"))
        for place in self._places[first:last]:
            found, data = self._member(place, max_bytes + 1)
            if _plain(found) == name:
                return data
        raise Reject("missing_image", f"{image_path[:300]}: in none of the {len(self._tars)} tars of --image-root")

    def _member(self, place: Any, max_bytes: int) -> tuple[str, bytes]:
        """The name of an image, and its bytes or the first of them."""
        number, start, header_bytes, num_bytes = place.item()
        url, size = self._tars[number]
        root, name = split_url(url)
        data = memoryview(open_store(root).read_range(name, start, start + header_bytes + min(num_bytes, max_bytes), size))
        return first_name(data[:header_bytes], url, start), bytes(data[header_bytes:])

    def _scan(self, number: int) -> tuple[NDArray[np.uint64], NDArray[Any], FormatError | None]:
        """Hashes and places of a tar, and what ends it before its end."""
        url, size = self._tars[number]
        hashes: list[int] = []
        places: list[tuple[int, int, int, int]] = []
        fault = None
        try:
            for member in _places_in(url, size):
                if member.num_dropped > MAX_MEMBER_BYTES:
                    continue
                hashes.append(_hash(_plain(member.name)))
                places.append((number, member.start, member.offset - member.start, member.num_dropped))
        except FormatError as error:
            if not places:
                raise UsageError(f"--image-root: {error}") from error
            fault = error
        return np.array(hashes, np.uint64), np.array(places, _PLACE), fault

    def _say_repeated(self) -> None:
        again = np.flatnonzero(self._hashes[1:] == self._hashes[:-1])
        if len(again):
            names = [self._member(place, 0)[0] for place in self._places[again[:_EXAMPLES]]]
            what = counted(len(again), "image of --image-root has", "images of --image-root have")
            what += f" the name of another, such as {', '.join(names)}"
            say(f"wds-tools: {what}: the first is used, in the order of the tars", error=True)


def _plain(name: str) -> str:
    return posixpath.normpath(name.lstrip("/"))


def _hash(name: str) -> int:
    return xxh3_64_intdigest(name.encode(errors="surrogatepass"))


def _places_in(url: str, size: int) -> Iterator[Member]:
    root, name = split_url(url)
    store = open_store(root)
    step = _PAGE_BYTES if isinstance(store, LocalStore) else _REQUEST_BYTES
    held_start, held = 0, memoryview(b"")

    def read(start: int, end: int) -> memoryview:
        nonlocal held_start, held
        if not held_start <= start <= end <= held_start + len(held):
            held_start = start
            held = memoryview(store.read_range(name, start, min(max(end, start + step), size), size))
        return held[start - held_start : end - held_start]

    return member_places(read, size, url)
