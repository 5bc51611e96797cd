"""Every layout of docs/inputs.md that is taken goes in with the command that stands there, and the others are refused by name."""

from __future__ import annotations

import gzip
import io
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from commands import ROOT, image_bytes, read_samples, tar_bytes

from loaders import LoaderConfig, Source, World, build_loader
from wds_tools.cli.main import main

PAGE = ROOT / "docs" / "inputs.md"
LAYOUTS: dict[str, tuple[Callable[[Path], None], int]] = {}
"""Number in the page -> (writes the input under a folder, samples it gives)."""


def layout(number: str, num_samples: int) -> Callable[[Callable[[Path], None]], None]:
    def add(write: Callable[[Path], None]) -> None:
        LAYOUTS[number] = write, num_samples

    return add


def tar_of(path: Path, members: dict[str, bytes | str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes((name, data.encode() if isinstance(data, str) else data) for name, data in members.items()))


def lines(path: Path, *records: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def parquet(path: Path, *records: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(pa.Table.from_pylist(list(records)), path)


def picture(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image_bytes(number, 64, 48))


def image(number: int) -> dict[str, Any]:
    return {"bytes": image_bytes(number, 64, 48), "path": f"{number}.jpg"}


@layout("1", 4)
def img2dataset(folder: Path) -> None:
    for shard in (0, 1):
        members: dict[str, bytes | str] = {}
        for number in (0, 1):
            key = f"{shard:05d}{number:04d}"
            about = {"caption": f"a thing {key}", "url": f"http://host/{key}.jpg", "similarity": 0.3, "status": "success"}
            members |= {
                f"{key}.jpg": image_bytes(number, 64, 48),
                f"{key}.txt": f"a thing {key}",
                f"{key}.json": json.dumps(about),
            }
        tar_of(folder / f"laion/{shard:05d}.tar", members)
        parquet(folder / f"laion/{shard:05d}.parquet", {"url": "http://host/0.jpg", "caption": "a thing"})
        (folder / f"laion/{shard:05d}_stats.json").write_text('{"count": 2}')


@layout("2", 3)
def tables_of_images(folder: Path) -> None:
    parquet(folder / "images/a.parquet", {"image": image(1), "caption": "a"}, {"image": image(2), "caption": "b"})
    parquet(folder / "images/b.parquet", {"image": image_bytes(3, 64, 48), "caption": "c"})


@layout("3", 2)
def liquid(folder: Path) -> None:
    for number in (0, 1):
        picture(folder / f"photos/{number}.jpg", number)
    lines(folder / "pairs.jsonl", *({"image_path": f"photos/{n}.jpg", "text_prompt": f"photo {n}"} for n in (0, 1)))


@layout("4", 3)
def other_names(folder: Path) -> None:
    for number in (0, 1, 2):
        picture(folder / f"photos/{number}.jpg", number)
    lines(folder / "emu.jsonl", {"path": "photos/0.jpg", "prompt": "first"})
    (folder / "showo.json").write_text(json.dumps([{"name": f"x{n}", "image": f"photos/{n}.jpg", "text": "t"} for n in (1, 2)]))


@layout("5", 3)
def folder_of_images(folder: Path) -> None:
    for number in (0, 1):
        picture(folder / f"photos/part/{number}.jpg", number)
        (folder / f"photos/part/{number}.txt").write_text(f"photo {number}")
    picture(folder / "photos/2.JPG", 2)
    (folder / "photos/2.json").write_text('{"caption": "photo 2"}')


@layout("5b", 2)
def hugging_face_imagefolder(folder: Path) -> None:
    for number in (0, 1):
        picture(folder / f"photos/{number}.jpg", number)
    lines(folder / "photos/metadata.jsonl", *({"file_name": f"{n}.jpg", "text": f"photo {n}"} for n in (0, 1)))


@layout("6", 2)
def several_captions(folder: Path) -> None:
    rows = [{"image": image(n), "captions": {"short": f"s{n}", "long": None if n else "l"}} for n in (0, 1)]
    parquet(folder / "captions.parquet", *rows)


@layout("9", 2)
def images_in_archives(folder: Path) -> None:
    tar_of(folder / "imgs/000.tar", {f"./000/{n}.jpg": image_bytes(n, 64, 48) for n in (0, 1)})
    lines(folder / "journey.jsonl", *({"img_path": f"./000/{n}.jpg", "prompt": f"draw {n}"} for n in (0, 1)))


@layout("10", 1)
def fields_to_filter_by(folder: Path) -> None:
    rows = [
        {"image": image(n), "caption": "c", "similarity": s, "pwatermark": w}
        for n, (s, w) in enumerate([(0.3, 0.9), (0.3, 0.1), (0.1, 0.1)])
    ]
    parquet(folder / "scored.parquet", *rows)


@layout("13", 2)
def llava(folder: Path) -> None:
    picture(folder / "images/0.jpg", 0)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    records = [
        {"id": "a", "image": "0.jpg", "conversations": turns},
        {"id": "b", "conversations": [{"from": "human", "value": "2 + 2"}, {"from": "gpt", "value": "4"}]},
    ]
    (folder / "llava.json").write_text(json.dumps(records))


@layout("14", 2)
def images_in_answers(folder: Path) -> None:
    for number in (0, 1):
        picture(folder / f"images/{number}.jpg", number)
    asked = {"from": "human", "value": "Draw a cat."}
    drawn = {"id": "a", "image": "0.jpg", "conversations": [asked, {"from": "gpt", "value": "Here it is: <image>"}]}
    turns = [{"from": "human", "value": "<image>Make it red."}, {"from": "gpt", "value": "<image>"}]
    (folder / "draw.json").write_text(json.dumps([drawn, {"id": "b", "image": ["0.jpg", "1.jpg"], "conversations": turns}]))


@layout("15", 2)
def messages(folder: Path) -> None:
    picture(folder / "0.jpg", 0)
    plain = {
        "messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "That."}],
        "images": ["0.jpg"],
    }
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    listed = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": [{"type": "text", "text": "That."}]},
        ],
        "images": ["0.jpg"],
    }
    lines(folder / "messages.jsonl", plain, listed)


@layout("16", 2)
def conversations_with_bytes(folder: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    parquet(folder / "onevision/0.parquet", *({"id": str(n), "image": image(n), "conversations": turns} for n in (0, 1)))


@layout("17", 2)
def edits_in_lines(folder: Path) -> None:
    for number in (0, 1, 2):
        picture(folder / f"images/{number}.jpg", number)
    omnigen = {"task_type": "edit", "instruction": "Make it red.", "input_images": ["0.jpg", "1.jpg"], "output_image": "2.jpg"}
    seed = {"source_image": "0.jpg", "instruction": "Make it red.", "target_image": "1.jpg"}
    lines(folder / "edits.jsonl", omnigen, seed)


@layout("17b", 3)
def edits_in_tables(folder: Path) -> None:
    pix2pix = {"original_prompt": "a dog", "original_image": image(0), "edit_prompt": "make it a cat", "edited_prompt": "a cat"}
    parquet(folder / "edits/pix2pix.parquet", {**pix2pix, "edited_image": image(1)})
    brush = {"img_id": "7", "turn_index": 1, "source_img": image(0), "mask_img": image(2), "instruction": "make it a cat"}
    parquet(folder / "edits/brush.parquet", {**brush, "target_img": image(1)})
    omni = {"task": "swap", "src_img": image(0), "edited_img": image(1), "edited_prompt_list": ["a cat", "make it a cat"]}
    parquet(folder / "edits/omni.parquet", omni)


@layout("18", 1)
def edits_one_after_the_other(folder: Path) -> None:
    images = [image_bytes(number, 64, 48) for number in range(3)]
    parquet(folder / "edits/0.parquet", {"image_list": images, "instruction_list": [["make it red", "red"], ["and larger"]]})


@layout("20", 2)
def two_lists(folder: Path) -> None:
    about = '[{"src": "https://host/a.jpg"}, null, null]'
    obelics = {"images": ["0.jpg", None, "1.jpg"], "texts": [None, "A cat.\n\nIt sleeps.", None], "metadata": about}
    for number in (0, 1):
        picture(folder / f"images/{number}.jpg", number)
    parquet(folder / "pages/0.parquet", obelics, {"images": ["1.jpg", None], "texts": [None, "A dog."]})


@layout("20b", 1)
def sentences_and_their_images(folder: Path) -> None:
    picture(folder / "images/ab.jpg", 0)
    about = {"image_name": "ab.jpg", "raw_url": "https://host/ab.jpg", "matched_text_index": 1}
    lines(
        folder / "mmc4.jsonl", {"text_list": ["A cat.", "It sleeps."], "image_info": [about], "similarity_matrix": [[0.1, 0.3]]}
    )


@layout("20c", 2)
def members_by_number(folder: Path) -> None:
    marked = {"a.jpg": image_bytes(0, 64, 48), "a.1.png": image_bytes(1, 64, 48, "PNG"), "a.txt": "A <image> and B <image>."}
    named = {"b.0.jpg": image_bytes(2, 64, 48), "b.json": json.dumps({"texts": ["A.", None], "images": [None, "b.0.jpg"]})}
    tar_of(folder / "pages/0.tar", {**marked, **named})


@layout("21", 2)
def dclm(folder: Path) -> None:
    (folder / "dclm").mkdir()
    (folder / "dclm/0.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "one"}\n{"text": "two"}\n'))


@layout("22", 1)
def json_zst(folder: Path) -> None:
    (folder / "text").mkdir()
    (folder / "text/0.json.zst").write_bytes(zstandard.compress(b'{"text": "one"}\n'))


@layout("23", 3)
def gzipped(folder: Path) -> None:
    (folder / "c4").mkdir()
    (folder / "c4/0.json.gz").write_bytes(gzip.compress(b'{"text": "one", "url": "u"}\n'))
    (folder / "c4/1.jsonl.gz").write_bytes(gzip.compress(b'{"text": "two"}\n'))
    lines(folder / "c4/2.jsonl", {"text": "three"})


@layout("24", 3)
def text_tables(folder: Path) -> None:
    parquet(folder / "fineweb/0.parquet", {"text": "one", "url": "u", "score": 0.5}, {"text": "two", "url": "v", "score": 0.1})
    parquet(folder / "refinedweb/0.parquet", {"content": "three", "image_urls": []})


@layout("25", 2)
def codes_in_lines(folder: Path) -> None:
    codes = [n % 8192 for n in range(1024)]
    lines(folder / "codes.jsonl", *({"data_type": "image_text", "text": f"t{n}", "vq_code": codes} for n in (0, 1)))


@layout("25b", 2)
def codes_in_npy(folder: Path) -> None:
    members: dict[str, bytes | str] = {}
    for number in (0, 1):
        buffer = io.BytesIO()
        np.save(buffer, np.arange(1024, dtype=np.uint16).reshape(32, 32))
        members |= {f"{number}.npy": buffer.getvalue(), f"{number}.txt": f"t{number}"}
    tar_of(folder / "codes/0.tar", members)


def table() -> dict[str, str]:
    """Number -> the cell with the command, or with why not."""
    rows = re.findall(r"^\| (\d+[a-z]?) \|(.*)\|$", PAGE.read_text(), re.M)
    return {number: cells.split(" | ")[-1].strip() for number, cells in rows}


@pytest.mark.parametrize("number", LAYOUTS)
def test_a_layout_goes_in_with_the_command_of_the_page(number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, num_samples = LAYOUTS[number]
    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    found = re.search(r"`(convert [^`]*)`", table()[number])
    assert found, f"layout {number} has no command"
    words = shlex.split(found[1].replace(r"\|", "|"))
    assert main([*words, "--output", "out", "--max-rejects", "0", "--quiet"]) == 0
    assert len(list(read_samples(tmp_path / "out"))) == num_samples


README = (ROOT / "README.md").read_text().partition("## You have … → run …\n")[2].partition("\n## ")[0]
COMMANDS = re.findall(r"^\|.*`wds-tools (convert .*) --output data` \|$", README, re.MULTILINE)
NEWCOMERS = {
    "5": "pictures with .txt",
    "1": "img2dataset",
    "2": "images in Parquet",
    "24": "FineWeb",
    "23": ".json.gz",
    "13": "LLaVA",
}


def test_the_readme_has_a_command_for_each_of_the_inputs_that_newcomers_have() -> None:
    told = {command.removesuffix(" --encode tiny") for command in COMMANDS}
    assert [about for number, about in NEWCOMERS.items() if not any(f"`{words}`" in table()[number] for words in told)] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_what_the_readme_says_to_run_gives_a_training_batch(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = command.removesuffix(" --encode tiny")
    write, num_samples = next(LAYOUTS[number] for number, cell in table().items() if f"`{told}`" in cell)
    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main([*shlex.split(command), "--output", "data", "--quiet"]) == 0
    loader = build_loader(LoaderConfig(sources=(Source("data"),), batch_size=num_samples, seed=42), World())
    (batch,) = loader
    loader.close()
    assert len(batch["__key__"]) == num_samples
    assert ("codes" in batch) == ("documents" not in command)


def test_the_page_has_each_layout_and_says_what_is_not_taken_and_why() -> None:
    rows = table()
    assert {number.rstrip("bc") for number in rows} == {str(number) for number in range(1, 28)}
    for number, cell in rows.items():
        assert ("`convert " in cell) == (number in LAYOUTS), f"layout {number}: {cell}"
        assert "`convert " in cell or len(cell) > 30, f"layout {number} is not taken, and the page does not say why: {cell}"
