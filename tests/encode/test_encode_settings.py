"""What `--precision`, `--compile` and `--resize` do to codes on a CPU, on photographs; and where the pass leaves its memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from commands import environment, image_bytes, read_rejects, read_samples, wds_tools
from factory import make_dataset

from wds_tools.dataset.reader import read_manifest
from wds_tools.encode import resize
from wds_tools.encode.resize import check_torch_resize, prepare_with_torch
from wds_tools.errors import UsageError
from wds_tools.format.schema import Sample
from wds_tools.images import ImageLimits, prepare
from wds_tools.storage import open_store

PHOTOGRAPHS = ("rocket.jpg", "coffee.png", "chelsea.png")


def photograph(name: str) -> bytes:
    return (Path(skimage.data.data_dir) / name).read_bytes()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of one size, one of many, and two that can't be used."""
    folder = tmp_path_factory.mktemp("settings") / "in"
    images = {name: photograph(name) for name in PHOTOGRAPHS}
    images |= {"cut": photograph("rocket.jpg")[:5000], "narrow": image_bytes(0, 900, 100)}
    samples = [
        Sample(key=key.split(".")[0], data_type="image_text", text=key, image=data, image_extension="jpg")
        for key, data in images.items()
    ]
    wide = Sample(key="wide", data_type="image_text_multi", text="", image=photograph("rocket.jpg"), image_extension="jpg")
    make_dataset(folder, [*samples, wide])
    return folder


def codes(source: Path, output: Path, *args: str) -> tuple[np.ndarray[Any, Any], dict[str, Any], list[str]]:
    """All codes of an encoded set in a row, the provenance of the square ones, and why samples were rejected."""
    wds_tools("encode", "--input", source, "--output", output, "--device", "cpu", "--max-rejects", "50%", *args)
    wds_tools("verify", output)
    found = [grid.ravel() for sample in read_samples(output) for grid in sample.codes.values()]
    return (
        np.concatenate(found),
        read_manifest(open_store(str(output))).codes["vqcode_512"],
        sorted(reject["reason"] for reject in read_rejects(output)),
    )


@pytest.fixture(scope="module")
def plain(source: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray[Any, Any]:
    """The codes in float32."""
    found, facts, reasons = codes(source, tmp_path_factory.mktemp("plain") / "out")
    assert reasons == ["aspect_ratio", "truncated_image"]
    assert facts["precision"] == "fp32"
    assert not facts.keys() & {"compile", "resize", "batch_size"}
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "least"), [("bf16", 0.95), ("fp16", 0.99)])
def test_half_precision_changes_few_codes_and_is_said(
    precision: str, least: float, source: Path, plain: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    found, facts, reasons = codes(source, tmp_path / "out", "--precision", precision, "--batch-size", "2")
    assert least < (found == plain).mean() < 1
    assert (facts["precision"], facts["batch_size"]) == (precision, 2)
    assert reasons == ["aspect_ratio", "truncated_image"]


@pytest.mark.slow
def test_a_compiled_network_gives_nearly_the_same_codes_and_is_said(
    source: Path, plain: np.ndarray[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    found, facts, reasons = codes(source, tmp_path / "out", "--compile")
    assert list((tmp_path / "cache").rglob("*.cpp")), "nothing was compiled"
    assert (found == plain).mean() > 0.999
    assert facts["compile"] is True
    assert reasons == ["aspect_ratio", "truncated_image"]


@pytest.mark.slow
def test_scaling_with_torch_changes_few_codes_and_is_said(source: Path, plain: np.ndarray[Any, Any], tmp_path: Path) -> None:
    found, facts, reasons = codes(source, tmp_path / "out", "--resize", "torch")
    assert 0.98 < (found == plain).mean() < 1
    assert facts["resize"] == "torch"
    assert reasons == ["aspect_ratio", "truncated_image"]
    assert "batch_size" not in facts


@pytest.mark.parametrize("mode", ["cc512", "multi768"])
@pytest.mark.parametrize(
    "data",
    [
        *map(photograph, PHOTOGRAPHS),
        image_bytes(1, 64, 48),
        image_bytes(2, 512, 512),
        image_bytes(3, 3000, 1700),
        image_bytes(4, 2, 1),
    ],
    ids=[*PHOTOGRAPHS, "small", "as it is", "large", "two pixels"],
)
def test_pixels_scaled_with_torch_are_within_two_levels_of_pillows(data: bytes, mode: Any) -> None:
    limits = ImageLimits(min_side=1)
    a, b = prepare(data, mode, limits), prepare_with_torch(data, mode, limits)
    assert (b.shape, b.dtype) == (a.shape, np.uint8)
    assert b.flags.writeable
    assert b.flags.c_contiguous
    off = np.abs(a.astype(int) - b)
    assert off.max() <= 2
    assert (off > 0).mean() < 0.02


def test_a_torch_without_lanczos_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_torch_resize()
    monkeypatch.setattr(resize.torch.ops, "aten", object())
    with pytest.raises(UsageError, match=r"--resize torch needs torch 2\.12 or later, and this is .*: use --resize pillow"):
        check_torch_resize()


FAULTS = """
import resource, torch
from wds_tools.encode.image_encoder import ImageEncoder
from wds_tools.encode.options import TokenizerOptions
from wds_tools.images import ImageLimits
from wds_tools.vq.lanes import side_by_side

torch.set_num_threads(2)
ImageEncoder("tiny", TokenizerOptions(device="cpu"), workers=1, keep_images=False, limits=ImageLimits()).device

def take_and_free(_):
    torch.empty(25_000_000).zero_()  # 100 MB, more than an arena of a thread may hold

side_by_side(take_and_free, range(16))  # until freed neighbours have become one room
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
side_by_side(take_and_free, range(16))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(), reason="of glibc, on a CPU")
def test_memory_that_a_pass_has_freed_is_not_mapped_anew() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], env=environment(), capture_output=True, text=True, check=True)
    mapped_anew = 16 * 100_000_000 // 4096
    assert int(done.stdout) < mapped_anew / 2
