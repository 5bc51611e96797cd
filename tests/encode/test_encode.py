"""`encode`: the codes are the tokenizer's, sample by sample, whatever the batches and workers; bad images are rejects."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import captions, image_bytes, read_rejects, read_samples, shared, tree, wds_tools, write_jsonl, write_pairs
from conversions import write_tars
from datasets import load_from_disk
from factory import image_sample, make_dataset, text_sample
from PIL import Image
from s3 import S3Server

from loaders import LoaderConfig, Source, build_loader
from wds_tools.check.verify import VerifyConfig, verify
from wds_tools.convert import run_conversion
from wds_tools.convert.pairs import PairsConfig
from wds_tools.encode.encode import EncodeConfig, encode
from wds_tools.encode.image_encoder import ImageEncoder
from wds_tools.encode.options import TokenizerOptions
from wds_tools.errors import FormatError, NotFound, TokenizerError, TooManyRejects, UsageError
from wds_tools.export.hf import export_hf
from wds_tools.export.options import ExportConfig
from wds_tools.format.manifest import Manifest
from wds_tools.format.schema import Sample
from wds_tools.images import PREPROCESSING_VERSION, ImageLimits, prepare
from wds_tools.storage import open_store
from wds_tools.vq.base import ImageTokenizer
from wds_tools.vq.registry import load_tokenizer
from wds_tools.vq.tiny import TinyConfig, TinyVQ, save_tiny


@pytest.fixture(scope="module")
def tokenizer() -> ImageTokenizer:
    return load_tokenizer("tiny", device="cpu")


def image(number: int, data: bytes | None = None, **fields: Any) -> Sample:
    """A sample with a source image and no codes."""
    data = image_bytes(number, 64, 48) if data is None else data
    fields = {"data_type": "image_text", "text": f"caption {number}", "image_extension": "jpg", **fields}
    return Sample(key=f"{number:08d}", image=data, **fields)


def fill(source: Path, output: Path, **settings: Any) -> Manifest:
    settings = {"device": "cpu", "quiet": True, "max_rejects": "100%", **settings}
    manifest = encode(EncodeConfig(input=str(source), output=str(output), **settings))
    assert manifest.inputs == manifest.samples + sum(manifest.rejects.values())
    assert verify(VerifyConfig(input=str(output), quiet=True)).problems == ()
    return manifest


def expected_codes(sample: Sample, tokenizer: ImageTokenizer) -> np.ndarray[Any, Any]:
    """The codes of one image on its own, by the definition."""
    assert sample.image is not None
    pixels_HWC = prepare(sample.image, "multi768" if sample.data_type == "image_text_multi" else "cc512")
    return tokenizer.encode(torch.from_numpy(pixels_HWC[None]))[0].numpy()


def test_codes_are_those_of_each_image_on_its_own(tmp_path: Path, tokenizer: ImageTokenizer) -> None:
    sources = [image(i, image_bytes(i, 60 + 7 * i, 90), provenance={"url": f"u{i}"}) for i in range(5)]
    make_dataset(tmp_path / "in", sources, shard_samples=2)
    manifest = fill(tmp_path / "in", tmp_path / "out", batch_size=3)
    filled = read_samples(tmp_path / "out")
    for sample, source in zip(filled, sources, strict=True):
        codes_hw = sample.codes["vqcode_512"]
        assert (codes_hw.dtype, codes_hw.shape) == (np.dtype("<u2"), (32, 32))
        assert np.array_equal(codes_hw, expected_codes(source, tokenizer))
        assert (sample.key, sample.data_type, sample.text) == (source.key, source.data_type, source.text)
        assert (sample.width, sample.height, sample.image, sample.image_extension) == (None, None, None, None)
        assert sample.provenance == source.provenance
    assert {row.members for row in manifest.shards} == {("json", "vqcode_512.npy")}
    (column,) = manifest.codes
    assert column == "vqcode_512"
    facts = manifest.codes[column]
    assert (facts["tokenizer"], facts["codebook_size"], facts["stride"]) == ("tiny", tokenizer.codebook_size, 16)
    assert (facts["weights_hash"], facts["precision"]) == (tokenizer.weights_hash, "fp32")
    assert facts["preprocessing_version"] == PREPROCESSING_VERSION


def test_images_of_many_shapes_keep_their_size_and_order(tmp_path: Path, tokenizer: ImageTokenizer) -> None:
    shapes = [(400, 100), (100, 100), (100, 390), (100, 100), (150, 100), (400, 100), (100, 100)]
    sources = [image(i, image_bytes(i, *shape), data_type="image_text_multi") for i, shape in enumerate(shapes)]
    make_dataset(tmp_path / "in", sources)
    manifest = fill(tmp_path / "in", tmp_path / "out", batch_size=2)
    for sample, source in zip(read_samples(tmp_path / "out"), sources, strict=True):
        codes_hw = sample.codes["vqcode_multi768"]
        assert np.array_equal(codes_hw, expected_codes(source, tokenizer))
        assert (sample.height, sample.width) == (16 * codes_hw.shape[0], 16 * codes_hw.shape[1])
        assert sample.key == source.key
    assert list(manifest.codes) == ["vqcode_multi768"]


def test_images_stay_on_request_byte_for_byte(tmp_path: Path) -> None:
    sources = [image(0), image(1, image_bytes(1, kind="PNG"), image_extension="png")]
    make_dataset(tmp_path / "in", sources)
    fill(tmp_path / "in", tmp_path / "out", keep_images=True)
    filled = read_samples(tmp_path / "out")
    assert [(s.image, s.image_extension) for s in filled] == [(s.image, s.image_extension) for s in sources]
    assert all(len(sample.codes) == 1 for sample in filled)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_network_that_overflows_ends_the_run_and_names_image_precision_and_tokenizer(tmp_path: Path, workers: int) -> None:
    model = TinyVQ(TinyConfig(codebook_size=8, enc8=4, enc16=4, dec16=4, dec8=4, dec4=4))
    with torch.no_grad():
        for weights in model.encoder.parameters():
            weights.fill_(500.0)
    save_tiny(model, tmp_path / "w.safetensors")
    make_dataset(tmp_path / "in", [image(i) for i in range(3)], shard_samples=2)
    arguments = ["encode", "--input", tmp_path / "in", "--output", tmp_path / "out", "--device", "cpu", "--workers", workers]
    done = wds_tools(
        *arguments,
        "--tokenizer=tiny",
        f"--weights={tmp_path}/w.safetensors",
        "--precision=fp16",
        "--mode=cc128",
        "--quiet",
        status=1,
    )
    assert re.fullmatch(
        r"wds-tools: .*0000000\d: tokenizer tiny in fp16 gave NaN or infinite numbers for 64 of the 64 codes of image 0 "
        r"\(128 x 128 pixels\): use --precision bf16 or fp32 .*\n",
        done.stderr,
    ), done.stderr
    assert not (tmp_path / "out" / "manifest.json").exists()


JPEG = image_bytes(1, 200, 150)
PNG = image_bytes(1, 200, 150, "PNG")
BAD = {
    "truncated JPEG": (JPEG[: len(JPEG) // 2], "truncated_image"),
    "JPEG without its end marker": (JPEG[:-2], "truncated_image"),
    "truncated PNG": (PNG[: len(PNG) // 2], "truncated_image"),
    "PNG with a flipped bit": (PNG[:-40] + bytes([PNG[-40] ^ 1]) + PNG[-39:], "corrupt_image"),
    "empty": (b"", "empty_image"),
    "no image": (b"<html></html>", "not_an_image"),
    "too long": (image_bytes(1, 100, 40), "aspect_ratio"),
}


def test_bad_images_in_a_shard_are_rejects_and_sink_nobody(tmp_path: Path, tokenizer: ImageTokenizer) -> None:
    bad = [image(2 * i + 1, data) for i, (data, _) in enumerate(BAD.values())]
    good = [image(2 * i) for i in range(len(BAD) + 1)]
    make_dataset(tmp_path / "in", sorted([*bad, *good], key=lambda sample: sample.key))
    manifest = fill(tmp_path / "in", tmp_path / "out", batch_size=2)
    filled = read_samples(tmp_path / "out")
    assert [sample.key for sample in filled] == [sample.key for sample in good]
    assert all(np.array_equal(s.codes["vqcode_512"], expected_codes(g, tokenizer)) for s, g in zip(filled, good, strict=True))
    rejects = read_rejects(tmp_path / "out")
    assert [(r["key"], r["reason"]) for r in rejects] == [(s.key, why) for s, (_, why) in zip(bad, BAD.values(), strict=True)]
    assert {reject["source"] for reject in rejects} == {"shard-000000-0000.tar"}
    assert all(reject["detail"] for reject in rejects)
    assert manifest.inputs == 2 * len(BAD) + 1


def test_too_many_bad_images_stop_the_run(tmp_path: Path) -> None:
    make_dataset(tmp_path / "in", [image(0), image(1, JPEG[:500])])
    with pytest.raises(TooManyRejects, match=r"1 of 2 inputs can't be used, allowed are 10% \(1 truncated_image\)"):
        fill(tmp_path / "in", tmp_path / "out", max_rejects="10%")


def test_limits_of_the_conversion_are_not_set_up_again(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs", 3, width=9, height=8)
    run_conversion(PairsConfig(output=str(tmp_path / "in"), input=(str(path),), min_side=8, quiet=True))
    assert fill(tmp_path / "in", tmp_path / "out").samples == 3
    assert fill(tmp_path / "in", tmp_path / "strict", max_pixels=71).rejects == {"too_many_pixels": 3}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, pairs and multi-ratio pairs in shards of three, one image of them bad."""
    folder = tmp_path_factory.mktemp("mixed") / "in"
    kinds: list[Callable[[int], Sample]] = [
        lambda i: text_sample(i),
        lambda i: image(i),
        lambda i: image(i, image_bytes(i, 120, 64), data_type="image_text_multi"),
        lambda i: image(i, JPEG[:900] if i == 7 else None),
    ]
    make_dataset(folder, (kinds[i % len(kinds)](i) for i in range(9)), shard_samples=3)
    return folder


def test_texts_pass_through_a_mixed_set_unchanged(mixed: Path, tmp_path: Path) -> None:
    manifest = fill(mixed, tmp_path / "out")
    before = {sample.key: sample for sample in read_samples(mixed)}
    filled = read_samples(tmp_path / "out")
    assert [sample.key for sample in filled] == [key for key in before if key != "00000007"]
    texts = [sample for sample in filled if sample.data_type == "text_pretrain"]
    assert texts == [before[sample.key] for sample in texts]
    assert sorted(manifest.codes) == ["vqcode_512", "vqcode_multi768"]
    assert manifest.rejects == {"truncated_image": 1}


@pytest.mark.slow
def test_codes_depend_neither_on_batches_nor_on_workers(mixed: Path, tmp_path: Path) -> None:
    first = fill(mixed, tmp_path / "first", shard_samples=3)
    expected = tree(tmp_path / "first")
    assert len(first.shards) > 2
    for name, settings in {"batch": {"batch_size": 1}, "workers": {"workers": 2, "batch_size": 5}}.items():
        fill(mixed, tmp_path / name, shard_samples=3, **settings)
        assert tree(tmp_path / name) == expected


def test_a_worker_gets_the_settings_and_no_tokenizer() -> None:
    image_encoder = ImageEncoder("tiny", TokenizerOptions(device="cpu"), workers=1, keep_images=False, limits=ImageLimits())
    assert image_encoder.device is image_encoder.device
    assert len(pickle.dumps(image_encoder)) < 2000
    assert "device" not in vars(pickle.loads(pickle.dumps(image_encoder)))  # noqa: S301  our own


def test_the_input_is_named_in_the_manifest(mixed: Path, tmp_path: Path) -> None:
    source = fill(mixed, tmp_path / "out").source["input"]
    assert source["url"] == str(mixed)
    assert source["fingerprint"] == verify(VerifyConfig(input=str(mixed), quiet=True)).manifest.fingerprint()
    assert source["source"] == {"command": "test"}


# ---- wrong inputs ----


def test_a_set_without_images_is_refused(tmp_path: Path) -> None:
    make_dataset(tmp_path / "in", [text_sample(1)])
    with pytest.raises(UsageError, match=r"no images to encode: it holds text_pretrain"):
        fill(tmp_path / "in", tmp_path / "out")


def test_an_empty_set_is_refused(tmp_path: Path) -> None:
    make_dataset(tmp_path / "in", [])
    with pytest.raises(UsageError, match=r"no images to encode: it holds nothing"):
        fill(tmp_path / "in", tmp_path / "out")


def test_an_encoded_set_is_refused(mixed: Path, tmp_path: Path) -> None:
    fill(mixed, tmp_path / "once")
    with pytest.raises(UsageError, match=r"encoded already \(vqcode_512, vqcode_multi768\); --code-set NAME adds"):
        fill(tmp_path / "once", tmp_path / "twice")
    with pytest.raises(UsageError, match="has codes, but its images were not kept"):
        fill(tmp_path / "once", tmp_path / "twice", code_set="again")


# ---- several sets of codes ----


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another tokenizer: tiny's network with random weights and 300 codes."""
    torch.manual_seed(0)
    model = TinyVQ(TinyConfig(codebook_size=300, enc8=8, enc16=8, dec16=8, dec8=8, dec4=8))
    with torch.no_grad():
        model.codebook_KD.normal_(std=0.1)
    path = tmp_path_factory.mktemp("weights") / "other.safetensors"
    save_tiny(model, path)
    return path


@pytest.fixture(scope="module")
def twice(mixed: Path, other_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mixed set with two sets of codes, the second named."""
    folder = tmp_path_factory.mktemp("twice")
    fill(mixed, folder / "once", keep_images=True)
    fill(folder / "once", folder / "twice", code_set="other", weights=str(other_weights))
    return folder / "twice"


def test_a_second_set_of_codes_stands_beside_the_first(mixed: Path, twice: Path, other_weights: Path) -> None:
    manifest = verify(VerifyConfig(input=str(twice), quiet=True)).manifest
    assert list(manifest.codes) == ["vqcode_512", "vqcode_multi768", "vqcode_512-other", "vqcode_multi768-other"]
    assert [facts["codebook_size"] for facts in manifest.codes.values()] == [4096, 4096, 300, 300]
    assert len({facts["weights_hash"] for facts in manifest.codes.values()}) == 2
    first, second = load_tokenizer("tiny", device="cpu"), load_tokenizer("tiny", weights=str(other_weights), device="cpu")
    sources = {sample.key: sample for sample in read_samples(mixed)}
    for sample in read_samples(twice):
        if sample.data_type == "text_pretrain":
            continue
        column = "vqcode_multi768" if sample.data_type == "image_text_multi" else "vqcode_512"
        assert list(sample.codes) == [column, f"{column}-other"]
        assert np.array_equal(sample.codes[column], expected_codes(sources[sample.key], first))
        assert np.array_equal(sample.codes[f"{column}-other"], expected_codes(sources[sample.key], second))
        assert sample.image is None


def test_export_takes_the_codes_that_are_named(twice: Path, tmp_path: Path) -> None:
    samples = [sample for sample in read_samples(twice) if sample.data_type == "image_text"]
    for name, column in (("", "vqcode_512"), ("other", "vqcode_512-other")):
        export_hf(ExportConfig(input=(str(twice),), output=str(tmp_path / f"hf{name}"), code_set=name, num_shards=1, quiet=True))
        rows = {row["text"]: row for row in load_from_disk(str(tmp_path / f"hf{name}"))}
        for sample in samples:
            row = rows[sample.text]
            assert json.loads(row["vqcode_512"]) == sample.codes[column].ravel().tolist()
            assert row["length"] == len(sample.text) + 4 * 1024
    with pytest.raises(UsageError, match=r"no codes named 'third', but vqcode_512, vqcode_512-other"):
        export_hf(ExportConfig(input=(str(twice),), output=str(tmp_path / "none"), code_set="third", quiet=True))


def test_the_loader_reads_the_codes_that_are_named(twice: Path) -> None:
    samples = {sample.key: sample for sample in read_samples(twice)}
    for name, is_other in ((None, False), ("", False), ("other", True)):
        loader = build_loader(LoaderConfig(sources=(Source(str(twice), code_set=name),), batch_size=len(samples), shuffle=False))
        (batch,) = list(loader)
        loader.close()
        assert batch["__key__"] == list(samples)
        for codes_hw, sample in zip(batch["codes"], samples.values(), strict=True):
            wanted = [grid for column, grid in sample.codes.items() if column.endswith("-other") == is_other]
            assert (codes_hw is None) == (not wanted)
            assert not wanted or np.array_equal(codes_hw, wanted[0])
    with pytest.raises(UsageError, match="has no codes named 'third', but "):
        list(build_loader(LoaderConfig(sources=(Source(str(twice), code_set="third"),), batch_size=1)))


def test_a_run_goes_on_with_the_codes_it_began_with(twice: Path) -> None:
    plain, other = (
        build_loader(LoaderConfig(sources=(Source(str(twice), code_set=name),), batch_size=1)) for name in (None, "other")
    )
    other.load_state_dict(other.state_dict())
    for one, another in ((plain, other), (other, plain)):
        with pytest.raises(UsageError, match="another order: code_set of source 0 was"):
            one.load_state_dict(another.state_dict())


@pytest.mark.parametrize("name", ["a.b", "x" * 20, "a/b"])
def test_a_name_that_can_not_name_codes_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="can't name a code set"):
        TokenizerOptions(code_set=name)


# ---- straight through ----


@pytest.mark.slow
def test_pairs_are_encoded_straight_through_to_the_same_samples(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs", 9, width=60)
    (tmp_path / "pairs/images/4.jpg").write_bytes(JPEG[:900])
    (tmp_path / "pairs/images/5.jpg").unlink()
    args = ["convert", "pairs", "--input", path, "--keep", "url", "--task-lines", "4", "--max-rejects", "50%"]
    wds_tools(*args, "--output", tmp_path / "raw")
    fill(tmp_path / "raw", tmp_path / "twostep")
    wds_tools(*args, "--output", tmp_path / "straight", "--encode", "tiny", "--device", "cpu", "--batch-size", "3")
    for one, two in zip(read_samples(tmp_path / "straight"), read_samples(tmp_path / "twostep"), strict=True):
        assert np.array_equal(one.codes["vqcode_512"], two.codes["vqcode_512"])
        assert one._replace(codes={}) == two._replace(codes={})
    rejects = read_rejects(tmp_path / "straight")
    assert [(reject["line"], reject["reason"]) for reject in rejects] == [(5, "truncated_image"), (6, "missing_image")]
    manifest = verify(VerifyConfig(input=str(tmp_path / "straight"), quiet=True)).manifest
    assert manifest.codes["vqcode_512"]["tokenizer"] == "tiny"
    assert manifest.inputs == 9
    wds_tools(*args, "--output", tmp_path / "again", "--encode", "tiny", "--device", "cpu", "--workers", "2")
    assert tree(tmp_path / "again") == tree(tmp_path / "straight")


@pytest.mark.slow
def test_encode_takes_files_as_the_converter_does_that_fits(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs", 3, width=60)
    how = ["--device", "cpu", "--keep-images", "--shard-samples", "2", "--max-pixels", "100000"]
    wds_tools("convert", "pairs", "--input", path, "--encode", "tiny", *how, "--output", tmp_path / "straight")
    wds_tools("encode", "--input", path, *how, "--output", tmp_path / "encoded")
    assert tree(tmp_path / "encoded") == tree(tmp_path / "straight")
    others = [word for word in how if word != "--keep-images"]
    failed = wds_tools("encode", "--input", path, *others, "--output", tmp_path / "encoded", "--resume", status=2)
    assert "keep_images" in failed.stderr
    failed = wds_tools("encode", "--input", path, "--sft-mode", "multi768", "--output", tmp_path / "out", status=2)
    assert "--sft-mode: the input is read as by convert pairs --encode, which has no such option" in failed.stderr
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "Noise."}]
    chats = [write_jsonl(tmp_path / f"pairs/{n}.jsonl", [{"image": f"images/{n}.jpg", "conversations": turns}]) for n in range(3)]
    size = ["--sft-mode", "cc256", "--device", "cpu"]
    wds_tools("convert", "conversations", "--input", *chats, "--encode", "tiny", *size, "--output", tmp_path / "chats")
    wds_tools("encode", "--input", *chats, *size, "--output", tmp_path / "encoded-chats")
    assert tree(tmp_path / "encoded-chats") == tree(tmp_path / "chats")
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": "no image"}])
    failed = wds_tools("encode", "--input", text, "--output", tmp_path / "out", status=2)
    assert "no images to encode: `wds-tools convert documents` takes these" in failed.stderr
    failed = wds_tools("encode", "--input", tmp_path / "chats", path, "--output", tmp_path / "out", status=2)
    assert "expected one dataset, or files and nothing else" in failed.stderr


@pytest.mark.slow
def test_encode_reads_tars_where_they_lie_and_writes_codes_alone(tmp_path: Path, s3: S3Server) -> None:
    samples = [{"jpg": image_bytes(number, 60, 40), "txt": b"caption %d" % number} for number in range(3)]
    pattern = write_tars(tmp_path / "tars", samples, 1)
    store = open_store(f"s3://{s3.bucket}/encode-tars")
    for path in (tmp_path / "tars").iterdir():
        store.put(path.name, path.read_bytes())
    for name, source in (("disk", pattern), ("s3", f"{store.url}/0000*.tar")):
        wds_tools("encode", "--input", source, "--device", "cpu", "--output", tmp_path / name)
    shards = [{name: data for name, data in tree(tmp_path / name).items() if name.endswith(".tar")} for name in ("disk", "s3")]
    assert shards[0] == shards[1]
    found = read_samples(tmp_path / "s3")
    assert captions(found) == ["caption 0", "caption 1", "caption 2"]
    assert {(*sample.codes, sample.image) for sample in found} == {("vqcode_512", None)}


def test_a_png_that_is_turned_by_what_lies_behind_its_pixels_has_the_size_of_its_grid(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turn = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = len(turn).to_bytes(4, "big") + b"eXIf" + turn + zlib.crc32(b"eXIf" + turn).to_bytes(4, "big")
    png = image_bytes(1, 300, 100, kind="PNG")
    (tmp_path / "a.png").write_bytes(png[:-12] + chunk + png[-12:])  # before IEND
    path = write_jsonl(tmp_path / "pairs.jsonl", [{"image": "a.png", "text": "a"}])
    wds_tools(
        *("convert", "pairs", "--input", path, "--mode", "multi768", "--encode", "tiny", "--device", "cpu"),
        *("--output", tmp_path / "out"),
    )
    (sample,) = read_samples(tmp_path / "out")
    assert (sample.height, sample.width) == tuple(16 * side for side in sample.codes["vqcode_multi768"].shape)
    assert sample.height > sample.width


@pytest.mark.slow
def test_conversations_are_encoded_straight_through_to_the_same_samples(tmp_path: Path) -> None:
    for number, name in enumerate("ab"):
        (tmp_path / f"{name}.jpg").write_bytes(image_bytes(number, 60, 40))
    turns = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "Red."}]
    path = write_jsonl(tmp_path / "talks.jsonl", [{"messages": turns, "images": [name]} for name in ("a.jpg", "b.jpg")])
    args = ["convert", "conversations", "--input", path, "--output"]
    wds_tools(*args, tmp_path / "raw")
    fill(tmp_path / "raw", tmp_path / "twostep", sft_mode="multi768")
    wds_tools(*args, tmp_path / "straight", "--encode", "tiny", "--device", "cpu", "--sft-mode", "multi768")
    for one, two in zip(read_samples(tmp_path / "straight"), read_samples(tmp_path / "twostep"), strict=True):
        assert np.array_equal(one.codes["vqcode_multi768"], two.codes["vqcode_multi768"])
        assert one._replace(codes={}) == two._replace(codes={})
    assert verify(VerifyConfig(input=str(tmp_path / "straight"), quiet=True)).problems == ()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pairs", "conversations"])
def test_settings_of_a_tokenizer_without_encode_are_refused(tmp_path: Path, name: str) -> None:
    path = write_pairs(tmp_path / "pairs", 1)
    for extra in (["--precision", "bf16"], ["--keep-images"], *([["--sft-mode", "multi768"]] if name == "conversations" else [])):
        said = wds_tools("convert", name, "--input", path, "--output", tmp_path / "out", *extra, status=2)
        words = " ".join(said.stderr.replace("│", " ").split())
        assert f"{extra[0]} says how to encode, and has no effect without --encode" in words


def test_codes_without_images_are_refused(tmp_path: Path) -> None:
    make_dataset(tmp_path / "in", [image_sample(1)])
    with pytest.raises(FormatError, match="has no image"):
        fill(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}])
@pytest.mark.parametrize("spelling", ["{0}", "{0}/", "./in", "file://{0}", "link", "../{1}/in"])
def test_output_on_input_is_refused_however_it_is_spelled(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str, flags: dict[str, bool]
) -> None:
    shutil.copytree(mixed, tmp_path / "in")
    (tmp_path / "link").symlink_to("in")
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path / "in")
    with pytest.raises(UsageError, match=r"--output .* is the input "):
        encode(EncodeConfig(input=str(tmp_path / "in"), output=spelling.format(tmp_path / "in", tmp_path.name), **flags))
    assert tree(tmp_path / "in") == before


def test_an_unfinished_or_missing_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such folder"):
        fill(tmp_path / "nowhere", tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"tokenizer": "huge"}, UsageError, "unknown tokenizer 'huge'"),
        ({"tokenizer": "chameleon"}, UsageError, "needs weights"),
        ({"weights": "nowhere.safetensors"}, TokenizerError, "nowhere"),
        ({"tokenizer": "chameleon", "weights": "nowhere"}, TokenizerError, "nowhere"),
        ({"device": "abacus"}, UsageError, "unknown device 'abacus'"),
        ({"batch_size": 0}, UsageError, "--batch-size 0"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(
    mixed: Path, tmp_path: Path, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fill(mixed, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_a_damaged_input_shard_stops_the_run_and_is_named(mixed: Path, tmp_path: Path) -> None:
    shutil.copytree(mixed, tmp_path / "in")
    shard = tmp_path / "in/shard-000000-0001.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    with pytest.raises(FormatError, match=r"shard-000000-0001\.tar"):
        fill(tmp_path / "in", tmp_path / "out", shard_samples=3)
    shutil.copy(mixed / shard.name, shard)
    fill(tmp_path / "in", tmp_path / "out", shard_samples=3, resume=True)
    fill(mixed, tmp_path / "peace", shard_samples=3)
    assert captions(read_samples(tmp_path / "out")) == captions(read_samples(tmp_path / "peace"))


@pytest.mark.parametrize("change", [{"precision": "bf16"}, {"keep_images": True}])
def test_resume_with_other_settings_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    make_dataset(tmp_path / "in", [image(0), image(1, JPEG[:500])])
    with pytest.raises(TooManyRejects):
        fill(tmp_path / "in", tmp_path / "out", max_rejects="0")
    with pytest.raises(UsageError, match=next(iter(change))):
        fill(tmp_path / "in", tmp_path / "out", resume=True, **change)
    assert fill(tmp_path / "in", tmp_path / "out", resume=True, batch_size=1).samples == 1


@pytest.mark.slow
def test_real_images_encode(tmp_path: Path, tokenizer: ImageTokenizer) -> None:
    folder = shared("pairs/open")
    lines = [json.loads(line) for line in (folder / "pairs.jsonl").read_text("utf-8").splitlines()][::9]
    path = write_jsonl(tmp_path / "pairs.jsonl", lines)
    wds_tools("convert", "pairs", "--input", path, "--image-root", folder, "--output", tmp_path / "raw")
    said = wds_tools("encode", "--input", tmp_path / "raw", "--output", tmp_path / "out", "--device", "cpu")
    assert "tiny, 4,096 codes, fp32" in said.stdout
    raw, filled = read_samples(tmp_path / "raw"), read_samples(tmp_path / "out")
    assert captions(filled) == captions(raw)
    for sample, source in list(zip(filled, raw, strict=True))[::5]:
        assert np.array_equal(sample.codes["vqcode_512"], expected_codes(source, tokenizer))
