"""Manifests -> README.md: the dataset card that the Hugging Face Hub shows, and what says which export lies here.

A yaml header (what `load_dataset` and the Hub's viewer read: features, counts, where the files are) and a page for people: what
the rows are, where they come from, with which tokenizer, how to load them. A pure function of the manifests and the settings, so
an export that carries the same card was made of the same data in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import orjson

from wds_tools.export.rows import Format
from wds_tools.format.manifest import Manifest
from wds_tools.records.coded import COLUMNS

NAME = "README.md"
TAG = "wds-tools"
LIQUID_TYPES = ("image_text", "text_pretrain")
"""Data types of which Liquid's trainer makes what they are; of any other it takes the text column for a document."""
_MEANING = {
    "data_type": "`image_text` (a square image and its caption), `image_text_multi` (an image of its own shape), `text_pretrain`"
    ", `visual_sft` (a conversation about any number of images)",
    "text": "the caption, the document, or the conversation as JSON: `conversations`, and the `grids` of its codes",
    "length": "characters of text + 4 x number of codes",
    "vqcode_512": "codes of the 512 px centre crop, row by row: a JSON list in a string; `no` if there are none",
    "vqcode_multi768": "the same for an image of `width` x `height` pixels",
    "width": "pixels of the cropped image, as a string; `no` if there are none",
    "height": "the same",
}
_SIZES = (("n<1K", 10**3), ("1K<n<10K", 10**4), ("10K<n<100K", 10**5), ("100K<n<1M", 10**6), ("1M<n<10M", 10**7))
_LARGER = (("10M<n<100M", 10**8), ("100M<n<1B", 10**9), ("1B<n<10B", 10**10), ("10B<n<100B", 10**11), ("100B<n<1T", 10**12))


def serialize_card(
    manifests: Sequence[Manifest],
    file_format: Format,
    *,
    data_types: Mapping[str, int],
    left_out: Mapping[str, int],
    files: int,
    seed: int | None,
    columns: Mapping[str, str],
    fingerprint: str,
    license_id: str | None,
    num_bytes: int | None = None,
) -> bytes:
    """The card of an export.

    Args:
        manifests: of the datasets that are in it.
        file_format: what kind of files it has.
        data_types: rows by data type.
        left_out: samples that are not in it, by data type.
        files: how many.
        seed: of the shuffle; None: the rows are in the order of the datasets, and typed.
        columns: name -> type.
        fingerprint: of the rows and their order.
        license_id: as the Hub names licences, such as cc-by-4.0.
        num_bytes: of the rows in Arrow's memory; None as long as it is not known.
    """
    rows = sum(data_types.values())
    order = "in the order of the datasets" if seed is None else f"shuffled with seed {seed}"
    header = "\n".join(["---", *_yaml(_header(rows, num_bytes, file_format, license_id, is_typed=seed is None)), "---"])
    lines = [
        "# Image tokens and text",
        "",
        f"{rows:,} rows in {files:,} files, {order}: {_counts(data_types)}.",
        f"Fingerprint {fingerprint}.",
        *(() if seed is None else _about_liquid(data_types, left_out)),
        "",
        "| column | type | |",
        "|---|---|---|",
        *(f"| `{name}` | {dtype} | {_MEANING.get(name, '') if seed is not None else ''} |" for name, dtype in columns.items()),
        "",
        "## Where it comes from",
        "",
        *(line for manifest in manifests for line in _provenance(manifest)),
        "",
        "## Load it",
        "",
        "```python",
        *_how_to_load(file_format),
        "```",
        "",
        "Made by wds-tools; `wds-tools convert coded` makes shards of it again"
        + ("." if seed is None else ": tell it the tokenizer, codebook size, stride and"),
        *(() if seed is None else ("weights hash that stand above.",)),
    ]
    return "\n".join([header, "", *lines, ""]).encode()


def unknown_to_liquid(data_types: Mapping[str, int]) -> dict[str, int]:
    """Of counts by data type those that Liquid's own trainer takes for plain text."""
    return {name: count for name, count in sorted(data_types.items()) if name not in LIQUID_TYPES}


def _about_liquid(data_types: Mapping[str, int], left_out: Mapping[str, int]) -> Iterator[str]:
    knows = f"Liquid's own trainer knows {' and '.join(f'`{name}`' for name in LIQUID_TYPES)} only"
    if strange := unknown_to_liquid(data_types):
        yield f"{knows}: it takes the `text` of the others ({_counts(strange)}) for plain text, and never sees their images."
    if left_out:
        yield f"{knows}, so these samples were left out: {_counts(left_out)}."


def _header(rows: int, num_bytes: int | None, file_format: Format, license_id: str | None, *, is_typed: bool) -> dict[str, Any]:
    header: dict[str, Any] = {} if license_id is None else {"license": license_id}
    header["tags"] = [TAG, "image-tokens", "webdataset"]
    header["size_categories"] = [next((name for name, limit in (*_SIZES, *_LARGER) if rows < limit), "n>1T")]
    features = [] if is_typed else [{"name": name, "dtype": dtype} for name, dtype in COLUMNS.items()]
    header["dataset_info"] = {"features": features} if features else {}
    if num_bytes is not None:
        header["dataset_info"]["splits"] = [{"name": "train", "num_bytes": num_bytes, "num_examples": rows}]
    if file_format == "parquet":
        header["configs"] = [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}]
    return header


def _yaml(record: Mapping[str, Any]) -> Iterator[str]:
    """As yaml, of which JSON is a part: one line for each field."""
    yield from (f"{name}: {orjson.dumps(value).decode()}" for name, value in record.items())


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items()))


def _provenance(manifest: Manifest) -> Iterator[str]:
    plan = manifest.source.get("plan")
    command = plan.get("command") if isinstance(plan, Mapping) else manifest.source.get("command")
    rejects = f"; {sum(manifest.rejects.values()):,} more were rejected ({_counts(manifest.rejects)})" if manifest.rejects else ""
    yield f"- {manifest.samples:,} samples ({_counts(manifest.data_types)}) of `{command}`, {manifest.fingerprint()}{rejects}"
    for column, made in manifest.codes.items():
        weights = f", weights {made['weights_hash']}" if made.get("weights_hash") else ""
        facts = f"{manifest.layout(column)}, stride {made.get('stride')}, {made.get('precision')}{weights}"
        yield f"    - `{column}`: tokenizer {made.get('tokenizer')}, {facts}"


def _how_to_load(file_format: Format) -> tuple[str, ...]:
    if file_format == "arrow":
        return "from datasets import load_from_disk", "", 'rows = load_from_disk("PATH")'
    return "from datasets import load_dataset", "", 'rows = load_dataset("PATH", split="train")'
