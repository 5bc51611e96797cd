"""`Stats` as JSON values, and as one HTML page: no script, nothing fetched, light and dark.

The same page is a file of its own (styles inside) and part of the viewer (in its frame, with links to samples). All that
comes from data (names, texts, keys, reasons) is escaped here, once, where it is put in.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from html import escape
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
import orjson

from wds_tools.check.stats import plots
from wds_tools.check.stats.count import CodeUse
from wds_tools.check.stats.describe import Stats
from wds_tools.check.stats.duplicates import Repeats
from wds_tools.check.stats.histogram import Histogram
from wds_tools.check.stats.png import png_bytes
from wds_tools.terminal import sized

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_SHOWN_SHARDS = 50
_MAP_WIDTH = 128
"""Codes in a line of the picture of a codebook."""


def to_json(stats: Stats) -> dict[str, Any]:
    """Everything that was found, as values for machines. Histograms are lists of [from, below, count]."""
    manifest, count = stats.manifest, stats.count
    repeats = {"text": stats.text_repeats, "codes": stats.code_repeats}
    return {
        "url": stats.url,
        "fingerprint": manifest.fingerprint(),
        "samples": manifest.samples,
        "counted": count.samples,
        "bytes": manifest.bytes,
        "shards": len(manifest.shards),
        "inputs": manifest.inputs,
        "rejects": dict(manifest.rejects),
        "data_types": dict(sorted(count.data_types.items())),
        "text_chars": _histogram_json(count.text_chars),
        "turns": _histogram_json(count.turns),
        "sample_bytes": _histogram_json(count.sample_bytes),
        "image_bytes": _histogram_json(count.image_bytes),
        "grids": dict(count.grids.most_common()),
        "codes": {column: _use_json(use) for column, use in sorted(count.codes.items())},
        "duplicates": {
            name: {
                **{key: value for key, value in asdict(repeated).items() if key != "largest"},
                "share": repeated.share,
                "largest": [{"copies": copies, "key": key, "text": text} for copies, key, text in stats.largest.get(name, ())],
            }
            for name, repeated in repeats.items()
        },
        "drift": [asdict(shard) for shard in stats.shards],
    }


def _histogram_json(histogram: Histogram) -> dict[str, Any]:
    return {
        "count": histogram.count,
        "mean": histogram.mean,
        "least": histogram.least,
        "most": histogram.most,
        "quantiles": {f"{share:g}": histogram.quantile(share) for share in QUANTILES},
        "bins": [list(item) for item in histogram.bars() if item[2]],
    }


def _use_json(use: CodeUse) -> dict[str, Any]:
    return {
        "codebook_size": use.codebook_size,
        "codes": int(use.counts.sum()),
        "used": use.used,
        "used_share": use.used / use.size,
        "entropy_bits": use.entropy_bits,
        "perplexity": use.perplexity,
        "most_frequent": [
            [int(code), int(use.counts[code])] for code in np.argsort(-use.counts, kind="stable")[:20] if use.counts[code]
        ],
    }


def render(stats: Stats) -> str:
    """The page that is a file of its own."""
    return f"{page_head(f'{stats.url}: statistics')}{main_part(stats)}</body></html>"


def page_head(title: str) -> str:
    """A page that is a file of its own, up to its <main>; </body></html> ends it."""
    style = (files("wds_tools.view") / "static" / "common.css").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>"
    )


def main_part(stats: Stats, *, served: bool = False) -> str:
    """What stands on the page, as its <main>.

    Args:
        stats: what to show.
        served: by the viewer, whose pages of samples it leads to.
    """
    head = f"<header><h1>{escape(stats.url)}</h1>{_scope(stats, served)}</header>{_tiles(*_totals(stats))}"
    sections = "".join(_sections(stats, served))
    footer = f"<footer>{escape(stats.manifest.fingerprint())}</footer>"
    return f'<main class="report">{head}<div class="sections">{sections}</div>{footer}</main>'


def _scope(stats: Stats, served: bool) -> str:
    counted, total = stats.count.samples, stats.manifest.samples
    if counted >= total:
        return f'<p class="scope">All {total:,} samples.</p>'
    hint = f" For all of them: <code>wds-tools stats {escape(stats.url)} --html report.html</code>" if served else ""
    return f'<p class="scope">From {counted:,} of {total:,} samples, spread evenly over the dataset.{hint}</p>'


def _totals(stats: Stats) -> Iterable[tuple[str, str, str]]:
    manifest = stats.manifest
    kinds = ", ".join(f"{kind} {number:,}" for kind, number in manifest.data_types.items()) or ", ".join(manifest.members)
    yield "samples", f"{manifest.samples:,}", kinds
    yield "shards", f"{len(manifest.shards):,}", f"{sized(manifest.bytes)} in all"
    yield "rejects", f"{sum(manifest.rejects.values()):,}", f"of {manifest.inputs:,} inputs"
    for column, use in sorted(stats.count.codes.items()):
        yield column, f"{use.used / max(use.size, 1):.1%}", f"of {use.size:,} codes in use, {use.entropy_bits:.2f} bits"


def _sections(stats: Stats, served: bool) -> Iterable[str]:
    manifest, count = stats.manifest, stats.count
    if count.text_chars.count:
        yield _distribution("Text length", "characters", count.text_chars)
    if count.turns.count:
        yield _distribution("Turns of conversations", "turns", count.turns)
    yield _distribution("Size of a sample in its shard", "bytes", count.sample_bytes)
    if count.image_bytes.count:
        yield _distribution("Source images", "bytes", count.image_bytes)
    if count.grids:
        yield _section("Code grids", _table(("shape", "grids", "share"), _shares(count.grids.most_common(30))))
    for column, use in sorted(count.codes.items()):
        yield _codebook(column, use, manifest.codes.get(column.partition(" ")[0], {}))
    if count.text_chars.count:
        yield _duplicates("Duplicates by text", stats.text_repeats, stats.largest.get("text", ()), "texts", served)
    if count.codes:
        yield _duplicates("Duplicates by codes", stats.code_repeats, stats.largest.get("codes", ()), "codes", served)
    if len(stats.shards) > 1 and count.text_chars.count:
        yield _drift(stats)
    if manifest.rejects:
        rejects = sorted(manifest.rejects.items(), key=lambda item: -item[1])
        yield _section("Rejects", _table(("reason", "records", "share"), _shares(rejects)))
    yield _section("Where it comes from", _provenance(manifest.codes, manifest.source), "wide")


def _distribution(title: str, unit: str, values: Histogram) -> str:
    marks = [(values.quantile(0.5), "median")] if values.count else []
    cells = [("least", values.least), *((f"{share:.0%}", values.quantile(share)) for share in QUANTILES), ("most", values.most)]
    facts = _facts([(name, f"{value:,}") for name, value in cells] + [("mean", f"{values.mean:,.1f}")])
    return _section(title, plots.histogram(values.bars(), unit, marks) + facts)


def _codebook(column: str, use: CodeUse, provenance: Mapping[str, Any]) -> str:
    counts = np.sort(use.counts)[::-1]
    total = max(int(counts.sum()), 1)
    top = ", ".join(f"{code:,} ({use.counts[code] / total:.2%})" for code in np.argsort(-use.counts, kind="stable")[:8])
    facts = _facts(
        [
            ("tokenizer", str(provenance.get("tokenizer", "not stated"))),
            ("entries", f"{use.size:,}"),
            ("in use", f"{use.used:,} ({use.used / max(use.size, 1):.1%})"),
            ("entropy", f"{use.entropy_bits:.3f} of {np.log2(max(use.size, 1)):.3f} bits"),
            ("perplexity", f"{use.perplexity:,.0f}"),
            ("codes counted", f"{counts.sum():,}"),
            ("most frequent", top),
        ]
    )
    picture = base64.b64encode(png_bytes(_map(use.counts))).decode()
    level = 1 / max(use.size, 1), "if all were equally frequent"
    curve = plots.curve((counts / total).tolist(), "share of each code by rank", *level)
    shown = (
        f'<figure class="split"><div>{curve}<figcaption>Share of the codes, by rank</figcaption></div>'
        f'<div><img class="codebook" alt="use of every entry of the codebook" src="data:image/png;base64,{picture}">'
        f"<figcaption>Each entry, {_MAP_WIDTH} a line: brighter is more frequent, black is never</figcaption></div></figure>"
    )
    return _section(f"Codebook: {column}", shown + facts, "wide")


def _map(counts: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A pixel an entry: black for none, then from blue over red to yellow by the logarithm of its count."""
    height = -(-max(len(counts), 1) // _MAP_WIDTH)
    heat = np.zeros(height * _MAP_WIDTH)
    heat[: len(counts)] = np.log1p(counts) / max(np.log1p(counts.max(initial=0)), 1e-9)
    stops = np.array([0.0, 0.05, 0.35, 0.65, 1.0])
    colours = np.array([[10, 10, 14], [38, 30, 82], [136, 34, 106], [227, 89, 51], [252, 255, 164]], float)
    channels = [np.interp(heat, stops, colours[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).astype(np.uint8).reshape(height, _MAP_WIDTH, 3)


def _duplicates(title: str, repeated: Repeats, largest: Sequence[tuple[int, str, str]], what: str, served: bool) -> str:
    how = (
        f"All {what} were compared with each other, by a 64-bit hash."
        if repeated.share_kept == 1
        else f"Estimated: of all contents, a random {repeated.share_kept:.3%} was compared, with all their copies."
    )
    facts = _facts(
        [
            ("superfluous", f"{repeated.extra:,} of {repeated.samples:,} samples ({repeated.share:.2%})"),
            ("contents that stand more than once", f"{repeated.groups:,}"),
            ("different contents", f"{repeated.contents:,}"),
        ]
    )
    rows = [
        (f"{copies:,}", _SampleLink(number, key) if served else key, text)
        for (copies, key, text), (_, number) in zip(largest, repeated.largest, strict=False)
    ]
    return _section(title, f"<p>{how}</p>" + facts + (_table(("copies", "first key", "text"), rows) if rows else ""))


def _drift(stats: Stats) -> str:
    odd = [shard for shard in stats.shards if shard.is_odd]
    limit = "more than 5 % and three times what chance makes of its size"
    summary = f"{len(odd):,} of {len(stats.shards):,} shards differ from a typical one by {limit}."
    text = plots.bands([(shard.name, shard.text_p5, shard.text_p50, shard.text_p95) for shard in stats.shards])
    by_text = plots.bars([(shard.name, shard.text_distance, shard.is_odd) for shard in stats.shards], 0.1)
    parts = [
        f"<p>{summary}</p>",
        f'<figure class="split"><div>{text}<figcaption>Text length: median, and the band of 90 %</figcaption></div>',
        f"<div>{by_text}<figcaption>Texts whose length would have to change to match a typical shard</figcaption></div>",
    ]
    if stats.count.codes:
        by_code = plots.bars([(shard.name, shard.code_distance, shard.is_odd) for shard in stats.shards], 0.1)
        parts.append(f"<div>{by_code}<figcaption>The same for codes, in 64 classes</figcaption></div>")
    rows = [
        (shard.name, f"{shard.samples:,}", f"{shard.text_p50:,}", f"{shard.text_distance:.1%}", f"{shard.code_distance:.1%}")
        for shard in sorted(odd, key=lambda shard: -max(shard.text_distance, shard.code_distance))[:_SHOWN_SHARDS]
    ]
    table = _table(("shard", "samples", "median text", "texts differ", "codes differ"), rows) if rows else ""
    return _section("Drift between shards", "".join(parts) + "</figure>" + table, "wide")


def _provenance(codes: Mapping[str, Mapping[str, Any]], source: Mapping[str, Any]) -> str:
    def block(name: str, value: Any) -> str:
        text = orjson.dumps(value, option=orjson.OPT_INDENT_2).decode()
        return f"<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>"

    return "".join([*(block(column, provenance) for column, provenance in codes.items()), block("source", source)])


def _shares(counts: Sequence[tuple[str, int]]) -> list[tuple[str, str, str]]:
    total = max(sum(count for _, count in counts), 1)
    return [(name, f"{count:,}", f"{count / total:.1%}") for name, count in counts]


def _section(title: str, inside: str, kind: str = "") -> str:
    return f'<section class="{kind}"><h2>{escape(title)}</h2>{inside}</section>'


def _tiles(*tiles: tuple[str, str, str]) -> str:
    shown = (
        f'<div class="tile"><span class="name">{escape(name)}</span><b>{escape(value)}</b><span>{escape(more)}</span></div>'
        for name, value, more in tiles
    )
    return f'<div class="tiles">{"".join(shown)}</div>'


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    shown = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    return f'<dl class="facts">{"".join(shown)}</dl>'


class _SampleLink(NamedTuple):
    """A cell that leads to a sample's page in the viewer."""

    number: int
    key: str


def _table(names: Sequence[str], rows: Iterable[Sequence[str | _SampleLink]]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    body = "".join("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(cell: str | _SampleLink) -> str:
    return escape(cell) if isinstance(cell, str) else f'<a href="/sample/{cell.number}">{escape(cell.key)}</a>'
