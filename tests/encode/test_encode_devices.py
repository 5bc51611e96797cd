"""Several devices have a process each and give the same bytes; shards are dealt out one by one: a slow one holds up nobody."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import image_bytes, tree, wds_tools
from factory import make_dataset, text_sample
from plugin import installed, write_plugin

from wds_tools.dataset.reader import read_manifest
from wds_tools.encode.encode import EncodeConfig, encode
from wds_tools.encode.image_encoder import ImageEncoder
from wds_tools.encode.options import TokenizerOptions
from wds_tools.errors import UsageError
from wds_tools.format.schema import Sample
from wds_tools.images import ImageLimits
from wds_tools.storage import open_store

NUM_SHARDS = 9

# The process that encodes first is the slow one: it does not get past its first image before all others are encoded.
SLOW = """
import os
import time
from pathlib import Path

import torch

log = Path(os.environ["ENCODED"])


class Slow:
    name, codebook_size, stride, weights_hash, device = "slow", 16, 16, "sha256:0", torch.device("cpu")
    is_slow = None

    def encode(self, pixels_BHWC):
        if self.is_slow is None:
            try:
                (log / "the-slow-one").touch(exist_ok=False)
                self.is_slow = True
            except FileExistsError:
                self.is_slow = False
        deadline = time.monotonic() + 60
        while self.is_slow and len(list(log.glob("*.done"))) < int(os.environ["OTHERS"]):
            assert time.monotonic() < deadline, "the others were not encoded meanwhile"
            time.sleep(0.01)
        (log / f"{os.getpid()}-{time.monotonic_ns()}.done").touch()
        return torch.zeros((len(pixels_BHWC), 32, 32), dtype=torch.int64)

    def decode(self, codes_Bhw):
        raise NotImplementedError


def load(weights, device, precision):
    return Slow()
"""


def images(count: int) -> list[Sample]:
    fields = {"data_type": "image_text", "text": "a picture", "image_extension": "jpg"}
    return [Sample(key=f"{i:04d}", image=image_bytes(i, 64, 48), **fields) for i in range(count)]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs and documents in shards of three."""
    folder = tmp_path_factory.mktemp("mixed") / "in"
    make_dataset(folder, [*images(7), text_sample(1), text_sample(2)], shard_samples=3)
    return folder


def fill(source: Path, output: Path, device: str) -> None:
    encode(EncodeConfig(input=str(source), output=str(output), device=device, shard_samples=3, quiet=True))


@pytest.mark.slow
def test_a_slow_device_does_one_shard_while_the_other_does_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site, log = tmp_path / "site", tmp_path / "log"
    site.mkdir()
    log.mkdir()
    write_plugin(site, "somebodys_slow", SLOW, "slow = somebodys_slow:load")
    make_dataset(tmp_path / "in", images(NUM_SHARDS), shard_samples=1)
    monkeypatch.setenv("ENCODED", str(log))
    monkeypatch.setenv("OTHERS", str(NUM_SHARDS - 1))
    args = ["encode", "--input", tmp_path / "in", "--output", tmp_path / "out", "--tokenizer", "slow", "--shard-samples", "1"]
    with installed(site, "somebodys_slow"):
        wds_tools(*args, "--device", "cpu,cpu")
    done = [path.name.partition("-")[0] for path in sorted(log.glob("*.done"))]
    assert sorted(done.count(pid) for pid in set(done)) == [1, NUM_SHARDS - 1]
    assert read_manifest(open_store(str(tmp_path / "out"))).samples == NUM_SHARDS


@pytest.mark.slow
def test_several_devices_have_a_process_each_and_give_the_same_bytes(mixed: Path, tmp_path: Path) -> None:
    fill(mixed, tmp_path / "one", "cpu")
    fill(mixed, tmp_path / "two", "cpu,cpu")
    assert tree(tmp_path / "two") == tree(tmp_path / "one")


def test_a_list_of_gpus_is_one_device_a_process() -> None:
    assert TokenizerOptions(device="cuda:0,1,12").devices == ("cuda:0", "cuda:1", "cuda:12")
    assert TokenizerOptions(device="cuda:3").devices == ("cuda:3",)
    with pytest.raises(UsageError, match="names cuda:1 twice"):
        TokenizerOptions(device="cuda:1,2,1")
    with pytest.raises(UsageError, match="each device has one process, so leave --workers out"):
        ImageEncoder("tiny", TokenizerOptions(device="cpu,cpu"), workers=3, keep_images=False, limits=ImageLimits())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("device", ["cuda:0,1", "cpu,cuda:1"])
def test_a_device_that_is_not_there_is_found_before_anything_is_written(device: str, mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="finds no CUDA device"):
        fill(mixed, tmp_path / "out", device)
    assert not (tmp_path / "out").exists()
