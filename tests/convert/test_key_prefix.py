"""--key-prefix: samples of two datasets lie in one folder without one taking the place of the other."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from commands import read_rejects, read_samples, tree, write_documents, write_jsonl, write_pairs
from energon import prepare

from loaders import ShardDataset
from wds_tools.convert import run_conversion
from wds_tools.convert.coded import CodedConfig
from wds_tools.convert.conversations import ConversationsConfig
from wds_tools.convert.documents import DocumentsConfig
from wds_tools.convert.options import ConvertOptions
from wds_tools.convert.pairs import PairsConfig
from wds_tools.dataset.reader import read_manifest
from wds_tools.encode.encode import EncodeConfig, encode
from wds_tools.errors import UsageError
from wds_tools.storage import open_store

TALK = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}
ROW = {"data_type": "text_pretrain", "text": "a"}


def pairs(folder: Path, **settings: Any) -> list[str]:
    source = write_pairs(folder / "in", 3)
    run_conversion(PairsConfig(input=(str(source),), output=str(folder / "out"), quiet=True, **settings))
    return keys(folder / "out")


def sft(folder: Path, **settings: Any) -> list[str]:
    source = write_jsonl(folder / "in.jsonl", [TALK] * 3)
    run_conversion(ConversationsConfig(input=(str(source),), output=str(folder / "out"), quiet=True, **settings))
    return keys(folder / "out")


def dclm(folder: Path, **settings: Any) -> list[str]:
    source = write_documents(folder / "in.jsonl.zst", [{"text": str(number)} for number in range(3)])
    run_conversion(DocumentsConfig(input=(str(source),), output=str(folder / "out"), quiet=True, **settings))
    return keys(folder / "out")


def hf(folder: Path, **settings: Any) -> list[str]:
    source = write_jsonl(folder / "in.jsonl", [ROW] * 3)
    run_conversion(CodedConfig(input=(str(source),), output=str(folder / "out"), quiet=True, **settings))
    return keys(folder / "out")


def keys(url: Path) -> list[str]:
    return [sample.key for sample in read_samples(url)]


@pytest.mark.parametrize("convert", [pairs, sft, dclm, hf])
def test_every_conversion_takes_a_prefix_and_names_it_in_its_settings(convert: Any, tmp_path: Path) -> None:
    plain = convert(tmp_path / "plain")
    prefixed = convert(tmp_path / "named", key_prefix="coco_2017-a")
    assert plain == [f"000000-{number:08d}" for number in range(3)]
    assert prefixed == [f"coco_2017-a-{key}" for key in plain]
    plans = [read_manifest(open_store(str(tmp_path / name / "out"))).source["plan"] for name in ("plain", "named")]
    assert "key_prefix" not in plans[0]["settings"]
    assert plans[1]["settings"]["key_prefix"] == "coco_2017-a"


@pytest.mark.parametrize("prefix", ["a.b", "a/b", "a b", "é", "x" * 46])
def test_a_prefix_that_can_not_begin_a_key_is_refused(prefix: str) -> None:
    with pytest.raises(UsageError, match="--key-prefix"):
        ConvertOptions(input=("in.jsonl",), output="out", key_prefix=prefix)


def test_the_longest_prefix_still_makes_keys(tmp_path: Path) -> None:
    assert dclm(tmp_path, key_prefix="x" * 45)[0] == "x" * 45 + "-000000-00000000"


def test_a_run_goes_on_under_the_same_prefix_only(tmp_path: Path) -> None:
    dclm(tmp_path, key_prefix="a")
    with pytest.raises(UsageError, match="key_prefix"):
        dclm(tmp_path, key_prefix="b", resume=True)


def encoded(folder: Path, *prefixes: str) -> Path:
    """Encoded datasets in sub-folders of one folder, each of a conversion with its own prefix."""
    for number, prefix in enumerate(prefixes):
        pairs(folder / f"work-{number}", key_prefix=prefix)
        output = folder / f"sets/{number}"
        encode(EncodeConfig(input=str(folder / f"work-{number}/out"), output=str(output), device="cpu", quiet=True))
        assert read_rejects(output) == []
    return folder / "sets"


def unpack(folder: Path, into: Path) -> list[str]:
    into.mkdir()
    for tar in sorted(folder.rglob("*.tar")):
        subprocess.run(["tar", "xf", tar, "-C", into], check=True)
    return sorted(tree(into))


def test_two_datasets_in_one_folder_keep_all_their_samples(tmp_path: Path) -> None:
    for number in range(2):
        dclm(tmp_path / f"same/{number}")
    assert len(unpack(tmp_path / "same", tmp_path / "files")) == 3  # one has overwritten the other
    sets = encoded(tmp_path, "left", "right")
    assert len(unpack(sets, tmp_path / "all-files")) == 2 * 3 * 2
    found = [sample["__key__"] for number in (0, 1) for sample in ShardDataset(str(sets / f"{number}"))]
    assert sorted(found) == [f"{name}-000000-{number:08d}" for name in ("left", "right") for number in range(3)]


@pytest.mark.slow
def test_energon_prepares_two_datasets_in_one_folder(tmp_path: Path) -> None:
    pytest.importorskip("megatron.energon", reason="pip install megatron-energon")
    for number in range(2):
        dclm(tmp_path / f"same/{number}")
    with pytest.raises(AssertionError, match="duplicate keys"):
        prepare(tmp_path / "same")
    sets = encoded(tmp_path, "left", "right")
    prepare(sets)
    assert json.loads((sets / ".nv-meta/.info.json").read_text())["shard_counts"] == {
        "0/shard-000000-0000.tar": 3,
        "1/shard-000000-0000.tar": 3,
    }
