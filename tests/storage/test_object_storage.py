"""The whole way on a real S3 server: inputs, images, datasets and resumption on s3:// give the bytes of a local run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from commands import (
    image_bytes,
    read_samples,
    session,
    start,
    tree,
    wait_until,
    wds_tools,
    write_documents,
    write_jsonl,
    write_pairs,
)
from s3 import S3Server

from wds_tools.check.verify import VerifyConfig, verify
from wds_tools.storage import Store, open_store


@pytest.fixture
def bucket(s3: S3Server, request: pytest.FixtureRequest) -> str:
    """A prefix of this test's own."""
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)
    return f"s3://{s3.bucket}/{name}-{os.getpid()}"


def upload(folder: Path, url: str) -> str:
    """Put a folder's files under a prefix."""
    store = open_store(url)
    for name, data in tree(folder).items():
        if data is not None:
            store.put(name, data)
    return url


def files(url: str | Path) -> dict[str, bytes]:
    """A dataset's files, but for the manifest, which names its inputs."""
    store: Store = open_store(str(url))
    return {entry.name: store.read(entry.name) for entry in store.list() if entry.name != "manifest.json"}


def facts(url: str | Path) -> tuple[object, ...]:
    """What the manifest says of the shards; fails if the set is not whole."""
    result = verify(VerifyConfig(input=str(url), quiet=True))
    assert result.problems == ()
    manifest = result.manifest
    return manifest.shards, manifest.inputs, manifest.rejects, manifest.codes, manifest.fingerprint()


def without_rejects(found: dict[str, bytes]) -> dict[str, bytes]:
    """Rejects name their source, which lies elsewhere."""
    return {name: data for name, data in found.items() if not name.startswith("rejects/")}


@pytest.mark.slow
def test_pairs_codes_and_the_loader_on_s3_are_those_of_a_local_run(bucket: str, tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "in", 12)
    (tmp_path / "in/images/3.jpg").write_bytes(image_bytes(3, 300, 200)[:1500])
    write_jsonl(path, [*path.read_bytes().splitlines(), {"image_path": "images/none.jpg", "text": "x"}, b"broken"])
    upload(tmp_path / "in", f"{bucket}/in")
    for where, source in ((str(tmp_path), str(path)), (bucket, f"{bucket}/in/pairs.jsonl")):
        flags = ["--max-rejects", "50%", "--workers", "2"]
        wds_tools("convert", "pairs", "--input", source, "--output", f"{where}/raw", "--task-lines", "5", *flags)
        flags = ["--shard-samples", "4", "--device", "cpu", "--max-rejects", "1"]
        wds_tools("encode", "--input", f"{where}/raw", "--output", f"{where}/codes", *flags)
    assert facts(f"{bucket}/raw") == facts(tmp_path / "raw")
    assert facts(f"{bucket}/codes") == facts(tmp_path / "codes")
    assert files(f"{bucket}/codes") == files(tmp_path / "codes")
    assert without_rejects(files(f"{bucket}/raw")) == without_rejects(files(tmp_path / "raw"))
    assert not [entry for entry in open_store(f"{bucket}/codes").list() if entry.name.startswith(("_work", ".tmp"))]
    streamed = pytest.importorskip("loaders.shards").ShardDataset(f"{bucket}/codes", shuffle=True, check_crc=True)
    seen = {record["__key__"]: record["codes"].tolist() for record in streamed}
    assert seen == {sample.key: sample.codes["vqcode_512"].tolist() for sample in read_samples(tmp_path / "codes")}
    assert "verify: all is well" in wds_tools("verify", f"{bucket}/codes", "--workers", "2").stdout


@pytest.mark.slow
def test_documents_on_s3_are_those_of_a_local_run_and_an_index_comes_back(bucket: str, tmp_path: Path) -> None:
    for file in range(4):
        write_documents(tmp_path / f"in/sub/{file}.jsonl.zst", ({"text": f"{file} {i}"} for i in range(30)))
    broken = tmp_path / "in/sub/3.jsonl.zst"
    broken.write_bytes(broken.read_bytes()[:-5])
    upload(tmp_path / "in", f"{bucket}/in")
    for where in (str(tmp_path), bucket):
        flags = ["--task-bytes", "1", "--workers", "2", "--shard-samples", "20"]
        wds_tools("convert", "documents", "--input", f"{where}/in", "--output", f"{where}/out", *flags)
    assert facts(f"{bucket}/out") == facts(tmp_path / "out")
    found = files(f"{bucket}/out")
    assert without_rejects(found) == without_rejects(files(tmp_path / "out"))
    store = open_store(f"{bucket}/out")
    name = "shard-000001-0001.tar.index"
    store.delete(name)
    wds_tools("verify", f"{bucket}/out", status=1)
    wds_tools("index", f"{bucket}/out")
    assert store.read(name) == found[name]


@pytest.mark.slow
def test_a_run_killed_on_s3_resumes_to_the_same_bytes(bucket: str, tmp_path: Path) -> None:
    for file in range(30):
        write_documents(tmp_path / f"in/{file:03d}.jsonl.zst", ({"text": f"{file} {i}"} for i in range(20)))
    args = ["convert", "documents", "--input", str(tmp_path / "in"), "--task-bytes", "1", "--shard-samples", "8"]
    wds_tools(*args, "--output", tmp_path / "peace")
    output = open_store(f"{bucket}/out")
    process = start(*args, "--output", f"{bucket}/out", "--workers", "2")
    wait_until(lambda: len(list(output.list("_work/task-"))) >= 3 or process.poll() is not None, "tasks get done")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    wait_until(lambda: not session(process.pid), "the workers are gone")
    wds_tools(*args, "--output", f"{bucket}/out", status=2)
    wds_tools(*args, "--output", f"{bucket}/out", "--resume")
    assert files(f"{bucket}/out") == files(tmp_path / "peace")
    assert output.read("manifest.json") == (tmp_path / "peace/manifest.json").read_bytes()


@pytest.mark.slow
def test_overwrite_on_s3_removes_only_its_own_files_and_not_a_neighbours(bucket: str, tmp_path: Path) -> None:
    path = write_documents(tmp_path / "a.jsonl.zst", ({"text": str(i)} for i in range(9)))
    args = ["convert", "documents", "--input", str(path), "--output", f"{bucket}/out"]
    wds_tools(*args[:-1], f"{bucket}/out-2")
    neighbour = files(f"{bucket}/out-2")
    wds_tools(*args, "--shard-samples", "1")
    wds_tools(*args, status=2)
    open_store(f"{bucket}/out").put("notes.txt", b"mine")
    wds_tools(*args, "--overwrite")
    shard = "shard-000000-0000.tar"
    assert sorted(files(f"{bucket}/out")) == ["notes.txt", "offsets.safetensors", shard, f"{shard}.index"]
    assert files(f"{bucket}/out-2") == neighbour


@pytest.mark.parametrize("path", ["../secret.jpg", "/images/0.jpg", "s3://other/a.jpg", "https://host/a.jpg", "x" * 3000])
def test_a_jsonl_on_s3_reads_images_below_its_folder_only(bucket: str, tmp_path: Path, path: str) -> None:
    store = open_store(bucket)
    store.put("secret.jpg", image_bytes(0))
    write_jsonl(tmp_path / "a.jsonl", [{"image_path": path, "text": "x"}])
    store.put("in/a.jsonl", (tmp_path / "a.jsonl").read_bytes())
    args = ["convert", "pairs", "--input", f"{bucket}/in/a.jsonl", "--output", tmp_path / "out", "--max-rejects", "1"]
    said = wds_tools(*args).stdout
    assert ("1 missing_image" if path.startswith("x") else "1 outside_root") in said


@pytest.mark.slow
def test_images_may_lie_on_s3_while_the_jsonl_is_here(bucket: str, tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "in", 3)
    upload(tmp_path / "in/images", f"{bucket}/images")
    write_jsonl(
        path, [{"image_path": f"{prefix}{i}.jpg", "text": "x"} for i, prefix in enumerate(["", "./", f"{bucket}/images/"])]
    )
    wds_tools("convert", "pairs", "--input", path, "--image-root", f"{bucket}/images", "--output", tmp_path / "out")
    assert [sample.image for sample in read_samples(tmp_path / "out")] == [image_bytes(i) for i in range(3)]


@pytest.mark.slow
def test_an_export_from_s3_holds_what_a_local_one_holds(bucket: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    path = write_documents(tmp_path / "a.jsonl.zst", ({"text": f"document {i}"} for i in range(25)))
    rows = []
    for where in (bucket, str(tmp_path)):
        wds_tools("convert", "documents", "--input", path, "--output", f"{where}/set")
        wds_tools("export", "hf", "--input", f"{where}/set", "--output", tmp_path / f"hf-{len(rows)}", "--num-shards", "2")
        rows.append(datasets.load_from_disk(str(tmp_path / f"hf-{len(rows)}")).to_list())
    assert rows[0] == rows[1]
    assert len(rows[0]) == 25


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_one_line(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WDS_TOOLS_RETRY_S", "1")
    said = wds_tools("verify", f"s3://{s3.bucket}/set", status=1)
    (line,) = said.stderr.splitlines()
    assert line.startswith("wds-tools: s3://")


def test_a_file_on_a_web_server_that_does_not_answer_is_said_to_be_just_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WDS_TOOLS_RETRY_S", "0")
    said = wds_tools("convert", "pairs", "--input", "http://127.0.0.1:9/a.jsonl", "--output", "out", status=1)
    assert "http://127.0.0.1:9/a.jsonl: can't look at, no answer" in said.stderr
