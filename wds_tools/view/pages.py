"""Path and query -> answer, for one dataset: what `server` serves, without HTTP around it.

    /  /sample/N  /rejects  /marks     the page (static/index.html), which asks for the rest:
    /static/NAME                       its parts, from a fixed list
    /api/set samples sample/N search ranked fields find rejects usage/N/COLUMN     JSON
    /picture/N/COLUMN.png        decoded from the codes          /codes/N/COLUMN.png   a pixel a code
    /image/N                     the source image                /stats                the report, of a part of the samples

Invariant: a path is matched against these patterns and never joined to another path; samples are found by number, and what is
read of storage goes through SampleReader and Rejects. Nothing but images is served under a type that a browser would render.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from wds_tools.check.stats.describe import Stats, sample_stats
from wds_tools.check.stats.png import png_bytes
from wds_tools.check.stats.report import main_part
from wds_tools.dataset.reader import read_manifest
from wds_tools.dataset.samples import SampleReader
from wds_tools.errors import DataError, NotFound, UsageError
from wds_tools.format.manifest import ancestors
from wds_tools.format.schema import ANY_MEMBERS
from wds_tools.sequences.tokenizer import TextTokenizer
from wds_tools.storage import Store
from wds_tools.storage.place import place_of
from wds_tools.storage.recent import Recent
from wds_tools.terminal import printable
from wds_tools.view import browse
from wds_tools.view.filters import Ranking, Tables
from wds_tools.view.pictures import Pictures, code_map
from wds_tools.view.rejects import Rejects
from wds_tools.view.token_rows import COLUMN, TokenRows

_SCRIPTS = ("main", "api", "dom", "samples", "sample", "grid", "rejects", "marks", "shell")
_STATIC = {
    **{f"{name}.js": "text/javascript" for name in _SCRIPTS},
    "common.css": "text/css",
    "page.css": "text/css",
    "icon.svg": "image/svg+xml",
}
_IMAGE_TYPES = {"jpg": "jpeg", "jpeg": "jpeg", "png": "png", "webp": "webp", "gif": "gif", "bmp": "bmp", "avif": "avif"}
"""What browsers show; TIFF is made into PNG."""
_PIECE_BYTES = 4 << 20
_MAX_TIFF_PIXELS = 1 << 26
_REJECTS_COUNT = 100
_KEPT_RANKINGS = 8
_LOADING = '<main id="main"><div class="state" role="status"><b>Loading</b></div></main>'


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A response of status 200."""

    body: bytes | Iterable[bytes]
    """The bytes, or pieces of them whose lengths add up to `length`."""
    content_type: str
    length: int
    is_fixed: bool = False
    """Whether the answer stays the same as long as the dataset does."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The parts of a request beside the path."""

    query: Mapping[str, str]
    is_wanted: Callable[[], bool] = lambda: True
    """Whether somebody still waits for the answer."""

    def word(self, name: str) -> str:
        """A text of the query; "" if it is not there."""
        return self.query.get(name, "")

    def number(self, name: str, default: int = 0) -> int:
        """A whole number of the query.

        Raises:
            UsageError: it is none.
        """
        value = self.query.get(name, str(default))
        if not re.fullmatch(r"\d{1,15}", value, re.ASCII):
            raise UsageError(f"{name}={value[:40]!r}: expected a whole number")
        return int(value)


@dataclass(frozen=True, kw_only=True)
class PagesConfig:
    """Options of what is shown beside the dataset itself."""

    weights: str | None = None
    """Weights of the tokenizer that made the codes, if they are not bundled: for chameleon, its folder."""
    device: str = "auto"
    """Device that decodes pictures: auto, cpu, cuda or cuda:N."""
    text_tokenizer: str | None = None
    """A tokenizer.json or its folder, to show the number of tokens of a text, and the texts of token rows."""


class Pages:
    """The answers for one dataset, for many threads.

    Args:
        store: the dataset.
        config: settings.

    Raises:
        NotFound: there is no manifest.
        FormatError: it is damaged.
        UsageError, TokenizerError, MissingPackage: the text tokenizer can't be loaded.
    """

    def __init__(self, store: Store, config: PagesConfig) -> None:
        manifest = read_manifest(store, any_members=True)
        self.reader = SampleReader(store, manifest)
        self._store = store
        self._rejects = Rejects(store)
        self._tables = Tables(self.reader)
        self._rankings: Recent[tuple[str, str], Ranking] = Recent(_KEPT_RANKINGS, lambda _: 1)
        self._tokenizer = None if config.text_tokenizer is None else TextTokenizer(config.text_tokenizer)
        self._rows: TokenRows | None = None
        if manifest.token_rows is not None:
            manifest = replace(manifest, codes={COLUMN: manifest.source.get("codes") or {}})
            self._rows = TokenRows(manifest.token_rows or {}, self._tokenizer, manifest.layout(COLUMN))
        self._layout = manifest.layout
        self._pictures = Pictures(manifest.codes, config.weights, config.device)
        self._stats: Stats | None = None
        self._stats_lock = threading.Lock()
        self.version = manifest.fingerprint().removeprefix("sha256:")[:16]
        number, column = r"(\d{1,15})", r"([A-Za-z0-9_-]{1,64})"
        routes: tuple[tuple[str, Callable[..., Answer]], ...] = (
            (r"/|/rejects|/marks", lambda _: self._page()),
            (rf"/sample/{number}", self._sample_page),
            (r"/static/([a-z]{1,20}\.[a-z]{1,4})", lambda _, name: _static(name)),
            (r"/stats", lambda _: self._page(main_part(self._sampled(), served=True), "Statistics · ")),
            (r"/api/set", lambda _: _json(self._describe())),
            (r"/api/samples", self._samples),
            (rf"/api/sample/{number}", self._sample),
            (r"/api/search", self._search),
            (r"/api/ranked", self._ranked),
            (r"/api/fields", lambda _: _json({"names": self._tables.names()})),
            (r"/api/find", self._find),
            (r"/api/rejects", self._reject_lines),
            (rf"/api/usage/{number}/{column}", self._usage),
            (rf"/picture/{number}/{column}\.png", self._picture),
            (rf"/codes/{number}/{column}\.png", self._code_map),
            (rf"/image/{number}", self._image),
        )
        self._routes = [(re.compile(pattern, re.ASCII), answer) for pattern, answer in routes]

    def close(self) -> None:
        """End its threads and its process."""
        self.reader.close()
        self._pictures.close()

    def answer(self, path: str, request: Request) -> Answer | None:
        """The answer to a GET; None if there is nothing at this path.

        Args:
            path: from its first '/' on, without the query, as it was sent: nothing here needs percent signs.
            request: the rest.

        Raises:
            WdsToolsError: what is there can't be shown, and why.
        """
        for pattern, answer in self._routes:
            match = pattern.fullmatch(path)
            if match is not None:
                return answer(request, *match.groups())
        return None

    def failure(self, why: str) -> Answer:
        """A page that says why there is no other at an address that a person has opened."""
        said = f"<h1>There is nothing to show here</h1><p>{escape(printable(why))}</p>"
        return self._page(
            f'<main id="main"><div class="state" role="alert">{said}<p><a href="/">All samples</a></p></div></main>',
            "Nothing here · ",
        )

    def _page(self, main: str = "", title: str = "") -> Answer:
        """static/index.html around `main`, which is markup; without, the scripts fill it in."""
        place = place_of(self._store.url)
        page = Template((files(__package__) / "static" / "index.html").read_text(encoding="utf-8")).substitute(
            title=escape(printable(f"{title}{place.rpartition('/')[2]}")),
            where=escape(printable(self._store.url)),
            main=main or _LOADING,
            script="" if main else '<script type="module" src="/static/main.js"></script>',
        )
        return _answer(page.encode(), "text/html")

    def _sample_page(self, _: Request, number: str) -> Answer:
        self.reader.locate(int(number))
        return self._page()

    def _describe(self) -> dict[str, Any]:
        manifest = self.reader.manifest
        return {
            "url": self._store.url,
            "place": place_of(self._store.url),
            "version": self.version,
            "samples": manifest.samples,
            "inputs": manifest.inputs,
            "bytes": manifest.bytes,
            "shards": len(manifest.shards),
            "data_types": manifest.data_types,
            "rejects": dict(manifest.rejects),
            "earlier": list(_earlier(manifest.source)),
            "columns": list(manifest.codes),
            "has_schema": manifest.schema_version != ANY_MEMBERS or self._rows is not None,
            "counts_tokens": self._tokenizer is not None,
        }

    def _samples(self, request: Request) -> Answer:
        return _json(browse.page(self.reader, request.number("first"), request.number("count", 24), rows=self._rows))

    def _sample(self, _: Request, number: str) -> Answer:
        shown = browse.sample(self.reader, int(number), self._rows)
        if self._tokenizer is not None and self._rows is None:  # without those that mark beginning and end
            texts = [shown["text"], *(turn["value"] for turn in shown.get("turns", ()))]
            shown["tokens"] = sum(map(len, self._tokenizer.encode(texts)))
        return _json(shown)

    def _search(self, request: Request) -> Answer:
        query = browse.Query(
            text=request.word("text"), key=request.word("key"), data_type=request.word("type"), where=request.word("where")
        )
        limit = max(1, min(request.number("limit", 24), browse.MAX_COUNT))
        return _json(browse.search(self.reader, self._tables, query, request.number("after"), limit, rows=self._rows))

    def _ranked(self, request: Request) -> Answer:
        """The samples of a page in the order of a field, once all of the dataset is looked at; until then, how far it is."""
        if request.word("text") or request.word("key"):
            raise UsageError("what a search finds has no order by a field: choose by a condition on fields (where) instead")
        by, where, kind, first = request.word("by"), request.word("where"), request.word("type"), request.number("first")
        where = " and ".join(filter(None, (where and f"({where})", kind and f"data_type == {kind!r}")))
        ranking = self._rankings.get((by, where), lambda _: Ranking(self._tables, self.reader, by, where))
        found = ranking.advance(browse.SEARCH_S)
        numbers, last = found.pop("numbers"), first + min(request.number("count", 24), browse.MAX_COUNT)
        shown = numbers[first:last] if found["looked_at"] == len(self.reader) else []
        return _json(found | {"ranked": len(numbers), "samples": browse.cards(self.reader, shown, rows=self._rows)})

    def _find(self, request: Request) -> Answer:
        key = request.word("key")
        return _json({"number": self.reader.find_key(key) if key else None})

    def _reject_lines(self, request: Request) -> Answer:
        position = request.number("file"), request.number("byte")
        return _json(self._rejects.read(request.word("reason"), *position, _REJECTS_COUNT))

    def _usage(self, request: Request, number: str, column: str) -> Answer:
        """How often each code of a grid was used, in the part of the dataset that the report is of."""
        codes = self._cells(number, column, request.number("image"))
        use = self._sampled().count.codes.get(column)
        counts = np.zeros(1, np.int64) if use is None else use.counts
        seen = np.where(codes < len(counts), counts[np.minimum(codes, len(counts) - 1)], 0)
        return _json({"total": int(counts.sum()), "entries": len(counts), "counts": seen.ravel().tolist()})

    def _picture(self, request: Request, number: str, column: str) -> Answer:
        image = request.number("image")
        codes = self._codes(number, column, image)
        kept_as, is_small = (int(number), column, image), bool(request.word("small"))
        return _png(self._pictures.decoded(kept_as, codes, is_small=is_small, is_wanted=request.is_wanted))

    def _code_map(self, request: Request, number: str, column: str) -> Answer:
        return _png(code_map(self._cells(number, column, request.number("image"))))

    def _codes(self, number: str, column: str, image: int) -> NDArray[Any]:
        return browse.codes_of(self.reader, int(number), column, image, self._rows)

    def _cells(self, number: str, column: str, image: int) -> NDArray[Any]:
        """The codes in rows and columns, to be drawn. Raises DataError: they are floats."""
        return self._layout(column).cells(self._codes(number, column, image))

    def _image(self, request: Request, number: str) -> Answer:
        """The source image, piece by piece as it is sent."""
        partial = self.reader.sample(int(number), lambda _: False)
        images, image = partial.images, request.number("image")
        if image >= len(images):
            raise DataError(f"sample {int(number):,} has {len(images)} source images")
        suffix = images[image]
        begin, end = partial.spans[suffix]
        pieces = (
            bytes(self._store.read_range(partial.shard, start, min(start + _PIECE_BYTES, end)))
            for start in range(begin, end, _PIECE_BYTES)
        )
        kind = _IMAGE_TYPES.get(suffix.rpartition(".")[2].lower())
        if kind is not None:
            return Answer(body=pieces, content_type=f"image/{kind}", length=end - begin, is_fixed=True)
        return _png(_tiff_to_png(b"".join(pieces)))

    def _sampled(self) -> Stats:
        with self._stats_lock:
            if self._stats is None:
                self._stats = sample_stats(self._store.url, self.reader)
            return self._stats


def _earlier(source: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What the datasets rejected that this one was made from, one after the other."""
    for made in ancestors(source):
        counts = {str(reason): count for reason, count in made["rejects"].items() if type(count) is int}
        yield {"url": str(made.get("url", "")), "rejects": counts}


def _tiff_to_png(data: bytes) -> bytes:
    from wds_tools.images import ImageLimits, decode_rgb  # Pillow, which nothing else here needs

    return png_bytes(np.asarray(decode_rgb(data, ImageLimits(min_side=1, max_pixels=_MAX_TIFF_PIXELS))))


def _answer(body: bytes, content_type: str, *, is_fixed: bool = False) -> Answer:
    return Answer(body=body, content_type=f"{content_type}; charset=utf-8", length=len(body), is_fixed=is_fixed)


def _json(value: Any) -> Answer:
    return _answer(orjson.dumps(value), "application/json")


def _png(data: bytes) -> Answer:
    return Answer(body=data, content_type="image/png", length=len(data), is_fixed=True)


def _static(name: str) -> Answer:
    if name not in _STATIC:
        raise NotFound(f"there is no part {name!r} of the page")
    return _answer((files(__package__) / "static" / name).read_bytes(), _STATIC[name])
