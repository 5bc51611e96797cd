"""Codes of any shape: plug-ins with 8 codebooks, codes in one dimension, floats in place of codes, through the whole chain."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import image_bytes, read_samples
from factory import make_dataset, text_sample
from numpy.typing import NDArray
from plugin import BLOCKS, installed, write_plugin
from tokens import write_tokenizer
from viewer import ask, serving

from loaders import LoaderConfig, SequenceConfig, Source, build_loader
from wds_tools.check.compare import CompareConfig, compare_codes
from wds_tools.check.stats.describe import StatsConfig, stats
from wds_tools.check.verify import VerifyConfig, verify
from wds_tools.cli.main import main
from wds_tools.cli.summary import print_dataset
from wds_tools.convert import run_conversion
from wds_tools.convert.coded import CodedConfig
from wds_tools.dataset.reader import read_manifest
from wds_tools.encode.encode import EncodeConfig, encode
from wds_tools.errors import FormatError, TokenizerError, UsageError
from wds_tools.export.hf import export_hf
from wds_tools.export.options import ExportConfig, ParquetConfig
from wds_tools.export.parquet import export_parquet
from wds_tools.format.codes import CodeGrid
from wds_tools.format.manifest import serialize_manifest
from wds_tools.format.schema import Sample, SourceImage
from wds_tools.images import prepare
from wds_tools.jobs.index_tars import rebuild_indices
from wds_tools.pack.rows import PackConfig, pack
from wds_tools.sequences.tokenizer import TextTokenizer
from wds_tools.storage import open_store
from wds_tools.vq import LayoutTokenizer, load_tokenizer
from wds_tools.vq.base import codes_shape, layout_of

NAMES = ("eight", "line", "latents", "small")
OTHERS = "wrong = somebodys_layouts:Wrong\ninfinite = somebodys_layouts:Infinite"
ENTRY_POINTS = f"""[wds_tools.tokenizers]
{chr(10).join(f"{name} = somebodys_layouts:{name.title()}" for name in NAMES)}
{OTHERS}
[wds_tools.templates]
flat = somebodys_layouts:Flat"""
LAYOUTS = {
    "eight": CodeGrid(layout="hwk", codebook_size=(16,) * 7 + (32,)),
    "line": CodeGrid(layout="n", codebook_size=512),
    "latents": CodeGrid(layout="hwd", dtype="bfloat16"),
    "small": CodeGrid(layout="wn", dtype="uint8"),
}
COLUMN = "vqcode_128"


def inputs() -> list[Sample]:
    jpegs = [image_bytes(number, 160, 140) for number in range(5)]
    pairs = [Sample(key=f"a{n}", data_type="image_text", text=f"t {n}", image=jpegs[n], image_extension="jpg") for n in range(3)]
    talk = Sample(
        key="b",
        data_type="visual_sft",
        text="",
        conversations=[{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "The first."}],
        image=jpegs[3],
        image_extension="jpg",
        more_images=(SourceImage(jpegs[4], "jpg"),),
    )
    return [*pairs, talk, text_sample(0)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The images, encoded by each; while it is there, so is the package."""
    folder = tmp_path_factory.mktemp("layouts")
    site = write_plugin(tmp_path_factory.mktemp("site"), "somebodys_layouts", BLOCKS, ENTRY_POINTS)
    make_dataset(folder / "in", inputs())
    write_tokenizer(folder / "tokenizer")
    with installed(site, "somebodys_layouts"):
        for name in NAMES:
            run(folder, name)
        yield folder


def run(folder: Path, name: str, output: str = "", **settings: Any) -> None:
    given: dict[str, Any] = {"keep_images": True, "mode": "cc128", "sft_mode": "cc128", "device": "cpu", "quiet": True}
    given |= settings
    encode(EncodeConfig(input=str(folder / "in"), output=str(folder / (output or name)), tokenizer=name, **given))


def as_floats(patterns: NDArray[Any]) -> NDArray[np.float32]:
    """bfloat16 is the upper half of a float32."""
    return (patterns.astype("<u4") << 16).view("<f4")


@pytest.mark.parametrize("name", NAMES)
def test_codes_of_every_shape_are_stored_as_the_tokenizer_gives_them_and_verified(folder: Path, name: str) -> None:
    result = verify(VerifyConfig(input=str(folder / name), quiet=True))
    layout, made = LAYOUTS[name], result.manifest.codes[COLUMN]
    assert result.problems == ()
    assert result.manifest.schema_version == 2
    assert result.manifest.layouts == {COLUMN: layout}
    assert made["stride"] == (16 if layout.has_sides else None)
    tokenizer = load_tokenizer(name, device="cpu")
    assert isinstance(tokenizer, LayoutTokenizer)
    assert layout_of(tokenizer) == layout
    shape = codes_shape(tokenizer, 128, 128)
    stored = [sample for sample in read_samples(folder / name) if sample.codes]
    assert [sample.codes[COLUMN].shape for sample in stored[:3]] == [shape] * 3
    assert stored[3].grids == {COLUMN: [list(shape)] * 2}
    for sample in stored:
        for codes, image in zip(sample.grids_of(COLUMN), sample.images, strict=True):
            assert codes.dtype == layout.npy_dtype
            given = tokenizer.encode(torch.from_numpy(prepare(image.data, "cc128"))[None])[0].float().numpy()
            assert np.array_equal(as_floats(codes) if layout.is_float else codes.astype(np.float32), given)
    before = {path: path.read_bytes() for path in (folder / name).glob("*.index")}
    rebuild_indices(open_store(str(folder / name)))
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("name", NAMES)
def test_statistics_comparison_and_summary_are_of_the_same_codes(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = read_samples(folder / name)
    count = stats(StatsConfig(input=str(folder / name), quiet=True)).count
    shape = codes_shape(load_tokenizer(name, device="cpu"), 128, 128)
    assert count.grids == {" x ".join(map(str, shape)): 5}
    every = [codes for sample in samples for codes in (sample.grids_of(COLUMN) if sample.codes else [])]
    num_counted = {called: int(use.counts.sum()) for called, use in count.codes.items()}
    if name == "eight":
        assert num_counted == {f"{COLUMN} codebook {number}": 5 * 64 for number in range(8)}
        assert count.codes[f"{COLUMN} codebook 7"].size == 32
        second = np.bincount(np.stack(every)[..., 2].ravel(), minlength=16)
        assert np.array_equal(count.codes[f"{COLUMN} codebook 2"].counts, second)
    else:
        assert num_counted == ({COLUMN: 5 * 32} if name == "line" else {})
    result = compare_codes(CompareConfig(a=str(folder / name), b=str(folder / name), device="cpu", quiet=True, code_set_b=COLUMN))
    assert (result.samples, result.codes, result.equal_codes) == (4, sum(codes.size for codes in every), result.codes)
    assert result.pictures == 5
    assert result.psnr_between_db == float("inf")
    print_dataset("it", read_manifest(open_store(str(folder / name))))
    assert f"{name}, {LAYOUTS[name]}, fp32" in capsys.readouterr().out
    assert main(["stats", str(folder / name), "--quiet"]) == 0
    told = capsys.readouterr().out
    for called, use in count.codes.items():
        assert f"\n{called}  " in told
        assert f" {use.used:,} of {use.size:,} codes in use" in told


def test_pictures_of_another_size_than_the_photographs_are_compared_with_each_other_alone(folder: Path) -> None:
    run(folder, "line", "small-lines", mode="cc64", sft_mode="cc64")  # it decodes to 128 x 128 all the same
    sets = str(folder / "small-lines")
    result = compare_codes(CompareConfig(a=sets, b=sets, device="cpu", quiet=True, code_set_b="vqcode_64"))
    assert (result.pictures, result.psnr_between_db, result.psnr_a_db) == (5, float("inf"), None)


@pytest.mark.parametrize("name", NAMES)
def test_a_loader_gives_the_codes_in_their_shape_and_type(folder: Path, name: str) -> None:
    layout, samples = LAYOUTS[name], {sample.key: sample for sample in read_samples(folder / name)}
    (batch,) = batches(folder / name)
    for key, codes in zip(batch["__key__"], batch["codes"], strict=True):
        sample = samples[key]
        grids = sample.grids_of(COLUMN) if sample.codes else []
        if not grids:
            assert codes is None
        for grid, tensor in zip(grids, codes if sample.grids else [codes] if grids else [], strict=True):
            assert tensor.dtype == (torch.bfloat16 if layout.is_float else torch.int32)
            assert np.array_equal(tensor.float().numpy(), as_floats(grid) if layout.is_float else grid.astype(np.float32))


def batches(*folders: Path, **settings: Any) -> list[Any]:
    given = {"batch_size": 5, "last_batch": "short", **settings}
    return list(build_loader(LoaderConfig(sources=tuple(Source(str(folder)) for folder in folders), **given)))


def rows_of(folder: Path, name: str, template: str = "liquid") -> Any:
    sequences = SequenceConfig(tokenizer=str(folder / "tokenizer"), max_length=1200, template=template)
    (batch,) = batches(folder / name, sequences=sequences)
    return batch


@pytest.mark.parametrize(("name", "template"), [("line", "liquid"), ("eight", "flat")])
def test_rows_have_the_codes_in_order_or_as_the_templates_own_rule_says(folder: Path, name: str, template: str) -> None:
    batch = rows_of(folder, name, template)
    text_size = TextTokenizer(str(folder / "tokenizer")).num_tokens
    for row, key in enumerate(batch["__key__"]):
        sample = next(sample for sample in read_samples(folder / name) if sample.key == key)
        grids = sample.grids_of(COLUMN) if sample.codes else []
        ids = batch["input_ids"][row].numpy()
        own = [grid.astype(int) + (16 * np.arange(8) if template == "flat" else 0) for grid in grids]
        expected = np.concatenate([np.zeros(0, int), *(grid.ravel() for grid in own)])
        assert np.array_equal(ids[ids >= text_size] - text_size, expected)
    packed = PackConfig(
        input=(str(folder / name),),
        output=str(folder / f"{name}-rows"),
        tokenizer=str(folder / "tokenizer"),
        max_length=1200,
        template=template,
        quiet=True,
    )
    assert pack(packed).source["counts"]["samples"] == 5
    assert verify(VerifyConfig(input=packed.output, quiet=True)).problems == ()


@pytest.mark.parametrize(
    ("name", "template", "problem"),
    [
        ("eight", "liquid", r"vqcode_128 has 7 x 16 \+ 32 codes \(hwk\), of which template liquid can't make"),
        ("latents", "liquid", r"bfloat16 \(hwd\), of which template liquid can't"),
        ("small", "liquid", r"uint8 \(wn\), of which"),
        ("line", "emu3", r"512 codes \(n\), of which template emu3 can't"),
    ],
)
def test_what_has_no_order_is_refused_before_a_row_is_made(folder: Path, name: str, template: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        rows_of(folder, name, template)


def test_liquids_columns_take_no_other_layout(folder: Path) -> None:
    run(folder, "line", "line512", mode="cc512", sft_mode="cc512", keep_images=False)
    with pytest.raises(UsageError, match=r"vqcode_512 has 512 codes \(n\), and Liquid's columns have a place for \(h, w\)"):
        export_hf(ExportConfig(input=(str(folder / "line512"),), output=str(folder / "hf"), quiet=True))


@pytest.mark.parametrize("name", NAMES)
def test_they_go_to_typed_parquet_and_come_back_in_their_layout(folder: Path, tmp_path: Path, name: str) -> None:
    export_parquet(ParquetConfig(input=(str(folder / name),), output=str(tmp_path / "table"), quiet=True))
    back = run_conversion(CodedConfig(input=(str(tmp_path / "table"),), output=str(tmp_path / "back"), quiet=True))
    first, again = read_samples(folder / name), read_samples(tmp_path / "back")
    assert back.layouts == {COLUMN: LAYOUTS[name]}
    for a, b in zip(first, again, strict=True):
        assert [array.dtype for array in a.codes.values()] == [array.dtype for array in b.codes.values()]
        assert all(map(np.array_equal, a.codes.values(), b.codes.values()))
        assert (a.grids, a.images, a.text) == (b.grids, b.images, b.text)


@pytest.mark.parametrize("name", NAMES)
def test_the_viewer_shows_what_it_can_and_says_so_of_the_rest(folder: Path, name: str) -> None:
    with serving(folder / name, device="cpu") as server:
        shown = ask(server, "/api/sample/0")["grids"][0]
        assert shown["layout"] == str(LAYOUTS[name])
        codes = read_samples(folder / name)[0].codes[COLUMN]
        assert shown["shape"] == list(codes.shape)
        if name == "latents":
            assert shown["problem"].startswith("8 x 8 x 3 numbers of bfloat16")
            assert "no codes" in ask(server, f"/codes/0/{COLUMN}.png", 422)["error"]
        else:
            assert shown["codes"] == codes.ravel().tolist()
            assert shown["height"] * shown["width"] == codes.size
            assert len(ask(server, f"/api/usage/0/{COLUMN}")["counts"]) == codes.size


@pytest.mark.parametrize(
    ("fault", "got"),
    [("k", r"torch.int64 \(\d, 8, 8, 7\)"), ("range", r"from \d+ to 16"), ("float", r"torch.float32 \(\d, 8, 8, 8\)")],
)
def test_codes_of_another_shape_type_or_codebook_end_the_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, got: str
) -> None:
    import somebodys_layouts

    monkeypatch.setattr(somebodys_layouts, "fault", fault)
    with pytest.raises(TokenizerError, match=rf"wrong gave codes of .*{got}.*expected integers \(\d, 8, 8, 8\) from 0 to 31: 7"):
        run(folder, "wrong", str(tmp_path / "out"))


def test_a_float_that_is_no_number_is_an_error_that_names_image_and_precision(folder: Path, tmp_path: Path) -> None:
    what = r"a0: tokenizer infinite in fp32 gave NaN or infinite numbers for 24 of the 192 codes of image 0 \(128 x 128 pixels"
    with pytest.raises(TokenizerError, match=what):
        run(folder, "infinite", str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("made", "codes", "problem"),
    [
        ({"layout": "n", "codebook_size": 9}, np.zeros((2, 2), "<u2"), "expected a non-empty 1-D grid of <u2"),
        ({"layout": "hwk", "codebook_size": [4, 4]}, np.zeros((2, 2, 3), "<u2"), "with 2 codebooks on its last axis"),
        ({"dtype": "float32"}, np.zeros((2, 2), "<u4"), "expected a non-empty 2-D grid of <f4"),
        ({"codebook_size": 9}, np.zeros((2, 2), "<f4"), "expected a non-empty 2-D grid of <u2 or <u4"),
    ],
)
def test_arrays_that_are_not_what_their_column_declares_are_found_by_whoever_writes_or_reads_them(
    tmp_path: Path, made: dict[str, Any], codes: NDArray[Any], problem: str
) -> None:
    sample = Sample(key="a", data_type="image_text", text="t", codes={COLUMN: codes})
    with pytest.raises(FormatError, match=problem):
        make_dataset(tmp_path / "refused", [sample], codes={COLUMN: made})
    names = {np.dtype("<u4"): "uint32", np.dtype("<f4"): "float32", np.dtype("<u2"): "uint16"}
    true = {"layout": "abc"[: codes.ndim], "dtype": names[codes.dtype]}
    manifest = make_dataset(tmp_path / "set", [sample], codes={COLUMN: true})
    (tmp_path / "set/manifest.json").write_bytes(serialize_manifest(replace(manifest, codes={COLUMN: made})))
    assert any(problem in found for found in verify(VerifyConfig(input=str(tmp_path / "set"), quiet=True)).problems)
    with pytest.raises(FormatError, match=problem):
        stats(StatsConfig(input=str(tmp_path / "set"), quiet=True))
    with pytest.raises(FormatError, match=problem):
        batches(tmp_path / "set")


@pytest.mark.parametrize(
    ("made", "codes", "problem"),
    [
        ({"layout": "hwk", "codebook_size": [9, 4]}, np.full((1, 1, 2), 4, "<u2"), f"a: {COLUMN} codebook 1 holds the code 4"),
        ({"layout": "n", "dtype": "bfloat16"}, np.full(3, 0x7FC0, "<u2"), f"a: {COLUMN}: 3 of 3 bfloat16 numbers are NaN"),
    ],
)
def test_values_that_can_not_be_are_found_by_verify(
    tmp_path: Path, made: dict[str, Any], codes: NDArray[Any], problem: str
) -> None:
    sample = Sample(key="a", data_type="image_text", text="t", codes={COLUMN: codes})
    make_dataset(tmp_path / "set", [sample], codes={COLUMN: made})
    (found,) = verify(VerifyConfig(input=str(tmp_path / "set"), quiet=True)).problems
    assert problem in found


def test_floats_and_codes_do_not_share_a_batch(folder: Path) -> None:
    with pytest.raises(FormatError, match=r"a batch can't hold (codes and bfloat16|bfloat16 and codes): make a loader of each"):
        batches(folder / "eight", folder / "latents", batch_size=10)
