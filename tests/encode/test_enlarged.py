"""Images are counted, and those of them that are smaller than their crop: at convert where the crop is known, and at encode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import image_bytes, write_documents, write_jsonl

from wds_tools.cli.summary import print_dataset
from wds_tools.convert import run_conversion
from wds_tools.convert.conversations import ConversationsConfig
from wds_tools.convert.documents import DocumentsConfig
from wds_tools.convert.pairs import PairsConfig
from wds_tools.encode.encode import EncodeConfig, encode
from wds_tools.images import crop_for

SIZES = ((600, 512), (511, 700), (40, 32))
QUIET: dict[str, Any] = {"quiet": True, "max_rejects": "100%"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, (width, height) in enumerate(SIZES):
        (tmp_path / f"{number}.jpg").write_bytes(image_bytes(number, width, height))
    return tmp_path


@pytest.mark.parametrize(
    ("mode", "size", "is_enlarged"),
    [
        ("cc512", (512, 512), False),
        ("cc512", (513, 512), False),
        ("cc512", (1000, 511), True),
        ("cc512", (300, 511), True),
        ("multi768", (768, 768), False),
        ("multi768", (767, 768), True),
        ("multi768", (1535, 384), True),
        ("multi768", (1536, 384), False),
    ],
)
def test_an_image_is_enlarged_if_either_side_is_scaled_up(mode: str, size: tuple[int, int], is_enlarged: bool) -> None:
    assert crop_for(mode, *size).enlarges(*size) is is_enlarged


def test_pairs_are_counted_when_they_are_converted_and_when_they_are_encoded(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(folder / "a.jsonl", [{"image_path": f"{number}.jpg", "text": "x"} for number in range(len(SIZES))])
    raw = run_conversion(PairsConfig(input=(str(source),), output=str(folder / "raw"), **QUIET))
    assert raw.source["counts"] == {"images": 3, "enlarged_images": 2}
    done = encode(EncodeConfig(input=str(folder / "raw"), output=str(folder / "codes"), device="cpu", **QUIET))
    assert done.source["counts"] == {"images": 3, "enlarged_images": 2}
    print_dataset("codes", done)
    assert (
        "images       3, 2 smaller than their crop, so enlarged (convert with --min-side leaves such out)"
        in capsys.readouterr().out
    )
    large = run_conversion(PairsConfig(input=(str(source),), output=str(folder / "large"), min_side=512, **QUIET))
    assert (large.source["counts"], large.rejects) == ({"images": 1}, {"too_small": 2})


def test_images_of_conversations_are_counted_and_text_has_no_counts(folder: Path) -> None:
    turns = [{"from": "human", "value": "<image><image> what?"}, {"from": "gpt", "value": "this"}]
    talk = {"image": ["0.jpg", "2.jpg"], "conversations": turns}
    (folder / "talks.json").write_text(json.dumps([talk, {"conversations": [{"from": "human", "value": "a"}, turns[1]]}]))
    source = str(folder / "talks.json")
    assert run_conversion(ConversationsConfig(input=(source,), output=str(folder / "raw"), **QUIET)).source["counts"] == {
        "images": 2
    }
    done = encode(EncodeConfig(input=str(folder / "raw"), output=str(folder / "codes"), device="cpu", **QUIET))
    assert done.source["counts"] == {"images": 2, "enlarged_images": 1}
    write_documents(folder / "text/a.jsonl.zst", [{"text": "x"}])
    manifest = run_conversion(DocumentsConfig(input=(str(folder / "text"),), output=str(folder / "documents"), **QUIET))
    assert "counts" not in manifest.source
