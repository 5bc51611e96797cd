"""What is public: the lists, their types, and a distribution that installs with what training needs and nothing more."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from commands import ROOT, image_bytes, write_documents
from factory import make_dataset, text_sample

import wds_tools

PUBLIC = {
    "loaders": [
        "EpochLoader",
        "JsonlDataset",
        "Loader",
        "LoaderConfig",
        "SequenceConfig",
        "ShardDataset",
        "Source",
        "TarDataset",
        "World",
        "build_loader",
        "flatten",
        "merge_states",
        "model_inputs",
    ],
    "wds_tools": ["Dataset", "DatasetWriter", "Manifest", "Sample", "WdsToolsError", "__version__", "open_dataset"],
    "wds_tools.api": [
        "CodedConfig",
        "ConversationsConfig",
        "DocumentsConfig",
        "EncodeConfig",
        "ExportConfig",
        "ExportSummary",
        "FinalizeConfig",
        "InterleavedConfig",
        "PackConfig",
        "PairsConfig",
        "ParquetConfig",
        "RelabelConfig",
        "SelectConfig",
        "VerifyConfig",
        "VerifyResult",
        "encode",
        "export_hf",
        "export_parquet",
        "finalize",
        "pack",
        "relabel",
        "run_conversion",
        "select",
        "verify",
    ],
    "wds_tools.convert": ["ConvertOptions", "Converter", "run_conversion"],
    "wds_tools.jobs": ["Advance", "Job", "JobOptions", "Report", "ShardLimits", "TaskWriter", "Work", "run_job"],
    "wds_tools.sources": ["InputFile", "Record", "Source", "file_records"],
    "wds_tools.storage": ["Entry", "LocalStore", "Store", "Writer", "join", "open_store", "redact", "split_url"],
    "wds_tools.vq": ["ImageTokenizer", "LayoutTokenizer", "load_tokenizer", "nearest"],
}
TRAIN = """
import sys
from loaders import LoaderConfig, Source, build_loader

loader = build_loader(LoaderConfig(sources=(Source(sys.argv[1]),), batch_size=4, last_batch="short", num_workers=0))
print(sum(len(batch["text"]) for batch in loader))
"""
ONLY_FOR_TRAINING = "import sys, importlib.util as u; sys.exit(any(map(u.find_spec, sys.argv[1:])))"


@pytest.mark.parametrize("module", PUBLIC)
def test_the_list_of_a_module_is_what_it_was_and_what_the_documentation_names(module: str) -> None:
    listed = importlib.import_module(module).__all__
    assert listed == PUBLIC[module], "a change of what is public belongs in this test, docs/stability.md and CHANGELOG.md"
    (row,) = re.findall(rf"^\| `{re.escape(module)}` \| (.*) \|$", (ROOT / "docs/stability.md").read_text(), re.MULTILINE)
    assert row == ", ".join(f"`{name}`" for name in listed if not name.startswith("__"))


@pytest.mark.parametrize("module", [*PUBLIC, "wds_tools.errors", "loaders.testing"])
def test_what_is_listed_is_there_and_says_what_it_is(module: str) -> None:
    found = importlib.import_module(module)
    for name in getattr(found, "__all__", ()):
        thing = getattr(found, name)
        assert isinstance(thing, str) or thing.__doc__, f"{module}.{name} has no docstring"
    assert found.__doc__


def test_the_reference_has_everything_that_is_public() -> None:
    def thing(name: str) -> object:
        module, _, attribute = name.rpartition(".")
        return getattr(importlib.import_module(module), attribute)

    pages = "".join(page.read_text() for page in (ROOT / "docs/reference").glob("*.md"))
    listed = re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE)
    found = [thing(name) for name in listed if ".trainers." not in name]  # those need the trainers
    public = {f"{module}.{name}" for module, names in PUBLIC.items() for name in names if not name.startswith("__")}
    assert {name for name in public if thing(name) not in found} == set()
    assert len(listed) == len(set(listed))


def test_the_version_is_one_and_the_change_log_has_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == wds_tools.__version__
    assert re.search(rf"^## {re.escape(wds_tools.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source distribution and a wheel, built as `make dist` does, from a copy, with the setuptools that is installed."""
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if files.returncode:
        pytest.skip("needs a git checkout")
    for name in files.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "dist"


@pytest.mark.slow
def test_the_wheel_has_all_of_the_packages_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in ("wds_tools", "loaders")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {"wds_tools/py.typed", "loaders/py.typed", "wds_tools/vq/weights/tiny.safetensors"} <= names
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith("licenses/LICENSE") for name in names)
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        assert any(name.endswith("/pyproject.toml") for name in archive.getnames())


def trained(python: Path, dataset: Path) -> int:
    """Samples that an epoch gives in another environment."""
    command = [python, "-c", TRAIN, dataset]
    return int(subprocess.run(command, cwd=dataset.parent, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow  # a minute: it installs torch
@pytest.mark.timeout(1800)
def test_the_wheel_installs_alone_converts_and_trains(built: Path, tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", [text_sample(number) for number in range(20)])
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    (wheel,) = built.glob("*.whl")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--upgrade", "pip"], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel], check=True)
    heavy = ("PIL", "diffusers", "datasets", "transformers", "pyarrow", "ray", "pandas", "torchvision", "pytest")
    subprocess.run([python, "-c", ONLY_FOR_TRAINING, *heavy], cwd=tmp_path, check=True)
    write_documents(tmp_path / "in/0.jsonl.zst", ({"text": f"document {number}"} for number in range(7)))
    program = tmp_path / "venv/bin/wds-tools"
    subprocess.run([program, "convert", "documents", "--input", "in", "--output", "text"], cwd=tmp_path, check=True)
    assert [trained(python, tmp_path / name) for name in ("set", "text")] == [20, 7]
    for words in (["verify", "set"], ["doctor", "set"], ["index", "set"], ["simulate", "set", "--batch-size", "4"], ["--help"]):
        subprocess.run([program, *words], cwd=tmp_path, capture_output=True, text=True, check=True)
    command = [program, "export", "hf", "--input", "set", "--output", "out"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert said.returncode == 1
    assert said.stderr == "wds-tools: exporting needs pyarrow: pip install 'wds-tools[convert]'\n"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", f"{wheel}[convert]"], check=True)
    (tmp_path / "photos").mkdir()
    for number in range(3):
        (tmp_path / f"photos/{number}.jpg").write_bytes(image_bytes(number, 64, 48))
        (tmp_path / f"photos/{number}.txt").write_text(f"picture {number}")
    words = ["convert", "pairs", "--input", "photos", "--encode", "tiny", "--output", "pairs"]
    subprocess.run([program, *words], cwd=tmp_path, check=True)
    assert trained(python, tmp_path / "pairs") == 3
