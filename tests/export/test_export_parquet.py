"""Typed Parquet: everything that datasets hold, as pandas and Hugging Face read it, and back into shards byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
from commands import wds_tools
from factory import answer_sample, image_sample, make_dataset, multi_sample, page_sample, random_codes, talk_sample, text_sample

from wds_tools.check.verify import VerifyConfig, verify
from wds_tools.convert.coded import CodedConfig
from wds_tools.convert.run import run_conversion
from wds_tools.dataset.reader import read_manifest, read_stored
from wds_tools.errors import UsageError
from wds_tools.export.hf import export_hf
from wds_tools.export.options import ExportConfig, ExportSummary, ParquetConfig
from wds_tools.export.parquet import export_parquet
from wds_tools.format.schema import Sample
from wds_tools.storage import open_store

MADE = {"tokenizer": "tiny", "codebook_size": 8192, "weights_hash": "sha256:0", "stride": 16, "precision": "fp32"}
CODES = {
    "vqcode_512": MADE,
    "vqcode_multi768": MADE,
    "vqcode_512-b": {**MADE, "tokenizer": "b", "codebook_size": 1 << 17, "stride": 8},
}


LAYOUTS = {
    "vqcode_512-k": {**MADE, "layout": "hwk", "codebook_size": [16, 40]},
    "vqcode_256": {**MADE, "layout": "n", "stride": None},
    "vqcode_128": {"tokenizer": "f", "layout": "hw", "dtype": "float16"},
    "vqcode_64": {"tokenizer": "f", "layout": "thwk", "dtype": "bfloat16"},
}


def other_layouts() -> list[Sample]:
    """Codes of several codebooks, in one dimension, floats, and the bit patterns of a video's."""
    rng = np.random.default_rng(0)
    codes = {
        "vqcode_512-k": rng.integers(0, 16, (2, 3, 2)).astype("<u2"),
        "vqcode_256": rng.integers(0, 99, 7).astype("<u2"),
        "vqcode_128": rng.random((2, 2)).astype("<f2"),
        "vqcode_64": rng.integers(0, 9, (1, 2, 2, 3)).astype("<u2"),
    }
    return [image_sample(number)._replace(key=f"000000-{number:08d}", codes=codes) for number in range(2)]


def every_kind() -> list[Sample]:
    """All that a sample can be, and have."""
    both = {"vqcode_512": random_codes(1, 4, 4), "vqcode_512-b": random_codes(2, 8, 8).astype("<u4")}
    kept = image_sample(1)._replace(image=b"\xff\xd8 not looked at", image_extension="jpg")
    page = page_sample(2, (2, 3), (1, 4))._replace(image=b"one", image_extension="png")
    alone = talk_sample(3, (4, 4))._replace(grids=None)  # as `convert coded` makes them of Liquid's
    return [
        image_sample(0)._replace(texts={"recap": "grün 🐶", "alt": None}, provenance={"url": "x", "n": 1.5, "of": {"a": [None]}}),
        kept._replace(codes=both),
        multi_sample(4),
        text_sample(5, 'Text with "quotes", \n\u2028 and zero \0.'),
        alone,
        talk_sample(6),
        talk_sample(7, (1, 2), (3, 4)),
        answer_sample(8, (2, 2), (3, 2)),
        page_sample(9, *[(2, 2)] * 5),
        page._replace(more_images=(page.images[0]._replace(data=b"two", extension="webp"),)),
    ]


def export(folder: Path, output: Path, **settings: Any) -> ExportSummary:
    return export_parquet(ParquetConfig(input=(str(folder),), output=str(output), quiet=True, **{"num_shards": 3, **settings}))


def payloads(folder: Path) -> list[dict[str, bytes]]:
    store = open_store(str(folder))
    rows = read_manifest(store).shards
    return [{suffix: bytes(data) for suffix, data in one.payloads.items()} for row in rows for one in read_stored(store, row)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "set"
    samples = [one._replace(key=f"000000-{number:08d}") for number, one in enumerate(every_kind())]
    make_dataset(folder, samples, shard_samples=4, codes=CODES)
    return folder


@pytest.mark.parametrize("codes", ["of every kind", "of other layouts"])
def test_everything_comes_back_byte_for_byte_with_what_is_known_of_its_codes(source: Path, tmp_path: Path, codes: str) -> None:
    if codes == "of other layouts":
        source = tmp_path / "layouts"
        make_dataset(source, other_layouts(), codes=LAYOUTS)
    export(source, tmp_path / "parquet")
    back = CodedConfig(input=(str(tmp_path / "parquet"),), output=str(tmp_path / "back"), shard_samples=4, quiet=True)
    manifest, original = run_conversion(back), read_manifest(open_store(str(source)))
    assert manifest.rejects == {}
    assert payloads(tmp_path / "back") == payloads(source)
    for name in ("fingerprint", "data_types", "codes", "schema_version"):
        ours, theirs = getattr(manifest, name), getattr(original, name)
        assert (ours() if callable(ours) else ours) == (theirs() if callable(theirs) else theirs)
    assert verify(VerifyConfig(input=str(tmp_path / "back"), quiet=True)).problems == ()


def test_pandas_and_load_dataset_read_typed_columns(source: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "parquet", num_shards=1)
    (file,) = (tmp_path / "parquet" / "data").iterdir()
    table = pd.read_parquet(file)
    kinds = [one.data_type for one in every_kind()]
    assert table["data_type"].tolist() == kinds
    for read in (table.to_dict("records"), list(datasets.load_dataset(str(tmp_path / "parquet"), split="train"))):
        for row, sample in zip(read, every_kind(), strict=True):
            assert (row["text"], row["length"]) == (sample.text, sample.length)
            for column in CODES:
                if (codes := sample.codes.get(column)) is None:
                    assert row[column] is None or pd.isna(row[column])
                    continue
                found = np.array(row[column]["codes"], row[column]["dtype"]).reshape(row[column]["shape"])
                assert (found.dtype, found.tolist()) == (codes.dtype, codes.tolist())
    features = datasets.load_dataset(str(tmp_path / "parquet"), split="train").features
    assert features["vqcode_512"]["codes"].feature.dtype == "uint16"
    assert features["vqcode_512-b"]["codes"].feature.dtype == "uint32"
    assert features["width"].dtype == "int32"
    card = (tmp_path / "parquet" / "README.md").read_text()
    assert "in the order of the datasets" in card
    assert "| `vqcode_512-b` | struct<codes: list<element: uint32>" in card.replace("item:", "element:")


def test_codes_of_one_name_and_two_tokenizers_are_not_put_into_one_column(source: Path, tmp_path: Path) -> None:
    for what, made in {"tokenizer": {**MADE, "tokenizer": "c"}, "stride": {**MADE, "stride": 8}, "codebook_size": {}}.items():
        make_dataset(tmp_path / what, [image_sample(1)], codes={"vqcode_512": made} if made else {})
        both = ParquetConfig(input=(str(source), str(tmp_path / what)), output=str(tmp_path / "out"), quiet=True)
        with pytest.raises(UsageError, match=rf"vqcode_512 of .*{what} is of another (tokenizer|{what}) .* than that of .*set"):
            export_parquet(both)


def test_a_finished_export_is_kept_by_resume_and_another_is_refused(source: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "out")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    export(source, tmp_path / "out", resume=True, verify=True)
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    with pytest.raises(UsageError, match="another export"):
        export_hf(ExportConfig(input=(str(source),), output=str(tmp_path / "out"), reader="liquid", resume=True, quiet=True))


def test_the_seven_columns_say_what_they_cannot_hold(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="interleaved documents, for which no column is: `wds-tools export parquet`"):
        export_hf(ExportConfig(input=(str(source),), output=str(tmp_path / "all"), quiet=True))
    summary = export_hf(ExportConfig(input=(str(source),), output=str(tmp_path / "some"), reader="liquid", quiet=True))
    assert summary.left_out == {"image_text_multi": 1, "interleaved": 2, "visual_sft": 4}
    assert summary.passed_over == {"image": 1, "provenance": 1, "texts": 1, "vqcode_512-b": 1}
    done = wds_tools("export", "hf", "--input", source, "--output", tmp_path / "told", "--for", "liquid")
    assert "left out for want of a column: 1 image, 1 provenance, 1 texts, 1 vqcode_512-b" in done.stderr.replace("\n", " ")
    told = wds_tools("export", "parquet", "--input", source, "--output", tmp_path / "parquet").stdout
    assert "10 (3 visual_sft" in told or "rows       10 (" in told
    with pytest.raises(UsageError, match="says itself how vqcode_512 was made: leave out --stride"):
        run_conversion(CodedConfig(input=(str(tmp_path / "parquet"),), output=str(tmp_path / "x"), stride=8, quiet=True))


def test_a_row_that_is_none_is_a_reject(source: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "parquet", num_shards=1)
    (file,) = (tmp_path / "parquet" / "data").iterdir()
    table = pd.read_parquet(file)
    table.at[0, "vqcode_512"] = {**table.at[0, "vqcode_512"], "shape": [3, 4]}
    table.at[1, "provenance"] = "{"
    table.at[2, "vqcode_multi768"] = {**table.at[2, "vqcode_multi768"], "dtype": "object"}
    table.to_parquet(tmp_path / "wrong.parquet")
    config = CodedConfig(
        input=(str(tmp_path / "wrong.parquet"),), tokenizer="tiny", output=str(tmp_path / "back"), max_rejects="50%", quiet=True
    )
    assert run_conversion(config).rejects == {"bad_codes": 3}
