"""Codebooks above 65,536 entries: uint32 codes from the tokenizer to the batch, the page and the export, and none is cut."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import image_bytes, read_samples, tree, wds_tools, write_pairs
from datasets import load_dataset, load_from_disk
from factory import image_sample, make_dataset, text_sample
from PIL import Image
from plugin import COLOURS, installed, write_plugin
from tokens import write_tokenizer
from viewer import ask, fetch, serving

from loaders import LoaderConfig, SequenceConfig, ShardDataset, Source, build_loader
from wds_tools.check.compare import CompareConfig, compare_codes
from wds_tools.check.verify import VerifyConfig, verify
from wds_tools.errors import UsageError
from wds_tools.format.schema import Sample, SourceImage
from wds_tools.vq import load_tokenizer

SIZE = 1 << 18


def samples() -> list[Sample]:
    """Pairs, wide pairs, a document, and conversations about none to two images."""
    one, two = (SourceImage(image_bytes(i, 90, 60), "jpg") for i in (1, 2))
    turns = [[{"from": "human", "value": "<image>" * count + "What?"}, {"from": "gpt", "value": "That."}] for count in range(3)]
    talk: dict[str, Any] = {"data_type": "visual_sft", "text": ""}
    first = {"image": one.data, "image_extension": "jpg"}
    pair = {"text": "a pair", "image_extension": "jpg"}
    return [
        *(Sample(key=f"a{i}", data_type="image_text", image=image_bytes(i, 64, 48), **pair) for i in range(4)),
        *(Sample(key=f"b{i}", data_type="image_text_multi", image=image_bytes(i, 200, 64), **pair) for i in range(2)),
        text_sample(0)._replace(key="c0"),
        Sample(key="d0", conversations=turns[0], **talk),
        Sample(key="d1", conversations=turns[1], **talk, **first),
        Sample(key="d2", conversations=turns[2], more_images=(two,), **talk, **first),
    ]


@pytest.fixture(scope="module", autouse=True)
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = write_plugin(tmp_path_factory.mktemp("site"), "somebodys_colours", COLOURS, "colours = somebodys_colours:load")
    with installed(folder, "somebodys_colours"):
        yield folder


@pytest.fixture(scope="module")
def encoded(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    make_dataset(folder / "raw", samples(), shard_samples=4)
    wds_tools("encode", "--input", folder / "raw", "--output", folder / "codes", "--tokenizer", "colours", "--device", "cpu")
    return folder / "codes"


def test_they_are_stored_as_they_came_and_verified(encoded: Path) -> None:
    manifest = verify(VerifyConfig(input=str(encoded), quiet=True))
    assert manifest.problems == ()
    filled = read_samples(encoded)
    grids = [grid_hw for sample in filled for grid_hw in sample.codes.values()]
    assert {grid_hw.dtype.str for grid_hw in grids} == {"<u4"}
    assert max(int(grid_hw.max(initial=0)) for grid_hw in grids) > 65_535
    pixels_HWC = np.asarray(Image.open(io.BytesIO(samples()[0].image or b"")))
    found_HWC = load_tokenizer("colours").decode(torch.from_numpy(filled[0].codes["vqcode_512"].astype(np.int64))[None])[0]
    assert abs(found_HWC.numpy().mean() + 2 - pixels_HWC.mean()) < 3
    assert [(shapes := sample.grids) and shapes["vqcode_512"] for sample in filled[-3:]] == [[], [[32, 32]], [[32, 32]] * 2]


@pytest.mark.slow
def test_what_another_run_makes_can_be_compared(encoded: Path, tmp_path: Path) -> None:
    raw = encoded.parent / "raw"
    wds_tools("encode", "--input", raw, "--output", tmp_path / "out", "--tokenizer", "colours", "--device", "cpu,cpu")
    assert tree(tmp_path / "out") == tree(encoded)
    result = compare_codes(CompareConfig(a=str(encoded), b=str(tmp_path / "out"), pictures=3, quiet=True))
    assert result.equal_codes == result.codes > 0
    assert result.psnr_between_db == float("inf")


@pytest.mark.slow
def test_a_conversion_that_encodes_stores_the_same(tmp_path: Path) -> None:
    pairs = ["convert", "pairs", "--input", write_pairs(tmp_path, 3, width=60)]
    how = ["--tokenizer", "colours", "--device", "cpu"]
    wds_tools(*pairs, "--output", tmp_path / "raw")
    wds_tools("encode", "--input", tmp_path / "raw", "--output", tmp_path / "codes", *how)
    wds_tools(*pairs, "--output", tmp_path / "straight", "--encode", *how[1:])
    for one, two in zip(read_samples(tmp_path / "straight"), read_samples(tmp_path / "codes"), strict=True):
        assert one.codes["vqcode_512"].dtype.str == "<u4"
        assert np.array_equal(one.codes["vqcode_512"], two.codes["vqcode_512"])


def test_loaders_hand_them_over_as_int32(encoded: Path) -> None:
    expected = {s.key: [grid.tolist() for column in s.codes for grid in s.grids_of(column)] for s in read_samples(encoded)}
    loader = build_loader(LoaderConfig(sources=(Source(str(encoded)),), batch_size=5, seed=0, num_workers=1))
    found = {}
    for batch in loader:
        for key, codes in zip(batch["__key__"], batch["codes"], strict=True):
            grids = [] if codes is None else codes if isinstance(codes, list) else [codes]
            assert all(grid.dtype == torch.int32 for grid in grids)
            found[key] = [grid.tolist() for grid in grids]
    loader.close()
    assert found == expected
    for sample in ShardDataset(str(encoded)):
        codes = sample.get("codes", [])
        grids = codes if isinstance(codes, list) else [codes]
        assert [grid.tolist() for grid in grids] == expected[sample["__key__"]]


@pytest.mark.slow
def test_token_rows_hold_them_behind_the_text_on_the_fly_and_packed_ahead(encoded: Path, tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    codes = {int(code) for sample in read_samples(encoded) for grid in sample.codes.values() for code in grid.ravel()}
    sequences = SequenceConfig(tokenizer=str(tokenizer), max_length=4096)
    loader = build_loader(LoaderConfig(sources=(Source(str(encoded)),), batch_size=5, seed=0, sequences=sequences))
    batches = list(loader)
    loader.close()
    args = ["pack", "--input", encoded, "--tokenizer", tokenizer, "--max-length", "4096"]
    said = wds_tools(*args, "--output", tmp_path / "rows").stdout
    assert f"{2003 + SIZE:,}" in said
    assert verify(VerifyConfig(input=str(tmp_path / "rows"), quiet=True)).problems == ()
    packed = build_loader(LoaderConfig(sources=(Source(str(tmp_path / "rows")),), batch_size=1, seed=0))
    rows = list(packed)
    packed.close()
    for tensors in ([batch["input_ids"] for batch in batches], [batch["input_ids"] for batch in rows]):
        ids = {int(token) for tensor in tensors for token in tensor.ravel()}
        assert {token - 2003 for token in ids if token >= 2003} == codes


@pytest.mark.slow
@pytest.mark.parametrize("file_format", ["arrow", "parquet"])
def test_the_export_writes_them_in_full_and_they_come_back(encoded: Path, tmp_path: Path, file_format: str) -> None:
    wds_tools("export", "hf", "--input", encoded, "--output", tmp_path / "hf", "--format", file_format, "--num-shards", "1")
    if file_format == "arrow":
        rows = list(load_from_disk(str(tmp_path / "hf")))
    else:
        files = sorted(map(str, (tmp_path / "hf").rglob("*.parquet")))
        rows = list(load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache")))
    found = sorted(row[column] for row in rows for column in ("vqcode_512", "vqcode_multi768") if row[column] != "no")
    grids = [grid for sample in read_samples(encoded) for grid in sample.codes.values() if grid.size]
    assert [text for text in found if text != "[]"] == sorted(json.dumps(grid.ravel().tolist()) for grid in grids)


@pytest.mark.slow
def test_statistics_count_every_entry(encoded: Path) -> None:
    found = json.loads(wds_tools("stats", encoded, "--json", "--quiet").stdout)["codes"]["vqcode_512"]
    codes = [int(c) for sample in read_samples(encoded) for c in sample.codes.get("vqcode_512", np.zeros(0)).ravel()]
    assert (found["codes"], found["used"], found["codebook_size"]) == (len(codes), len(set(codes)), SIZE)


@pytest.mark.slow
def test_the_page_shows_them_and_the_picture_that_they_decode_to(encoded: Path) -> None:
    sample = read_samples(encoded)[0]
    codes_hw = sample.codes["vqcode_512"]
    with serving(encoded) as server:
        (grid,) = ask(server, "/api/sample/0")["grids"]
        assert grid["codes"] == codes_hw.ravel().tolist()
        shown = np.asarray(Image.open(io.BytesIO(fetch(server, "/picture/0/vqcode_512.png")[2])))
        assert np.array_equal(shown, load_tokenizer("colours").decode(torch.from_numpy(codes_hw.astype(np.int64))[None])[0])
        assert fetch(server, "/codes/0/vqcode_512.png")[0] == 200


@pytest.mark.slow
def test_a_vocabulary_beyond_int32_is_refused(tmp_path: Path) -> None:
    facts = {"vqcode_512": {"tokenizer": "huge", "codebook_size": 1 << 31, "weights_hash": "x"}}
    make_dataset(tmp_path / "set", [image_sample(0)], codes=facts)
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    args = ["pack", "--input", tmp_path / "set", "--tokenizer", tokenizer, "--max-length", "64", "--output", tmp_path / "rows"]
    assert "2,147,485,651" in wds_tools(*args, status=2).stderr
    config = LoaderConfig(
        sources=(Source(str(tmp_path / "set")),),
        batch_size=1,
        sequences=SequenceConfig(tokenizer=str(tokenizer), max_length=64),
    )
    with pytest.raises(UsageError, match="2,147,485,651"):
        build_loader(config)
