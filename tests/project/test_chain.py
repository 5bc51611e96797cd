"""A dataset of every kind through the whole chain, command by command, and read by the readers of others."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import webdataset as wds
from commands import image_bytes, read_samples, write_documents, write_jsonl
from PIL import Image
from tokens import write_tokenizer
from viewer import ask, fetch, serving

from loaders import LoaderConfig, SequenceConfig, Source, World, build_loader
from wds_tools.cli.main import main
from wds_tools.images import parse_mode, prepare
from wds_tools.vq import load_tokenizer

NUM, LENGTH = 6, 160
Words = list[str]


def pictures(folder: Path, count: int = 2 * NUM) -> list[str]:
    """Images of several shapes, and their paths in the folder."""
    (folder / "images").mkdir(parents=True)
    for number in range(count):
        (folder / f"images/{number}.jpg").write_bytes(image_bytes(number, 64 + 16 * (number % 3), 64))
    return [f"images/{number}.jpg" for number in range(count)]


def pairs(folder: Path) -> Words:
    texts = ({"text": f"caption {i}", "alt": f"alt {i}", "recap": f"a long one {i}" if i % 2 else None} for i in range(NUM))
    records = ({"image_path": path, **text} for path, text in zip(pictures(folder), texts, strict=False))
    return ["pairs", "--input", str(write_jsonl(folder / "in.jsonl", records)), "--texts", "alt=alt", "recap=recap"]


def wide_pairs(folder: Path) -> Words:
    records = ({"image_path": path, "text": f"caption of {path}"} for path in pictures(folder, NUM))
    return ["pairs", "--input", str(write_jsonl(folder / "in.jsonl", records)), "--mode", "multi128"]


def text(folder: Path) -> Words:
    write_documents(folder / "in/0.jsonl.zst", ({"text": f"document {i} says little"} for i in range(NUM)))
    return ["documents", "--input", str(folder / "in")]


def talks(folder: Path) -> Words:
    paths = pictures(folder)
    turns = [("human", "<image>\nWhat is this?"), ("gpt", "A thing."), ("human", "And <image>?"), ("gpt", "Another.")]
    records = [
        {"image": paths[2 * i : 2 * i + 2], "conversations": [{"from": who, "value": f"{says} {i}"} for who, says in turns]}
        for i in range(NUM)
    ]
    return ["conversations", "--input", str(write_jsonl(folder / "in.jsonl", records))]


def edits(folder: Path) -> Words:
    paths = pictures(folder)
    records = (
        {"instruction": f"make it red {i}", "input_images": [paths[2 * i]], "output_image": paths[2 * i + 1]} for i in range(NUM)
    )
    return ["conversations", "--input", str(write_jsonl(folder / "in.jsonl", records)), "--image-root", str(folder)]


def pages(folder: Path) -> Words:
    paths = pictures(folder)
    records = (
        {"texts": [f"page {i} begins", None, "goes on", None], "images": [None, paths[2 * i], None, paths[2 * i + 1]]}
        for i in range(NUM)
    )
    return ["interleaved", "--input", str(write_jsonl(folder / "in.jsonl", records)), "--image-root", str(folder)]


KINDS: dict[str, tuple[Callable[[Path], Words], str, Words]] = {
    "pairs with texts": (pairs, "image_text", ["--mode", "cc64"]),
    "pairs of many shapes": (wide_pairs, "image_text_multi", ["--mode", "multi96"]),
    "documents": (text, "text_pretrain", []),
    "conversations": (talks, "visual_sft", ["--sft-mode", "fit64"]),
    "edits": (edits, "visual_sft", ["--sft-mode", "cc64"]),
    "interleaved": (pages, "interleaved", ["--sft-mode", "fit64"]),
}
"""Kind -> (writes the input and gives the words behind `convert`, its data type, the size that `encode` makes)."""


@pytest.fixture(scope="module", params=KINDS)
def chain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with `raw`, as converted, `codes`, encoded (of documents the same), and a tokenizer; the kind."""
    folder, kind = tmp_path_factory.mktemp("chain"), request.param
    write, _, size = KINDS[kind]
    assert main(["convert", *write(folder / "in"), "--output", str(folder / "raw"), "--shard-samples", "4", "--quiet"]) == 0
    if size:
        words = ["--output", str(folder / "codes"), "--tokenizer", "tiny", "--device", "cpu", "--shard-samples", "4", "--quiet"]
        assert main(["encode", "--input", str(folder / "raw"), *words, *size]) == 0
    else:
        (folder / "codes").symlink_to(folder / "raw")
    write_tokenizer(folder / "tokenizer")
    return folder, kind


def test_every_image_has_the_codes_of_its_pixels_and_verify_and_stats_agree(
    chain: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, kind = chain
    _, data_type, size = KINDS[kind]
    tokenizer, raw, coded = load_tokenizer("tiny", device="cpu"), read_samples(folder / "raw"), read_samples(folder / "codes")
    assert len(coded) == NUM
    assert {sample.data_type for sample in coded} == {data_type}
    num_codes = 0
    for before, after in zip(raw, coded, strict=True):
        assert (before.key, before.text, before.texts, before.conversations) == (
            after.key,
            after.text,
            after.texts,
            after.conversations,
        )
        for column in after.codes:
            images, grids = [image.data for image in before.images], after.grids_of(column)
            assert len(images) == len(grids) == (1 if data_type.startswith("image_text") else 2)
            for data, grid in zip(images, grids, strict=True):
                pixels = torch.from_numpy(prepare(data, parse_mode(size[-1]).at("tiny", 16))[None])
                np.testing.assert_array_equal(tokenizer.encode(pixels)[0].numpy(), grid)
                num_codes += grid.size
    assert (num_codes > 0) == bool(size)
    assert main(["verify", str(folder / "codes"), "--quiet"]) == 0
    capsys.readouterr()
    assert main(["stats", str(folder / "codes"), "--quiet", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["samples"] == NUM
    assert sum(column["codes"] for column in found["codes"].values()) == num_codes


@pytest.mark.slow  # pictures have a process of their own, which imports torch
def test_the_page_shows_every_sample_with_the_pictures_of_its_codes(chain: tuple[Path, str]) -> None:
    folder, _ = chain
    samples = read_samples(folder / "codes")
    with serving(folder / "codes") as server:
        assert fetch(server, "/")[0] == 200
        shown = ask(server, "/api/samples?first=0")["samples"]
        assert [one["key"] for one in shown] == [sample.key for sample in samples]
        for column in samples[-1].codes:
            status, _, body = fetch(server, f"/picture/{NUM - 1}/{column}.png")
            height, width = samples[-1].grids_of(column)[0].shape
            assert status == 200
            assert Image.open(io.BytesIO(body)).size[1] >= 16 * height
            assert Image.open(io.BytesIO(body)).size[0] >= 16 * width


def segments(batch: dict[str, Any]) -> Iterator[tuple[int, ...]]:
    """The ids of what a batch keeps apart, without padding."""
    if "attention_mask" in batch:
        for ids, mask in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True):
            yield tuple(ids[: sum(mask)])
        return
    ids = batch["input_ids"].reshape(-1).tolist()
    yield from (tuple(ids[begin:end]) for begin, end in pairwise(batch["cu_seqlens"].tolist()))


def test_padded_packed_on_the_fly_and_packed_ahead_hold_the_same_rows(chain: tuple[Path, str]) -> None:
    folder, _ = chain
    codes, tokenizer, rows = (str(folder / name) for name in ("codes", "tokenizer", "rows"))
    sequences = SequenceConfig(tokenizer=tokenizer, max_length=LENGTH)

    def made(source: str, **settings: Any) -> Counter[tuple[int, ...]]:
        loader = build_loader(LoaderConfig(sources=(Source(source),), batch_size=2, last_batch="short", **settings), World())
        found = Counter(segment for batch in islice(loader, 30) for segment in segments(batch))
        loader.close()
        return found

    padded = made(codes, sequences=sequences)
    assert sum(padded.values()) == NUM
    assert (
        main(["pack", "--input", codes, "--output", rows, "--tokenizer", tokenizer, "--max-length", str(LENGTH), "--quiet"]) == 0
    )
    assert padded <= made(rows)
    assert padded <= made(codes, sequences=sequences, packing=True)
    assert main(["verify", rows, "--quiet"]) == 0


def test_it_goes_to_parquet_with_everything_in_it_and_comes_back(chain: tuple[Path, str]) -> None:
    folder, _ = chain
    codes, parquet, back = (str(folder / name) for name in ("codes", "parquet", "back"))
    assert main(["export", "parquet", "--input", codes, "--output", parquet, "--quiet"]) == 0
    tables = [pq.read_table(path).to_pylist() for path in sorted(Path(parquet).rglob("*.parquet"))]
    samples = read_samples(folder / "codes")
    rows = [row for table in tables for row in table]
    assert [row["key"] for row in rows] == [sample.key for sample in samples]
    for row, sample in zip(rows, samples, strict=True):
        for column, array in sample.codes.items():
            assert row[column]["codes"] == array.ravel().tolist()
    assert main(["convert", "coded", "--input", parquet, "--output", back, "--quiet"]) == 0
    for ours, again in zip(samples, read_samples(back), strict=True):
        assert (ours.data_type, ours.text, ours.texts, ours.conversations, ours.grids) == (
            again.data_type,
            again.text,
            again.texts,
            again.conversations,
            again.grids,
        )
        for column, array in ours.codes.items():
            np.testing.assert_array_equal(array, again.codes[column])


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_and_hugging_faces_reader_have_every_sample(chain: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = chain
    tars = sorted(map(str, (folder / "codes").resolve().rglob("*.tar")))
    ours = {sample.key: sample for sample in read_samples(folder / "codes")}
    theirs = list(wds.WebDataset(tars, shardshuffle=False).decode())
    hub = datasets.load_dataset("webdataset", data_files=tars, split="train", streaming=True, cache_dir=str(tmp_path))
    for found in (theirs, list(hub)):
        assert [row["__key__"] for row in found] == [*ours]
        for row in found:
            sample = ours[row["__key__"]]
            assert row["json"]["data_type"] == sample.data_type
            assert row["json"]["text"] == sample.text
            for column, array in sample.codes.items():
                np.testing.assert_array_equal(np.asarray(row[f"{column}.npy"]), array)
