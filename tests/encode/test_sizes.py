"""Codes of any size, several of one set of images: through encode, verify, stats, token rows, comparison, viewer and export."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import image_bytes, read_rejects, read_samples, wds_tools, write_jsonl
from datasets import load_from_disk
from factory import make_dataset
from PIL import Image
from tokens import write_tokenizer
from viewer import ask, fetch, serving

from loaders import LoaderConfig, SequenceConfig, Source, build_loader
from wds_tools.check.compare import CompareConfig, compare_codes
from wds_tools.check.stats.describe import StatsConfig, stats
from wds_tools.check.stats.report import to_json
from wds_tools.check.verify import VerifyConfig, verify
from wds_tools.convert import run_conversion
from wds_tools.convert.pairs import PairsConfig
from wds_tools.encode.encode import EncodeConfig, encode
from wds_tools.errors import UsageError
from wds_tools.export.hf import export_hf
from wds_tools.export.options import ExportConfig
from wds_tools.format.manifest import Manifest
from wds_tools.format.schema import Sample
from wds_tools.images import parse_mode, prepare
from wds_tools.pack.rows import PackConfig, pack
from wds_tools.select.select import SelectConfig, select
from wds_tools.vq.registry import load_tokenizer

SIZES = [(90, 60), (60, 90), (64, 64), (120, 62), (130, 60), (300, 40)]
"""Five that every family takes but for the fifth, which is beyond 2:1; and one that none takes."""


def write_raw(folder: Path, mode: str) -> Path:
    """A dataset of pairs for this mode."""
    for number, size in enumerate(SIZES):
        (folder / "images").mkdir(parents=True, exist_ok=True)
        (folder / f"images/{number}.jpg").write_bytes(image_bytes(number, *size))
    pairs = ({"image_path": f"images/{number}.jpg", "text": f"caption {number}"} for number in range(len(SIZES)))
    path = write_jsonl(folder / "pairs.jsonl", pairs)
    run_conversion(PairsConfig(input=(str(path),), output=str(folder / mode), mode=mode, max_rejects="100%", quiet=True))
    return folder / mode


def fill(source: Path, output: Path, **settings: Any) -> Manifest:
    settings = {"keep_images": True, "max_rejects": "100%", "device": "cpu", "quiet": True, **settings}
    manifest = encode(EncodeConfig(input=str(source), output=str(output), **settings))
    assert verify(VerifyConfig(input=str(output), quiet=True)).problems == ()
    return manifest


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs converted for fit96, and their codes in that size, of squares, and of shapes of about 128 x 128 pixels."""
    folder = tmp_path_factory.mktemp("several")
    raw = write_raw(folder, "fit96")
    assert list(fill(raw, folder / "fit").codes) == ["vqcode_fit96"], "the mode that the dataset was converted for"
    manifest = fill(folder / "fit", folder / "two", mode="cc64")
    assert list(manifest.codes) == ["vqcode_fit96", "vqcode_64"]
    assert manifest.rejects == {"aspect_ratio": 1}, "cc takes images up to 2:1"
    fill(folder / "two", folder / "several", mode="multi128")
    return folder / "several"


def test_every_column_has_the_codes_of_its_mode(several: Path) -> None:
    tokenizer = load_tokenizer("tiny", device="cpu")
    samples = read_samples(several)
    assert [sample.text for sample in samples] == [f"caption {number}" for number in range(4)]
    for sample in samples:
        assert list(sample.codes) == ["vqcode_fit96", "vqcode_64", "vqcode_multi128"]
        assert sample.data_type == "image_text_multi"
        for word, codes_hw in zip(("fit96", "cc64", "multi128"), sample.codes.values(), strict=True):
            assert sample.image is not None
            pixels_HWC = prepare(sample.image, parse_mode(word).at("tiny", 16))
            assert np.array_equal(tokenizer.encode(torch.from_numpy(pixels_HWC[None]))[0].numpy(), codes_hw), word
        height, width = sample.codes["vqcode_fit96"].shape
        assert (sample.width, sample.height) == (16 * width, 16 * height), "those of the first column"


@pytest.mark.slow
def test_a_straight_run_has_the_codes_of_two_steps(several: Path, tmp_path: Path) -> None:
    args = ("convert", "pairs", "--input", several.parent / "pairs.jsonl", "--output", tmp_path / "out", "--max-rejects", "100%")
    wds_tools(*args, "--mode", "fit96", "--encode", "tiny", "--min-pixels", "9000", "--device", "cpu")
    manifest = verify(VerifyConfig(input=str(tmp_path / "out"), quiet=True)).manifest
    assert manifest.codes["vqcode_fit96"]["min_pixels"] == 9000
    shapes = [sample.codes["vqcode_fit96"].shape for sample in read_samples(tmp_path / "out")]
    assert shapes == [(4, 7), (7, 4), (6, 6), (4, 8), (4, 8)], "of (4, 6), (6, 4), (4, 4), (4, 8) without it"
    assert [line["reason"] for line in read_rejects(tmp_path / "out")] == ["aspect_ratio"]
    fill(several.parent / "fit96", tmp_path / "steps", min_pixels=9000)
    for one, two in zip(read_samples(tmp_path / "out"), read_samples(tmp_path / "steps"), strict=True):
        assert np.array_equal(one.codes["vqcode_fit96"], two.codes["vqcode_fit96"])


def test_what_was_selected_keeps_the_mode_of_its_inputs_or_asks_for_one(several: Path, tmp_path: Path) -> None:
    raw = several.parent / "fit96"
    select(SelectConfig(input=(str(raw),), output=f"{tmp_path}/half", where="sample_index > 0", quiet=True))
    both = (f"{tmp_path}/half", str(raw))
    select(SelectConfig(input=both, key_prefix=("a", "b"), output=f"{tmp_path}/both", quiet=True))
    assert list(fill(tmp_path / "both", tmp_path / "codes").codes) == ["vqcode_fit96"]
    inputs = (str(raw), str(write_raw(tmp_path, "fit80")))
    select(SelectConfig(input=inputs, key_prefix=("a", "b"), output=f"{tmp_path}/mixed", quiet=True))
    with pytest.raises(UsageError, match="mixed: some of it was converted for fit96, some for fit80: say which with --mode"):
        fill(tmp_path / "mixed", tmp_path / "none")
    assert list(fill(tmp_path / "mixed", tmp_path / "one", mode="fit80").codes) == ["vqcode_fit80"]


def test_a_set_without_codes_becomes_one_of_its_modes_family(tmp_path: Path) -> None:
    raw = write_raw(tmp_path, "cc512")
    manifest = fill(raw, tmp_path / "multi", mode="multi128", keep_images=False)
    assert (list(manifest.codes), manifest.data_types) == (["vqcode_multi128"], {"image_text_multi": 4})
    manifest = fill(raw, tmp_path / "cc", mode="cc64", code_set="b")
    assert (list(manifest.codes), manifest.data_types) == (["vqcode_64-b"], {"image_text": 4})
    assert {(sample.width, sample.height) for sample in read_samples(tmp_path / "cc")} == {(None, None)}
    again = fill(tmp_path / "cc", tmp_path / "both", mode="fit96")
    assert (list(again.codes), again.data_types) == (["vqcode_64-b", "vqcode_fit96"], {"image_text": 4})
    with pytest.raises(UsageError, match=r"encoded already \(vqcode_fit96\); .* --mode another size"):
        fill(tmp_path / "both", tmp_path / "none", mode="fit96")


def test_conversations_take_the_same_words(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "That."}]
    fields: dict[str, Any] = {"data_type": "visual_sft", "text": "", "conversations": turns, "image_extension": "jpg"}
    make_dataset(tmp_path / "in", [Sample(key=f"{i}", image=image_bytes(i, *SIZES[i]), **fields) for i in range(4)])
    fill(tmp_path / "in", tmp_path / "one", sft_mode="fit96")
    fill(tmp_path / "one", tmp_path / "two", sft_mode="cc64")
    assert [sample.grids for sample in read_samples(tmp_path / "two")] == [
        {"vqcode_fit96": [shape], "vqcode_64": [[4, 4]]} for shape in ([4, 6], [6, 4], [4, 4], [4, 8])
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "cc100"}, "mode cc100: 100 px is not a multiple of 16, the stride of tokenizer tiny: take cc96 or cc112"),
        ({"mode": "512"}, "mode '512': did you mean cc512[?] expected cc, multi or fit with 64 to 4096 pixels"),
        ({"mode": "cc64", "min_pixels": 100}, "--min-pixels 100 is for a mode such as fit720, and has no effect on others"),
        ({"min_pixels": 10_000}, "--min-pixels 10000: expected 0 to 9216 with fit96"),
    ],
)
def test_what_a_tokenizer_can_not_take_is_one_line(several: Path, tmp_path: Path, settings: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fill(several.parent / "fit96", tmp_path / "none", **settings)
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_stats_and_the_viewer_have_every_column(several: Path) -> None:
    found = to_json(stats(StatsConfig(input=str(several), quiet=True)))
    samples = read_samples(several)
    grids = Counter(f"{codes.shape[0]} x {codes.shape[1]}" for sample in samples for codes in sample.codes.values())
    assert found["grids"] == grids
    for column in samples[0].codes:
        assert found["codes"][column]["codes"] == sum(sample.codes[column].size for sample in samples)
    with serving(several) as server:
        assert list(ask(server, "/api/samples?first=0")["samples"][0]["columns"]) == list(samples[0].codes)
        for column, codes_hw in samples[0].codes.items():
            height, width = codes_hw.shape
            assert Image.open(io.BytesIO(fetch(server, f"/picture/0/{column}.png")[2])).size == (16 * width, 16 * height)


def test_token_rows_and_batches_are_of_the_column_that_is_chosen(several: Path, tmp_path: Path) -> None:
    tokenizer = str(write_tokenizer(tmp_path / "tokenizer"))
    sequences = SequenceConfig(tokenizer=tokenizer, max_length=200, t2i_ratio=1, unconditional_ratio=0)
    samples, made = read_samples(several), verify(VerifyConfig(input=str(several), quiet=True)).manifest.codes
    for column in (None, *samples[0].codes):
        plain = column or "vqcode_fit96"
        alone = [sample.with_codes([plain], made)._replace(image=None, image_extension=None) for sample in samples]
        make_dataset(tmp_path / f"alone-{column}", alone, codes={plain: made[plain]})
        for sample in alone:
            height, width = (16 * side for side in sample.codes[plain].shape)
            is_square = plain == "vqcode_64"
            assert sample.data_type == ("image_text" if is_square else "image_text_multi")
            assert (sample.width, sample.height) == ((None, None) if is_square else (width, height))
        packed, rows, batches = [], [], []
        for url, choice in ((several, column), (tmp_path / f"alone-{column}", None)):
            out = tmp_path / f"rows-{column}-{len(packed)}"
            settings = {"tokenizer": tokenizer, "max_length": 400, "t2i_ratio": 1, "unconditional_ratio": 0, "quiet": True}
            packed.append(pack(PackConfig(input=(str(url),), output=str(out), code_set=choice, **settings)).fingerprint())  # type: ignore[arg-type]
            for found, config in ((rows, {"sequences": sequences}), (batches, {})):
                source = Source(str(url), code_set=choice)
                loader = build_loader(LoaderConfig(sources=(source,), batch_size=4, shuffle=False, **config))  # type: ignore[arg-type]
                found.append(next(iter(loader)))
                loader.close()
        assert packed[0] == packed[1]
        assert torch.equal(rows[0]["input_ids"], rows[1]["input_ids"])
        assert batches[0]["data_type"] == batches[1]["data_type"] == [sample.data_type for sample in alone]
        assert all(map(torch.equal, batches[0]["codes"], batches[1]["codes"]))


def test_sizes_are_compared_column_by_column(several: Path, tmp_path: Path) -> None:
    fill(several.parent / "fit96", tmp_path / "bf16", mode="cc64", precision="bf16")
    found = compare_codes(CompareConfig(a=str(several), b=str(tmp_path / "bf16"), device="cpu", quiet=True))
    assert (found.samples, found.only_a, found.only_b, found.codes, found.pictures) == (4, 0, 0, 4 * 16, 4)
    again = compare_codes(CompareConfig(a=str(several), b=str(several), code_set_a="vqcode_fit96", device="cpu", quiet=True))
    assert (again.samples, again.equal_samples) == (4, 4)
    assert again.psnr_a_db == again.psnr_b_db
    with pytest.raises(
        UsageError, match=r"are of images of one size: .*vqcode_fit96, vqcode_64, vqcode_multi128, .*vqcode_64; choose"
    ):
        compare_codes(CompareConfig(a=str(several), b=str(tmp_path / "bf16"), code_set_a="vqcode_fit96", quiet=True))


@pytest.mark.slow
def test_liquids_seven_columns_have_no_place_for_other_sizes(several: Path, tmp_path: Path) -> None:
    columns = "vqcode_512 and vqcode_multi768 only, and none for vqcode_64: --code-set vqcode_512 takes one"
    for choice, message in (
        ("", "no codes without a name .* but vqcode_fit96, vqcode_64, vqcode_multi128"),
        ("vqcode_64", columns),
    ):
        with pytest.raises(UsageError, match=message):
            export_hf(ExportConfig(input=(str(several),), output=str(tmp_path / "none"), code_set=choice, quiet=True))
    assert not (tmp_path / "none").exists()
    fill(several, tmp_path / "more", mode="cc512")
    fill(tmp_path / "more", tmp_path / "most", mode="multi768")
    samples = {sample.text: sample for sample in read_samples(tmp_path / "most")}
    for column, kind in (("vqcode_512", "image_text"), ("vqcode_multi768", "image_text_multi")):
        config = ExportConfig(
            input=(str(tmp_path / "most"),), output=str(tmp_path / column), code_set=column, num_shards=1, quiet=True
        )
        export_hf(config)
        for row in load_from_disk(config.output):
            codes_hw = samples[row["text"]].codes[column]
            assert json.loads(row[column]) == codes_hw.ravel().tolist()
            assert row["data_type"] == kind
            size = ["no", "no"] if kind == "image_text" else [str(16 * side) for side in codes_hw.shape[::-1]]
            assert [row["width"], row["height"]] == size
