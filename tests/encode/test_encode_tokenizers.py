"""Tokenizers that do something wrong while they encode: the run ends with one line that names them, and no code is stored."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import image_bytes, last_line, wds_tools
from factory import make_dataset
from plugin import installed, write_plugin

from wds_tools.format.schema import Sample

WRONG = """
import torch


class Wrong:
    codebook_size, stride, weights_hash, device = 16, 16, "sha256:0", torch.device("cpu")

    def __init__(self, name):
        self.name = name

    def encode(self, pixels_BHWC):
        codes_Bhw = torch.zeros((len(pixels_BHWC), 32, 32), dtype=torch.int64)
        match self.name:
            case "above":
                codes_Bhw[-1, 3, 4] = 65_536 + 3
            case "below":
                codes_Bhw[0, 0, 0] = -2
            case "fewer":
                return codes_Bhw[:-1]
            case "flat":
                return codes_Bhw.flatten(1)
            case "floats":
                return codes_Bhw.float()
            case "fails":
                raise RuntimeError("the device\\nis on fire")
        return codes_Bhw

    def decode(self, codes_Bhw):
        raise NotImplementedError


def __getattr__(name):
    return lambda weights, device, precision: Wrong(name)
"""
NAMES = ("above", "below", "fewer", "flat", "floats", "fails")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    entries = "\n".join(f"{name} = somebodys_mistakes:{name}" for name in NAMES)
    return write_plugin(tmp_path_factory.mktemp("site"), "somebodys_mistakes", WRONG, entries)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("above", "gave codes of torch.int64 (3, 32, 32) from 0 to 65539 for 3 images of 512 x 512 pixels: expected integers"),
        ("below", "from -2 to 0 for 3 images of 512 x 512 pixels: expected integers (3, 32, 32) from 0 to 15"),
        ("fewer", "gave codes of torch.int64 (2, 32, 32)"),
        ("flat", "gave codes of torch.int64 (3, 1024)"),
        ("floats", "gave codes of torch.float32 (3, 32, 32)"),
        ("fails", "failed on 3 images of 512 x 512 pixels (RuntimeError: the device is on fire)"),
    ],
)
def test_a_tokenizer_that_does_wrong_is_named_and_nothing_of_it_is_stored(
    name: str, message: str, site: Path, tmp_path: Path
) -> None:
    fields = {"data_type": "image_text", "text": "a picture", "image_extension": "jpg"}
    make_dataset(tmp_path / "in", [Sample(key=f"{i}", image=image_bytes(i, 64, 48), **fields) for i in range(3)])  # type: ignore[arg-type]
    args = ["encode", "--input", tmp_path / "in", "--output", tmp_path / "out", "--tokenizer", name, "--device", "cpu"]
    with installed(site, "somebodys_mistakes"):
        said = wds_tools(*args, status=1).stderr
    assert f"tokenizer {name} " in last_line(said)
    assert message in last_line(said)
    assert len(said.splitlines()) == 1
    assert list((tmp_path / "out").glob("*.tar")) == []
