"""Other people's tools on our shards, and ours on their tars: each the real library, at the version that is installed."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import webdataset as wds
from commands import image_bytes, wds_tools
from energon import energon, prepare
from factory import CODEBOOK_SIZE, image_sample, make_dataset, multi_sample, talk_sample, text_sample

from loaders import LoaderConfig, ShardDataset, Source, TarDataset, build_loader
from wds_tools.export.hf import export_hf
from wds_tools.export.options import ExportConfig
from wds_tools.format.schema import Sample

NUM_SAMPLES = 30
PROVENANCE = {"tokenizer": "tiny", "codebook_size": CODEBOOK_SIZE, "precision": "fp32"}


def samples() -> list[Sample]:
    return [image_sample(number, side=8) for number in range(NUM_SAMPLES)]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoded dataset of four shards."""
    folder = tmp_path_factory.mktemp("interop") / "pairs"
    make_dataset(folder, samples(), shard_samples=8, codes={"vqcode_512": PROVENANCE})
    return folder


def tars(folder: Path) -> list[str]:
    return sorted(map(str, folder.rglob("*.tar")))


def load(paths: list[str], folder: Path, streaming: bool) -> list[dict[str, Any]]:
    """What Hugging Face's reader makes of tars."""
    cache = str(folder / "cache")
    return list(datasets.load_dataset("webdataset", data_files=paths, split="train", streaming=streaming, cache_dir=cache))


def check(found: list[dict[str, Any]], expected: list[Sample] | None = None) -> None:
    """That decoded samples are the ones that were written, in any order."""
    expected = samples() if expected is None else expected
    assert sorted(sample["__key__"] for sample in found) == [sample.key for sample in expected]
    for sample, ours in zip(sorted(found, key=lambda sample: sample["__key__"]), expected, strict=True):
        assert sample["json"]["data_type"] == ours.data_type
        assert sample["json"]["text"] == ours.text
        for column, grid_hw in ours.codes.items():
            np.testing.assert_array_equal(np.asarray(sample[f"{column}.npy"]), grid_hw)


# ---- Our shards, read by others ----


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_decodes_every_sample(pairs: Path) -> None:
    found = list(wds.WebDataset(tars(pairs), shardshuffle=False).decode())
    gc.collect()  # it leaves its files open
    check(found)


@pytest.mark.parametrize("streaming", [True, False])
def test_load_dataset_reads_every_sample(pairs: Path, tmp_path: Path, streaming: bool) -> None:
    check(load(tars(pairs), tmp_path, streaming))


@pytest.mark.parametrize("make", [text_sample, multi_sample])
def test_load_dataset_reads_documents_and_wide_images_too(make: Any, tmp_path: Path) -> None:
    expected = [make(number) for number in range(NUM_SAMPLES)]
    make_dataset(tmp_path / "set", expected, shard_samples=8)
    check(load(tars(tmp_path / "set"), tmp_path, streaming=True), expected)


def test_python_and_gnu_tar_list_and_unpack_the_same_plain_files(pairs: Path, tmp_path: Path) -> None:
    names: list[str] = []
    for number, path in enumerate(tars(pairs)):
        for tool in ("tar", "python"):
            (tmp_path / f"{tool}-{number}").mkdir()
        subprocess.run(["tar", "-xf", path, "-C", tmp_path / f"tar-{number}"], check=True)
        with tarfile.open(path) as archive:
            archive.extractall(tmp_path / f"python-{number}", filter="data")
            assert {member.mode for member in archive} == {0o644}
            names += archive.getnames()
        listed = subprocess.run(["tar", "-tf", path], check=True, capture_output=True, text=True)
        assert listed.stderr == ""
        assert listed.stdout.split() == names[-len(listed.stdout.split()) :]
        for file in (tmp_path / f"tar-{number}").iterdir():
            assert file.read_bytes() == (tmp_path / f"python-{number}" / file.name).read_bytes()
    assert names == [name for sample in samples() for name in (f"{sample.key}.json", f"{sample.key}.vqcode_512.npy")]
    first = samples()[0]
    np.testing.assert_array_equal(np.load(tmp_path / f"tar-0/{first.key}.vqcode_512.npy"), first.codes["vqcode_512"])
    assert json.loads((tmp_path / f"tar-0/{first.key}.json").read_text())["text"] == first.text


# Sets with images of several formats, and several kinds of samples in one list: who reads them, and who does not


def mixed(*kinds: str) -> list[Sample]:
    """Samples with source images of these formats in turn."""
    made = [image_sample(number)._replace(codes={}) for number in range(12)]
    formats = [kinds[number % len(kinds)] for number in range(12)]
    images = [image_bytes(number, kind={"jpg": "JPEG", "png": "PNG"}[kind]) for number, kind in enumerate(formats)]
    return [sample._replace(image=data, image_extension=kind) for sample, data, kind in zip(made, images, formats, strict=True)]


@pytest.fixture(scope="module")
def jpeg_and_png(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interop") / "mixed"
    make_dataset(folder, mixed("jpg", "png"), shard_samples=6)
    return folder


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_and_tar_read_images_of_several_formats(jpeg_and_png: Path, tmp_path: Path) -> None:
    found = {sample["__key__"]: sample for sample in wds.WebDataset(tars(jpeg_and_png), shardshuffle=False)}
    gc.collect()
    for path in tars(jpeg_and_png):
        subprocess.run(["tar", "-xf", path, "-C", tmp_path], check=True)
    for sample in mixed("jpg", "png"):
        assert found[sample.key][str(sample.image_extension)] == sample.image
        assert (tmp_path / f"{sample.key}.{sample.image_extension}").read_bytes() == sample.image


@pytest.mark.parametrize("streaming", [True, False])
def test_load_dataset_refuses_a_set_whose_first_images_are_of_several_formats(
    jpeg_and_png: Path, tmp_path: Path, streaming: bool
) -> None:
    with pytest.raises(ValueError, match="don't share the same prefix or the same types"):
        load(tars(jpeg_and_png), tmp_path, streaming)


def test_load_dataset_shows_no_image_of_a_format_that_first_comes_later(tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", mixed(*["jpg"] * 8, *["png"] * 4))
    found = load(tars(tmp_path / "set"), tmp_path, streaming=True)
    assert [row["jpg"] is not None for row in found] == [True] * 8 + [False] * 4
    assert "png" not in found[-1]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents, pairs, and wide pairs, each a dataset."""
    folder = tmp_path_factory.mktemp("interop")
    for name, make in (("text", text_sample), ("pairs", image_sample), ("wide", multi_sample)):
        make_dataset(folder / name, map(make, range(6)))
    return folder


@pytest.mark.parametrize("streaming", [True, False])
def test_load_dataset_takes_its_columns_from_the_first_kind_of_a_list(kinds: Path, tmp_path: Path, streaming: bool) -> None:
    found = load([*tars(kinds / "text"), *tars(kinds / "pairs")], tmp_path, streaming)
    assert len(found) == 12
    assert not any("vqcode_512.npy" in row for row in found)  # the codes of all pairs are lost


def test_load_dataset_can_not_cast_square_and_wide_images_in_one_list(kinds: Path, tmp_path: Path) -> None:
    with pytest.raises(datasets.exceptions.DatasetGenerationError) as caught:
        load([*tars(kinds / "pairs"), *tars(kinds / "wide")], tmp_path, streaming=False)
    assert "Couldn't cast" in str(caught.value.__cause__)


def test_load_dataset_reads_conversations_that_begin_without_images_only_as_a_stream(tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", [talk_sample(number, *[(2, 2)] * (number > 5)) for number in range(9)])
    assert len(load(tars(tmp_path / "set"), tmp_path, streaming=True)) == 9
    with pytest.raises(datasets.exceptions.DatasetGenerationError) as caught:
        load(tars(tmp_path / "set"), tmp_path, streaming=False)
    assert "Couldn't cast" in str(caught.value.__cause__)


def test_an_export_of_several_kinds_loses_nothing(kinds: Path, tmp_path: Path) -> None:
    inputs = tuple(str(kinds / name) for name in ("text", "pairs", "wide"))
    export_hf(ExportConfig(input=inputs, output=str(tmp_path / "out"), format="parquet", num_shards=2, quiet=True))
    rows = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    found = {row["text"]: row for row in rows}
    for number in range(6):
        assert found[f"document {number}"]["vqcode_512"] == "no"
        for sample in (image_sample(number), multi_sample(number)):
            ((column, grid_hw),) = sample.codes.items()
            assert json.loads(found[sample.text][column]) == grid_hw.ravel().tolist()


RAY = """
import json, sys
import ray
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
pairs, mixed = map(json.loads, sys.argv[1:])
rows = ray.data.read_webdataset(pairs).take_all()
try:
    ray.data.read_webdataset(mixed).take_all()
    fails = ""
except Exception as error:
    fails = str(error)
plain = ray.data.read_webdataset(mixed, decoder=None).take_all()
print("\\n|" + json.dumps({
    "pairs": [{**row, "vqcode_512.npy": row["vqcode_512.npy"].tolist()} for row in rows],
    "fails": fails,
    "mixed": {row["__key__"]: {k: row[k].hex() for k in ("jpg", "png") if isinstance(row[k], bytes)} for row in plain},
}))
"""


@pytest.mark.slow
def test_ray_data_reads_every_sample_undecoded_where_images_are_of_several_formats(
    pairs: Path, jpeg_and_png: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="pip install 'ray[data]'")
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "HOME": str(tmp_path)}
    paths = [json.dumps(tars(pairs)), json.dumps(tars(jpeg_and_png))]
    done = subprocess.run([sys.executable, "-c", RAY, *paths], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.rpartition("\n|")[2])
    check(found["pairs"])
    assert "unsupported element of type <class 'float'>" in found["fails"]
    assert found["mixed"] == {sample.key: {sample.image_extension: (sample.image or b"").hex()} for sample in mixed("jpg", "png")}


ENERGON = """
import json, sys
from megatron.energon import Cooker, DefaultTaskEncoder, WorkerConfig, edataclass, get_loader, get_train_dataset, stateless
from megatron.energon.flavors import Sample
from megatron.energon.task_encoder.cooking import basic_sample_keys

@edataclass
class Pair(Sample):
    json: dict
    codes: object

@stateless
def cook(crude):
    return Pair(**basic_sample_keys(crude), json=crude["json"], codes=crude["vqcode_512.npy"])

class Encoder(DefaultTaskEncoder):
    cookers = [Cooker(cook)]

    @stateless
    def batch(self, samples):
        return samples

workers = WorkerConfig(rank=0, world_size=1, num_workers=0)
settings = {"shuffle_buffer_size": 10, "max_samples_per_sequence": 100, "worker_config": workers, "repeat": False}
dataset = get_train_dataset(sys.argv[1], batch_size=4, task_encoder=Encoder(), **settings)
for batch in get_loader(dataset):
    for pair in batch:
        print(json.dumps({"__key__": pair.__key__, "json": pair.json, "vqcode_512.npy": pair.codes.tolist()}))
"""


@pytest.mark.slow
def test_megatron_energon_prepares_and_loads_and_what_was_there_still_works(tmp_path: Path) -> None:
    pytest.importorskip("megatron.energon", reason="pip install megatron-energon")
    folder = tmp_path / "pairs"
    make_dataset(folder, samples(), shard_samples=8, codes={"vqcode_512": PROVENANCE})
    prepare(folder)
    assert "verify: all is well" in wds_tools("verify", folder).stdout
    assert len(list(ShardDataset(str(folder)))) == NUM_SAMPLES
    wds_tools("index", folder)
    found = [json.loads(line) for line in energon("-c", ENERGON, folder).splitlines() if line.startswith("{")]
    for sample in found:
        sample["__key__"] = sample["__key__"].rpartition("/")[2]  # it puts the shard's name before the key
    check(found)


# ---- Third-party tars, read by us ----


def write_files(folder: Path, count: int = 12) -> Path:
    """Pictures (of a kind) and captions, with a key in folders that is longer than a ustar header holds."""
    for number in range(count):
        path = folder / ("a-long-name-" * 9) / ("b" * 120) / f"{number:04d}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".txt").write_text(f"caption {number}: ü")
        path.with_suffix(".jpg").write_bytes(os.urandom(700 * number + 1))
    return folder


def webdataset_reads(folder: Path) -> Iterator[tuple[str, str, bytes]]:
    for sample in wds.WebDataset(tars(folder), shardshuffle=False):
        yield sample["__key__"], sample["txt"].decode(), sample["jpg"]
    gc.collect()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("form", ["gnu", "oldgnu", "pax", "ustar", "v7"])
def test_tars_of_gnu_tar_are_indexed_and_streamed_in_all_its_formats(tmp_path: Path, form: str) -> None:
    files = write_files(tmp_path / "files")
    if form in ("ustar", "v7"):  # these can't hold long names
        files = next(next(files.iterdir()).iterdir())
    (tmp_path / "tars").mkdir()
    packed = ["tar", f"--format={form}", "--sort=name", "-C", files, "-cf", tmp_path / "tars/0.tar", "."]
    subprocess.run(packed, check=True)
    expected = sorted(webdataset_reads(tmp_path / "tars"))
    assert len(expected) == 12
    streamed = [
        (sample["__key__"], bytes(sample["txt"]).decode(), bytes(sample["jpg"]))
        for sample in TarDataset(str(tmp_path / "tars"), shuffle=False)
    ]
    assert sorted(streamed) == [(key.removeprefix("./"), *rest) for key, *rest in expected]
    wds_tools("index", tmp_path / "tars")
    assert "verify: all is well" in wds_tools("verify", tmp_path / "tars").stdout
    config = LoaderConfig(sources=(Source(str(tmp_path / "tars")),), batch_size=4, seed=1, num_workers=0)
    loader = build_loader(config)
    batched = [bytes(picture) for batch in loader for picture in batch["jpg"]]
    loader.close()
    assert sorted(batched) == sorted(jpg for _, _, jpg in expected)


@pytest.mark.parametrize(
    ("flag", "name", "reason"),
    [
        ("--gzip", "0.tar", "this is gzip: unpack it first"),
        ("--gzip", "0.tar.gz", "unpack it (and its like) with `gunzip`"),
        ("--bzip2", "0.tar", "this is bzip2: unpack it first"),
        ("--xz", "0.tar", "this is xz: unpack it first"),
    ],
)
def test_compressed_tars_are_refused_with_the_reason(tmp_path: Path, flag: str, name: str, reason: str) -> None:
    write_files(tmp_path / "files", 2)
    (tmp_path / "tars").mkdir()
    subprocess.run(["tar", flag, "-C", tmp_path / "files", "-cf", tmp_path / "tars" / name, "."], check=True)
    status = 2 if name.endswith(".gz") else 1
    said = wds_tools("index", tmp_path / "tars", status=status)
    assert reason in said.stderr
    assert not (tmp_path / "tars/manifest.json").exists()


@pytest.mark.slow
def test_indexing_leaves_what_energon_wrote_beside_the_tars_alone(tmp_path: Path) -> None:
    pytest.importorskip("megatron.energon", reason="pip install megatron-energon")
    with wds.TarWriter(str(tmp_path / "0.tar")) as writer:
        for number in range(5):
            writer.write({"__key__": f"{number}", "txt": f"caption {number}", "json": {"number": number}})
    prepare(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert tmp_path / "0.tar.idx" in before
    wds_tools("index", tmp_path)
    assert "verify: all is well" in wds_tools("verify", tmp_path).stdout
    assert all(path.read_bytes() == data for path, data in before.items())
    assert len(list(ShardDataset(str(tmp_path)))) == 5
