"""Every conversion, with a small input that makes several tasks and has records that can't be used: for tests of all of them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from commands import image_bytes, write_documents, write_jsonl, write_pairs
from factory import random_codes

from wds_tools.format.shard import npy_bytes

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
    return ["conversations", "--input", source, "--task-lines", "2", "--encode", "tiny", "--device", "cpu"]


def _page(number: int) -> dict[str, Any]:
    """An interleaved document in one of several layouts."""
    first, second = (f"images/{image % NUM_RECORDS}.jpg" for image in (number, number + 1))
    texts = [f"Page {number}.", f"It ends {number}."]
    places = [{"image_name": first, "matched_text_index": 1}, {"image_name": second, "matched_text_index": 0}]
    kinds: list[dict[str, Any]] = [
        {"texts": [texts[0], None, None, texts[1]], "images": [None, first, second, None]},
        {"text_list": texts, "image_info": places if number != 5 else [{"image_name": "gone.jpg", "matched_text_index": 0}]},
        {"text": f"{texts[0]} <image> {texts[1]}", "images": [first]},
        {"content": [{"type": "text", "text": texts[0]}, {"type": "image", "image": second}]},
    ]
    return {"id": number, **kinds[number % len(kinds)]}


def _interleaved(folder: Path) -> Words:
    _talks(folder)
    source = write_jsonl(folder / "pages.jsonl", map(_page, range(NUM_RECORDS)))
    words: Words = ["interleaved", "--input", source, "--task-lines", "3", "--keep", "number=id"]
    return [*words, "--encode", "tiny", "--device", "cpu", "--sft-mode", "multi64"]


def _edits_in_parquet(folder: Path) -> Words:
    folder.mkdir()
    rows = []
    for i in range(NUM_RECORDS):
        source, edited = image_bytes(i), image_bytes(i + 50)[: 100 if i == 5 else None]
        structs = {"source_img": {"bytes": source, "path": None}, "target_img": {"bytes": edited, "path": None}}
        rows.append({**structs, "instruction": f"Edit {i}.", "mask_img": image_bytes(i + 90)})
    pq.write_table(pa.Table.from_pylist(rows), folder / "edits.parquet", row_group_size=3)
    return ["conversations", "--input", folder, "--task-records", "3", "--drop", "mask_img"]


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


def write_tars(folder: Path, samples: Sequence[dict[str, bytes]], each: int) -> str:
    """Tars of samples, which are suffix -> content, `each` in a tar; the pattern that names them."""
    folder.mkdir(parents=True, exist_ok=True)
    for tar in range(len(samples) // each):
        with tarfile.open(folder / f"{tar:05d}.tar", "w") as file:
            for number in range(tar * each, (tar + 1) * each):
                for suffix, content in samples[number].items():
                    member = tarfile.TarInfo(f"{number:08d}.{suffix}")
                    member.size = len(content)
                    file.addfile(member, io.BytesIO(content))
    return f"{folder}/{{00000..{len(samples) // each - 1:05d}}}.tar"


def _pairs_in_tars(folder: Path) -> Words:
    samples = [
        {"jpg": image_bytes(i)[: 100 if i == 5 else None], "txt": b"caption %d" % i, "json": b'{"url": "u%d"}' % i}
        for i in range(NUM_RECORDS)
    ]
    return ["pairs", "--input", write_tars(folder, samples, 3), "--keep", "url", "--task-bytes", "1"]


def _conversations_in_parquet(folder: Path) -> Words:
    folder.mkdir()
    turns = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "That."}]
    images = [{"bytes": image_bytes(i)[: 100 if i == 5 else None], "path": f"{i}.jpg"} for i in range(NUM_RECORDS)]
    table = pa.Table.from_pylist([{"messages": turns, "images": [image]} for image in images])
    pq.write_table(table, folder / "talks.parquet", row_group_size=3)
    return ["conversations", "--input", folder, "--task-records", "3"]


def _codes_in_tars(folder: Path) -> Words:
    samples = [{"npy": npy_bytes(random_codes(i, 32, 32))[i == 5 :], "txt": b"caption %d" % i} for i in range(NUM_RECORDS)]
    return ["coded", "--input", write_tars(folder, samples, 3), "--task-bytes", "1"]


CONVERSIONS: dict[str, Callable[[Path], Words]] = {
    "pairs": _pairs,
    "documents": _documents,
    "conversations": _conversations,
    "conversations that are encoded": _encoded,
    "interleaved documents that are encoded": _interleaved,
    "edits in Parquet": _edits_in_parquet,
    "rows of Liquid": _coded,
    "codes of others": _codes,
    "pairs in tars": _pairs_in_tars,
    "conversations in Parquet": _conversations_in_parquet,
    "codes in tars": _codes_in_tars,
}
"""Name -> writes the input into a folder, and gives the words behind `wds-tools convert`."""


def conversion(name: str, folder: Path) -> Words:
    """The command line of a conversion but for its output; its input is written into `folder`."""
    return ["convert", *CONVERSIONS[name](folder), "--max-rejects", "50%", "--shard-samples", "2"]
