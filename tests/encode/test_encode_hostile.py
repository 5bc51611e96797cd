"""Images of every bad kind, each between two good ones, on all ways to codes: what can be encoded is, as it would be alone; the
others are rejects with the reason that the image gives alone; and the numbers add up."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import image_bytes, read_rejects, read_samples, shared, wds_tools, write_jsonl
from factory import make_dataset
from PIL import Image

from wds_tools.check.verify import VerifyConfig, verify
from wds_tools.encode.encode import EncodeConfig, encode
from wds_tools.errors import Reject
from wds_tools.format.schema import Sample, SourceImage
from wds_tools.images import ImageLimits, prepare
from wds_tools.vq import load_tokenizer

Outcome = np.ndarray[Any, Any] | str
"""Codes, or the reason why there are none."""
TOO_LARGE = 64 << 20
"""Pixels; the largest bomb of the shared files unpacks to 900 million."""
LIMITS = ["--max-pixels", str(TOO_LARGE), "--max-rejects", "100%"]
GOOD = {f"good-{number}": image_bytes(100 + number, 70, 60) for number in range(4)}


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def odd() -> dict[str, bytes]:
    """Good images of rare kinds, one too wide, and one that unpacks to 400 million pixels."""
    pixels_HWC = np.asarray(Image.open(io.BytesIO(image_bytes(1, 90, 64))))
    picture = Image.fromarray(pixels_HWC)
    exif = Image.Exif()
    exif[274] = 6
    frames = {"save_all": True, "append_images": [Image.fromarray(np.roll(pixels_HWC, shift, 1)) for shift in (10, 20)]}
    return {
        "cmyk.jpg": saved(picture.convert("CMYK"), "JPEG"),
        "turned.jpg": saved(picture, "JPEG", exif=exif),
        "deep.png": saved(Image.fromarray(pixels_HWC[..., 0].astype(np.uint16) * 257), "PNG"),
        "moving.gif": saved(picture, "GIF", **frames),
        "moving.png": saved(picture, "PNG", **frames),
        "moving.webp": saved(picture, "WEBP", **frames),
        "clear.png": saved(picture.convert("RGBA"), "PNG"),
        "wide.png": saved(picture.resize((300, 64)), "PNG"),
        "bomb.png": saved(Image.new("1", (20_000, 20_000)), "PNG"),
    }


@pytest.fixture(scope="module")
def images() -> dict[str, bytes]:
    """By name: those, and all of the shared malformed ones."""
    folder = shared("malformed/images")
    return odd() | {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def alone(images: dict[str, bytes]) -> dict[str, Outcome]:
    """What becomes of each image by itself."""
    tokenizer = load_tokenizer("tiny", device="cpu")
    found: dict[str, Outcome] = {}
    for name, data in {**images, **GOOD}.items():
        try:
            pixels_HWC = prepare(data, "cc512", ImageLimits(max_pixels=TOO_LARGE, min_side=1))
            found[name] = tokenizer.encode(torch.from_numpy(pixels_HWC)[None])[0].numpy()
        except Reject as cause:
            found[name] = cause.reason
    assert all(name in ("wide.png", "bomb.png") or not isinstance(found[name], str) for name in (*odd(), *GOOD))
    return found


def mingled(images: dict[str, bytes]) -> list[str]:
    """Names of the images, with good ones between them."""
    names = list(images)
    return [name for n in range(0, len(names), 4) for name in (*names[n : n + 4], f"good-{n // 4 % 4}")]


def check(output: Path, names: Iterable[str], alone: dict[str, Outcome], rejects: dict[int, str]) -> None:
    """These images, in this order, are samples with the codes that each has alone, or rejects: number -> reason."""
    expected = [alone[name] for name in names]
    assert rejects == {number: outcome for number, outcome in enumerate(expected) if isinstance(outcome, str)}
    samples = read_samples(output)
    good = [(number, outcome) for number, outcome in enumerate(expected) if not isinstance(outcome, str)]
    for sample, (number, codes_hw) in zip(samples, good, strict=True):
        assert sample.key.endswith(f"{number:04d}")
        assert np.array_equal(sample.grids_of("vqcode_512")[0], codes_hw), sample.key
    result = verify(VerifyConfig(input=str(output), quiet=True))
    assert result.problems == ()
    assert result.manifest.inputs == result.manifest.samples + sum(result.manifest.rejects.values())


@pytest.mark.slow
def test_in_a_dataset_whose_images_were_kept(images: dict[str, bytes], alone: dict[str, Outcome], tmp_path: Path) -> None:
    names, data = mingled(images), {**images, **GOOD}
    fields: dict[str, Any] = {"data_type": "image_text", "text": "a picture", "image_extension": "jpg"}
    rows = (Sample(key=f"{number:04d}", image=data[name], **fields) for number, name in enumerate(names))
    make_dataset(tmp_path / "in", rows, shard_samples=30)
    where = {"input": str(tmp_path / "in"), "output": str(tmp_path / "out"), "device": "cpu", "max_pixels": TOO_LARGE}
    encode(EncodeConfig(**where, batch_size=3, max_rejects="100%", shard_samples=40, quiet=True))  # type: ignore[arg-type]
    check(tmp_path / "out", names, alone, {int(row["key"]): row["reason"] for row in read_rejects(tmp_path / "out")})


def write_files(folder: Path, images: dict[str, bytes]) -> None:
    folder.mkdir()
    for name, data in {**images, **GOOD}.items():
        (folder / name).write_bytes(data)


@pytest.mark.slow
def test_straight_from_the_files_to_codes(images: dict[str, bytes], alone: dict[str, Outcome], tmp_path: Path) -> None:
    names = mingled(images)
    write_files(tmp_path / "files", images)
    pairs = write_jsonl(tmp_path / "pairs.jsonl", ({"image_path": f"files/{name}", "text_prompt": name} for name in names))
    how = ["--encode", "tiny", "--device", "cpu", "--min-side", "1", *LIMITS]
    wds_tools("convert", "pairs", "--input", pairs, "--output", tmp_path / "out", *how)
    check(tmp_path / "out", names, alone, {row["line"] - 1: row["reason"] for row in read_rejects(tmp_path / "out")})


@pytest.mark.slow
def test_in_conversations_about_several_images(images: dict[str, bytes], alone: dict[str, Outcome], tmp_path: Path) -> None:
    write_files(tmp_path / "files", images)
    turns = [{"from": "human", "value": "<image><image>What?"}, {"from": "gpt", "value": "That."}]
    records = [{"image": [name, f"good-{number % 4}"], "conversations": turns} for number, name in enumerate(images)]
    (tmp_path / "talks.json").write_text(json.dumps(records))
    raw = [
        "--input",
        tmp_path / "talks.json",
        "--image-root",
        tmp_path / "files",
        "--output",
        tmp_path / "raw",
        "--min-side",
        "1",
    ]
    wds_tools("convert", "conversations", *raw, *LIMITS)
    wds_tools("encode", "--input", tmp_path / "raw", "--output", tmp_path / "out", "--device", "cpu", *LIMITS)
    # The conversion looks at headers; what only pixels show, and what a crop does not take, is found by the encoding.
    rejects = {row["element"]: row["reason"] for row in read_rejects(tmp_path / "raw")}
    rejects |= {int(row["key"].rpartition("-")[2]): row["reason"] for row in read_rejects(tmp_path / "out")}
    check(tmp_path / "out", images, alone, rejects)


def test_an_empty_image_inside_a_conversation_rejects_that_one(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image><image>What?"}, {"from": "gpt", "value": "That."}]
    fields: dict[str, Any] = {"data_type": "visual_sft", "text": "", "conversations": turns, "image_extension": "jpg"}
    talks = [
        Sample(key=f"{number}", image=GOOD["good-0"], more_images=(SourceImage(data, "jpg"),), **fields)
        for number, data in enumerate((GOOD["good-1"], b"", GOOD["good-2"]))
    ]
    make_dataset(tmp_path / "in", talks)
    where = {"input": str(tmp_path / "in"), "output": str(tmp_path / "out"), "device": "cpu", "quiet": True}
    manifest = encode(EncodeConfig(**where, max_rejects="50%"))  # type: ignore[arg-type]
    assert (manifest.inputs, manifest.samples, manifest.rejects) == (3, 2, {"empty_image": 1})
