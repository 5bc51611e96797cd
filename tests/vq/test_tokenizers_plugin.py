"""A tokenizer of somebody else, plugged in from outside: a package with an entry point, around a real pretrained VQ-VAE.

The package is made here, as a third party would write it, from the description beside the weights; nothing of it is in this
project. Its codes are compared with the reference codes that came with the weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import image_bytes, read_samples, shared, wds_tools
from factory import make_dataset
from PIL import Image
from plugin import installed, write_plugin

from wds_tools.dataset.reader import read_manifest
from wds_tools.errors import TokenizerError, UsageError
from wds_tools.format.schema import Sample
from wds_tools.storage import open_store
from wds_tools.vq import ImageTokenizer, load_tokenizer

MODULE = '''
"""Somebody's VQ-VAE: stride 4, 512 codes."""

import torch
from torch.nn import functional as F

from wds_tools.vq.quantize import CodebookTokenizer, hash_files


class Network:
    def __init__(self, state):
        self.w = state

    def conv(self, name, x, **settings):
        return F.conv2d(x, self.w[name + ".weight"], self.w.get(name + ".bias"), **settings)

    def residual(self, part, x):
        for i in (0, 1):
            block = f"{part}._blocks.residual.residual_blocks.residual_{i}._block."
            x = F.relu(x)  # in place when it was trained, so the way past the block has it too
            x = x + self.conv(block + "conv_2", F.relu(self.conv(block + "conv_1", x, padding=1)))
        return F.relu(x)

    def latents(self, pixels_BCHW):
        x = F.relu(self.conv("encoder._blocks.conv_1", pixels_BCHW / 2, stride=2, padding=1))
        x = F.relu(self.conv("encoder._blocks.conv_2", x, stride=2, padding=1))
        x = self.residual("encoder", self.conv("encoder._blocks.conv_3", x, padding=1))
        return self.conv("pre_vq_conv", x)

    def image(self, latents_BDhw):
        x = self.residual("decoder", self.conv("decoder._blocks.conv_1", latents_BDhw, padding=1))
        for i in (1, 2):
            name = f"decoder._blocks.conv_t_{i}"
            x = F.conv_transpose2d(x, self.w[name + ".weight"], self.w[name + ".bias"], stride=2, padding=1)
            x = F.relu(x) if i == 1 else x
        return x * 2


def load(weights, device, precision):
    state = {name: tensor.to(device) for name, tensor in torch.load(weights, "cpu", weights_only=True).items()}
    codebook = state["vq_vae.codebook.weight"]
    return CodebookTokenizer(
        name="cifar-vqvae", stride=4, weights_hash=hash_files(weights), network=Network(state), codebook_KD=codebook,
        precision=precision,
    )
'''
ENTRY_POINTS = """cifar-vqvae = somebodys_vqvae:load
broken = somebodys_nothing:load
wrong = json:loads
tiny = somebodys_vqvae:load"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plugin(tmp_path_factory.mktemp("site"), "somebodys_vqvae", MODULE, ENTRY_POINTS)


@pytest.fixture
def plugged_in(site: Path) -> Iterator[None]:
    with installed(site, "somebodys_vqvae"):
        yield


@pytest.fixture
def weights() -> Path:
    return shared("weights/nimblebox_vqvae_cifar.pt")


@pytest.mark.usefixtures("plugged_in")
def test_a_real_pretrained_tokenizer_gives_its_reference_codes(weights: Path) -> None:
    tokenizer = load_tokenizer("cifar-vqvae", weights=str(weights), device="cpu")
    assert isinstance(tokenizer, ImageTokenizer)
    assert (tokenizer.codebook_size, tokenizer.stride) == (512, 4)
    facts = json.loads((weights.parent / "reference/reference.json").read_text())
    assert len(facts) == 4
    for name, fact in facts.items():
        pixels_HWC = np.array(Image.open(weights.parent / "reference" / name).convert("RGB"))
        codes_hw = tokenizer.encode(torch.from_numpy(pixels_HWC)[None])[0]
        expected_hw = np.load(weights.parent / "reference" / fact["codes"])
        assert codes_hw.shape == expected_hw.shape
        assert (codes_hw.numpy() != expected_hw).sum() <= 2, name  # ties in floating point
        decoded_HWC = tokenizer.decode(codes_hw[None])[0].numpy().astype(float)
        psnr = 10 * np.log10(255**2 / np.square(decoded_HWC - pixels_HWC).mean())
        assert abs(psnr - fact["psnr"]) < 0.05, name


@pytest.mark.usefixtures("plugged_in")
def test_it_encodes_a_dataset_from_the_command_line(weights: Path, tmp_path: Path) -> None:
    sample = Sample(key="a", data_type="image_text", text="a", image=image_bytes(1, 64, 64), image_extension="jpg")
    make_dataset(tmp_path / "in", [sample])
    args = ["encode", "--input", tmp_path / "in", "--output", tmp_path / "out", "--device", "cpu", "--tokenizer", "cifar-vqvae"]
    done = wds_tools(*args, "--weights", weights)
    assert "cifar-vqvae, 512 codes, fp32" in done.stdout
    assert read_samples(tmp_path / "out")[0].codes["vqcode_512"].shape == (128, 128)
    assert read_manifest(open_store(str(tmp_path / "out"))).codes["vqcode_512"]["tokenizer"] == "cifar-vqvae"


@pytest.mark.usefixtures("plugged_in")
def test_what_is_wrong_with_a_plugin_is_said_in_one_line() -> None:
    with pytest.raises(TokenizerError, match=r"'broken' of somebodys_nothing:load can't be imported \(ModuleNotFoundError"):
        load_tokenizer("broken", device="cpu")
    with pytest.raises(TokenizerError, match="'wrong': its loader failed"):
        load_tokenizer("wrong", device="cpu")
    with pytest.raises(UsageError, match="unknown tokenizer 'x': expected one of broken, chameleon, cifar-vqvae, emu3"):
        load_tokenizer("x", device="cpu")
    assert load_tokenizer("tiny", device="cpu").codebook_size == 4096, "a name of ours can't be taken"
