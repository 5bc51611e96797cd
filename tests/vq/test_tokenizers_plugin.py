"""A tokenizer of somebody else, plugged in from outside: a package with an entry point, around a real pretrained VQ-VAE.

The package is made here, as a third party would write it, from the description beside the weights; nothing of it is in this
project. Its codes are compared with the reference codes that came with the weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import image_bytes, read_samples, shared, wds_tools
from factory import make_dataset
from PIL import Image
from plugin import installed, write_plugin

from wds_tools.dataset.reader import read_manifest
from wds_tools.encode.encode import EncodeConfig, encode
from wds_tools.errors import DataError, TokenizerError, UsageError
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
cifar = somebodys_vqvae:load
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
def test_a_tokenizer_that_would_not_be_found_by_the_name_that_datasets_have_is_refused(weights: Path) -> None:
    with pytest.raises(TokenizerError, match="'cifar': its loader gave one that calls itself 'cifar-vqvae', and by that name"):
        load_tokenizer("cifar", weights=str(weights), device="cpu")


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
    with pytest.raises(UsageError, match="unknown tokenizer 'x': expected one of broken, chameleon, cifar, cifar-vqvae, emu3"):
        load_tokenizer("x", device="cpu")
    assert load_tokenizer("tiny", device="cpu").codebook_size == 4096, "a name of ours can't be taken"


LFQ = """
import torch

from wds_tools.vq.quantize import check_codes, check_pixels


class LookupFree:
    # A code is the signs of 6 numbers, read as bits: there is no codebook. Stride 16.
    name, codebook_size, stride, weights_hash = "lfq", 64, 16, "sha256:" + "0" * 64

    def __init__(self, device):
        self.device = device
        rng = torch.Generator().manual_seed(0)
        self.into = (torch.randn(6, 3, generator=rng)).to(device)

    def encode(self, pixels_BHWC):
        check_pixels(pixels_BHWC, self.stride)
        B, H, W, C = pixels_BHWC.shape
        means = pixels_BHWC.to(self.device).view(B, H // 16, 16, W // 16, 16, C).float().mean((2, 4))
        bits = (means / 127.5 - 1) @ self.into.T > 0
        return (bits * 2 ** torch.arange(6, device=self.device)).sum(-1)

    def decode(self, codes_Bhw):
        check_codes(codes_Bhw, self.codebook_size)
        signs = (codes_Bhw[..., None].long() >> torch.arange(6) & 1) * 2.0 - 1
        pixels = ((signs @ torch.linalg.pinv(self.into).T).clamp(-1, 1) + 1) * 127.5
        return pixels.to(torch.uint8).repeat_interleave(16, 1).repeat_interleave(16, 2)


def load(weights, device, precision):
    return LookupFree(device)
"""

STRIDE_14 = """
import torch

from wds_tools.vq.quantize import CodebookTokenizer


class Patches(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.into = torch.nn.Conv2d(3, 8, 14, stride=14)
        self.back = torch.nn.ConvTranspose2d(8, 3, 14, stride=14)
        self.codebook = torch.nn.Parameter(torch.randn(100, 8))

    def latents(self, pixels_BCHW):
        return self.into(pixels_BCHW)

    def image(self, latents_BDhw):
        return self.back(latents_BDhw)


def load(weights, device, precision):
    network = Patches().requires_grad_(False).to(device)
    return CodebookTokenizer(
        name="fourteen", stride=14, weights_hash="sha256:" + "0" * 64, network=network, codebook_KD=network.codebook.data,
        precision=precision,
    )
"""


def test_a_tokenizer_without_a_codebook_encodes_a_dataset(tmp_path: Path) -> None:
    site = write_plugin(tmp_path, "somebodys_lfq", LFQ, "lfq = somebodys_lfq:load")
    sample = Sample(key="a", data_type="image_text", text="a", image=image_bytes(1, 64, 64), image_extension="jpg")
    make_dataset(tmp_path / "in", [sample])
    with installed(site, "somebodys_lfq"):
        encode(EncodeConfig(input=str(tmp_path / "in"), output=str(tmp_path / "out"), tokenizer="lfq", device="cpu", quiet=True))
        tokenizer = load_tokenizer("lfq", device="cpu")
        codes = read_samples(tmp_path / "out")[0].codes["vqcode_512"]
        assert codes.shape == (32, 32)
        assert codes.max() < 64
        every = torch.arange(64).view(1, 8, 8)
        assert tokenizer.decode(every).shape == (1, 128, 128, 3)
        with pytest.raises(DataError, match="code 64 is outside the codebook of 64 entries"):
            tokenizer.decode(every + 1)


def test_a_stride_need_not_be_a_power_of_two(tmp_path: Path) -> None:
    site = write_plugin(tmp_path, "somebodys_patches", STRIDE_14, "fourteen = somebodys_patches:load")
    with installed(site, "somebodys_patches"):
        tokenizer = load_tokenizer("fourteen", device="cpu")
    pixels = torch.randint(0, 256, (2, 56, 84, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    codes = tokenizer.encode(pixels)
    assert codes.shape == (2, 4, 6)
    assert len(codes.unique()) > 5
    assert tokenizer.decode(codes).shape == pixels.shape
    with pytest.raises(UsageError, match="H=64 is not a multiple of 14: crop to 56 or 70 first"):
        tokenizer.encode(torch.zeros(1, 64, 84, 3, dtype=torch.uint8))


def test_without_a_tokenizer_named_one_line_says_that_tiny_is_for_trials(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = Sample(key="a", data_type="image_text", text="a", image=image_bytes(1, 64, 64), image_extension="jpg")
    make_dataset(tmp_path / "in", [sample])
    settings: dict[str, Any] = {"input": str(tmp_path / "in"), "device": "cpu", "quiet": True}
    manifest = encode(EncodeConfig(**settings, output=str(tmp_path / "out")))
    assert manifest.codes["vqcode_512"]["tokenizer"] == "tiny"
    assert [line for line in capsys.readouterr().err.splitlines() if "tiny" in line] == [
        "wds-tools: no --tokenizer is named: `tiny` encodes, which is for trials; see docs/tokenizers.md"
    ]
    encode(EncodeConfig(**settings, output=str(tmp_path / "named"), tokenizer="tiny"))
    assert "tiny" not in capsys.readouterr().err
