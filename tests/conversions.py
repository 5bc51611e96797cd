"""Every conversion, with a small input that makes several tasks and has records that can't be used: for tests of all of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
from commands import image_bytes, write_documents, write_jsonl, write_pairs
from factory import random_codes

Words = list[str | Path]
NUM_RECORDS = 12


def _pairs(folder: Path) -> Words:
    path = write_pairs(folder, NUM_RECORDS)
    (folder / "images/5.jpg").unlink()
    return ["pairs", "--input", path, "--keep", "url", "--task-lines", "3"]


def _documents(folder: Path) -> Words:
    for number in range(4):
        records = ({"text": f"document {number} {i}" if i % 20 else "", "url": f"u{i}"} for i in range(60))
        write_documents(folder / f"{number}.jsonl.zst", records)
    return ["documents", "--input", folder, "--keep", "url", "--task-bytes", "1"]


def _talk(number: int) -> dict[str, Any]:
    """A conversation in one of several conventions, about one image or none."""
    image = f"images/{number}.jpg" if number != 5 else "images/gone.jpg"
    asked, said = f"What is {number}?", f"It is {number}."
    turns = [{"from": "human", "value": f"<image>{asked}"}, {"from": "gpt", "value": said}]
    parts = [{"type": "image", "image": image}, {"type": "text", "text": asked}]
    kinds: list[dict[str, Any]] = [
        {"conversations": turns, "image": image},
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": number}]},
        {"texts": [{"user": asked, "assistant": said}], "images": [image]},
        {"conversations": [{"from": "gpt", "value": "Hello."}, {**turns[0], "value": asked}, turns[1]], "system": "Be kind."},
    ]
    return {"id": number, **kinds[number % len(kinds)]}


def _talks(folder: Path) -> list[dict[str, Any]]:
    (folder / "images").mkdir(parents=True)
    for number in range(NUM_RECORDS):
        (folder / f"images/{number}.jpg").write_bytes(image_bytes(number))
    return [_talk(number) for number in range(NUM_RECORDS)]


def _conversations(folder: Path) -> Words:
    talks = _talks(folder)
    (folder / "talks.json").write_text(json.dumps(talks))
    return ["conversations", "--input", folder / "talks.json", "--task-records", "3"]


def _encoded(folder: Path) -> Words:
    source = write_jsonl(folder / "talks.jsonl", _talks(folder)[:6])
    return ["conversations", "--input", source, "--task-records", "2", "--encode", "tiny", "--device", "cpu"]


def _rows() -> list[dict[str, Any]]:
    absent = dict.fromkeys(("vqcode_multi768", "width", "height"), "no")
    rows = [{"data_type": "image_text", "text": f"caption {i}", "length": 1, **absent} for i in range(NUM_RECORDS)]
    return [{**row, "vqcode_512": json.dumps(random_codes(i, 32, 32 - (i == 5)).ravel().tolist())} for i, row in enumerate(rows)]


def _coded(folder: Path) -> Words:
    datasets.Dataset.from_list(_rows()).save_to_disk(str(folder / "rows"), num_shards=4)
    return ["coded", "--input", folder / "rows"]


def _codes(folder: Path) -> Words:
    rows = [{"text": row["text"], "vq_code": row["vqcode_512"]} for row in _rows()]
    return ["coded", "--input", write_jsonl(folder / "rows.jsonl", rows), "--task-lines", "3"]


CONVERSIONS: dict[str, Callable[[Path], Words]] = {
    "pairs": _pairs,
    "documents": _documents,
    "conversations": _conversations,
    "conversations that are encoded": _encoded,
    "rows of Liquid": _coded,
    "codes of others": _codes,
}
"""Name -> writes the input into a folder, and gives the words behind `wds-tools convert`."""


def conversion(name: str, folder: Path) -> Words:
    """The command line of a conversion but for its output; its input is written into `folder`."""
    return ["convert", *CONVERSIONS[name](folder), "--max-rejects", "50%", "--shard-samples", "2"]
