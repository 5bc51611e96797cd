"""Samples of every kind come through what makes datasets of datasets: codes of any layout, documents, edits, texts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factory import answer_sample, image_sample, make_dataset, page_sample, talk_sample

from wds_tools.dataset.reader import read_manifest
from wds_tools.errors import UsageError
from wds_tools.format.manifest import Manifest
from wds_tools.format.schema import Sample
from wds_tools.select.dataset import DatasetWriter, open_dataset
from wds_tools.select.relabel import RelabelConfig, relabel
from wds_tools.select.select import SelectConfig, select
from wds_tools.storage import open_store

MADE: Mapping[str, Any] = {"tokenizer": "test", "stride": 16}


def coded(number: int, shape: tuple[int, ...], dtype: str) -> Sample:
    codes = np.random.default_rng(number).integers(0, 100, shape).astype(dtype)
    return Sample(key=f"coded-{number:08d}", data_type="image_text", text=f"caption {number}", codes={"vqcode_256": codes})


KINDS: Mapping[str, tuple[Sequence[Sample], Mapping[str, Any]]] = {
    "n": ([coded(n, (7,), "<u2") for n in range(6)], {"layout": "n", "codebook_size": 100, "stride": None}),
    "hwk": ([coded(n, (3, 4, 2), "<u2") for n in range(6)], {"layout": "hwk", "codebook_size": [100, 200]}),
    "floats": ([coded(n, (2, 3, 3), "<f4") for n in range(6)], {"layout": "hwc", "dtype": "float32"}),
    "bytes": ([coded(n, (3, 4), "|u1") for n in range(6)], {"dtype": "uint8", "codebook_size": 100}),
    "pages": ([page_sample(n, *[(2, 3)] * (n % 3)) for n in range(6)], {"codebook_size": 8192}),
    "edits": ([answer_sample(n, (2, 2), (3, 2)) for n in range(6)], {"codebook_size": 8192}),
    "talks": ([talk_sample(n, (2, 2)) for n in range(6)], {"codebook_size": 8192}),
    "texts": ([image_sample(n)._replace(texts={"alt": f"caption {n}", "b": None}) for n in range(6)], {"codebook_size": 8192}),
}


def contents(url: Path, prefix: str = "") -> list[Any]:
    """All that is said of each sample, arrays with their types."""
    found = []
    for sample in open_dataset(str(url)):
        codes = {column: (array.dtype.str, array.tolist()) for column, array in sample.codes.items()}
        found.append(sample._replace(key=sample.key.removeprefix(prefix), codes=codes))
    return found


def make_kind(url: Path, kind: str) -> Manifest:
    samples, made = KINDS[kind]
    return make_dataset(url, samples, shard_samples=4, codes={column: {**MADE, **made} for column in samples[-1].codes})


@pytest.mark.parametrize("kind", KINDS)
def test_samples_of_every_kind_come_through_with_what_the_manifest_says_of_them(kind: str, tmp_path: Path) -> None:
    source, labels = tmp_path / "source", tmp_path / "labels.jsonl"
    made, before = make_kind(source, kind), contents(source)
    labels.write_text(json.dumps({"key": before[1].key, "score": 0.5}))
    select(SelectConfig(input=(str(source),), output=f"{tmp_path}/stored", shard_samples=3, quiet=True))
    select(SelectConfig(input=(str(source),), output=f"{tmp_path}/named", key_prefix=("A",), quiet=True))
    relabel(RelabelConfig(input=str(source), labels=(str(labels),), fields=("score",), output=f"{tmp_path}/labelled", quiet=True))
    with DatasetWriter(f"{tmp_path}/written", parents=[open_dataset(str(source))]) as writer:
        for sample in open_dataset(str(source)):
            writer.add(sample)
    assert contents(tmp_path / "stored") == contents(tmp_path / "named", "A-") == contents(tmp_path / "written") == before
    before[1] = before[1]._replace(provenance={"score": 0.5})
    assert contents(tmp_path / "labelled") == before
    for name in ("stored", "named", "labelled", "written"):
        manifest = read_manifest(open_store(f"{tmp_path}/{name}"))
        assert (manifest.schema_version, manifest.codes) == (made.schema_version, made.codes)
        assert (manifest.data_types, manifest.rejects) == (made.data_types, {})


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"layout": "wh", "codebook_size": 100}, "another layout"),
        ({"dtype": "uint16", "codebook_size": 100}, "another dtype"),
        (None, "another tokenizer"),
    ],
)
def test_codes_that_lie_or_were_made_otherwise_do_not_go_into_one_column(
    column: Mapping[str, Any] | None, message: str, tmp_path: Path
) -> None:
    first = {"codebook_size": 100} if column is None else {"dtype": "uint8", "codebook_size": 100}
    second = {} if column is None else {"vqcode_256": {**MADE, **column}}
    make_dataset(tmp_path / "a", [coded(1, (3, 4), "<u2" if column is None else "|u1")], codes={"vqcode_256": {**MADE, **first}})
    make_dataset(tmp_path / "b", [coded(2, (3, 4), "<u2")], codes=second)
    for inputs in ([tmp_path / "a", tmp_path / "b"], [tmp_path / "b", tmp_path / "a"]):
        with pytest.raises(UsageError, match=message):
            select(SelectConfig(input=tuple(map(str, inputs)), output=f"{tmp_path}/both", quiet=True))


def test_equal_values_stay_together_whatever_stands_beside_them(tmp_path: Path) -> None:
    """Beside a fraction a column holds whole numbers as fractions too."""
    values = [*range(20), *range(20), 0.5, 1e300, 2**60]
    samples = [image_sample(n)._replace(provenance={"value": value}) for n, value in enumerate(values)]
    make_dataset(tmp_path / "set", samples, shard_samples=20)
    select(SelectConfig(input=(f"{tmp_path}/set",), output=f"{tmp_path}/{{split}}", split="a=.5,b=.5", by="value", quiet=True))
    sides = [{sample.provenance["value"] for sample in open_dataset(f"{tmp_path}/{side}")} for side in "ab"]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == set(values)
    labels = tmp_path / "labels.jsonl"
    labels.write_text("".join(json.dumps({"value": float(value), "score": n}) + "\n" for n, value in enumerate(values[:41])))
    relabel(
        RelabelConfig(
            input=f"{tmp_path}/set", labels=(str(labels),), on="value", fields=("score",), output=f"{tmp_path}/out", quiet=True
        )
    )
    scores = [sample.provenance.get("score") for sample in open_dataset(f"{tmp_path}/out")]
    assert scores == [*range(20), *range(20), 40, None, None]
