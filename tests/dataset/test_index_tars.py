"""`index` on folders of tars that nobody wrote a manifest for: webdataset's, tarfile's, this project's own, good and bad."""

from __future__ import annotations

import io
import os
import shutil
import signal
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import last_line, start, tree, wait_until, wds_tools, write_documents
from factory import answer_sample, image_sample, make_dataset, page_sample, talk_sample, text_sample
from s3 import S3Server

from loaders import LoaderConfig, ShardDataset, Source, TarDataset, World, build_loader
from wds_tools.check.verify import VerifyConfig, verify
from wds_tools.cli import index as cli_index
from wds_tools.cli.main import main
from wds_tools.dataset.layout import OFFSETS
from wds_tools.dataset.reader import ShardBytes, read_manifest
from wds_tools.errors import FormatError, NotFound, StorageError, UsageError, WorkerDied
from wds_tools.format.checksum import content_hash
from wds_tools.format.index import ABSENT, parse_index, serialize_index
from wds_tools.format.manifest import Manifest
from wds_tools.format.schema import ANY_MEMBERS, SCHEMA_VERSION, Sample
from wds_tools.jobs import index_tars as index_module
from wds_tools.jobs.index_tars import index_tars, rebuild_indices
from wds_tools.storage import open_store

Samples = list[dict[str, Any]]


def some_samples(first: int, count: int) -> Samples:
    """As webdataset's writer takes them; not all have all members."""
    return [
        {
            "__key__": f"set/{number:06d}",
            "jpg": b"\xff\xd8" * (number % 700),
            "txt": f"caption {number}".encode(),
            **({"cls": b"1"} if number % 3 else {}),
        }
        for number in range(first, first + count)
    ]


def write_webdataset(path: Path, samples: Samples) -> Path:
    webdataset = pytest.importorskip("webdataset")
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = webdataset.TarWriter(str(path), encoder=False)
    for sample in samples:
        writer.write(sample)
    writer.close()
    return path


def write_tarfile(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def index(folder: Path, *, workers: int = 1) -> Manifest:
    return index_tars(open_store(str(folder)), workers=workers)


def problems(folder: Path | str) -> tuple[str, ...]:
    return verify(VerifyConfig(input=str(folder), quiet=True)).problems


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Three of webdataset's tars, one of them in a folder of its own, 30 samples."""
    folder = tmp_path / "tars"
    for number, name in enumerate(("00000.tar", "00001.tar", "more/00002.tar")):
        write_webdataset(folder / name, some_samples(10 * number, 10))
    return folder


# ---- What is written ----


def test_tars_of_webdatasets_writer_become_a_dataset_of_any_members(tars: Path) -> None:
    (tars / "README.md").write_text("about these")
    (tars / "00000_stats.json").write_text("{}")
    before = tree(tars)
    manifest = index(tars)
    assert manifest == read_manifest(open_store(str(tars)), any_members=True)
    assert manifest.schema_version == ANY_MEMBERS
    assert [row.name for row in manifest.shards] == ["00000.tar", "00001.tar", "more/00002.tar"]
    assert (manifest.samples, manifest.inputs, manifest.data_types, manifest.rejects, manifest.codes) == (30, 30, {}, {}, {})
    assert manifest.members == ("jpg", "txt", "cls")
    assert manifest.source["command"] == "index"
    for row in manifest.shards:
        tar = (tars / row.name).read_bytes()
        assert (row.bytes, row.xxh128) == (len(tar), content_hash(tar).hexdigest())
        assert (row.text_chars, row.num_codes) == (0, 0)
    written = {"manifest.json", OFFSETS, *(f"{row.name}.index" for row in manifest.shards)}
    assert tree(tars) == {**before, **{name: (tars / name).read_bytes() for name in written}}
    assert problems(tars) == ()


def test_every_member_of_every_sample_lies_where_the_index_says(tars: Path) -> None:
    for number, row in enumerate(index(tars).shards):
        tar = (tars / row.name).read_bytes()
        found = parse_index((tars / f"{row.name}.index").read_bytes())
        for sample, start_at, offsets, lengths in zip(
            some_samples(10 * number, 10), found.start.tolist(), found.offsets.tolist(), found.lengths.tolist(), strict=True
        ):
            payloads = {
                suffix: tar[start_at + offset : start_at + offset + length]
                for suffix, offset, length in zip(found.members, offsets, lengths, strict=True)
                if length != ABSENT
            }
            assert payloads == {suffix: content for suffix, content in sample.items() if suffix != "__key__"}


def test_tars_of_this_projects_schema_become_the_dataset_that_they_were(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    original = make_dataset(folder, [*map(image_sample, range(25)), *map(text_sample, range(25))], shard_samples=20)
    before = tree(folder)
    for path in [folder / "manifest.json", *folder.glob("*.index")]:
        path.unlink()
    manifest = index(folder)
    assert manifest.shards == original.shards
    assert (manifest.schema_version, manifest.data_types) == (SCHEMA_VERSION, {"image_text": 25, "text_pretrain": 25})
    assert manifest.fingerprint() == original.fingerprint()
    assert {**tree(folder), "manifest.json": b""} == {**before, "manifest.json": b""}
    assert problems(folder) == ()  # though nothing is known of what made the codes


@pytest.mark.parametrize(("sample", "version"), [(talk_sample, 1), (page_sample, 2), (answer_sample, 2)])
def test_schema_2_is_that_of_sets_with_a_sample_that_1_cannot_say(
    sample: Callable[..., Sample], version: int, tmp_path: Path
) -> None:
    original = make_dataset(tmp_path, [sample(0, (4, 4), (2, 8)), text_sample(0), talk_sample(9)], shard_samples=1)
    assert read_manifest(open_store(str(tmp_path))).schema_version == version
    (tmp_path / "manifest.json").unlink()
    found = index(tmp_path)
    assert (found.schema_version, found.shards, found.fingerprint()) == (version, original.shards, original.fingerprint())
    assert problems(tmp_path) == ()


def test_one_sample_of_another_kind_makes_the_set_one_of_any_members(tars: Path) -> None:
    make_dataset(tars / "ours", map(image_sample, range(10)))
    (tars / "ours/manifest.json").unlink()
    manifest = index(tars)
    assert manifest.schema_version == ANY_MEMBERS
    ours = manifest.shards[-1]
    assert (ours.name, ours.data_types, ours.text_chars, ours.num_codes) == ("ours/shard-000000-0000.tar", {}, 0, 0)
    found = parse_index((tars / f"{ours.name}.index").read_bytes())
    assert not found.text_chars.any()
    assert not found.num_codes.any()
    assert problems(tars) == ()


def test_the_number_of_workers_changes_no_byte(tars: Path, tmp_path: Path) -> None:
    shutil.copytree(tars, tmp_path / "copy")
    index(tars)
    index(tmp_path / "copy", workers=2)
    assert tree(tars) == tree(tmp_path / "copy")


def test_a_key_may_come_back_in_another_tar_but_not_in_the_same(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        write_webdataset(tmp_path / name, some_samples(0, 3))
    assert index(tmp_path).samples == 6
    assert problems(tmp_path) == ()
    write_tarfile(tmp_path / "other/c.tar", {"1.jpg": b"", "2.jpg": b"", "1.txt": b""})
    with pytest.raises(FormatError, match=r"other/c.tar: '1.txt' at byte 1024 comes after other samples"):
        index(tmp_path / "other")


def test_tars_without_samples_are_indexed_too(tmp_path: Path) -> None:
    write_tarfile(tmp_path / "a.tar", {})
    assert [row.samples for row in index(tmp_path).shards] == [0]
    write_webdataset(tmp_path / "b.tar", some_samples(0, 2))
    (tmp_path / "manifest.json").unlink()
    assert [row.samples for row in index(tmp_path).shards] == [0, 2]
    assert problems(tmp_path) == ()


# ---- Again, and after a kill ----


@pytest.mark.slow
def test_members_that_are_no_part_of_a_sample_are_passed_over_and_counted(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("LICENSE", "._0.jpg", "0.jpg", "._0.txt", "0.txt", "set/.DS_Store", "1.jpg", "1.txt"):
            member = tarfile.TarInfo(name)
            member.size = len(name)
            archive.addfile(member, io.BytesIO(name.encode()))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            other = tarfile.TarInfo("2.jpg")
            other.type = kind
            archive.addfile(other)
    manifest = index_tars(open_store(str(tmp_path)))
    assert (manifest.samples, manifest.members) == (2, ("jpg", "txt"))
    assert manifest.source["counts"] == {"members_passed_over": 8}
    assert problems(tmp_path) == ()
    assert sorted(bytes(sample["txt"]) for sample in ShardDataset(str(tmp_path))) == [b"0.txt", b"1.txt"]


@pytest.mark.slow
def test_an_index_that_is_lost_comes_back(tars: Path) -> None:
    index(tars)
    before = tree(tars)
    (tars / "00001.tar.index").unlink()
    assert "00001.tar.index" in "".join(problems(tars))
    said = wds_tools("index", tars, "--workers", "2")
    assert said.stdout.startswith(f"index: rebuilt 3 index files of {tars}: 30 samples, ")
    assert said.stdout.endswith("\nschema: WebDataset samples of any members: jpg, txt, cls\n")
    assert tree(tars) == before


@pytest.mark.parametrize(
    "harm", [lambda tars: (tars / "00001.tar").unlink(), lambda tars: shutil.copy(tars / "00000.tar", tars / "9.tar")]
)
def test_tars_that_came_or_went_are_not_passed_over(tars: Path, harm: Callable[[Path], object]) -> None:
    index(tars)
    harm(tars)
    assert len(problems(tars)) == 1
    with pytest.raises(FormatError, match=r"1 tar came or went since it was indexed \(.*\): remove its manifest.json to index"):
        rebuild_indices(open_store(str(tars)))
    (tars / "manifest.json").unlink()
    index(tars)


def test_a_tar_that_was_changed_is_not_blessed(tars: Path) -> None:
    index(tars)
    write_webdataset(tars / "00001.tar", some_samples(100, 10))
    with pytest.raises(FormatError, match=r"00001.tar: .*the shard was changed or damaged"):
        rebuild_indices(open_store(str(tars)))


@pytest.mark.slow
def test_a_run_that_was_killed_is_simply_run_again(tars: Path, tmp_path: Path) -> None:
    for number in range(200):
        shutil.copy(tars / "00000.tar", tars / f"copy-{number:03d}.tar")
    shutil.copytree(tars, tmp_path / "undisturbed")
    index(tmp_path / "undisturbed")
    (tars / ".tmp").mkdir()
    (tars / ".tmp/left-by-an-earlier-one").write_bytes(b"half")
    process = start("index", tars)
    wait_until(lambda: list(tars.glob("*.index")) or process.poll() is not None, "the first index file")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    if not (tars / "manifest.json").exists():  # else it was done before it could be killed
        assert "no manifest.json" in wds_tools("verify", tars, status=1).stderr
    wds_tools("index", tars)
    assert tree(tars) == tree(tmp_path / "undisturbed")


# ---- What is refused ----


def test_a_folder_without_tars_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no tars here")
    said = wds_tools("index", tmp_path, status=1)
    assert last_line(said.stderr).endswith("has no manifest.json and no .tar files: give the folder of a dataset, or of tars")


@pytest.mark.parametrize(("suffix", "tool"), [(".tar.gz", "gunzip"), (".tgz", "gunzip -S .tgz"), (".tar.zst", "unzstd")])
def test_compressed_tars_are_refused_with_what_unpacks_them(tars: Path, suffix: str, tool: str) -> None:
    (tars / f"more{suffix}").write_bytes(b"x")
    with pytest.raises(UsageError, match=rf"more\{suffix} is compressed, .* unpack it .* with `{tool}`"):
        index(tars)
    assert not list(tars.rglob("*.index"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x1f\x8b gzip under another name" * 50, "this is gzip: unpack it first"),
        (b"<html>404</html>" * 50, "this looks like an HTML or XML page"),
        (b"", "without the end-of-archive blocks"),
        (b"CUT", "it was cut off"),
    ],
)
def test_a_damaged_tar_is_named_and_there_is_no_manifest(tars: Path, content: bytes, message: str) -> None:
    whole = (tars / "00001.tar").read_bytes()
    (tars / "00001.tar").write_bytes(whole[:4000] if content == b"CUT" else content)
    said = wds_tools("index", tars, status=1)
    assert f"{tars}/00001.tar: " in last_line(said.stderr)
    assert message in last_line(said.stderr)
    assert not (tars / "manifest.json").exists()


def test_an_unfinished_dataset_of_this_project_is_not_blessed(tmp_path: Path) -> None:
    make_dataset(tmp_path, [text_sample(1)])
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "_work").mkdir()
    (tmp_path / "_work/plan.json").write_text("{}")
    with pytest.raises(UsageError, match="holds an unfinished dataset: repeat the command that began it, with --resume"):
        index(tmp_path)


def test_somebody_elses_manifest_is_left_alone(tars: Path) -> None:
    (tars / "manifest.json").write_text('{"format": "theirs"}')
    said = wds_tools("index", tars, status=1)
    assert "format is 'theirs', expected 'wds-tools'" in last_line(said.stderr)
    assert (tars / "manifest.json").read_text() == '{"format": "theirs"}'


def test_a_name_that_a_manifest_cannot_hold_is_refused_before_any_work(tars: Path) -> None:
    (tars / "00001.tar").rename(tars / "a\\b.tar")
    with pytest.raises(UsageError, match=r"the name 'a\\\\b.tar' can't be written down in a manifest: rename the file"):
        index(tars)
    assert not list(tars.rglob("*.index"))


def test_a_folder_that_may_not_be_written_says_that_the_index_lies_beside_the_tars(tars: Path) -> None:
    if os.getuid() == 0:
        (tars / ".tmp").write_bytes(b"")  # root may write anywhere, but not into a file as if it were a folder
    tars.chmod(0o500)
    with pytest.raises(StorageError, match="an index lies beside its tar: index a copy of the tars where you may write"):
        index(tars)
    tars.chmod(0o700)


def test_a_worker_that_was_killed_is_one_line_that_fits_this_command(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object, **__: object) -> None:
        raise WorkerDied("use --resume")

    monkeypatch.setattr(index_module, "run_tasks", killed)
    with pytest.raises(WorkerDied, match="Each holds a whole shard: run again, with fewer --workers"):
        index(tars)


def test_ctrl_c_says_to_run_the_same_command_again(
    tars: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pressed(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_index, "run", pressed)
    assert main(["index", str(tars)]) == 130
    assert capsys.readouterr().err == "wds-tools: interrupted; run the same command again\n"


@pytest.mark.parametrize("name", ["__key__", "__url__", "__source__", "__local_path__"])
@pytest.mark.parametrize("long", [False, True])
def test_a_member_cannot_replace_what_a_sample_says_of_itself(tmp_path: Path, name: str, long: bool) -> None:
    """In any reader, and by an index that another program wrote: a long name makes the tar one that is read member by member."""
    key = "k" * (120 if long else 1)
    write_tarfile(tmp_path / "a.tar", {f"{key}.txt": b"1", f"{key}.{name}": b"forged"})
    with pytest.raises(FormatError, match=rf"a\.tar, byte \d+: .*would replace the sample's own {name}"):
        list(TarDataset(str(tmp_path)))
    with pytest.raises(FormatError, match=rf"a\.tar, byte \d+: .*would replace the sample's own {name}"):
        index(tmp_path)
    write_tarfile(tmp_path / "a.tar", {f"{key}.txt": b"1", f"{key}.forged": b"forged"})
    index(tmp_path)
    path = tmp_path / "a.tar.index"
    path.write_bytes(serialize_index(replace(parse_index(path.read_bytes()), members=("txt", name))))
    with pytest.raises(FormatError, match=f"a.tar.index: its member {name} would replace"):
        list(ShardDataset(str(tmp_path)))
    with pytest.raises(FormatError, match=f"a.tar.index: its member {name} would replace"):
        next(iter(build_loader(LoaderConfig(sources=(Source(str(tmp_path)),), batch_size=1), World())))


# ---- What may be done with it ----


@pytest.mark.parametrize(
    "args",
    [
        ["encode", "--input", "TARS", "--output", "OUT", "--device", "cpu"],
        ["export", "hf", "--input", "TARS", "--output", "OUT"],
    ],
)
def test_a_command_that_needs_the_schema_refuses_a_set_of_any_members_in_one_line(
    tars: Path, tmp_path: Path, args: list[str]
) -> None:
    index(tars)
    names = {"TARS": str(tars), "OUT": str(tmp_path / "out")}
    said = wds_tools(*(names.get(word, word) for word in args), status=2)
    (line,) = said.stderr.splitlines()
    assert line == (
        f"wds-tools: {tars} is indexed WebDataset data of any members (jpg, txt, cls): not in this project's schema; "
        "loaders can stream it, this command can't"
    )


@pytest.mark.parametrize("flags", [[], ["--overwrite"], ["--resume"]])
def test_no_pass_writes_among_tars_that_were_indexed(tars: Path, tmp_path: Path, flags: list[str]) -> None:
    index(tars)
    before = tree(tars)
    source = write_documents(tmp_path / "in.jsonl.zst", [{"text": "a"}])
    said = wds_tools("convert", "documents", "--input", source, "--output", tars, *flags, status=2)
    assert "holds tars that were indexed where they lay, not made here: choose another output" in last_line(said.stderr)
    assert tree(tars) == before


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda tars: change_byte(tars / "00000.tar", 700), "00000.tar"),
        (lambda tars: (tars / "00000.tar").unlink(), "00000.tar"),
        (lambda tars: (tars / "00000.tar.index").write_bytes(b""), "00000.tar.index: not an index"),
        (lambda tars: shutil.copy(tars / "00001.tar.index", tars / "00000.tar.index"), "00000.tar.index: the index is stale"),
        (lambda tars: shutil.copy(tars / "00001.tar", tars / "new.tar"), "new.tar: not in the manifest"),
    ],
)
def test_verify_finds_what_is_wrong_with_indexed_tars(tars: Path, harm: Callable[[Path], object], message: str) -> None:
    index(tars)
    harm(tars)
    assert message in "\n".join(problems(tars))
    assert wds_tools("verify", tars, status=1).stdout.count("WRONG") == len(problems(tars))


def change_byte(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.slow
def test_indexing_on_s3_gives_what_it_gives_on_a_disk(tars: Path, s3: S3Server) -> None:
    store = open_store(f"s3://{s3.bucket}/index-tars-{os.getpid()}")
    for name, data in tree(tars).items():
        if data is not None:
            store.put(name, data)
    said = wds_tools("index", store.url, "--workers", "2", "--quiet")
    assert said.stdout.startswith(f"index: indexed 3 tars of {store.url}: 30 samples, ")
    index(tars)
    assert {entry.name: store.read(entry.name) for entry in store.list()} == {
        n: d for n, d in tree(tars).items() if d is not None
    }
    assert "verify: all is well" in wds_tools("verify", store.url).stdout


# ---- Reading a shard whole ----


@pytest.mark.parametrize("likely_bytes", [0, 10, 3000, 1 << 20, 1 << 52])
def test_a_shard_is_read_whole_whatever_was_thought_of_its_size(tmp_path: Path, likely_bytes: int) -> None:
    shards = ShardBytes()
    for size in (3000, 0, 10_000, 1):
        data = os.urandom(size)
        (tmp_path / "a.tar").write_bytes(data)
        tar, xxh128 = shards.read(open_store(str(tmp_path)), "a.tar", likely_bytes)
        assert (bytes(tar), xxh128) == (data, content_hash(data).hexdigest())
    with pytest.raises(NotFound):
        shards.read(open_store(str(tmp_path)), "b.tar", likely_bytes)
