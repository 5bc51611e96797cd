"""`compare-codes`: shares and PSNR as numpy computes them, joined by key, and what can't be compared is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import image_bytes, read_samples, wds_tools
from factory import image_sample, make_dataset, text_sample

from wds_tools.check.compare import CompareConfig, compare_codes
from wds_tools.encode.encode import EncodeConfig, encode
from wds_tools.errors import FormatError, UsageError
from wds_tools.format.codes import join_grids
from wds_tools.format.schema import Sample, SourceImage
from wds_tools.images import Mode, prepare
from wds_tools.vq import load_tokenizer


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same six images in fp32, kept, and in bf16; and both side by side under two names."""
    folder = tmp_path_factory.mktemp("sets")
    samples = [
        Sample(key=f"{i:04d}", data_type="image_text", text=f"t{i}", image=image_bytes(i, 300, 200), image_extension="jpg")
        for i in range(6)
    ]
    make_dataset(folder / "in", [*samples, text_sample(1)])
    for name, settings in {"fp32": {"keep_images": True}, "bf16": {"precision": "bf16"}}.items():
        encode(EncodeConfig(input=str(folder / "in"), output=str(folder / name), device="cpu", quiet=True, **settings))  # type: ignore[arg-type]
    both = EncodeConfig(
        input=str(folder / "fp32"), output=str(folder / "both"), device="cpu", quiet=True, precision="bf16", code_set="b"
    )
    encode(both)
    return folder


def compare(a: Path, b: Path, **settings: Any) -> Any:
    return compare_codes(CompareConfig(a=str(a), b=str(b), device="cpu", quiet=True, **settings))


def psnr(errors: list[float]) -> float:
    return float(10 * np.log10(255**2 / np.mean(errors)))


@pytest.mark.slow
def test_shares_and_psnr_are_those_of_the_definition(sets: Path) -> None:
    result = compare(sets / "fp32", sets / "bf16")
    a, b = ([s for s in read_samples(sets / name) if s.codes] for name in ("fp32", "bf16"))
    grids_a, grids_b = (np.stack([s.codes["vqcode_512"] for s in samples]).astype(int) for samples in (a, b))
    assert (result.samples, result.only_a, result.only_b, result.codes) == (6, 0, 0, 6 * 1024)
    assert result.equal_codes == (grids_a == grids_b).sum()
    assert 0.9 < result.equal_codes / result.codes < 1
    assert result.equal_samples == (grids_a == grids_b).all((1, 2)).sum()
    tokenizer = load_tokenizer("tiny", device="cpu")
    shown_a, shown_b = (tokenizer.decode(torch.from_numpy(grids)).numpy().astype(float) for grids in (grids_a, grids_b))
    photographs = np.stack([prepare(s.image, "cc512") for s in a if s.image is not None]).astype(float)
    assert result.psnr_between_db == pytest.approx(psnr([float(np.square(shown_a - shown_b).mean())]), abs=1e-3)
    assert result.psnr_a_db == pytest.approx(psnr([float(np.square(shown_a - photographs).mean())]), abs=1e-3)
    assert result.psnr_b_db == pytest.approx(psnr([float(np.square(shown_b - photographs).mean())]), abs=1e-3)
    assert result.psnr_between_db > result.psnr_a_db


@pytest.mark.slow
def test_two_names_of_one_dataset_can_be_compared(sets: Path) -> None:
    apart, together = (
        compare(sets / "fp32", sets / "bf16", pictures=0),
        compare(sets / "both", sets / "both", code_set_b="b", pictures=0),
    )
    assert (apart.codes, apart.equal_codes) == (together.codes, together.equal_codes)
    assert together.pictures == 0
    assert together.psnr_between_db is None


def test_samples_are_joined_by_key(tmp_path: Path) -> None:
    facts = {"vqcode_512": {"tokenizer": "tiny", "codebook_size": 8192, "weights_hash": "x"}}
    make_dataset(tmp_path / "a", (image_sample(i) for i in (1, 2, 3, 5, 8)), codes=facts)
    make_dataset(tmp_path / "b", (image_sample(i) for i in (2, 3, 4, 9)), codes=facts)
    result = compare(tmp_path / "a", tmp_path / "b", pictures=0)
    assert (result.samples, result.only_a, result.only_b) == (2, 3, 2)
    assert result.equal_codes == result.codes == 32


def test_what_can_not_be_compared_is_refused(sets: Path, tmp_path: Path) -> None:
    facts = {"vqcode_512": {"tokenizer": "other", "codebook_size": 8192, "weights_hash": "x"}}
    make_dataset(tmp_path / "other", [image_sample(1)], codes=facts)
    make_dataset(tmp_path / "shape", [image_sample(1, side=2)], codes=facts)
    make_dataset(tmp_path / "order", [image_sample(2), image_sample(1)], codes=facts)
    with pytest.raises(UsageError, match="can't be compared: tokenizer is 'tiny' and 'other'"):
        compare(sets / "fp32", tmp_path / "other")
    with pytest.raises(
        UsageError,
        match=r"no codes '' of .* and 'x' of .* are of images of one size: .* has vqcode_512; choose",
    ):
        compare(sets / "fp32", sets / "bf16", code_set_b="x")
    with pytest.raises(UsageError, match="both are the same codes"):
        compare(sets / "fp32", sets / "fp32")
    with pytest.raises(FormatError, match=r"vqcode_512 has grids of \(4, 4\) and of \(2, 2\) codes"):
        compare(tmp_path / "other", tmp_path / "shape", pictures=0)
    with pytest.raises(FormatError, match="keys have to ascend"):
        compare(tmp_path / "other", tmp_path / "order", pictures=0)


def talk(number: int, *sides: tuple[int, int]) -> Sample:
    """A conversation about images of these sizes."""
    images = [SourceImage(image_bytes(10 * number + i, *size), "jpg") for i, size in enumerate(sides)]
    turns = [{"from": "human", "value": "<image>" * len(sides) + "What?"}, {"from": "gpt", "value": "That."}]
    first = {"image": images[0].data, "image_extension": "jpg"} if images else {}
    fields = {"data_type": "visual_sft", "text": "", "conversations": turns, "more_images": tuple(images[1:]), **first}
    return Sample(key=f"{number:04d}", **fields)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["cc512", "multi768"])
def test_all_pictures_of_a_conversation_are_decoded_and_compared(tmp_path: Path, mode: Mode) -> None:
    make_dataset(tmp_path / "in", [talk(0), talk(1, (90, 60), (60, 60)), talk(2, (64, 90)), talk(3)])
    for name, settings in {"a": {"keep_images": True}, "b": {"precision": "bf16"}}.items():
        where = {"input": str(tmp_path / "in"), "output": str(tmp_path / name), "sft_mode": mode}
        encode(EncodeConfig(**where, device="cpu", quiet=True, **settings))  # type: ignore[arg-type]
    result = compare(tmp_path / "a", tmp_path / "b")
    column = {"cc512": "vqcode_512", "multi768": "vqcode_multi768"}[mode]
    a, b = (read_samples(tmp_path / name) for name in "ab")
    assert (result.samples, result.pictures, result.codes) == (4, 3, sum(sample.num_codes for sample in a))
    assert result.equal_codes == sum(int((x.codes[column] == y.codes[column]).sum()) for x, y in zip(a, b, strict=True))
    tokenizer = load_tokenizer("tiny", device="cpu")
    errors = []
    for sample in a:
        for grid_hw, image in zip(sample.grids_of(column), sample.images, strict=True):
            shown = tokenizer.decode(torch.from_numpy(grid_hw.astype(np.int64))[None])[0].numpy().astype(float)
            errors.append(float(np.square(shown - prepare(image.data, mode)).mean()))
    assert result.psnr_a_db == pytest.approx(psnr(errors), abs=1e-3)
    assert compare(tmp_path / "a", tmp_path / "b", pictures=1).pictures == 2, "of the first sample that has any"


def test_conversations_that_were_cropped_in_two_ways_are_refused(tmp_path: Path) -> None:
    make_dataset(tmp_path / "in", [talk(0, (90, 60))])
    for mode in ("cc512", "multi768"):
        encode(EncodeConfig(input=str(tmp_path / "in"), output=str(tmp_path / mode), sft_mode=mode, device="cpu", quiet=True))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"images of one size: .*cc512 has vqcode_512, .*multi768 has vqcode_multi768; choose"):
        compare(tmp_path / "cc512", tmp_path / "multi768")


def test_conversations_without_images_compare_as_equal(tmp_path: Path) -> None:
    facts = {"vqcode_512": {"tokenizer": "tiny", "codebook_size": 4096, "weights_hash": load_tokenizer("tiny").weights_hash}}
    codes, grids = join_grids([], np.dtype("<u2"))
    sample = talk(0)._replace(codes={"vqcode_512": codes}, grids={"vqcode_512": grids})
    for name in "ab":
        make_dataset(tmp_path / name, [sample], codes=facts)
    assert "1 in both" in wds_tools("compare-codes", tmp_path / "a", tmp_path / "b", "--device", "cpu").stdout


def test_small_images_that_were_encoded_can_be_compared(tmp_path: Path) -> None:
    make_dataset(tmp_path / "in", [talk(0, (9, 8))])
    for name in "ab":
        encode(EncodeConfig(input=str(tmp_path / "in"), output=str(tmp_path / name), keep_images=True, device="cpu", quiet=True))
    assert compare(tmp_path / "a", tmp_path / "b").psnr_between_db == float("inf")


def test_the_command_says_it_in_words(sets: Path) -> None:
    said = wds_tools("compare-codes", sets / "fp32", sets / "bf16", "--device", "cpu", "--pictures", "2").stdout
    assert "6 in both" in said
    assert "PSNR, B against the images" in said
    assert "dB over 2 decoded pictures" in said
