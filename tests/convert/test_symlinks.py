"""Symlinks in what a user names and in what records name, sentence by sentence; for stores see tests/storage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import captions, image_bytes, read_rejects, read_samples, write_documents, write_jsonl

from wds_tools.convert import run_conversion
from wds_tools.convert.documents import DocumentsConfig
from wds_tools.convert.pairs import PairsConfig
from wds_tools.format.manifest import Manifest
from wds_tools.format.tar import END, header, padding

QUIET: dict[str, Any] = {"quiet": True, "max_rejects": "100%"}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A snapshot of a Hugging Face cache: an image twice, a jsonl that names both, text twice, all links to blobs; and a loop."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots/rev"
    blobs.mkdir()
    (snapshot / "data").mkdir(parents=True)
    (blobs / "aa").write_bytes(image_bytes(1))
    write_jsonl(blobs / "bb", [{"image_path": path, "text": path} for path in ("a.jpg", "data/b.jpg")])
    write_documents(blobs / "cc", [{"text": "same"}])
    image = image_bytes(1)
    (blobs / "dd").write_bytes(header("t.jpg", len(image)) + image + padding(len(image)) + END)
    links = {"a.jpg": "aa", "data/b.jpg": "aa", "images.tar": "dd", "pairs/a.jsonl": "bb", "text/x.jsonl.zst": "cc"}
    for name, blob in {**links, "text/y.jsonl.zst": "cc"}.items():
        (snapshot / name).parent.mkdir(exist_ok=True)
        (snapshot / name).symlink_to(f"{'../' * name.count('/')}../../blobs/{blob}")
    for folder in ("data", "text"):
        (snapshot / folder / "loop").symlink_to("../" + folder)
    return snapshot


def pairs(output: Path, source: Path, *roots: Path | str, **settings: Any) -> Manifest:
    return run_conversion(
        PairsConfig(input=(str(source),), output=str(output), image_root=tuple(map(str, roots)), **QUIET, **settings)
    )


def named(folder: Path, *paths: Path | str) -> Path:
    return write_jsonl(folder / "named.jsonl", [{"image_path": str(path), "text": "x"} for path in paths])


def test_the_inputs_the_image_root_and_the_image_tars_that_a_user_names_may_be_links(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(cache)
    assert pairs(tmp_path / "out", tmp_path / "link/pairs/a.jsonl", tmp_path / "link").samples == 2
    assert pairs(tmp_path / "again", tmp_path / "link/pairs", tmp_path / "link").samples == 2
    assert pairs(tmp_path / "tars", named(tmp_path, "t.jpg"), tmp_path / "link/images.tar").samples == 1


def test_a_loop_is_entered_once_and_two_links_to_one_blob_are_two_files(cache: Path, tmp_path: Path) -> None:
    manifest = run_conversion(DocumentsConfig(input=(str(cache / "text"),), output=str(tmp_path / "out"), **QUIET))
    assert captions(read_samples(tmp_path / "out")) == ["same", "same"]
    assert [Path(file["url"]).name for file in manifest.source["inputs"]] == ["x.jsonl.zst", "y.jsonl.zst"]


def test_the_root_of_all_allows_every_absolute_path(cache: Path, tmp_path: Path) -> None:
    source = named(tmp_path, cache / "a.jpg", tmp_path / "blobs/aa", str(cache / "a.jpg").lstrip("/"))
    assert pairs(tmp_path / "out", source, "/").samples == 3


def test_an_absolute_path_is_taken_if_as_text_it_lies_below_the_image_root(cache: Path, tmp_path: Path) -> None:
    paths = [cache / "a.jpg", f"{cache}/data/../a.jpg", tmp_path / "blobs/aa", f"{cache}/../../blobs/aa", f"{cache}x/a.jpg"]
    pairs(tmp_path / "out", named(tmp_path, *paths), f"{cache}/")
    assert [reject["line"] for reject in read_rejects(tmp_path / "out")] == [3, 4, 5]
    assert {reject["reason"] for reject in read_rejects(tmp_path / "out")} == {"outside_root"}


def test_paths_that_climb_out_as_text_are_refused_though_links_would_lead_back(cache: Path, tmp_path: Path) -> None:
    source = named(tmp_path, "../rev/a.jpg", "data/../../rev/a.jpg", "data/loop/b.jpg", "data/../a.jpg")
    manifest = pairs(tmp_path / "out", source, cache)
    assert (manifest.samples, manifest.rejects) == (2, {"outside_root": 2})


def test_without_an_image_root_paths_go_anywhere(cache: Path, tmp_path: Path) -> None:
    source = named(tmp_path / "deep", "../snapshots/rev/a.jpg", cache / "data/b.jpg")
    assert pairs(tmp_path / "out", source).samples == 2


def test_strict_links_follows_none_that_leaves_the_image_root_or_the_folder_of_inputs(cache: Path, tmp_path: Path) -> None:
    (cache / "real.jpg").write_bytes(image_bytes(2))
    (cache / "data/inside.jpg").symlink_to("../real.jpg")
    source = named(tmp_path, "real.jpg", "data/inside.jpg", "a.jpg", "data/b.jpg", "data/loop/inside.jpg")
    manifest = pairs(tmp_path / "out", source, cache, strict_links=True)
    assert (manifest.samples, manifest.rejects) == (3, {"outside_root": 2})
    write_documents(cache / "text/z.jsonl.zst", [{"text": "real"}])
    run_conversion(DocumentsConfig(input=(str(cache / "text"),), output=str(tmp_path / "text"), strict_links=True, **QUIET))
    assert captions(read_samples(tmp_path / "text")) == ["real"]
