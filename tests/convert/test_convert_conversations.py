"""`convert conversations`: conversations as they are found in the wild become samples or rejects, unchanged; none is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import image_bytes, last_line, read_rejects, read_samples, shared, tree, wds_tools, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from properties import tries

from loaders import ShardDataset
from wds_tools.check.verify import VerifyConfig, verify
from wds_tools.convert import run_conversion, survey
from wds_tools.convert.conversations import ConversationsConfig
from wds_tools.errors import FormatError, UsageError
from wds_tools.format.manifest import Manifest
from wds_tools.sources.record import InputFile
from wds_tools.sources.text import elements
from wds_tools.sources.text.elements import plan_list, read_elements, split_elements

Record = dict[str, Any]


def convert(source: Path, output: Path, **options: Any) -> Manifest:
    options = {"quiet": True, "max_rejects": "100%", **options}
    manifest = run_conversion(ConversationsConfig(input=(str(source),), output=str(output), **options))
    assert manifest.inputs == manifest.samples + sum(manifest.rejects.values())
    assert verify(VerifyConfig(input=str(output), quiet=True)).problems == ()
    return manifest


def turns(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def record(image: object = "a.jpg", marks: int = 1, **fields: Any) -> Record:
    return {"image": image, "conversations": turns("<image>" * marks + "What?", "This."), **fields}


def write(folder: Path, content: object, name: str = "llava.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, letter in enumerate("abc"):
        (folder / f"{letter}.jpg").write_bytes(image_bytes(number))
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content, indent=2))
    return folder / name


REAL = {
    "celeba_with_ids.json": "images",
    "lmms_celeba_image_train.json": "images/lmms",
    "lmms_celeba_image_eval.json": "images/lmms",
    "lmms_single_image.json": "images/lmms",
    "lmms_single_image_has_text_only.json": "images/lmms",
    "lmms_multi_images.json": "images/lmms",
    "qwen_single_images.json": "images/qwen",
}


@pytest.mark.parametrize("name", REAL)
def test_every_real_shape_is_taken_in_full_with_text_and_images_unchanged(name: str, tmp_path: Path) -> None:
    source, root = shared("sft") / name, shared("sft") / REAL[name]
    manifest = convert(source, tmp_path / "out", image_root=(str(root),), task_records=40)
    expected = json.loads(source.read_text())
    samples = read_samples(tmp_path / "out")
    assert (manifest.rejects, len(samples)) == ({}, len(expected))
    for sample, wanted in zip(samples, expected, strict=True):
        prompt = [{"from": "system", "value": wanted["system_prompt"]}] if "system_prompt" in wanted else []
        assert sample.conversations == prompt + wanted["conversations"]
        paths = wanted.get("image", [])
        images = [(root / path).read_bytes() for path in ([paths] if isinstance(paths, str) else paths)]
        assert [image.data for image in sample.images] == images
        assert sample.provenance["source_id"] == wanted.get("id")


@pytest.mark.slow
def test_conversations_go_through_encode_verify_stream_and_export(tmp_path: Path) -> None:
    folder = shared("sft")
    root = folder / "images/lmms"
    inputs = [folder / name for name in ("lmms_multi_images.json", "lmms_single_image_has_text_only.json")]
    out = wds_tools("convert", "conversations", "--input", *inputs, "--image-root", root, "--output", tmp_path / "raw").stdout
    assert "6 of 6 inputs (6 visual_sft)" in out
    wds_tools("encode", "--input", tmp_path / "raw", "--output", tmp_path / "codes", "--sft-mode", "multi768", "--device", "cpu")
    wds_tools("verify", tmp_path / "codes")
    counts = {
        sample["__key__"]: [tuple(grid.shape) for grid in sample["codes"]] for sample in ShardDataset(str(tmp_path / "codes"))
    }
    assert [len(counts[key]) for key in sorted(counts)] == [2, 4, 1, 1, 0, 0]
    assert len({shape for shapes in counts.values() for shape in shapes}) > 1
    out = wds_tools("export", "hf", "--input", tmp_path / "codes", "--output", tmp_path / "hf").stdout
    assert "6 (6 visual_sft)" in out


def test_malformed_records_are_rejects_by_element_and_the_rest_is_taken(tmp_path: Path) -> None:
    folder = shared("malformed/sft")
    cases = json.loads((folder / "bad_records.expect.json").read_text())
    manifest = convert(folder / "bad_records.json", tmp_path / "out")
    rejected = {reject["element"]: reject["reason"] for reject in read_rejects(tmp_path / "out")}
    assert manifest.inputs == len(cases)
    unusable = {case["index"] for case in cases if case["usable"] is False and case["case"] != "truncated image"}
    usable = {case["index"] for case in cases if case["usable"] is True}
    assert unusable <= set(rejected)
    assert usable.isdisjoint(rejected)
    reasons = {case["case"]: rejected.get(case["index"]) for case in cases if case["usable"] is None}
    assert reasons == {
        "id missing": None,
        "id used twice": None,
        "image null": "image_marks",
        "image list of two, one <image>": "image_marks",
        "only a human turn": "bad_conversation",
        "gpt turn first": "bad_conversation",
        "system role": "bad_conversation",
        "role named assistant": None,
        "image given, no <image> token": "image_marks",
        "three <image> tokens, one image": "image_marks",
        "<image> in the answer": "image_marks",
        "empty answer": "empty_text",
    }


def test_a_set_whose_images_are_missing_is_refused(tmp_path: Path) -> None:
    source = shared("sft/llava_coco30_missing_images.json")
    failed = wds_tools("convert", "conversations", "--input", source, "--output", tmp_path / "out", status=1)
    assert "30 of 30 inputs can't be used, allowed are 10% (30 missing_image)" in last_line(failed.stderr)
    assert "--image-root names the folder that image paths are relative to" in last_line(failed.stderr)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (record("../a.jpg"), "outside_root"),
        (record("/etc/hostname"), "outside_root"),
        (record(5), "wrong_type"),
        (record(["a.jpg", ""], 2), "empty_text"),
        (record(None, 0, video="a.mp4"), "unsupported_media"),
        (record(conversations=[*turns("<image>a", "b"), {"from": "tool", "value": "c"}]), "bad_conversation"),
        (record(conversations=turns("<image>a", "b", "c")), "bad_conversation"),
        (record(conversations=["hi"]), "wrong_type"),
        (record("llava.json"), "not_an_image"),
        (record(extra=0, conversations=None), "missing_field"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_used_is_a_reject_with_its_reason(broken: Record, reason: str, tmp_path: Path) -> None:
    source = write(tmp_path / "in", [record(), broken, record("b.jpg")])
    manifest = convert(source, tmp_path / "out", image_root=(str(tmp_path / "in"),))
    assert (manifest.samples, manifest.rejects) == (2, {reason: 1})
    (reject,) = read_rejects(tmp_path / "out")
    assert (reject["element"], reject["reason"]) == (1, reason)


TURN = {"from": "human", "value": "What?"}
ANSWER = {"from": "gpt", "value": "This."}


@pytest.mark.parametrize(
    "fields",
    [
        {"image_url": "a"},
        {"images_paths": ["a"]},
        {"img": {"url": "https://host/a"}},
        {"Image_File": "a"},
        {"picture": "iVBORw0KGgo="},
        {"name": "folder/a.PNG"},
        {"source": {"where": ["https://host/a.webp?size=512"]}},
        {"note": "data:image/png;base64,iVBORw0KGgo="},
        {"image": "b.jpg", "second": "c.jpg", "conversations": turns("<image>What?", "This.")},
        {"conversations": [{**TURN, "image": "a.jpg"}, ANSWER]},
        {"conversations": [TURN, {**ANSWER, "images": ["a"]}]},
        {"conversations": turns("<img>a.jpg</img>What?", "This.")},
        {"conversations": turns("<img> What?", "This.")},
        {"conversations": turns("What?", "<|image|>")},
        {"conversations": turns("<|image_1|> What?", "This.")},
        {"conversations": turns("<|vision_start|><|image_pad|><|vision_end|> What?", "This.")},
        {"conversations": turns("What is in <image 1>?", "This.")},
    ],
    ids=str,
)
def test_an_image_that_would_be_left_behind_is_a_reject_and_never_a_text_alone(
    fields: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey, "NUM_RECORDS", 0)  # as if it came later in the input
    source = write(tmp_path / "in", [{"conversations": turns("What?", "This."), **fields}, record()])
    manifest = convert(source, tmp_path / "out")
    assert (manifest.samples, manifest.rejects) == (1, {"unused_image": 1})


@pytest.mark.parametrize("name", ["image_path", "img_path", "file_name"])
def test_an_image_of_another_known_name_is_found_and_without_a_mark_a_reject(name: str, tmp_path: Path) -> None:
    talks = [{"conversations": turns(f"{mark}What?", "This."), name: "a.jpg"} for mark in ("<image>", "")]
    manifest = convert(write(tmp_path / "in", talks), tmp_path / "out")
    assert (manifest.samples, manifest.rejects) == (1, {"image_marks": 1})
    assert len(read_samples(tmp_path / "out")[0].images) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"image": ""},
        {"image": None},
        {"image": []},
        {"images": [""]},
        {"image_path": "", "image_url": None, "imgs": []},
        {"image_id": 139, "image_width": 640, "image_size": [640, 480], "url": "https://host/page.html"},
        {"conversations": turns('Is <img src="a"> right?', "Add alt: <image/>.")},
        {"system": "", "system_prompt": None},
    ],
    ids=str,
)
def test_a_conversation_without_an_image_may_say_so_in_any_way(fields: Record, tmp_path: Path) -> None:
    source = write(tmp_path / "in", [{"conversations": turns("What?", "This."), **fields}])
    assert convert(source, tmp_path / "out").samples == 1
    assert read_samples(tmp_path / "out")[0].images == ()


def test_another_name_for_the_image_that_is_used_and_a_field_that_is_kept_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey, "NUM_RECORDS", 0)
    talks = [record(image_url="https://host/x/a.jpg", id="coco/a.jpg"), record(original="https://host/0017.jpg")]
    source = write(tmp_path / "in", talks)
    assert convert(source, tmp_path / "out").rejects == {"unused_image": 1}
    assert convert(source, tmp_path / "kept", keep=("original",)).samples == 2
    assert read_samples(tmp_path / "kept")[1].provenance["original"] == "https://host/0017.jpg"


def test_a_system_prompt_is_the_first_turn_whatever_the_field_is_called_and_two_of_them_are_a_reject(tmp_path: Path) -> None:
    prompts = [{"system": "A."}, {"system_prompt": "A."}, {"system": "A.", "system_prompt": "A."}]
    wrong = [{"system": "A.", "system_prompt": "B."}, {"system": ["A."]}]
    source = write(tmp_path / "in", [record(**fields) for fields in [*prompts, *wrong]])
    assert convert(source, tmp_path / "out").rejects == {"bad_conversation": 1, "wrong_type": 1}
    for sample in read_samples(tmp_path / "out"):
        assert (sample.conversations or [])[0] == {"from": "system", "value": "A."}
        assert len(sample.conversations or []) == 3


def test_a_folder_gives_its_json_and_jsonl_files_in_order(tmp_path: Path) -> None:
    write(tmp_path / "in", [record(id="b")], "b.json")
    write_jsonl(tmp_path / "in/a.jsonl", [record(id="a")])
    write_jsonl(tmp_path / "in/c.JSONL", [record(id="c")])
    manifest = convert(tmp_path / "in", tmp_path / "out")
    assert [sample.provenance["source_id"] for sample in read_samples(tmp_path / "out")] == ["a", "b", "c"]
    assert manifest.source["left_out"]["files"] == 3


def test_roles_and_ids_of_other_tools_are_taken_and_fields_kept(tmp_path: Path) -> None:
    talk = [{"from": "system", "value": "Be kind."}, {"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]
    source = write(tmp_path / "in", [{"id": 7, "conversations": talk, "source": "vqa"}, record(["a.jpg", "b.jpg"], 2, id="x")])
    convert(source, tmp_path / "out", keep=("source",))
    first, second = read_samples(tmp_path / "out")
    assert [turn["from"] for turn in first.conversations or ()] == ["system", "human", "gpt"]
    assert (first.provenance, second.provenance) == ({"source_id": "7", "source": "vqa"}, {"source_id": "x"})
    assert (len(first.images), len(second.images)) == (0, 2)


def test_a_list_and_its_records_line_by_line_give_the_same_samples(tmp_path: Path) -> None:
    talks = [record("abc"[number % 3] + ".jpg", id=str(number)) for number in range(7)]
    source = write(tmp_path / "in", talks)
    lines = write_jsonl(tmp_path / "in" / "talks.jsonl", talks)
    convert(source, tmp_path / "list", task_records=3)
    convert(lines, tmp_path / "lines", task_lines=3, workers=2)
    assert {name: data for name, data in tree(tmp_path / "list").items() if name.endswith("tar")} == {
        name: data for name, data in tree(tmp_path / "lines").items() if name.endswith("tar")
    }


@pytest.mark.parametrize(
    ("name", "problem", "message"),
    [
        ("truncated.json", FormatError, "the list is not closed: its element 16"),
        ("object_not_list.json", UsageError, r"is one object; .* with `jq '.data'`"),
    ],
)
def test_files_that_are_no_list_of_records_are_refused_at_once(
    name: str, problem: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(problem, match=message):
        convert(shared("malformed/sft") / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_something_behind_the_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="there is something behind the list, which ends at byte 2"):
        convert(write(tmp_path / "in", "[] {}"), tmp_path / "out")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text('ab\\"[]{},: \n\u2028é', max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('a"[{', max_size=3), inner, max_size=3),
    max_leaves=6,
)
STYLES: list[Callable[[object], str]] = [
    json.dumps,
    lambda value: json.dumps(value, indent=1),
    lambda value: "\ufeff \n" + json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n",
]


@given(content=st.lists(JSON, max_size=8), style=st.sampled_from(STYLES), read_bytes=st.integers(1, 40), size=st.integers(1, 4))
@tries(200)
def test_a_list_is_cut_where_its_elements_end_however_it_is_written_and_read(
    tmp_path_factory: pytest.TempPathFactory, content: list[Any], style: Callable[[object], str], read_bytes: int, size: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_text(style(content))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elements, "_READ_BYTES", max(read_bytes, 8))
        spans = plan_list(InputFile(str(file), 0), size)
    found = [line for span in spans for line in read_elements(span)]
    data = file.read_bytes()
    assert list(split_elements(data[at : at + read_bytes] for at in range(0, len(data), read_bytes))) == found
    assert [json.loads(line.data or b"") for line in found] == content
    assert [line.number for line in found] == list(range(len(content)))
    assert [span.num_lines for span in spans] == [min(size, len(content) - at) for at in range(0, len(content), size)]


def test_an_element_beyond_the_limit_is_one_reject_and_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elements, "MAX_LINE_BYTES", 2000)
    monkeypatch.setattr(elements, "_RANGE_BYTES", 1000)
    source = write(tmp_path / "in", [record(), record(note=[1] * 2000), record()])
    manifest = convert(source, tmp_path / "out")
    assert (manifest.samples, manifest.rejects) == (2, {"line_too_long": 1})
