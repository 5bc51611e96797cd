"""`compare-codes`: shares and PSNR as numpy computes them, joined by key, and what can't be compared is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import image_bytes, read_samples, wds_tools
from factory import image_sample, make_dataset, text_sample

from wds_tools.encode.compare import CompareConfig, compare_codes
from wds_tools.encode.fill import EncodeConfig, encode
from wds_tools.errors import FormatError, UsageError
from wds_tools.format.schema import Sample
from wds_tools.images import prepare
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
        input=str(folder / "fp32"), output=str(folder / "both"), device="cpu", quiet=True, precision="bf16", codes="b"
    )
    encode(both)
    return folder


def compare(a: Path, b: Path, **settings: Any) -> Any:
    return compare_codes(CompareConfig(a=str(a), b=str(b), device="cpu", quiet=True, **settings))


def psnr(errors: list[float]) -> float:
    return float(10 * np.log10(255**2 / np.mean(errors)))


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


def test_two_names_of_one_data_set_can_be_compared(sets: Path) -> None:
    apart, together = (
        compare(sets / "fp32", sets / "bf16", pictures=0),
        compare(sets / "both", sets / "both", codes_b="b", pictures=0),
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
    with pytest.raises(UsageError, match="has no codes vqcode_512-x or vqcode_multi768-x"):
        compare(sets / "fp32", sets / "bf16", codes_b="x")
    with pytest.raises(UsageError, match="both are the same codes"):
        compare(sets / "fp32", sets / "fp32")
    with pytest.raises(FormatError, match=r"grids of \(4, 4\) and \(2, 2\) codes"):
        compare(tmp_path / "other", tmp_path / "shape", pictures=0)
    with pytest.raises(FormatError, match="keys have to ascend"):
        compare(tmp_path / "other", tmp_path / "order", pictures=0)


def test_the_command_says_it_in_words(sets: Path) -> None:
    said = wds_tools("compare-codes", sets / "fp32", sets / "bf16", "--device", "cpu", "--pictures", "2").stdout
    assert "6 in both" in said
    assert "PSNR, B against the images" in said
    assert "dB over 2 decoded pictures" in said
