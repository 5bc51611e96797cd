"""Bytes on disk of a 512 px sample with a 40-word caption: ours, webdataset's writer, the reference's Hugging Face dataset."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import webdataset as wds

from benchmarks.workload import captioned_codes
from wds_tools.dataset.writer import ShardLimits, TaskWriter
from wds_tools.format.schema import Sample
from wds_tools.records.coded import ABSENT, COLUMNS
from wds_tools.storage import open_store


def bytes_per_sample(out: Path, num_samples: int = 2000) -> dict[str, float]:
    """Write the same samples all three ways; bytes of all files over samples. Ours counts its index."""
    samples = captioned_codes(num_samples)
    with TaskWriter(open_store(str(out / "ours")), 0, ShardLimits()) as writer:
        for number, (caption, codes_hw) in enumerate(samples):
            writer.add(Sample(key=f"000000-{number:08d}", data_type="image_text", text=caption, codes={"vqcode_512": codes_hw}))
        writer.finish(num_samples)
    (out / "webdataset").mkdir()
    with wds.TarWriter(str(out / "webdataset" / "000000.tar")) as sink:
        for number, (caption, codes_hw) in enumerate(samples):
            record = {"data_type": "image_text", "text": caption, "length": len(caption) + 4096, "width": None, "height": None}
            sink.write({"__key__": f"{number:09d}", "json": record, "vqcode_512.npy": codes_hw})
    rows = [
        dict.fromkeys(COLUMNS, ABSENT)
        | {
            "data_type": "image_text",
            "text": caption,
            "length": len(caption) + 4096,
            "vqcode_512": json.dumps(codes_hw.ravel().tolist()),
        }
        for caption, codes_hw in samples
    ]
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(out / "reference")
    return {
        way: sum(file.stat().st_size for file in (out / way).rglob("*") if file.is_file()) / num_samples
        for way in ("ours", "webdataset", "reference")
    }
