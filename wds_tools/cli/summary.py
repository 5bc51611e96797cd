"""What a finished pass says on standard output: a few aligned lines, the same for every command."""

from __future__ import annotations

from collections.abc import Mapping

from wds_tools.dataset.write import REJECTS
from wds_tools.format.manifest import Manifest
from wds_tools.format.schema import ANY_MEMBERS


def print_data_set(url: str, manifest: Manifest) -> None:
    """Say what a data set holds and where it is."""
    rejected = sum(manifest.rejects.values())
    facts = {
        "data set": url,
        "samples": f"{manifest.samples:,} of {manifest.inputs:,} inputs ({describe_samples(manifest)})",
        "rejects": f"{rejected:,} ({_counts(manifest.rejects)}), listed in {url.rstrip('/')}/{REJECTS}" if rejected else "none",
        "shards": f"{len(manifest.shards):,}, {manifest.bytes / 1e6:,.1f} MB, {_per_sample(manifest)}",
    }
    for column, provenance in manifest.codes.items():
        facts[column] = f"{provenance['tokenizer']}, {provenance['codebook_size']:,} codes, {provenance['precision']}"
    facts["fingerprint"] = manifest.fingerprint()
    width = max(map(len, facts))
    for name, fact in facts.items():
        print(f"{name:<{width}}  {fact}")


def describe_samples(manifest: Manifest) -> str:
    """What kind of samples a data set holds."""
    if rows := manifest.source.get("rows"):
        return f"token rows of {rows['length']:,}"
    if manifest.schema_version != ANY_MEMBERS:
        return _counts(manifest.data_types)
    return f"WebDataset samples of any members: {', '.join(manifest.members) or 'none'}"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1])) or "nothing"


def _per_sample(manifest: Manifest) -> str:
    return f"{manifest.bytes / manifest.samples:,.0f} bytes a sample" if manifest.samples else "empty"
