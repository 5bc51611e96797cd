"""Interleaved documents and edits from their records to codes: the same in one pass or two, and as other libraries read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import webdataset
from commands import image_bytes, read_rejects, read_samples, write_jsonl

from wds_tools.check.stats.describe import StatsConfig, stats
from wds_tools.check.verify import VerifyConfig, verify
from wds_tools.convert import ConvertOptions, run_conversion
from wds_tools.convert.conversations import ConversationsConfig
from wds_tools.convert.images import reader
from wds_tools.convert.interleaved import InterleavedConfig
from wds_tools.encode.encode import EncodeConfig, encode
from wds_tools.encode.image_encoder import ImageEncoder
from wds_tools.encode.options import TokenizerOptions
from wds_tools.errors import UsageError
from wds_tools.images import ImageLimits, prepare
from wds_tools.vq.registry import load_tokenizer

SIZES = [(96, 60), (64, 64), (60, 90)]
MODE, COLUMN = "multi64", "vqcode_multi64"
PAGES = [
    {"texts": ["One.", None, None, "Two."], "images": [None, "0.png", "1.png", None]},
    {"text_list": ["No image."], "image_info": []},
    {"text": "<image> is a picture.", "images": ["2.png"]},
]
EDITS = [
    {"source_image": "0.png", "instruction": "Redder.", "target_image": "1.png"},
    {"image_list": ["0.png", "1.png", "2.png"], "instruction_list": ["Redder.", "Larger."]},
    {"conversations": [{"from": "human", "value": "Draw."}, {"from": "gpt", "value": "So: <image>"}], "image": "2.png"},
]
KINDS: dict[str, tuple[type[ConvertOptions], list[dict[str, Any]], list[list[int]]]] = {
    "interleaved": (InterleavedConfig, PAGES, [[0, 1], [], [2]]),
    "visual_sft": (ConversationsConfig, EDITS, [[0, 1], [0, 1, 2], [2]]),
}


@pytest.fixture(scope="module", params=KINDS)
def chain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A data type, and the folder with its `raw` set, the `codes` of that, and those that were made at `once`."""
    kind, records, _ = KINDS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    for number, size in enumerate(SIZES):
        (folder / f"{number}.png").write_bytes(image_bytes(number, *size, kind="PNG"))
    read: Any = {"input": (str(write_jsonl(folder / "in.jsonl", records)),), "max_rejects": "0", "quiet": True}
    run_conversion(kind(output=str(folder / "raw"), **read))
    encode(EncodeConfig(input=str(folder / "raw"), output=str(folder / "codes"), sft_mode=MODE, device="cpu", quiet=True))
    config: Any = kind(output=str(folder / "once"), sft_mode=MODE, **read)  # type: ignore[call-arg]
    options = TokenizerOptions(device="cpu")
    encoder = ImageEncoder("tiny", options, workers=1, keep_images=False, limits=ImageLimits(), modes=config.modes)
    run_conversion(config, encoder)
    return request.param, folder


def test_each_image_has_its_codes_in_its_place_and_the_set_says_version_2(chain: tuple[str, Path]) -> None:
    data_type, folder = chain
    _, _, numbers = KINDS[data_type]
    tokenizer = load_tokenizer("tiny", device="cpu")
    pixels = [prepare(image_bytes(number, *size, kind="PNG"), MODE) for number, size in enumerate(SIZES)]
    alone = [tokenizer.encode(torch.from_numpy(pixels_HWC[None]))[0].numpy() for pixels_HWC in pixels]
    raw, codes = (read_samples(folder / name) for name in ("raw", "codes"))
    for sample, source, expected in zip(codes, raw, numbers, strict=True):
        assert [image.data for image in source.images] == [image_bytes(n, *SIZES[n], kind="PNG") for n in expected]
        assert (sample.data_type, sample.text, sample.conversations) == (data_type, source.text, source.conversations)
        assert (sample.width, sample.height, sample.length) == (None, None, source.text_chars + 4 * sample.num_codes)
        grids = sample.grids_of(COLUMN)
        assert len(grids) == len(expected)
        assert all(np.array_equal(grid_hw, alone[number]) for grid_hw, number in zip(grids, expected, strict=True))
    assert [path.read_bytes() for path in sorted(folder.glob("once/*.tar"))] == [
        path.read_bytes() for path in sorted(folder.glob("codes/*.tar"))
    ]
    for name in ("raw", "codes", "once"):
        result = verify(VerifyConfig(input=str(folder / name), quiet=True))
        assert (result.problems, result.manifest.schema_version) == ((), 2)
    counted = stats(StatsConfig(input=str(folder / "codes"), quiet=True)).count
    assert (counted.data_types, sum(counted.grids.values())) == ({data_type: 3}, sum(map(len, numbers)))


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # they leave files open
def test_webdataset_and_hugging_face_read_what_was_written(chain: tuple[str, Path], tmp_path: Path) -> None:
    _, folder = chain
    tars = sorted(map(str, folder.glob("codes/*.tar")))
    ours = read_samples(folder / "codes")
    pipeline = webdataset.WebDataset(tars, shardshuffle=False)
    decoded = list(pipeline.decode())
    rows = datasets.load_dataset("webdataset", data_files=tars, split="train", cache_dir=str(tmp_path))
    for sample, theirs, row in zip(ours, decoded, rows, strict=True):
        for found in (theirs, row):
            assert found["json"]["grids"] == {COLUMN: [list(grid.shape) for grid in sample.grids_of(COLUMN)]}
            assert (found["json"]["text"], found["json"].get("conversations")) == (sample.text, sample.conversations)
            assert np.array_equal(np.asarray(found[f"{COLUMN}.npy"]), sample.codes[COLUMN])


def test_images_that_are_too_large_together_reject_their_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = image_bytes(0, kind="PNG")
    (tmp_path / "0.png").write_bytes(image)
    monkeypatch.setattr(reader, "MAX_SAMPLE_BYTES", 3 * len(image))
    pages = [{"text": "<image>" * count, "images": ["0.png"] * count} for count in (3, 4)]
    read: Any = {"input": (str(write_jsonl(tmp_path / "in.jsonl", pages)),), "max_rejects": "90%", "quiet": True}
    read["max_image_bytes"] = len(image)
    assert run_conversion(InterleavedConfig(output=str(tmp_path / "out"), **read)).rejects == {"too_many_bytes": 1}


def test_a_broken_image_rejects_its_document_and_a_field_that_is_not_there_stops_the_run(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(image_bytes(0, kind="PNG"))
    (tmp_path / "1.png").write_bytes(b"<html>gone</html>")
    pages = [{"texts": [None, None, "A"], "images": ["0.png", f"{number}.png", None], "id": number} for number in range(3)]
    read: Any = {"input": (str(write_jsonl(tmp_path / "in.jsonl", pages)),), "max_rejects": "90%", "quiet": True}
    manifest = run_conversion(InterleavedConfig(output=str(tmp_path / "out"), keep=("number=id",), **read))
    assert (manifest.samples, manifest.rejects) == (1, {"missing_image": 1, "not_an_image": 1})
    assert {reject["detail"][:14] for reject in read_rejects(tmp_path / "out")} == {"image 2 of 2: "}
    assert [dict(sample.provenance) for sample in read_samples(tmp_path / "out")] == [{"number": 0}]
    with pytest.raises(UsageError, match="--text: none of the first records has a field body"):
        run_conversion(InterleavedConfig(output=str(tmp_path / "none"), text="body", **read))
