"""What commands say on standard output: a few aligned lines for people, or with --json one object, the same for every command."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from wds_tools.dataset.layout import REJECTS
from wds_tools.format.manifest import ENLARGED, FILTERED, IMAGES, PASSED_OVER, Manifest
from wds_tools.format.schema import ANY_MEMBERS
from wds_tools.terminal import say, sized


@dataclass(frozen=True, kw_only=True)
class Printed:
    """How a command says what came of it."""

    help_group = "messages"

    json: bool = False
    """Print one JSON object instead of lines."""


def show(config: Printed, record: Mapping[str, Any], lines: Iterable[str]) -> None:
    """Say what came of a command: with --json the record, else the lines, which are only made then."""
    if config.json:
        print_json(record)
    else:
        say(*lines)


def print_json(record: Mapping[str, Any]) -> None:
    """One object on standard output, indented. A file's name that is not UTF-8 is in it as Python's json reads it back."""
    try:
        text = orjson.dumps(record, option=orjson.OPT_INDENT_2).decode()
    except TypeError:
        text = json.dumps(record, indent=2)
    say(*text.split("\n"))


def dataset_record(url: str, manifest: Manifest) -> dict[str, Any]:
    """What `print_dataset` says, for machines."""
    return {
        "dataset": url,
        "inputs": manifest.inputs,
        "samples": manifest.samples,
        "data_types": manifest.data_types,
        "members": manifest.members,
        "rejects": manifest.rejects,
        **({"left_out": left_out} if (left_out := manifest.source.get("left_out")) else {}),
        **({"counts": counts} if (counts := manifest.source.get("counts")) else {}),
        "shards": len(manifest.shards),
        "bytes": manifest.bytes,
        "codes": manifest.codes,
        **({"part": part} if (part := manifest.source.get("part")) else {"fingerprint": manifest.fingerprint()}),
    }


def print_dataset(url: str, manifest: Manifest, *, json: bool = False) -> None:
    """Say what a dataset holds and where it is."""
    show(Printed(json=json), dataset_record(url, manifest), describe_dataset(url, manifest))


def aligned(facts: Mapping[str, str]) -> Iterator[str]:
    """A line for each, with its name in front."""
    width = max(map(len, facts))
    return (f"{name:<{width}}  {fact}" for name, fact in facts.items())


def describe_dataset(url: str, manifest: Manifest) -> Iterator[str]:
    """The lines of print_dataset."""
    filtered = {reason: count for reason, count in manifest.rejects.items() if reason in FILTERED}
    listed = {reason: count for reason, count in manifest.rejects.items() if reason not in FILTERED}
    rejected = sum(listed.values())
    facts = {
        "dataset": url,
        "samples": f"{manifest.samples:,} of {manifest.inputs:,} inputs ({describe_samples(manifest)})",
        "rejects": f"{rejected:,} ({itemize(listed)}), listed in {url.rstrip('/')}/{REJECTS}" if rejected else "none",
        "shards": f"{len(manifest.shards):,}, {sized(manifest.bytes)}, {_per_sample(manifest)}",
    }
    if filtered:
        lacking = filtered.get("filtered_missing", 0)
        without = f", {lacking:,} of them without a field that it names" if lacking else ""
        by_where = lacking + filtered.get("filtered", 0)
        dropped = {f"dropped by --where{without}": by_where, "not chosen": filtered.get("not_chosen", 0)}
        dropped["equal to an earlier one (--unique)"] = filtered.get("duplicate", 0)
        facts["filtered"] = ", ".join(f"{count:,} {what}" for what, count in dropped.items() if count)
    if isinstance(left_out := manifest.source.get("left_out"), dict):
        files = left_out.get("files")
        facts["left out"] = f"{files} file{'' if files == 1 else 's'}, not read as records, such as {left_out.get('such_as')}"
    counts = manifest.source.get("counts")
    if isinstance(counts, dict) and IMAGES in counts:
        enlarged = f", {counts.get(ENLARGED)} smaller than their crop, so enlarged (convert with --min-side leaves such out)"
        facts["images"] = f"{counts[IMAGES]}{enlarged if ENLARGED in counts else ''}"
    if isinstance(counts, dict) and PASSED_OVER in counts:
        facts["passed over"] = f"{counts[PASSED_OVER]} members of tars that are of no sample: hidden, without suffix, links"
    for column, provenance in manifest.codes.items():
        settings = [str(manifest.layouts[column])]
        settings += [str(provenance.get("precision", "unknown precision")), *(["compiled"] if provenance.get("compile") else [])]
        settings += [f"resized by {provenance['resize']}"] if "resize" in provenance else []
        facts[column] = f"{provenance.get('tokenizer', 'unknown tokenizer')}, {', '.join(settings)}"
    if part := manifest.source.get("part"):
        facts["part"] = f"{part}, nothing else is counted here; when all parts are through: wds-tools finalize --output {url}"
    else:
        facts["fingerprint"] = manifest.fingerprint()
    return aligned(facts)


def describe_samples(manifest: Manifest) -> str:
    """What kind of samples a dataset holds."""
    if rows := manifest.token_rows:
        return f"token rows of {rows['length']:,}"
    if manifest.schema_version != ANY_MEMBERS:
        return itemize(manifest.data_types)
    return f"WebDataset samples of any members: {', '.join(manifest.members) or 'none'}"


def itemize(counts: Mapping[str, int]) -> str:
    """Counts by name, the largest first."""
    return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1])) or "nothing"


def _per_sample(manifest: Manifest) -> str:
    return f"{manifest.bytes / manifest.samples:,.0f} bytes a sample" if manifest.samples else "empty"
