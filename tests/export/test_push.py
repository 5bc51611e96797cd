"""Dataset cards, and exports pushed to the Hub: against a stand-in on loopback, since the real one can't be had here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
import yaml
from commands import environment, last_line, wds_tools
from factory import CODEBOOK_SIZE, image_sample, make_dataset, text_sample
from hub import TOKEN, Hub, serve_hub

from wds_tools.errors import UsageError
from wds_tools.export.hf import export_hf
from wds_tools.export.options import ExportConfig
from wds_tools.export.output import FILES

CODES = {"vqcode_512": {"tokenizer": "tiny", "codebook_size": CODEBOOK_SIZE, "stride": 16, "precision": "fp32"}}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    samples = [*map(image_sample, range(30)), *map(text_sample, range(10))]
    make_dataset(folder, samples, codes=CODES)
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_hub() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")  # its storage protocol is beyond the stand-in
        yield served


def export(source: Path, output: Path, **settings: Any) -> None:
    export_hf(
        ExportConfig(input=(str(source),), output=str(output), num_shards=6, quiet=True, **{"format": "parquet", **settings})
    )


def command(source: Path, output: Path) -> list[str]:
    where = ["--input", str(source), "--output", str(output), "--format", "parquet", "--num-shards", "6"]
    return ["export", "hf", *where, "--push-to-hub", "me/set", "--quiet"]


def files(output: Path) -> dict[str, bytes]:
    """What is to be pushed: all but the export's list of its own files."""
    found = {path.relative_to(output).as_posix(): path.read_bytes() for path in output.rglob("*") if path.is_file()}
    del found[FILES]
    return found


# ---- The card ----


def test_a_card_says_what_is_in_it_where_it_comes_from_and_how_to_load_it(source: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "out", license="cc-by-4.0")
    text = (tmp_path / "out/README.md").read_text()
    _, header, page = text.split("---\n", 2)
    fields = yaml.safe_load(header)
    assert fields["license"] == "cc-by-4.0"
    assert fields["size_categories"] == ["n<1K"]
    num_bytes = 0
    for path in (tmp_path / "out/data").iterdir():
        rows = pq.read_table(path).to_pylist()
        num_bytes += sum(len(value.encode()) for row in rows for value in row.values() if isinstance(value, str))
        num_bytes += (6 * 4 + 8) * len(rows)  # offsets of six columns of strings, and one of numbers
    assert fields["dataset_info"]["splits"] == [{"name": "train", "num_bytes": num_bytes, "num_examples": 40}]
    assert [feature["name"] for feature in fields["dataset_info"]["features"]][:3] == ["data_type", "text", "length"]
    assert "40 rows in 6 files, shuffled with seed 42: 30 image_text, 10 text_pretrain." in page
    assert "- 40 samples (30 image_text, 10 text_pretrain) of `test`, sha256:" in page
    assert "`vqcode_512`: tokenizer tiny, 8,192 codes, stride 16, fp32" in page


def test_a_folder_with_its_card_loads_as_the_hub_would_load_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(datasets.info.logger, "warning", said.append)
    export(source, tmp_path / "out")
    (tmp_path / "out/data/notes.txt").write_text("not matched by the card's pattern")
    rows = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.num_rows == 40
    assert rows.features["length"] == datasets.Value("int64")
    assert said == []


def test_the_card_lets_the_reader_find_that_a_file_is_missing(source: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "out")
    next((tmp_path / "out/data").iterdir()).unlink()
    with pytest.raises(datasets.exceptions.NonMatchingSplitsSizesError):
        datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))


def test_load_from_disk_does_not_mind_the_card(source: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "out", format="arrow")
    assert "load_from_disk" in (tmp_path / "out/README.md").read_text()
    assert len(datasets.load_from_disk(str(tmp_path / "out"))) == 40


def test_somebody_elses_readme_is_not_taken_for_ours(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/README.md").write_text("my notes")
    with pytest.raises(UsageError, match=r"files that no export writes, such as README\.md"):
        export(source, tmp_path / "out", overwrite=True)


# ---- Going on ----


def test_a_finished_export_is_kept_by_resume_and_another_is_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for file_format in ("arrow", "parquet"):
        export(source, out / file_format, format=file_format, resume=True)
        before = {path: path.stat().st_mtime_ns for path in (out / file_format).rglob("*")}
        export(source, out / file_format, format=file_format, resume=True)
        assert {path: path.stat().st_mtime_ns for path in (out / file_format).rglob("*")} == before
        with pytest.raises(UsageError, match="holds another export, or one of other data"):
            export(source, out / file_format, format=file_format, seed=43, resume=True)
        (out / file_format / "README.md").unlink()
        with pytest.raises(UsageError, match="holds another export, or one of other data"):
            export(source, out / file_format, format=file_format, resume=True)


KILLED = """
import os, signal, sys
from wds_tools.export import output
from wds_tools.export.hf import export_hf
from wds_tools.export.options import ExportConfig

write = output.write_part

def write_or_die(*part):
    if "die" in sys.argv:
        os.kill(os.getpid(), signal.SIGKILL)
    sys.argv.append("die")
    return write(*part)

output.write_part = write_or_die
export_hf(ExportConfig(input=(sys.argv[1],), output=sys.argv[2], format=sys.argv[3], num_shards=6, quiet=True))
"""


@pytest.mark.parametrize("file_format", ["arrow", "parquet"])
def test_a_killed_export_is_made_anew_by_resume(source: Path, tmp_path: Path, file_format: str) -> None:
    out = tmp_path / "out"
    ended = subprocess.run([sys.executable, "-c", KILLED, source, out, file_format], env=environment(), check=False)
    assert ended.returncode == -9
    export(source, out, format=file_format, resume=True)
    export(source, tmp_path / "undisturbed", format=file_format)
    assert files(out) == files(tmp_path / "undisturbed")


# ---- The Hub ----


@pytest.mark.slow
def test_a_push_makes_the_repository_what_the_folder_is_and_the_card_comes_last(hub: Hub, source: Path, tmp_path: Path) -> None:
    said = wds_tools(*command(source, tmp_path / "out"), "--private")
    assert hub.files == files(tmp_path / "out")
    assert hub.created[0]["name"] == "set"
    assert hub.created[0]["type"] == "dataset"
    assert hub.created[0].get("private") or hub.created[0].get("visibility") == "private"
    assert hub.commits[-1] == ["README.md"]
    assert "pushed     7 files to hf://datasets/me/set" in said.stdout
    again = wds_tools(*command(source, tmp_path / "out"), "--resume")
    assert "pushed     0 files" in again.stdout
    assert len(hub.uploads) == 6


PUSH = """
import sys
from pathlib import Path
from wds_tools.export import push

push.COMMIT_FILES = 2
print(push.push(Path(sys.argv[1]), "me/set"))
"""


def push(out: Path) -> subprocess.CompletedProcess[str]:
    """With two files a commit, in a process of its own: Hugging Face's library looks at the environment when it is imported."""
    return subprocess.run([sys.executable, "-c", PUSH, out], env=environment(), capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_push_that_broke_off_goes_on_with_what_is_missing(hub: Hub, source: Path, tmp_path: Path) -> None:
    hub.refuse_after = 5
    out = tmp_path / "out"
    export(source, out)
    said = last_line(push(out).stderr)
    assert "hf://datasets/me/set: can't be pushed to, after 4 files that stay there: " in said
    assert said.endswith("run again with --resume")
    assert len(hub.files) == 4
    assert "README.md" not in hub.files
    hub.refuse_after = None
    assert push(out).stdout == "3\n"
    assert hub.files == files(out)
    assert len(hub.uploads) == len(set(hub.uploads)) == 6, "the file that had been sent, but not committed, was sent again"


@pytest.mark.slow
def test_parts_of_an_earlier_export_go_and_other_files_stay(hub: Hub, source: Path, tmp_path: Path) -> None:
    hub.files = {"data/train-00000-of-00001.parquet": b"PAR1 old", "data/mine.csv": b"1", "README.md": b"an old card"}
    wds_tools(*command(source, tmp_path / "out"))
    assert hub.files == {**files(tmp_path / "out"), "data/mine.csv": b"1"}


@pytest.mark.slow
def test_a_wrong_token_or_no_hub_is_one_line(hub: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    said = wds_tools(*command(source, tmp_path / "out"), status=1)
    assert "can't be pushed to, after 0 files" in last_line(said.stderr)
    assert "check the token" in last_line(said.stderr)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    said = wds_tools(*command(source, tmp_path / "out"), "--resume", status=1)
    assert "can't be pushed to, after 0 files" in last_line(said.stderr)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"push_to_hub": "me/set", "format": "arrow"}, "--format parquet, and a local --output"),
        ({"push_to_hub": "me/set", "output": "s3://bucket/out"}, "--format parquet, and a local --output"),
        ({"push_to_hub": "set"}, "expected OWNER/NAME"),
        ({"private": True}, "--private is for the repository of --push-to-hub"),
        ({"resume": True, "overwrite": True}, "exclude each other"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ExportConfig(**{"input": ("a",), "output": "b", "format": "parquet", **settings})
