"""`wds-tools inspect`: what an input is, and what would become of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import tree, write_jsonl, write_pairs

from wds_tools.cli.main import main


def inspect(capsys: pytest.CaptureFixture[str], *args: str | Path) -> str:
    assert main(["inspect", *map(str, args)]) == 0
    return capsys.readouterr().out


def inspect_json(capsys: pytest.CaptureFixture[str], *args: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(inspect(capsys, "--json", *args))
    return found


def test_it_says_what_there_is_and_what_to_type_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_pairs(tmp_path / "in", 2)
    records = [json.loads(line) | {"caption": "c", "n": 3, "meta": {"a": None}} for line in path.read_text().splitlines()]
    write_jsonl(path, [*records, {"image_path": "images/none.jpg", "text_prompt": "x\x1b[31m"}, 7])
    before = tree(tmp_path)
    printed = inspect(capsys, path)
    assert tree(tmp_path) == before
    for line in (
        "input     1 file (lines), ",
        "records   4 looked at, 1 not_an_object",
        "becomes   pairs: image = image_path; text = text_prompt (caption passed over)",
        "line 1: image_text, 40 x 32 jpeg, 'caption 0'",
        "line 3: a reject, missing_image: images/none.jpg",
        f"command   wds-tools convert pairs --input {path} --output OUTPUT",
    ):
        assert line in printed
    assert "\x1b" not in printed
    found = inspect_json(capsys, path)
    assert found["fields"]["n"] == {"types": {"int": 2}, "example": "3"}
    assert found["fields"]["meta.a"] == {"types": {"NoneType": 2}, "example": "null"}
    assert (found["converter"], found["num_records"], found["rejects"]) == ("pairs", 4, {"not_an_object": 1})


TURNS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This."}]


@pytest.mark.parametrize(
    ("record", "converter"),
    [
        ({"text": "a document", "url": "https://host/a.jpg"}, "documents"),
        ({"image": "a.jpg", "text": "a caption"}, "pairs"),
        ({"image": "a.jpg", "text": "a caption", "conversations": TURNS}, "conversations"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "conversations"),
        ({"instruction": "redder", "source_image": "a.jpg", "target_image": "b.jpg"}, "conversations"),
        ({"image_list": ["a.jpg", "b.jpg"], "instruction_list": ["redder"]}, "conversations"),
        ({"texts": ["a", None], "images": [None, "a.jpg"]}, "interleaved"),
        ({"text_list": ["a"], "image_info": [{"image_name": "a.jpg", "matched_text_index": 0}]}, "interleaved"),
        ({"text": "a <image>", "images": ["a.jpg"]}, "interleaved"),
        ({"data_type": "interleaved", "text": "a <image>", "vqcode_512": [1]}, "coded"),
        ({"data_type": "image_text", "text": "a", "vqcode_512": "[1, 2]", "vqcode_multi768": "no"}, "coded"),
        ({"data_type": "text_pretrain", "text": "a", "vqcode_512": "no", "vqcode_multi768": "no"}, "documents"),
        ({"data_type": "text_pretrain", "text": "a", "length": 1, "vqcode_512": "no"}, "coded"),
        ({"data_type": "visual_sft", "text": "", "length": 1, "conversations": TURNS, "vqcode_256": {"codes": [1]}}, "coded"),
    ],
)
def test_the_converter_is_what_the_records_hold_unless_told_otherwise(
    record: dict[str, Any], converter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [record] * 3)
    assert inspect_json(capsys, path)["converter"] == converter
    assert inspect_json(capsys, path, "--as", "pairs", "--image-root", tmp_path)["converter"] == "pairs"


def test_where_no_image_is_found_the_command_asks_for_their_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pairs(tmp_path / "in", 2).rename(tmp_path / "moved.jsonl")
    assert inspect_json(capsys, tmp_path / "moved.jsonl")["command"].endswith(" --image-root FOLDER --output OUTPUT")
    found = inspect_json(capsys, tmp_path / "moved.jsonl", "--image-root", tmp_path / "in")
    assert "image_text" in found["samples"][0]


def test_options_of_convert_are_taken_and_shown_in_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [{"image": "a.jpg", "image_path": "b.jpg", "text": "x", "score": score} for score in range(4)]
    path = write_jsonl(tmp_path / "in.jsonl", records)
    options = ["--image", "image", "--drop", "image_path", "--where", "score > 1", "--keep", "n=score"]
    found = inspect_json(capsys, path, *options)
    assert (found["problem"], found["rejects"]) == (None, {"filtered": 2})
    assert found["field_map"].startswith("image = image; text = text")
    for word in ("--image image", "--drop image_path", "--where 'score > 1'", "--keep n=score"):
        assert word in found["command"]
    assert "no record" not in (stops := str(inspect_json(capsys, path, "--where", "scor > 1")["problem"]))
    assert "--where: none of the first records has a field scor: did you mean score?" in stops
    assert main(["inspect", str(path), "--codes", "x"]) == 2
    assert "--codes is no option of convert pairs: say with --as what it is to become" in capsys.readouterr().err


def test_it_says_why_a_run_would_stop_and_what_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(tmp_path / "in" / "a.jsonl", [{"image": "a.jpg", "image_path": "b.jpg", "text": "x"}])
    (tmp_path / "in" / "notes.pdf").write_text("x")
    printed = inspect(capsys, tmp_path / "in")
    assert "stops at  " in printed
    assert "\ncommand" not in printed
    assert "a.jsonl, line 1: image holds an image beside that of image_path: --image image takes it instead" in printed
    assert f"left out  1 file, such as {tmp_path}/in/notes.pdf" in printed


def test_an_input_without_a_record_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [7, 8])
    assert main(["inspect", str(path)]) == 2
    assert "no record in it can be read (2 not_an_object)" in capsys.readouterr().err
