"""Images in tars beside a jsonl, as JourneyDB comes: `--image-root '{000..001}.tar'` gives the bytes that unpacked files give."""

from __future__ import annotations

import gzip
import pickle
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import obstore
import pytest
from commands import image_bytes, read_rejects, read_samples, tree, write_jsonl
from obstore.store import S3Store
from s3 import S3Server

from wds_tools.convert import run_conversion
from wds_tools.convert.images import tars
from wds_tools.convert.images.reader import ImageReader
from wds_tools.convert.images.tars import TarImages
from wds_tools.convert.pairs import PairsConfig
from wds_tools.errors import NotFound, Reject, StorageError, UsageError
from wds_tools.format.manifest import Manifest
from wds_tools.format.tar import END, header, padding

LONG = "a" * 90 + "/" + "b" * 180 + ".jpg"
NAMES = ("000/0.jpg", "000/1.jpg", "001/2.jpg", LONG, "001/caf\u00e9.jpg")


@pytest.fixture
def journey(tmp_path: Path) -> Path:
    """A jsonl, a folder of images, and the same in two tars: one of GNU tar with a folder, one with pax blocks."""
    root = tmp_path / "in/images"
    for number, name in enumerate(NAMES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(image_bytes(number))
    pack = ["tar", "-C", str(root), "-cf"]
    subprocess.run([*pack, str(tmp_path / "in/000.tar"), "./000"], check=True)
    subprocess.run([*pack, str(tmp_path / "in/001.tar"), "--format=pax", "001", LONG.partition("/")[0]], check=True)
    paths = [*NAMES, "./000/1.jpg", "000/../001/2.jpg", "/000/0.jpg", "nowhere.jpg", "../000/0.jpg", "s3://b/000/0.jpg", "000"]
    return write_jsonl(tmp_path / "in/anno.jsonl", [{"img_path": path, "prompt": path} for path in paths])


def tar(*members: tuple[str, bytes], end: bytes = END) -> bytes:
    return b"".join(header(name, len(data)) + data + padding(len(data)) for name, data in members) + end


def convert(output: Path, source: Path, *roots: Path | str, **settings: Any) -> Manifest:
    return run_conversion(
        PairsConfig(
            output=str(output),
            input=(str(source),),
            image_root=tuple(map(str, roots)),
            max_rejects="100%",
            quiet=True,
            **settings,
        )
    )


def reader(*roots: Path | str) -> ImageReader:
    return ImageReader(PairsConfig(input=("a",), output="out", image_root=tuple(map(str, roots)), quiet=True))


def test_members_of_tars_are_the_images_that_records_name(journey: Path, tmp_path: Path) -> None:
    manifest = convert(tmp_path / "out", journey, journey.parent / "{000..001}.tar")
    samples = read_samples(tmp_path / "out")
    assert [sample.image for sample in samples] == [image_bytes(number) for number in (0, 1, 2, 3, 4, 1, 2, 0)]
    assert manifest.rejects == {"missing_image": 2, "outside_root": 2}
    assert "in none of the 2 tars of --image-root" in read_rejects(tmp_path / "out")[0]["detail"]


def test_neither_workers_nor_the_names_of_the_tars_change_a_byte(journey: Path, tmp_path: Path) -> None:
    folder = journey.parent
    convert(tmp_path / "one", journey, folder / "000.tar", folder / "001.tar", task_lines=3)
    convert(tmp_path / "two", journey, folder / "{000..001}.tar", task_lines=3, workers=2)
    trees = [tree(tmp_path / name) for name in ("one", "two")]
    for files in trees:
        del files["manifest.json"]  # names the options
    assert trees[0] == trees[1]


def test_headers_are_read_once_and_travel_to_the_workers_in_28_bytes_an_image(
    journey: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = reader(journey.parent / "{000..001}.tar")
    monkeypatch.setattr(tars, "_places_in", None)
    there = pickle.loads(pickle.dumps(here))  # noqa: S301
    assert there.read("records.jsonl", LONG)[0] == image_bytes(3)
    assert there._tars is not None
    assert there._tars._hashes.nbytes + there._tars._places.nbytes == 28 * len(NAMES)


def test_the_limit_of_bytes_holds_before_an_image_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar(("a.jpg", bytes(5_000_000)), ("empty.jpg", b"")))
    images = TarImages([(str(tmp_path / "a.tar"), (tmp_path / "a.tar").stat().st_size)])
    assert len(images.read("a.jpg", 1000)) == 1001
    assert images.read("empty.jpg", 1000) == b""


def test_of_images_of_one_name_the_first_is_used_and_that_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.tar").write_bytes(tar(("x.jpg", image_bytes(1)), ("y.jpg", image_bytes(2))))
    (tmp_path / "b.tar").write_bytes(tar(("./x.jpg", image_bytes(3)), ("z.jpg", image_bytes(4))))
    for roots, expected in ((("a.tar", "b.tar"), 1), (("b.tar", "a.tar"), 3)):
        images = reader(*(tmp_path / root for root in roots))
        assert images.read("", "x.jpg")[0] == image_bytes(expected)
        assert "1 image of --image-root has the name of another, such as" in capfd.readouterr().err


def test_links_and_names_of_other_encodings_are_passed_by_and_the_images_behind_them_are_found(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jpg").write_bytes(image_bytes(1))
    (tmp_path / "in/b.jpg").symlink_to("a.jpg")
    (tmp_path / "in/caf\udce9.jpg").write_bytes(image_bytes(3))
    (tmp_path / "in/z.jpg").write_bytes(image_bytes(2))
    subprocess.run(["tar", "-C", str(tmp_path / "in"), "-cf", str(tmp_path / "a.tar"), "--sort=name", "."], check=True)
    images = reader(tmp_path / "a.tar")
    assert images.read("", "z.jpg")[0] == image_bytes(2)
    with pytest.raises(Reject, match="missing_image"):
        images.read("", "b.jpg")


def test_two_names_of_one_hash_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "_hash", lambda _: 7)
    (tmp_path / "a.tar").write_bytes(tar(*((f"{number}.jpg", image_bytes(number)) for number in range(5))))
    images = reader(tmp_path / "a.tar")
    assert [images.read("", f"{number}.jpg")[0] for number in range(5)] == [image_bytes(number) for number in range(5)]
    with pytest.raises(Reject, match="missing_image"):
        images.read("", "5.jpg")


@pytest.mark.parametrize("cut", [-1024, -1025, -1500, -2048, -3000])
def test_of_a_cut_tar_the_images_before_the_cut_are_used_and_that_is_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], cut: int
) -> None:
    whole = tar(*((f"{number}.jpg", image_bytes(number)) for number in range(3)))
    (tmp_path / "a.tar").write_bytes(whole[:cut])
    images = reader(tmp_path / "a.tar")
    assert images.read("", "0.jpg")[0] == image_bytes(0)
    said = capfd.readouterr().err
    assert "a.tar: " in said
    assert "images before that are used" in said


@pytest.mark.parametrize(
    ("name", "data", "what"),
    [
        ("a.tar", gzip.compress(tar(("a", b"a")), mtime=0), "this is gzip: unpack it first"),
        ("a.tar", b"<html>" + bytes(600), "HTML"),
        ("a.tar", tar(("a", b"a"))[:400], "only the first bytes of one"),
        ("a.tgz", b"", "can't be read from the middle: unpack it first, as with `gunzip --keep FILE.tgz`, which makes FILE.tar"),
        ("a.tar.gz", b"", "can't be read from the middle"),
        ("a.TGZ", b"", "can't be read from the middle"),
    ],
    ids=range(6),
)
def test_what_is_no_plain_tar_is_refused_before_anything_is_written(tmp_path: Path, name: str, data: bytes, what: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=what):
        reader(tmp_path / name)


def test_a_folder_and_tars_or_a_missing_tar_are_refused(journey: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected one folder, or \.tar files and nothing else"):
        reader(journey.parent / "000.tar", journey.parent / "images")
    with pytest.raises(NotFound, match=r"002\.tar"):
        reader(journey.parent / "{000..002}.tar")
    (tmp_path / "folder.tar").mkdir()
    (tmp_path / "folder.tar/a.jpg").write_bytes(image_bytes(1))
    assert reader(tmp_path / "folder.tar").read("x.jsonl", "a.jpg")[0] == image_bytes(1)


def test_a_tar_that_is_replaced_meanwhile_ends_the_run_and_gives_no_other_image(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar(("a.jpg", image_bytes(1)), ("b.jpg", image_bytes(2))))
    images = reader(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(tar(("b.jpg", image_bytes(2)), ("a.jpg", image_bytes(1))))
    with pytest.raises(Reject, match="missing_image"):
        images.read("", "a.jpg")
    (tmp_path / "a.tar").write_bytes(tar(("a.jpg", image_bytes(1))))
    with pytest.raises(StorageError, match="replaced"):
        images.read("", "a.jpg")


def test_tars_on_s3_give_the_same(journey: Path, tmp_path: Path, s3: S3Server) -> None:
    for name in ("000.tar", "001.tar"):
        obstore.put(S3Store(s3.bucket, client_options={"allow_http": True}), f"jdb/{name}", (journey.parent / name).read_bytes())
    root = f"s3://{s3.bucket}/jdb/{{000..001}}.tar"
    samples: list[Sequence[bytes | None]] = []
    for output, where in (("local", journey.parent / "{000..001}.tar"), ("s3", root)):
        convert(tmp_path / output, journey, where)
        samples.append([sample.image for sample in read_samples(tmp_path / output)])
    assert samples[0] == samples[1]
    assert len(samples[0]) == 8


def test_a_folder_of_nothing_but_tars_is_refused_with_what_to_type(tmp_path: Path) -> None:
    (tmp_path / "imgs").mkdir()
    (tmp_path / "imgs/000.tar").write_bytes(END)
    settings: dict[str, Any] = {"input": ("a.jsonl",), "output": str(tmp_path / "out")}
    with pytest.raises(UsageError, match=r"imgs holds nothing but tars: name them, as --image-root '\S+imgs/\*\.tar'"):
        PairsConfig(**settings, image_root=(str(tmp_path / "imgs"),))
    assert PairsConfig(**settings, image_root=(str(tmp_path / "imgs/*.tar"),)).are_tars
