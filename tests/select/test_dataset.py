"""open_dataset and DatasetWriter, and the groups of equals that stats writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import webdataset as wds
from factory import image_sample, make_dataset, text_sample

from wds_tools import Dataset, DatasetWriter, Sample, open_dataset
from wds_tools.check.verify import VerifyConfig, verify
from wds_tools.cli import index, stats
from wds_tools.errors import FormatError, UsageError


def test_samples_are_read_by_number_and_key_and_their_fields_are_a_table(tmp_path: Path) -> None:
    rows = [image_sample(n)._replace(key=f"k{(n * 7) % 10}", provenance={"score": n if n < 5 else n + 0.5}) for n in range(10)]
    make_dataset(tmp_path / "set", rows, shard_samples=4)
    data = open_dataset(str(tmp_path / "set"))
    assert len(data) == 10
    assert [sample.key for sample in data] == [row.key for row in rows]
    for number, row in enumerate(rows):  # keys that do not ascend
        assert data[number].text == data[row.key].text == row.text
    assert json.loads(data.members("k0")["json"])["text"] == rows[0].text
    assert data.fields("score", "key", "nothing").to_pydict() == {
        "key": [row.key for row in rows],
        "score": [row.provenance["score"] for row in rows],
    }
    mixed = [row._replace(key=f"m{n}", provenance={"x": ["a", 1, ["b"], None][n]}) for n, row in enumerate(rows[:4])]
    make_dataset(tmp_path / "mixed", mixed, shard_samples=1)
    assert open_dataset(str(tmp_path / "mixed")).fields("x").to_pydict() == {"x": ['"a"', "1", '["b"]', None]}
    for which in ("k", 10, -1):
        with pytest.raises(UsageError, match="no sample"):
            data[which]
    data.close()


def test_a_writer_makes_a_dataset_with_the_provenance_of_its_parents_or_none(tmp_path: Path) -> None:
    made = {"vqcode_512": {"tokenizer": "tiny", "codebook_size": 8192}}
    make_dataset(tmp_path / "set", map(image_sample, range(6)), codes=made)
    data = open_dataset(str(tmp_path / "set"))
    with DatasetWriter(str(tmp_path / "out"), parents=[data], shard_samples=2) as writer:
        for number in (5, 1, 3):
            writer.add(data[number])
        with pytest.raises(FormatError, match="image-00000001: a sample of this key is there already"):
            writer.add(data[1])
        with pytest.raises(FormatError, match="data_type"):
            writer.add(data[2]._replace(data_type="other"))
    assert [shard.samples for shard in writer.manifest.shards] == [2, 1]
    assert writer.manifest.codes == made
    assert writer.manifest.source["input"]["fingerprint"] == data.manifest.fingerprint()
    assert verify(VerifyConfig(input=str(tmp_path / "out"), quiet=True)).problems == ()
    with pytest.raises(UsageError, match="holds a complete dataset already"):
        DatasetWriter(str(tmp_path / "out")).__enter__()
    with pytest.raises(ZeroDivisionError):
        fail_in_writer(str(tmp_path / "other"), data)
    assert not list((tmp_path / "other").iterdir())


def fail_in_writer(url: str, data: Dataset) -> None:
    with DatasetWriter(url, parents=[data]) as writer:
        writer.add(data[0])
        raise ZeroDivisionError


def test_third_party_tars_that_are_written_again_keep_what_they_had(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    with wds.TarWriter(str(tmp_path / "tars/0.tar")) as tar:
        tar.write({"__key__": "a/b", "json": {"score": 3}, "txt": "caption", "jpg": b"pixels"})
    assert index.run(index.Config(input=str(tmp_path / "tars"), fields=True, quiet=True)) == 0
    assert list((tmp_path / "tars/fields").rglob("0.tar.parquet"))
    data = open_dataset(str(tmp_path / "tars"))
    with pytest.raises(UsageError, match=r"samples of any members \(jpg, json, txt\): ask for members\(\)"):
        data[0]
    with DatasetWriter(str(tmp_path / "out"), parents=[data]) as writer:
        for number in range(len(data)):
            members = data.members(number)
            image = {"image": members["jpg"], "image_extension": "jpg", "provenance": json.loads(members["json"])}
            writer.add(Sample(key=f"{number:08d}", data_type="image_text", text=members["txt"].decode(), **image))
    (found,) = open_dataset(str(tmp_path / "out"))
    assert (found.text, found.image, found.provenance) == ("caption", b"pixels", {"score": 3})
    assert verify(VerifyConfig(input=str(tmp_path / "out"), quiet=True)).problems == ()


def test_stats_writes_all_groups_of_equals_with_every_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [image_sample(n % 3)._replace(key=f"k{n}", text=f"t{n // 2}") for n in range(7)] + [text_sample(9, "t0")]
    make_dataset(tmp_path / "set", rows, shard_samples=3, codes={"vqcode_512": {"codebook_size": 8192}})
    target = tmp_path / "groups.jsonl"
    stats.run(stats.Config(input=str(tmp_path / "set"), duplicates=str(target), quiet=True))
    assert "3 groups of equal text and 3 groups of equal codes" in capsys.readouterr().err
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    found = {what: sorted(line["keys"] for line in lines if line["same"] == what) for what in ("text", "codes")}
    assert found["text"] == [["k0", "k1", "text-00000009"], ["k2", "k3"], ["k4", "k5"]]
    assert found["codes"] == [["k0", "k3", "k6"], ["k1", "k4"], ["k2", "k5"]]
    with pytest.raises(UsageError, match="--duplicates"):
        stats.run(stats.Config(input=str(tmp_path / "set"), duplicates=str(tmp_path / "set/groups.jsonl"), quiet=True))
