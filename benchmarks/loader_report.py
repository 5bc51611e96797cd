"""Results of the loader benchmark -> bars, a table, a plot, the section of docs/benchmarks.md.

A bar is what was aimed at before anything was measured; one that is missed says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

MEASURES = {
    "pairs/samples": "pairs, samples/s",
    "pairs/batches": "pairs in ready batches, samples/s",
    "documents/samples": "documents, samples/s",
}
PLOTTED = ("pairs/samples", "pairs/batches")
SECTION = ("<!-- loader: written by `make bench-loader ARGS=--publish` -->", "<!-- /loader -->")
SVG = "benchmarks-loader.svg"
_MIB = 1 << 20
_TIMES = {  # bars of the issue: x times this way, one process, samples as (text, codes)
    "webdataset": 30.0,
    "hf_map": 20.0,
    "litdata": 1.5,
    "array_record": 1.5,
}


class Bar(NamedTuple):
    """One thing that was aimed at."""

    what: str
    value: float | None
    """None: not measured."""
    aim: float
    is_floor: bool
    """The value should be at least the aim; else at most."""
    unit: str = " x"

    @property
    def is_met(self) -> bool:
        """Whether it was measured and reached."""
        return self.value is not None and (self.value >= self.aim if self.is_floor else self.value <= self.aim)

    @property
    def verdict(self) -> str:
        """met, MISSED or not measured."""
        return "not measured" if self.value is None else "met" if self.is_met else "MISSED"


def bars(results: dict[str, Any]) -> Iterator[Bar]:
    """All that the issue asked for, in its order."""
    titles, speed = results["titles"], results.get("speed", {})
    samples = {way: measured["pairs/samples"] for way, measured in speed.items()}
    for way, aim in _TIMES.items():
        yield Bar(f"one process: samples/s over {titles[way]}", _ratio(samples.get("ours"), samples.get(way)), aim, True)
    batches = {way: measured["pairs/batches"] for way, measured in speed.items()}
    fastest = max(batches.keys() - {"ours", "shard_dataset"}, key=batches.__getitem__, default=None)
    name = f"the fastest peer ({titles[fastest]})" if fastest else "the fastest peer"
    yield Bar(f"ready batches: samples/s over {name}", _ratio(batches.get("ours"), batches.get(fastest)), 2.5, True)
    s3 = results.get("s3", {})
    rates = s3.get("bytes_per_s", {})
    yield Bar("S3: bytes/s over bare GETs of the same ranges", _ratio(rates.get("ours"), rates.get("ranges")), 0.8, True)
    yield Bar("S3: bytes/s over streams of whole objects", _ratio(rates.get("ours"), rates.get("objects")), 0.5, True)
    mean = _ratio(s3.get("bytes"), s3.get("requests"))
    yield Bar("S3: mean request", mean and mean / _MIB, 1.0, True, " MiB")
    index = results.get("index", {})
    yield Bar("`wds-tools index`: samples/s over `energon prepare`", _ratio(index.get("ours"), index.get("energon")), 10.0, True)
    restore = results.get("restore", {})
    for key, size in (("first_60k", "60,000"), ("first_100M", "100 million")):
        first = restore.get(key, {})
        what = f"first batch after a restore at 90 % over a fresh start's, {size} samples"
        yield Bar(what, _ratio(first.get("restored_s"), first.get("fresh_s")), 1.2, False)
    plan = restore.get("plan_100M", {})
    yield Bar("plan of 100 million samples", plan.get("seconds"), 0.2, False, " s")
    yield Bar("plan of 100 million samples, peak memory", plan.get("bytes") and plan["bytes"] / 1e6, 100.0, False, " MB")
    resident = restore.get("memory", {}).get("resident_bytes")
    growth = resident and 100 * (max(resident) / resident[0] - 1)
    yield Bar("resident memory over three epochs: growth after the first", growth, 5.0, False, " %")


def report(results: dict[str, Any], out: Path, docs: Path | None) -> None:
    """Print the table; write the plot to `out`, and with `docs` both plot and section there."""
    text = markdown(results)
    print(text)
    if not results.get("speed"):
        return
    plot = svg(results)
    (out / "loader.svg").write_text(plot)
    if docs is not None:
        (docs / SVG).write_text(plot)
        put_section(docs / "benchmarks.md", SECTION, text)


def put_section(page: Path, marks: tuple[str, str], text: str) -> None:
    """Write what stands between two marks of a page again."""
    before, _, rest = page.read_text().partition(marks[0])
    after = rest.partition(marks[1])[2]
    page.write_text(f"{before}{marks[0]}\n\n{text}\n{marks[1]}{after}")


def markdown(results: dict[str, Any]) -> str:
    """What was measured, as it stands in docs/benchmarks.md under the section's introduction."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [f"Measured {results['date']} on {results['machine']}; {versions}. Median of {results['rounds']}.", ""]
    lines += _speed_table(results)
    lines += [*bar_table(bars(results)), "", *_details(results)]
    return "\n".join(lines) + "\n"


def bar_table(aims: Iterable[Bar]) -> list[str]:
    """Lines of a table of what was aimed at."""
    lines = ["| aim | measured | at least / at most | |", "|---|---|---|---|"]
    for bar in aims:
        value = "" if bar.value is None else f"{_number(bar.value)}{bar.unit}"
        verdict = f"**{bar.verdict}**" if bar.verdict == "MISSED" else bar.verdict
        lines.append(f"| {bar.what} | {value} | {'≥' if bar.is_floor else '≤'} {bar.aim:g}{bar.unit} | {verdict} |")
    return lines


def _speed_table(results: dict[str, Any]) -> list[str]:
    speed, missing = results.get("speed", {}), results["missing"]
    if not speed:
        return []
    lines = [f"![Samples per second of every way to read]({SVG})", ""]
    far = results.get("latency")
    heads = [*MEASURES.values()]
    if far:
        heads.append(f"pairs from S3 at {far['latency_ms']:g} ms: first batch, s; then samples/s")
    lines += [f"| way | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for way, measured in sorted(speed.items(), key=lambda item: -item[1]["pairs/samples"]):
        cells = [f"{measured[measure]:,.0f}" for measure in MEASURES]
        if far:
            cells.append(_from_afar(far["ways"].get(way, {})))
        lines.append(f"| [{results['titles'][way]}](../benchmarks/peers/{way}.py) | {' | '.join(cells)} |")
    lines += [f"| {results['titles'][way]} | missing: {why} |" + " |" * (len(heads) - 1) for way, why in missing.items()]
    return [*lines, ""]


def _from_afar(found: dict[str, Any]) -> str:
    if "why" in found:
        return f"failed: {found['why']}"
    return f"{found['first_s']:.2g}; {found['samples_per_s']:,.0f}" if found else "reads local files alone"


def _details(results: dict[str, Any]) -> Iterator[str]:
    if s3 := results.get("s3"):
        rates = ", ".join(f"{way} {rate / 1e6:,.0f} MB/s" for way, rate in s3["bytes_per_s"].items())
        yield f"S3: {rates}; {s3['bytes'] / 1e6:,.0f} MB in {s3['requests']:,} requests."
    if far := results.get("latency"):
        yield (
            f"S3 at {far['latency_ms']:g} ms and {far['mb_per_s']:g} MB/s a connection: bare GETs of 4 MiB, 64 in flight, "
            f"{far['bare_mb_per_s']:,.0f} MB/s, for which the server took {far['server_busy']:.0%} of a core."
        )
    if index := results.get("index"):
        yield f"Index: {', '.join(f'{way} {rate:,.0f} samples/s' for way, rate in index.items())}."
    if restore := results.get("restore"):
        for key, size in (("first_60k", "60,000"), ("first_100M", "100 million")):
            fresh, restored = (1000 * restore[key][name] for name in ("fresh_s", "restored_s"))
            yield f"First batch, {size} samples: {fresh:,.0f} ms afresh, {restored:,.0f} ms after a restore."
        resident = ", ".join(f"{size / 1e6:,.0f}" for size in restore["memory"]["resident_bytes"])
        yield f"Resident memory after each epoch: {resident} MB."


def svg(results: dict[str, Any]) -> str:
    """Horizontal bars on a logarithmic axis: samples and ready batches a second of each way."""
    speed, titles = results["speed"], results["titles"]
    ways = sorted(speed, key=lambda way: -speed[way]["pairs/samples"])
    values = [speed[way][measure] for way in ways for measure in PLOTTED]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    left, width, row, bar, top = 310, 520, 40, 14, 56
    height = top + row * len(ways) + 34

    def x(value: float) -> float:
        return left + width * (math.log10(value) - low) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 90}" height="{height}" font-family="sans-serif" '
        'font-size="13" fill="#222">',
        '<rect width="100%" height="100%" fill="#fff"/>',
        '<text x="12" y="22" font-size="15" font-weight="bold">Shuffled, decoded samples per second, on one core</text>',
    ]
    for number, (measure, colour) in enumerate(zip(PLOTTED, ("#5b8db8", "#b8cfe0"), strict=True)):
        at = left + 190 * number
        parts.append(f'<rect x="{at}" y="33" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{at + 18}" y="44">{"(text, codes)" if measure == PLOTTED[0] else "in batches of 1,024"}</text>')
    for power in range(low, high + 1):
        at = x(10**power)
        parts.append(f'<path d="M{at:.1f} {top}V{height - 28}" stroke="#ddd"/>')
        parts.append(f'<text x="{at:.1f}" y="{height - 10}" text-anchor="middle" fill="#666">{10**power:,}</text>')
    for number, way in enumerate(ways):
        at = top + row * number + 6
        weight = ' font-weight="bold"' if way == "ours" else ""
        parts.append(f'<text x="{left - 10}" y="{at + bar + 4}" text-anchor="end"{weight}>{escape(titles[way])}</text>')
        colours = ("#c2571a", "#e8a377") if way == "ours" else ("#5b8db8", "#b8cfe0")
        for place, (measure, colour) in enumerate(zip(PLOTTED, colours, strict=True)):
            value, y = speed[way][measure], at + place * bar
            parts.append(f'<rect x="{left}" y="{y}" width="{x(value) - left:.1f}" height="{bar - 1}" fill="{colour}"/>')
            parts.append(f'<text x="{x(value) + 5:.1f}" y="{y + 11}" font-size="11" fill="#555">{value:,.0f}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
