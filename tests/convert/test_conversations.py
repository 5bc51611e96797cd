"""Conversations with no, one and several images: through encode, verify, index, the loaders, export, and other libraries."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import webdataset
from commands import image_bytes, read_rejects, read_samples, wds_tools
from factory import image_sample, make_dataset, text_sample

from loaders import LoaderConfig, ShardDataset, Source, build_loader
from loaders.testing import Topology, check_resume
from wds_tools.check.verify import VerifyConfig, verify
from wds_tools.encode.encode import EncodeConfig, encode
from wds_tools.export.hf import export_hf
from wds_tools.export.options import ExportConfig
from wds_tools.format.manifest import Manifest
from wds_tools.format.schema import Sample, SourceImage
from wds_tools.images import Mode, prepare
from wds_tools.vq.registry import load_tokenizer

leaves_files_open = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
COUNTS = (1, 0, 2, 4, 1, 0)
SIZES = ((40, 32), (96, 60), (60, 90), (64, 64))


def talk(number: int, count: int) -> Sample:
    """A conversation about `count` images of different kinds and shapes."""
    kinds = ("JPEG", "PNG")
    images = [
        SourceImage(image_bytes(10 * number + i, *SIZES[i % 4], kind=kinds[i % 2]), ("jpg", "png")[i % 2]) for i in range(count)
    ]
    turns = [{"from": "human", "value": "<image>" * count + "What is it?"}, {"from": "gpt", "value": f"Number {number}."}]
    first = images[0]._asdict() if images else {}
    fields = {"image": first.get("data"), "image_extension": first.get("extension"), "more_images": tuple(images[1:])}
    return Sample(key=f"talk-{number:04d}", data_type="visual_sft", text="", conversations=turns, **fields)


def raw(folder: Path, counts: tuple[int, ...] = COUNTS) -> list[Sample]:
    samples = [talk(number, count) for number, count in enumerate(counts)]
    make_dataset(folder, samples, shard_samples=4)
    return samples


def fill(source: Path, output: Path, **settings: Any) -> Manifest:
    return encode(EncodeConfig(input=str(source), output=str(output), device="cpu", quiet=True, **settings))


def problems(url: Path) -> tuple[str, ...]:
    return verify(VerifyConfig(input=str(url), quiet=True)).problems


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conversations")
    raw(folder / "raw")
    fill(folder / "raw", folder / "codes", batch_size=3)
    return folder / "codes"


def by_webdataset(url: Path) -> list[dict[str, Any]]:
    return list(webdataset.WebDataset(sorted(map(str, url.glob("*.tar"))), shardshuffle=False))


@leaves_files_open
def test_source_images_lie_beside_the_conversation_in_their_order(tmp_path: Path) -> None:
    samples = raw(tmp_path / "raw")
    assert read_samples(tmp_path / "raw") == samples
    assert problems(tmp_path / "raw") == ()
    found = [[name for name in member if not name.startswith("__")] for member in by_webdataset(tmp_path / "raw")]
    assert found == [
        ["json", "jpg"],
        ["json"],
        ["json", "jpg", "1.png"],
        ["json", "jpg", "1.png", "2.jpg", "3.png"],
        ["json", "jpg"],
        ["json"],
    ]


@pytest.mark.parametrize("mode", ["cc512", "multi768"])
def test_each_image_of_a_conversation_gets_the_codes_that_it_has_alone(tmp_path: Path, mode: Mode) -> None:
    sources = raw(tmp_path / "raw", (2, 0, 1))
    manifest = fill(tmp_path / "raw", tmp_path / "codes", sft_mode=mode, batch_size=2)
    assert problems(tmp_path / "codes") == ()
    column = {"cc512": "vqcode_512", "multi768": "vqcode_multi768"}[mode]
    assert {row.members for row in manifest.shards} == {("json", f"{column}.npy")}
    tokenizer = load_tokenizer("tiny", device="cpu")
    for sample, source in zip(read_samples(tmp_path / "codes"), sources, strict=True):
        grids = sample.grids_of(column)
        assert len(grids) == len(source.images)
        assert (sample.images, sample.conversations, sample.num_codes) == ((), source.conversations, sum(g.size for g in grids))
        for codes_hw, image in zip(grids, source.images, strict=True):
            pixels_HWC = prepare(image.data, mode)
            assert codes_hw.shape == (pixels_HWC.shape[0] // 16, pixels_HWC.shape[1] // 16)
            assert np.array_equal(codes_hw, tokenizer.encode(torch.from_numpy(pixels_HWC[None]))[0].numpy())


def test_all_images_can_be_kept_beside_the_codes(tmp_path: Path) -> None:
    sources = raw(tmp_path / "raw", (3, 1))
    fill(tmp_path / "raw", tmp_path / "codes", keep_images=True)
    assert problems(tmp_path / "codes") == ()
    assert [sample.images for sample in read_samples(tmp_path / "codes")] == [source.images for source in sources]


def test_one_bad_image_rejects_its_conversation_and_no_other(tmp_path: Path) -> None:
    good, bad = talk(0, 2), talk(1, 3)
    broken = SourceImage(bad.more_images[0].data[:100], "png")
    make_dataset(tmp_path / "raw", [good, bad._replace(more_images=(broken, *bad.more_images[1:])), talk(2, 1)])
    manifest = fill(tmp_path / "raw", tmp_path / "codes", max_rejects="50%")
    assert (manifest.inputs, manifest.samples, manifest.rejects) == (3, 2, {"truncated_image": 1})
    assert [reject["key"] for reject in read_rejects(tmp_path / "codes")] == ["talk-0001"]
    assert [sample.key for sample in read_samples(tmp_path / "codes")] == ["talk-0000", "talk-0002"]


def test_an_index_is_rebuilt_as_it_was(encoded: Path) -> None:
    before = {path.name: path.read_bytes() for path in encoded.glob("*.index")}
    for path in encoded.glob("*.index"):
        path.unlink()
    wds_tools("index", encoded, "--quiet")
    assert {path.name: path.read_bytes() for path in encoded.glob("*.index")} == before
    assert problems(encoded) == ()


def batches(url: Path, **settings: Any) -> Iterator[dict[str, Any]]:
    config = LoaderConfig(sources=(Source(str(url)),), **{"batch_size": 3, "seed": 0, "num_workers": 0, **settings})
    loader = build_loader(config)
    yield from loader
    loader.close()


@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_a_batch_has_a_list_of_grids_for_each_conversation(encoded: Path, batch_size: int) -> None:
    expected = {s.key: [grid.tolist() for grid in s.grids_of("vqcode_512")] for s in read_samples(encoded)}
    found = {}
    for batch in batches(encoded, batch_size=batch_size):
        for key, grids in zip(batch["__key__"], batch["codes"], strict=True):
            assert all(grid.dtype == torch.int32 for grid in grids)
            found[key] = [grid.tolist() for grid in grids]
    assert found == expected


def test_shard_dataset_gives_grids_and_images(tmp_path: Path) -> None:
    sources = {source.key: source for source in raw(tmp_path / "raw")}
    fill(tmp_path / "raw", tmp_path / "codes", keep_images=True)
    for sample in ShardDataset(str(tmp_path / "codes")):
        images = sources[sample["__key__"]].images
        assert [grid.shape for grid in sample["codes"]] == [(32, 32)] * len(images)
        assert sample.get("image", []) == [image.data for image in images]
        assert "grids" not in sample


@pytest.mark.slow
def test_conversations_mix_with_documents_and_pairs_and_resume_anywhere(encoded: Path, tmp_path: Path) -> None:
    make_dataset(tmp_path / "rest", [text_sample(0), image_sample(1), text_sample(2), image_sample(3)])
    config = LoaderConfig(
        sources=(Source(str(encoded)), Source(str(tmp_path / "rest"))), batch_size=2, seed=1, last_batch="short"
    )
    kinds = {}
    loader = build_loader(config)
    for batch in loader:
        for data_type, codes in zip(batch["data_type"], batch.get("codes", [None] * 2), strict=True):
            kinds[data_type] = type(codes)
    loader.close()
    assert kinds == {"visual_sft": list, "image_text": torch.Tensor, "text_pretrain": type(None)}
    topologies = [Topology(2), Topology(3, 2), Topology(2, 1, 1)]
    check_resume(
        lambda at, world: build_loader(replace(config, batch_size=at.batch_size, num_workers=at.num_workers), world), topologies
    )


def test_damaged_grids_are_an_unreadable_sample_and_nothing_worse(tmp_path: Path) -> None:
    samples = [talk(number, 0) for number in range(4)]
    codes = {"codes": {"vqcode_512": np.array([[1, 2]], "<u2")}, "grids": {"vqcode_512": [[1, 1], [1, 1]]}}
    make_dataset(tmp_path / "set", [sample._replace(**codes) for sample in samples])
    (shard,) = (tmp_path / "set").glob("*.tar")
    shard.write_bytes(shard.read_bytes().replace(b"[[1,1],[1,1]]", b"[[1,1],[9,1]]", 1))
    taken = list(batches(tmp_path / "set", batch_size=4, on_error="substitute", max_bad=1))
    assert [len(grids) for grids in taken[0]["codes"]] == [2, 2, 2, 2]


def test_the_export_says_how_its_codes_are_cut(encoded: Path, tmp_path: Path) -> None:
    export_hf(ExportConfig(input=(str(encoded),), output=str(tmp_path / "out"), num_shards=2, quiet=True))
    expected = {sample.conversations[1]["value"]: sample for sample in read_samples(encoded) if sample.conversations}
    rows = list(datasets.load_from_disk(str(tmp_path / "out")))
    assert len(rows) == len(expected)
    for row in rows:
        record = json.loads(row["text"])
        sample = expected[record["conversations"][1]["value"]]
        assert record == {"conversations": sample.conversations, "grids": sample.grids}
        assert row["length"] == sample.length == sum(len(t["value"]) for t in sample.conversations or ()) + 4 * sample.num_codes
        codes = [] if row["vqcode_512"] == "no" else json.loads(row["vqcode_512"])
        assert codes == sample.codes["vqcode_512"].ravel().tolist()


def test_hugging_face_reads_a_set_in_which_some_have_no_image(encoded: Path) -> None:
    files = sorted(map(str, encoded.glob("*.tar")))
    stream = datasets.load_dataset("webdataset", data_files=files, split="train", streaming=True)
    expected = read_samples(encoded)
    for row, sample in zip(stream, expected, strict=True):
        assert row["__key__"].endswith(sample.key)
        assert np.array_equal(np.asarray(row["vqcode_512.npy"]), sample.codes["vqcode_512"])
        assert row["json"]["grids"] == sample.grids


@leaves_files_open
def test_numpy_reads_one_image_as_its_grid_and_several_as_one_row(encoded: Path) -> None:
    shapes = [np.load(io.BytesIO(sample["vqcode_512.npy"])).shape for sample in by_webdataset(encoded)]
    assert shapes == [{1: (32, 32)}.get(count, (1, 1024 * count)) for count in COUNTS]
