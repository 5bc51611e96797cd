"""examples/train_tiny_tokenizer.py: the same seed, steps and threads give the same file, also over a kill; what is trained on."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from commands import ROOT, image_bytes

from wds_tools.vq.tiny import load_tiny

pytest.importorskip("skimage", reason="some of the photographs are scikit-image's: pip install scikit-image")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script, with two of scikit-image's photographs, one to train on and one held out, and one of `--more`."""
    spec = importlib.util.spec_from_file_location("train_tiny_tokenizer", ROOT / "examples/train_tiny_tokenizer.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    names = ("chelsea.png", "camera.png", "Cat.png")
    monkeypatch.setattr(module, "PHOTOGRAPHS", {name: module.PHOTOGRAPHS[name] for name in names})
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def photos(folder: Path) -> Path:
    """One photograph of each licence, as shared by COCO."""
    rows = []
    for number, words in enumerate(("Attribution", "Attribution-ShareAlike", "Attribution-NonCommercial")):
        name = f"images/coco/{number}.jpg"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(image_bytes(number, 300, 280))
        licence = f"image: {words} License (http://creativecommons.org/), farm1.staticflickr.com/{number}.jpg; caption: none"
        rows.append({"image_path": name, "licence": licence, "derived": None})
    (folder / "provenance.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_photographs_that_are_not_cc0_public_or_cc_by_are_not_trained_on(script: Any, tmp_path: Path) -> None:
    found = {photo.name: photo for photo in script.load_photos(photos(tmp_path), None)}
    assert {name for name, photo in found.items() if photo.trained_on} == {"chelsea.png", "0.jpg"}
    assert "2.jpg" not in found
    assert found["1.jpg"].licence == "CC BY-SA 2.0"
    assert found["camera.png"].held_out


def test_photographs_that_are_added_are_trained_on_so_what_is_held_out_stays(script: Any, tmp_path: Path) -> None:
    (tmp_path / "Cat.png").write_bytes(image_bytes(4, 300, 280))
    found = {photo.name: photo for photo in script.load_photos(photos(tmp_path), tmp_path)}
    assert found["Cat.png"].trained_on
    assert not replace(found["Cat.png"], more=False).trained_on


def test_every_photograph_of_the_table_has_an_author_or_source_and_a_licence_that_is_free() -> None:
    lines = (ROOT / "examples/tiny_photographs.tsv").read_text().splitlines()
    rows = [dict(zip(lines[0].split("\t"), line.split("\t"), strict=True)) for line in lines[1:]]
    assert len({row["name"] for row in rows}) == len(rows)
    for row in rows:
        assert re.fullmatch(r"(CC0|CC BY \d\.\d|public domain|no known copyright)( \(.+\))?", row["licence"]), row
        assert row["from"]
        assert 0 < float(row["weight"]) <= 1


@pytest.mark.slow
def test_the_same_steps_give_the_same_file_also_over_a_kill(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--photos", str(photos(tmp_path)), "--steps", "9", "--batch", "1", "--threads", "1", "--save-every", "4", "--out"]
    script.main([*words, str(tmp_path / "a.safetensors")])

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(script, "measure", killed)
        with pytest.raises(KeyboardInterrupt):
            script.main([*words, str(tmp_path / "b.safetensors")])
    with pytest.raises(SystemExit, match=r"was written with .*'seed': 0.*, got .*'seed': 1.*: give the same"):
        script.main([*words, str(tmp_path / "b.safetensors"), "--resume", "--seed", "1"])
    script.main([*words, str(tmp_path / "b.safetensors"), "--resume"])
    one, two = ((tmp_path / f"{name}.safetensors").read_bytes() for name in "ab")
    assert one == two
    script.main([*words, str(tmp_path / "c.safetensors"), "--start", str(tmp_path / "a.ckpt")])
    assert (tmp_path / "c.safetensors").read_bytes() != one
    assert "1 threads, from what 9 steps of another run had made)" in (tmp_path / "c.md").read_text()
    with pytest.raises(SystemExit, match="give the same"):
        script.main([*words, str(tmp_path / "c.safetensors"), "--resume"])
    codes = load_tiny(tmp_path / "a.safetensors").encode(script.square(script.load_photos(tmp_path, None)[0], 64))
    assert len(codes.unique()) > 1
    card = (tmp_path / "a.md").read_text()
    assert "9 steps of 1 crops of 256 px, seed 0, 1 threads" in card
    assert "| chelsea.png | CC0 (Stefan van der Walt) | scikit-image |" in card.partition("## Held out")[0]
    assert "1.jpg" not in card
