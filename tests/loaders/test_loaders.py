"""ShardDataset and JsonlDataset: every sample once, decoded, in an order that is a function of seed and epoch."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch
import webdataset as wds
from factory import make_dataset
from memory import grown_mb
from PIL import Image

from loaders import JsonlDataset, ShardDataset
from wds_tools.errors import FormatError, NotFound, UsageError
from wds_tools.format.schema import Sample
from wds_tools.images import prepare


def pair(number: int) -> Sample:
    grid_hw = np.random.default_rng(number).integers(0, 8192, (32, 32), dtype="<u2")
    return Sample(key=f"000000-{number:08d}", data_type="image_text", text=f"caption {number}", codes={"vqcode_512": grid_hw})


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    url = str(tmp_path / "pairs")
    make_dataset(url, [pair(number) for number in range(101)], shard_samples=17)
    return url


def keys(dataset: Any) -> list[str]:
    return [sample["__key__"] for sample in dataset]


def test_an_epoch_has_every_sample_once_with_its_text_and_codes(pairs: str) -> None:
    samples = {sample["__key__"]: sample for sample in ShardDataset(pairs)}
    assert len(samples) == 101
    for number in range(101):
        expected = pair(number)
        found = samples[expected.key]
        assert found["text"] == expected.text
        assert found["data_type"] == "image_text"
        assert found["codes"].dtype == torch.int32
        assert np.array_equal(found["codes"].numpy(), expected.codes["vqcode_512"])


def test_seed_and_epoch_change_the_order_and_nothing_else_does(pairs: str) -> None:
    first = keys(ShardDataset(pairs, seed=1))
    assert first == keys(ShardDataset(pairs, seed=1))
    assert sorted(first) == sorted(keys(ShardDataset(pairs, seed=2)))
    dataset = ShardDataset(pairs, seed=1)
    dataset.set_epoch(1)
    orders = [first, keys(dataset), keys(ShardDataset(pairs, seed=2)), keys(ShardDataset(pairs, shuffle=False))]
    assert len({tuple(order) for order in orders}) == 4
    assert orders[3] == sorted(first)


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 2), (3, 0), (3, 1), pytest.param(7, 2, marks=pytest.mark.slow)])
def test_ranks_and_workers_share_the_samples_without_overlap(pairs: str, world_size: int, num_workers: int) -> None:
    seen: list[str] = []
    for rank in range(world_size):
        dataset = ShardDataset(pairs, rank=rank, world_size=world_size)
        loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=num_workers)
        seen += keys(loader)
    assert sorted(seen) == [f"000000-{number:08d}" for number in range(101)]


def test_webdatasets_own_pipeline_goes_on_behind_it(pairs: str) -> None:
    dataset = ShardDataset(pairs).shuffle(50).map(lambda sample: (sample["text"], sample["codes"])).batched(8)
    texts, codes_Bhw = next(iter(dataset))
    assert len(texts) == 8
    assert codes_Bhw.shape == (8, 32, 32)
    assert sum(len(texts) for texts, _ in dataset) == 101


def _text(sample: dict[str, Any]) -> str:
    return str(sample["text"])


def test_webloader_with_workers_sees_every_sample_once(pairs: str) -> None:
    loader = wds.WebLoader(ShardDataset(pairs).map(_text), batch_size=None, num_workers=2)
    assert sorted(loader.shuffle(10)) == sorted(f"caption {number}" for number in range(101))


def test_a_sample_has_only_the_fields_that_it_has(tmp_path: Path) -> None:
    url = str(tmp_path / "text")
    make_dataset(url, [Sample(key="a", data_type="text_pretrain", text="ünï\0 📷", provenance={"url": "http://x"})])
    (sample,) = ShardDataset(url)
    assert sample == {
        "__key__": "a",
        "__url__": f"{url}/shard-000000-0000.tar",
        "data_type": "text_pretrain",
        "text": "ünï\0 📷",
        "url": "http://x",
    }


def test_fields_of_a_record_cannot_replace_what_a_sample_says_of_itself(tmp_path: Path) -> None:
    """A writer refuses such fields; a shard that another program wrote may have them."""
    url = tmp_path / "text"
    fields = {"xxkeyxx": "forged", "xxurlxx": "forged", "kept": 1}
    make_dataset(url, [Sample(key="a", data_type="text_pretrain", text="t", provenance=fields)])
    (shard,) = url.glob("*.tar")
    shard.write_bytes(shard.read_bytes().replace(b"xxkeyxx", b"__key__").replace(b"xxurlxx", b"__url__"))
    (sample,) = ShardDataset(str(url))
    assert (sample["__key__"], sample["__url__"], sample["kept"]) == ("a", str(shard), 1)


def test_large_codes_and_odd_grids_survive(tmp_path: Path) -> None:
    grid_hw = np.array([[0, 262_143, 70_000]], dtype="<u4")
    url = str(tmp_path / "multi")
    sample = Sample(key="a", data_type="image_text_multi", text="t", width=48, height=16, codes={"vqcode_multi768": grid_hw})
    make_dataset(url, [sample])
    (found,) = ShardDataset(url)
    assert found["codes"].tolist() == grid_hw.tolist()
    assert (found["width"], found["height"]) == (48, 16)


def test_a_folder_that_is_no_dataset_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there is no such folder, or nothing is in it"):
        ShardDataset(str(tmp_path))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(NotFound, match=r"has no manifest\.json: it is not a dataset, or making it .*did not finish"):
        ShardDataset(str(tmp_path))


@pytest.mark.parametrize(("rank", "world_size"), [(-1, 1), (1, 1), (0, 0)])
def test_a_rank_outside_the_world_is_refused(pairs: str, rank: int, world_size: int) -> None:
    with pytest.raises(UsageError, match="rank"):
        ShardDataset(pairs, rank=rank, world_size=world_size)


def test_a_flipped_bit_is_found_by_the_crc_when_asked(pairs: str) -> None:
    shard = Path(pairs) / "shard-000000-0000.tar"
    data = bytearray(shard.read_bytes())
    data[2000] ^= 1
    shard.write_bytes(data)
    assert len(keys(ShardDataset(pairs))) == 101
    with pytest.raises(FormatError, match=r"shard-000000-0000\.tar.*byte 0: .*CRC-32"):
        keys(ShardDataset(pairs, check_crc=True))


def test_a_truncated_shard_is_named(pairs: str) -> None:
    os.truncate(Path(pairs) / "shard-000000-0002.tar", 5000)
    with pytest.raises(FormatError, match=r"shard-000000-0002\.tar"):
        keys(ShardDataset(pairs))


def test_an_index_of_other_bytes_is_refused(pairs: str) -> None:
    folder = Path(pairs)
    (folder / "shard-000000-0001.tar.index").write_bytes((folder / "shard-000000-0000.tar.index").read_bytes())
    with pytest.raises(FormatError, match="stale"):
        keys(ShardDataset(pairs))


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[[bytes], str]:
    def write(content: bytes) -> str:
        path = tmp_path / "small.jsonl"
        path.write_bytes(content)
        return str(path)

    return write


def test_a_jsonl_is_read_by_number(jsonl: Callable[[bytes], str]) -> None:
    lines = [orjson.dumps({"data_type": "image_text", "text": f"t{n}", "vq_code": [n, n + 1]}) for n in range(5)]
    dataset = JsonlDataset(jsonl(b"\n\n".join(lines[:3]) + b"\r\n\r\n" + b"\n".join(lines[3:])))
    assert len(dataset) == 5
    assert [dataset[n]["text"] for n in range(5)] == ["t0", "t1", "t2", "t3", "t4"]
    assert dataset[-1]["codes"].tolist() == [4, 5]
    assert dataset[2]["codes"].dtype == torch.int64
    with pytest.raises(IndexError):
        dataset[5]


def test_a_jsonl_of_images_gives_the_pixels_that_would_be_tokenized(jsonl: Callable[[bytes], str], tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    out = io.BytesIO()
    image.save(out, "PNG")
    (tmp_path / "a.png").write_bytes(out.getvalue())
    path = jsonl(orjson.dumps({"data_type": "image_text", "text": "t", "image_path": "a.png"}))
    pixels_CHW = JsonlDataset(path)[0]["pixels_CHW"]
    assert pixels_CHW.shape == (3, 512, 512)
    assert np.array_equal(pixels_CHW.numpy(), prepare(out.getvalue(), "cc512").transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{", "bad_json"),
        (b"[1]", "object"),
        (b'{"data_type": "text_pretrain"}', "text"),
        (b'{"data_type": "poem", "text": "t"}', "poem"),
        (b'{"data_type": "image_text", "text": "t", "vq_code": "[1"}', "vq_code"),
        (b'{"data_type": "image_text", "text": "t", "vq_code": [1.5]}', "vq_code"),
        (b'{"data_type": "image_text", "text": "t", "vq_code": [true]}', "vq_code"),
        (b'{"data_type": "image_text", "text": "t", "image_path": 3}', "image_path"),
    ],
)
def test_a_bad_line_is_named_when_it_is_asked_for(jsonl: Callable[[bytes], str], line: bytes, says: str) -> None:
    dataset = JsonlDataset(jsonl(b'\n{"data_type": "text_pretrain", "text": "fine"}\n' + line + b"\n"))
    assert dataset[0]["text"] == "fine"
    with pytest.raises(FormatError, match=says) as caught:
        dataset[1]
    assert "line 3" in str(caught.value)


def test_a_jsonl_without_records_is_refused(jsonl: Callable[[bytes], str]) -> None:
    with pytest.raises(UsageError, match="no records"):
        JsonlDataset(jsonl(b"\n\n"))


def test_a_jsonl_travels_to_workers(jsonl: Callable[[bytes], str]) -> None:
    lines = [orjson.dumps({"data_type": "text_pretrain", "text": f"t{n}"}) for n in range(50)]
    dataset = JsonlDataset(jsonl(b"\n".join(lines)))
    assert pickle.loads(pickle.dumps(dataset))[7] == dataset[7]  # noqa: S301 - our own bytes
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, shuffle=True, num_workers=2)
    assert sorted(sample["text"] for sample in loader) == sorted(f"t{n}" for n in range(50))


@pytest.mark.slow
def test_a_large_jsonl_opens_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    line = orjson.dumps({"data_type": "text_pretrain", "text": "x" * 4000}) + b"\n"
    with path.open("wb") as out:
        for _ in range(100):
            out.write(line * 1000)  # 400 MB in all
    code = f"d = JsonlDataset({str(path)!r}); assert len(d) == 100_000 and len(d[99_999]['text']) == 4000"
    assert grown_mb("from loaders import JsonlDataset", code) < 60
