"""`convert pairs`: every line is a sample or a reject with its place and reason; images go in byte for byte."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import captions, image_bytes, read_rejects, read_samples, shared, tree, write_jsonl, write_pairs

from wds_tools.check.verify import VerifyConfig, verify
from wds_tools.convert import run_conversion
from wds_tools.convert.pairs import PairsConfig
from wds_tools.errors import NotFound, TooManyRejects, UsageError
from wds_tools.format.manifest import Manifest
from wds_tools.run.local import MOST_RESTS

LENIENT = {"max_rejects": "100%", "quiet": True}


def convert(output: Path | str, *inputs: Path | str, **settings: Any) -> Manifest:
    config = PairsConfig(output=str(output), input=tuple(map(str, inputs)), **{**LENIENT, **settings})
    manifest = run_conversion(config)
    assert manifest.inputs == manifest.samples + sum(manifest.rejects.values())
    result = verify(VerifyConfig(input=str(output), quiet=True))
    assert result.problems == ()
    return manifest


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "in", 4)


def one_line(tmp_path: Path, record: object, **settings: Any) -> dict[str, Any]:
    """The only reject of a file of one line."""
    convert(tmp_path / "out", write_jsonl(tmp_path / "in/pairs.jsonl", [record]), **settings)
    (reject,) = read_rejects(tmp_path / "out")
    return reject


# ---- what becomes of the records ----


def test_a_pair_becomes_a_sample_with_its_caption_and_the_bytes_of_its_image(pairs: Path, tmp_path: Path) -> None:
    manifest = convert(tmp_path / "out", pairs)
    samples = read_samples(tmp_path / "out")
    assert captions(samples) == [f"caption {i}" for i in range(4)]
    assert [sample.image for sample in samples] == [(pairs.parent / f"images/{i}.jpg").read_bytes() for i in range(4)]
    assert {(s.data_type, s.image_extension, s.width, s.height) for s in samples} == {("image_text", "jpg", None, None)}
    assert manifest.data_types == {"image_text": 4}
    assert manifest.codes == {}


def test_text_prompt_goes_before_text_and_text_serves_where_it_is_missing_or_null(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "in", 1)
    records = [
        {"image_path": "images/0.jpg", "text": "second", "text_prompt": "first"},
        {"image_path": "images/0.jpg", "text": "second"},
        {"image_path": "images/0.jpg", "text": "second", "text_prompt": None},
    ]
    convert(tmp_path / "out", write_jsonl(path, records))
    assert captions(read_samples(tmp_path / "out")) == ["first", "second", "second"]


def test_an_empty_or_wrong_text_prompt_is_not_replaced_by_text(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "in", 1)
    records = [{"image_path": "images/0.jpg", "text": "second", "text_prompt": wrong} for wrong in ("", 7)]
    convert(tmp_path / "out", write_jsonl(path, records))
    assert [reject["reason"] for reject in read_rejects(tmp_path / "out")] == ["empty_text", "wrong_type"]


@pytest.mark.parametrize(
    ("kind", "extension"), [("PNG", "png"), ("WEBP", "webp"), ("BMP", "bmp"), ("TIFF", "tif"), ("AVIF", "avif")]
)
def test_the_member_is_named_by_content_whatever_the_file_is_called(tmp_path: Path, kind: str, extension: str) -> None:
    path = write_pairs(tmp_path / "in", 1)
    (tmp_path / "in/images/0.jpg").write_bytes(image_bytes(0, kind=kind))
    convert(tmp_path / "out", path)
    (sample,) = read_samples(tmp_path / "out")
    assert (sample.image_extension, sample.image) == (extension, image_bytes(0, kind=kind))


@pytest.mark.parametrize(
    ("mode", "sizes", "kept"),
    [
        ("cc512", [(64, 32), (32, 64), (65, 32), (32, 65)], ["64x32", "32x64"]),
        ("multi768", [(128, 32), (32, 128), (134, 32), (136, 32)], ["128x32", "32x128", "134x32"]),
    ],
)
def test_images_beyond_the_modes_ratio_are_rejects_that_no_budget_counts(
    tmp_path: Path, mode: str, sizes: list[tuple[int, int]], kept: list[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for width, height in sizes:
        (folder / f"{width}x{height}.png").write_bytes(image_bytes(1, width, height, "PNG"))
    path = write_jsonl(folder / "a.jsonl", [{"image_path": f"{w}x{h}.png", "text": f"{w}x{h}"} for w, h in sizes])
    manifest = convert(tmp_path / "out", path, mode=mode, max_rejects="0")
    samples = read_samples(tmp_path / "out")
    assert captions(samples) == kept
    assert {s.data_type for s in samples} == {"image_text" if mode == "cc512" else "image_text_multi"}
    assert manifest.rejects == {"aspect_ratio": len(sizes) - len(kept)}


def test_kept_fields_travel_with_the_sample_as_they_are(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "in", 1)
    record = {"image_path": "images/0.jpg", "text": "x", "url": "http://a", "n": {"deep": [1, None, 2.5]}, "other": 1}
    convert(tmp_path / "out", write_jsonl(path, [record]), keep=("url", "n", "absent"))
    (sample,) = read_samples(tmp_path / "out")
    assert sample.provenance == {"url": "http://a", "n": {"deep": [1, None, 2.5]}}


def test_a_kept_field_that_can_not_be_written_is_a_reject_and_sinks_nobody(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "in", 2)
    deep = b'{"image_path": "images/0.jpg", "text": "x", "url": ' + b"[" * 500 + b"]" * 500 + b"}"
    convert(tmp_path / "out", write_jsonl(path, [deep, {"image_path": "images/1.jpg", "text": "good"}, deep]), keep=("url",))
    assert captions(read_samples(tmp_path / "out")) == ["good"]
    assert [(r["reason"], r["line"]) for r in read_rejects(tmp_path / "out")] == [
        ("unwritable_record", 1),
        ("unwritable_record", 3),
    ]


def test_a_set_of_nothing_but_unwritable_records_has_no_shard(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "in", 1)
    deep = b'{"image_path": "images/0.jpg", "text": "x", "url": ' + b"[" * 500 + b"]" * 500 + b"}"
    manifest = convert(tmp_path / "out", write_jsonl(path, [deep]), keep=("url",))
    assert (manifest.shards, manifest.inputs) == ((), 1)


@pytest.mark.parametrize("name", ["text", "id", "length"])
def test_reserved_names_can_not_be_kept(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=f"--keep {name}"):
        PairsConfig(output="out", input=("a",), keep=(name,))


# ---- the image root ----


def test_without_an_image_root_paths_may_be_absolute_or_climb(tmp_path: Path) -> None:
    write_pairs(tmp_path, 1)
    paths = ["../images/0.jpg", str(tmp_path / "images/0.jpg"), "./../x/../images//0.jpg"]
    path = write_jsonl(tmp_path / "deep/pairs.jsonl", [{"image_path": image, "text": "x"} for image in paths])
    assert convert(tmp_path / "out", path).samples == 3


def test_paths_that_climb_do_so_from_where_a_linked_folder_really_is(tmp_path: Path) -> None:
    write_pairs(tmp_path / "real", 1)
    write_jsonl(tmp_path / "real/deep/pairs.jsonl", [{"image_path": "../images/0.jpg", "text": "x"}])
    (tmp_path / "link").symlink_to(tmp_path / "real/deep")
    assert convert(tmp_path / "out", tmp_path / "link/pairs.jsonl").samples == 1


@pytest.mark.parametrize(
    "path",
    [
        "../secret.jpg",
        "a/../../secret.jpg",
        "/SECRET",
        "link.jpg",
        "folder_link/secret.jpg",
        "s3://bucket/a.jpg",
        "a\0b.jpg",
        "https://h/a.jpg",
    ],
)
@pytest.mark.parametrize("is_relative", [True, False])
def test_nothing_outside_of_the_image_root_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, is_relative: bool
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.jpg").write_bytes(image_bytes(0))
    (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "folder_link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    image_path = path.replace("/SECRET", str(tmp_path / "secret.jpg"))
    settings = {"image_root": ("root" if is_relative else str(root),), "strict_links": "link" in path}
    reject = one_line(tmp_path, {"image_path": image_path, "text": "x"}, **settings)
    assert reject["reason"] == "outside_root"


def test_inside_the_image_root_links_and_absolute_paths_are_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pairs(tmp_path / "root", 1)
    (tmp_path / "root/link.jpg").symlink_to("images/0.jpg")
    paths = ["images/0.jpg", "link.jpg", str(tmp_path / "root/images/0.jpg"), "images/../link.jpg"]
    path = write_jsonl(tmp_path / "in/a.jsonl", [{"image_path": image, "text": "x"} for image in paths])
    assert convert(tmp_path / "absolute", path, image_root=(str(tmp_path / "root"),)).samples == 4
    monkeypatch.chdir(tmp_path)
    assert convert(tmp_path / "relative", path, image_root=("root",)).samples == 4


def test_a_path_that_begins_like_a_relative_root_is_still_below_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images/images").mkdir(parents=True)
    (tmp_path / "images/a.jpg").write_bytes(image_bytes(1))
    (tmp_path / "images/images/a.jpg").write_bytes(image_bytes(2))
    path = write_jsonl(tmp_path / "in/a.jsonl", [{"image_path": "images/a.jpg", "text": "x"}])
    monkeypatch.chdir(tmp_path)
    convert(tmp_path / "out", path, image_root=("images",))
    assert read_samples(tmp_path / "out")[0].image == image_bytes(2)


def test_a_url_is_no_local_path_without_an_image_root_either(tmp_path: Path) -> None:
    assert one_line(tmp_path, {"image_path": "https://host/a.jpg", "text": "x"})["reason"] == "outside_root"


@pytest.mark.parametrize("path", ["nowhere.jpg", "images", ".", "n" * 5000, "n/" * 3000 + "a", "loop", "pairs.jsonl/a.jpg"])
@pytest.mark.parametrize("is_fenced", [True, False])
def test_a_path_where_no_file_can_be_is_a_missing_image(tmp_path: Path, path: str, is_fenced: bool) -> None:
    (tmp_path / "in/images").mkdir(parents=True)
    (tmp_path / "in/loop").symlink_to("loop")
    reject = one_line(tmp_path, {"image_path": path, "text": "x"}, image_root=(str(tmp_path / "in"),) if is_fenced else ())
    assert reject["reason"] in ("missing_image", "outside_root")
    assert reject["reason"] == "missing_image" or path == "."
    assert len(reject["detail"]) < 500


# ---- limits ----


@pytest.mark.parametrize(
    ("setting", "reason"),
    [({"max_pixels": 1279}, "too_many_pixels"), ({"max_image_bytes": 100}, "too_many_bytes"), ({"min_side": 33}, "too_small")],
)
def test_images_outside_of_the_limits_are_rejects(pairs: Path, tmp_path: Path, setting: dict[str, int], reason: str) -> None:
    assert convert(tmp_path / "out", pairs, **setting).rejects == {reason: 4}


# ---- inputs ----


def test_folders_brace_patterns_and_several_files_are_read_in_order(tmp_path: Path) -> None:
    for name in ("a/0", "a/1", "b/0", "b/sub/1"):
        folder = (tmp_path / name).parent
        write_pairs(folder, 1)
        write_jsonl(tmp_path / f"{name}.jsonl", [{"image_path": str(folder / "images/0.jpg"), "text": name}])
        (folder / "pairs.jsonl").unlink()
    convert(tmp_path / "out", tmp_path / "b", tmp_path / "a/{1,0}.jsonl")
    assert captions(read_samples(tmp_path / "out")) == ["b/0", "b/sub/1", "a/1", "a/0"]


def test_rejects_of_a_dataset_below_an_input_folder_are_no_input_unless_named(half_bad: Path, tmp_path: Path) -> None:
    folder = half_bad.parent
    first = convert(tmp_path / "out", folder)
    (tmp_path / "out").rename(folder / "out")
    assert convert(tmp_path / "again", folder).source["inputs"] == first.source["inputs"]
    assert convert(tmp_path / "named", folder / "out/rejects/task-000000.jsonl").rejects == {"missing_field": 6}


@pytest.mark.parametrize("missing", ["nowhere.jsonl", "empty_folder", "in/{0..1}.jsonl"])
def test_an_input_that_is_not_there_is_named(tmp_path: Path, missing: str) -> None:
    (tmp_path / "empty_folder").mkdir()
    with pytest.raises(NotFound, match=r"nowhere|empty_folder|in/0"):
        convert(tmp_path / "out", tmp_path / missing)
    assert not (tmp_path / "out").exists()


def test_an_empty_file_makes_an_empty_dataset(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    manifest = convert(tmp_path / "out", tmp_path / "a.jsonl")
    assert (manifest.inputs, manifest.samples, manifest.shards) == (0, 0, ())


@pytest.mark.parametrize("encode", [lambda data: b"\xef\xbb\xbf" + data, lambda data: data.replace(b"\n", b"\r\n")])
def test_a_byte_order_mark_and_windows_line_ends_change_nothing(pairs: Path, tmp_path: Path, encode: Any) -> None:
    convert(tmp_path / "plain", pairs)
    pairs.write_bytes(encode(pairs.read_bytes()))
    convert(tmp_path / "out", pairs)
    assert [p.read_bytes() for p in sorted((tmp_path / "out").glob("*.tar"))] == [
        p.read_bytes() for p in sorted((tmp_path / "plain").glob("*.tar"))
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('{"a": 1}\n'.encode("utf-16"), "is UTF-16"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a Git LFS pointer"),
    ],
)
def test_what_is_no_lines_is_refused_with_what_to_do(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(data)
    with pytest.raises(UsageError, match=message):
        convert(tmp_path / "out", tmp_path / "a.jsonl")


# ---- keys, shards, workers ----


@pytest.mark.slow
def test_neither_workers_nor_their_number_change_a_byte(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "in", 30)
    for workers in (1, 2, 3):
        convert(tmp_path / f"out{workers}", path, workers=workers, task_lines=7, shard_samples=3)
    assert tree(tmp_path / "out1") == tree(tmp_path / "out2") == tree(tmp_path / "out3")


def test_keys_are_unique_sorted_and_say_the_line(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "in", 5)
    lines = path.read_bytes().splitlines()
    write_jsonl(path, [lines[0], b"", b"broken", *lines[1:]])
    convert(tmp_path / "out", path, task_lines=4)
    assert [sample.key for sample in read_samples(tmp_path / "out")] == [
        "000000-00000000",
        "000000-00000003",
        "000001-00000000",
        "000001-00000001",
        "000001-00000002",
    ]


def test_shards_close_at_a_count_and_at_a_size(pairs: Path, tmp_path: Path) -> None:
    by_count = convert(tmp_path / "count", pairs, shard_samples=3)
    assert [row.samples for row in by_count.shards] == [3, 1]
    by_size = convert(tmp_path / "size", pairs, shard_bytes=1)
    assert [row.samples for row in by_size.shards] == [1, 1, 1, 1]
    assert [row.name for row in by_size.shards] == [f"shard-000000-000{i}.tar" for i in range(4)]


@pytest.mark.parametrize("wrong", [{name: 0} for name in ("workers", "task_lines", "shard_samples", "shard_bytes", "max_pixels")])
def test_numbers_below_one_are_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        convert(tmp_path / "out", write_pairs(tmp_path / "in", 1), **wrong)


# ---- the budget of rejects ----


@pytest.fixture
def half_bad(tmp_path: Path) -> Path:
    """Ten lines; the even ones name no file, and one is a ratio that is filtered."""
    path = write_pairs(tmp_path / "in", 10)
    for number in range(0, 10, 2):
        (tmp_path / f"in/images/{number}.jpg").unlink()
    (tmp_path / "in/images/1.jpg").write_bytes(image_bytes(1, 100, 20))
    return path


@pytest.mark.parametrize("budget", ["4", "0", "49%", "49.9%"])
def test_one_reject_too_many_stops_the_run_with_counts_and_a_way_on(half_bad: Path, tmp_path: Path, budget: str) -> None:
    out = tmp_path / "out"
    with pytest.raises(TooManyRejects) as stopped:
        convert(f"{out}/", half_bad, max_rejects=budget)
    message = str(stopped.value)
    assert message.startswith(f"5 of 10 inputs can't be used, allowed are {budget} (5 missing_image)")
    assert f"{out}/rejects/" in message
    assert f"; the first, in {half_bad}, line 1: " in message
    assert "--resume and a larger --max-rejects" in message
    assert not (out / "manifest.json").exists()
    assert len(read_rejects_of_an_unfinished_set(out)) == 6
    assert convert(out, half_bad, max_rejects="5", resume=True).rejects == {"aspect_ratio": 1, "missing_image": 5}


def read_rejects_of_an_unfinished_set(folder: Path) -> list[Any]:
    return [json.loads(line) for path in sorted((folder / "rejects").iterdir()) for line in path.read_bytes().splitlines()]


@pytest.mark.parametrize(
    "settings", [{"max_rejects": "10%"}, {"max_rejects": "0", "task_lines": 2}, {"where": "url == 'x'"}], ids=str
)
def test_a_run_of_which_nothing_was_usable_leaves_nothing_behind(tmp_path: Path, settings: dict[str, Any]) -> None:
    path = write_pairs(tmp_path / "in", 9)
    for image in (tmp_path / "in/images").iterdir() if "where" not in settings else ():
        image.unlink()
    with pytest.raises(TooManyRejects) as stopped:
        convert(tmp_path / "out", path, **settings)
    assert tree(tmp_path / "out") == {}
    if "where" not in settings:
        assert f"; the first, in {path}, line 1: " in str(stopped.value)
        assert "no input was usable, so no files are left" in str(stopped.value)


def test_a_part_of_which_nothing_was_usable_leaves_what_others_made(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "in", 4)
    (tmp_path / "in/images/1.jpg").unlink()
    (tmp_path / "in/images/3.jpg").unlink()
    config = PairsConfig(output=str(tmp_path / "out"), input=(str(path),), task_lines=1, quiet=True, part="0/2")
    run_conversion(config)
    before = tree(tmp_path / "out")
    with pytest.raises(TooManyRejects, match=r"see .*rejects/"):
        run_conversion(replace(config, part="1/2"))
    assert before.items() <= tree(tmp_path / "out").items()


@pytest.mark.parametrize("budget", ["5", "50%", "100%"])
def test_as_many_rejects_as_allowed_are_fine(half_bad: Path, tmp_path: Path, budget: str) -> None:
    assert convert(tmp_path / "out", half_bad, max_rejects=budget).samples == 4


def test_a_count_stops_the_run_at_once_and_a_resumed_run_remembers(half_bad: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "in/images/0.jpg").write_bytes(image_bytes(0))  # something has to be usable, or nothing stays
    done = 2
    for resume in (False, True):
        with pytest.raises(TooManyRejects):
            convert(out, half_bad, max_rejects="0", task_lines=1, resume=resume)
        done, before = len(list((out / "_work").glob("task-*"))), done
        assert before < done <= before + 1 + MOST_RESTS  # so many were under way when the one too many ended
    assert convert(out, half_bad, max_rejects="5", task_lines=1, resume=True).inputs == 10


@pytest.mark.parametrize("wrong", ["", "x", "-1", "101%", "nan%", "1.5", "%", "-1%"])
def test_a_budget_that_is_none_is_refused(wrong: str) -> None:
    with pytest.raises(UsageError, match="--max-rejects"):
        PairsConfig(output="out", input=("a",), max_rejects=wrong)


# ---- an output that is there already ----


def test_a_complete_output_is_only_replaced_with_overwrite(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(out, pairs)
    before = tree(out)
    with pytest.raises(UsageError, match=r"complete dataset already.*--overwrite"):
        convert(out, pairs, shard_samples=1)
    assert tree(out) == before
    assert len(convert(out, pairs, shard_samples=1, overwrite=True).shards) == 4
    convert(out, pairs, overwrite=True)
    assert tree(out) == before


def test_an_unfinished_output_asks_for_resume_or_overwrite(half_bad: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(TooManyRejects):
        convert(out, half_bad, max_rejects="0")
    with pytest.raises(UsageError, match=r"unfinished dataset.*--resume.*--overwrite"):
        convert(out, half_bad)
    convert(out, half_bad, overwrite=True, shard_samples=1)
    convert(tmp_path / "fresh", half_bad, shard_samples=1)
    assert tree(out) == tree(tmp_path / "fresh")


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
@pytest.mark.parametrize(
    "name", ["notes.txt", "shard-000000.tar", "manifest.json", "deep/shard-000000-0000.tar", "rejects/a.jsonl"]
)
def test_a_folder_of_other_files_is_never_touched(pairs: Path, tmp_path: Path, flags: dict[str, bool], name: str) -> None:
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_bytes(b'{"format": "something else"}')
    before = tree(out)
    with pytest.raises(UsageError, match="choose another output"):
        convert(out, pairs, **flags)
    assert tree(out) == before


def test_overwrite_leaves_files_that_are_not_ours(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(out, pairs)
    others = {"notes.txt": b"mine", "shard-000000.tar": b"mine", "rejects/mine.txt": b"mine"}
    for name, data in others.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(data)
    run_conversion(PairsConfig(output=str(out), input=(str(pairs),), overwrite=True, shard_samples=1, quiet=True))
    found = tree(out)
    assert {name: found[name] for name in others} == others
    assert len(read_samples(out)) == 4


def test_an_overwrite_that_was_interrupted_can_only_be_overwritten(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(out, pairs, shard_samples=1)
    (out / "manifest.json").unlink()  # what it removes first
    for flags in ({}, {"resume": True}):
        with pytest.raises(UsageError, match="--overwrite"):
            convert(out, pairs, **flags)
    assert convert(out, pairs, overwrite=True).samples == 4


def test_resume_on_nothing_is_a_fresh_start_and_both_flags_exclude_each_other(pairs: Path, tmp_path: Path) -> None:
    assert convert(tmp_path / "out", pairs, resume=True).samples == 4
    with pytest.raises(UsageError, match="exclude each other"):
        convert(tmp_path / "out", pairs, resume=True, overwrite=True)


# ---- real inputs ----


def test_the_170_real_images_come_through_byte_for_byte(tmp_path: Path) -> None:
    folder = shared("pairs/open")
    manifest = convert(tmp_path / "out", folder / "pairs.jsonl", workers=2, task_lines=50, max_rejects="2%")
    assert (manifest.inputs, manifest.samples) == (243, 213)
    assert manifest.rejects == {"aspect_ratio": 27, "too_small": 3}
    lines = [json.loads(line) for line in (folder / "pairs.jsonl").read_text("utf-8").splitlines()]
    rejected = {reject["line"] for reject in read_rejects(tmp_path / "out")}
    expected = [line for number, line in enumerate(lines, 1) if number not in rejected]
    samples = read_samples(tmp_path / "out")
    assert captions(samples) == [line["text_prompt"] for line in expected]
    assert all(s.image == (folder / line["image_path"]).read_bytes() for s, line in zip(samples, expected, strict=True))


def test_the_real_images_in_many_shapes(tmp_path: Path) -> None:
    manifest = convert(tmp_path / "out", shared("pairs/open") / "pairs.jsonl", mode="multi768")
    assert manifest.data_types == {"image_text_multi": manifest.samples}
    assert manifest.rejects == {"aspect_ratio": 2, "too_small": 3}


# What becomes of each line of pairs_bad.jsonl that is no sample; where its expectation leaves that open, this pins it.
BAD_LINES = {
    "aspect_ratio": {53},
    "bad_json": {2, 22, 23},
    "corrupt_image": {33, 49},
    "empty_image": {46},
    "empty_text": {7, 8},
    "invalid_utf8": {15, 20},
    "missing_field": {3, 4, 5},
    "missing_image": {9, 12},
    "not_an_image": {10, 11, 34, 36, 62, 72, 83},
    "not_an_object": {17, 18, 19},
    "too_many_bytes": {80},
    "too_many_pixels": {31, 32, 37, 48, 55},
    "too_small": {58, 73},
    "truncated_image": {40, 41, 44, 78, 81},
    "unsupported_format": {47, 56},
    "wrong_type": {6, 16},
}
BLANK_LINES = {13, 14}


def test_every_bad_line_has_the_outcome_that_it_should(tmp_path: Path) -> None:
    path = shared("malformed/jsonl") / "pairs_bad.jsonl"
    expected = json.loads((path.parent / "pairs_bad.expect.json").read_text())
    manifest = convert(tmp_path / "out", path)
    rejects = read_rejects(tmp_path / "out")
    by_line = {reject["line"]: reject["reason"] for reject in rejects}
    for case in expected:
        if case["usable"] is not None:
            assert (case["line"] not in by_line) == case["usable"], case
    assert {reason: {line for line in by_line if by_line[line] == reason} for reason in by_line.values()} == BAD_LINES
    assert all(reject["source"] == str(path) and reject["detail"] for reject in rejects)
    assert manifest.inputs == len(expected) - len(BLANK_LINES)


@pytest.mark.parametrize("name", ["pairs_bom.jsonl", "pairs_crlf.jsonl", "pairs_u2028.jsonl"])
def test_odd_but_good_files_lose_nothing(tmp_path: Path, name: str) -> None:
    path = shared("malformed/jsonl") / name
    manifest = convert(tmp_path / "out", path)
    lines = [json.loads(line) for line in path.read_bytes().decode("utf-8-sig").split("\n") if line.strip()]
    assert manifest.samples == len(lines) > 0
    assert captions(read_samples(tmp_path / "out")) == [line["text_prompt"] for line in lines]


def test_real_utf_16_is_refused_and_a_real_list_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is UTF-16"):
        convert(tmp_path / "out", shared("malformed/jsonl") / "pairs_utf16.jsonl")
    path = shared("malformed/jsonl") / "pairs_array.json"
    assert convert(tmp_path / "out", path).inputs == len(json.loads(path.read_text()))
