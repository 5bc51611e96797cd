"""Image tokenizers: pixels to codes and back, weights that load or are refused.

Chameleon's network is checked against a second implementation, written here from the checkpoint's own names with
torch.nn.functional alone; its weights are random, and its codebook is drawn from latents of real photographs so that
near ties do not blur the comparison. Legend as in wds_tools.vq: B H W pixels, h w codes.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from properties import tries
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from weights import config_tree, one_by_one, vqgan, vqgan_state, write_vqgan

from wds_tools.errors import DataError, MissingPackage, TokenizerError, UsageError
from wds_tools.vq import ImageTokenizer, load_tokenizer, nearest
from wds_tools.vq.lanes import side_by_side
from wds_tools.vq.norm import GroupNorm
from wds_tools.vq.quantize import CodebookTokenizer
from wds_tools.vq.tiny import BUNDLED, TinyConfig, TinyVQ, load_tiny, save_tiny

PHOTOS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "camera.png")
TINY_PSNR_FLOOR_DB = {  # about 0.5 dB below what the shipped weights reach
    "astronaut.png": 21.8,
    "coffee.png": 24.6,
    "chelsea.png": 27.0,
    "rocket.jpg": 26.9,
    "camera.png": 24.0,  # the only one that was held out of training
}
SMALL = vqgan()
FULL = {"ch": 128, "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "z_channels": 256, "n_embed": 8192, "embed_dim": 256}


def photo(name: str, H: int = 512, W: int = 512) -> Tensor:
    """A photograph scaled to cover H x W and cut to it at the centre: uint8 pixels_HWC."""
    from PIL import Image

    image = Image.open(Path(skimage.data.__file__).parent / name).convert("RGB")
    scale = min(image.width / W, image.height / H)
    left, top = (image.width - W * scale) / 2, (image.height - H * scale) / 2
    box = (left, top, left + W * scale, top + H * scale)
    return torch.from_numpy(np.array(image.resize((W, H), Image.Resampling.LANCZOS, box=box)))


def psnr_db(a: Tensor, b: Tensor) -> float:
    return float(10 * torch.log10(255**2 / (a.float() - b.float()).square().mean()))


# --- Chameleon: a second implementation, from the checkpoint's names -----------------------------------------------


class PlainVqgan:
    """The forward pass of a checkpoint, one function call after the other, in float64: with torch's own norms in float32 two of
    the 1,024 codes of a large image are others."""

    def __init__(self, state: dict[str, Tensor], config: dict[str, Any]) -> None:
        self.state = {name: value.double() for name, value in state.items()}
        self.levels, self.blocks = len(config["ch_mult"]), config["num_res_blocks"]

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.state[f"{name}.weight"]
        pad = weight.shape[2] // 2 if stride == 1 else 0
        return functional.conv2d(x, weight, self.state[f"{name}.bias"], stride=stride, padding=pad)

    def norm(self, name: str, x: Tensor) -> Tensor:
        return functional.group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps=1e-6)

    def block(self, name: str, x: Tensor) -> Tensor:
        inner = self.conv(f"{name}.conv1", functional.silu(self.norm(f"{name}.norm1", x)))
        inner = self.conv(f"{name}.conv2", functional.silu(self.norm(f"{name}.norm2", inner)))
        if f"{name}.nin_shortcut.weight" in self.state:
            x = self.conv(f"{name}.nin_shortcut", x)
        return x + inner

    def middle(self, name: str, x: Tensor) -> Tensor:
        x = self.block(f"{name}.block_1", x)
        B, C, H, W = x.shape
        normed = self.norm(f"{name}.attn_1.norm", x)
        q, k, v = (self.conv(f"{name}.attn_1.{part}", normed).view(B, C, H * W) for part in "qkv")
        share = torch.einsum("bci,bcj->bij", q, k).div(C**0.5).softmax(dim=2)
        attended = torch.einsum("bij,bcj->bci", share, v).view(B, C, H, W)
        x = x + self.conv(f"{name}.attn_1.proj_out", attended)
        return self.block(f"{name}.block_2", x)

    def latents(self, pixels_BHWC: Tensor) -> Tensor:
        x = self.conv("encoder.conv_in", (pixels_BHWC.double() / 255 * 2 - 1).permute(0, 3, 1, 2))
        for level in range(self.levels):
            for i in range(self.blocks):
                x = self.block(f"encoder.down.{level}.block.{i}", x)
            if level < self.levels - 1:
                x = self.conv(f"encoder.down.{level}.downsample.conv", functional.pad(x, (0, 1, 0, 1)), stride=2)
        x = functional.silu(self.norm("encoder.norm_out", self.middle("encoder.mid", x)))
        return self.conv("quant_conv", self.conv("encoder.conv_out", x))

    def codes(self, pixels_BHWC: Tensor) -> Tensor:
        latents_BhwD = self.latents(pixels_BHWC).permute(0, 2, 3, 1)
        book_KD = self.state["quantize.embedding.weight"]
        return torch.stack([torch.cdist(one.flatten(0, 1), book_KD).argmin(1).view(one.shape[:2]) for one in latents_BhwD])

    def pixels(self, codes_Bhw: Tensor) -> Tensor:
        entries = self.state["quantize.embedding.weight"][codes_Bhw].permute(0, 3, 1, 2)
        x = self.middle("decoder.mid", self.conv("decoder.conv_in", self.conv("post_quant_conv", entries)))
        for level in reversed(range(self.levels)):
            for i in range(self.blocks + 1):
                x = self.block(f"decoder.up.{level}.block.{i}", x)
            if level:
                x = self.conv(f"decoder.up.{level}.upsample.conv", functional.interpolate(x, scale_factor=2.0))
        x = self.conv("decoder.conv_out", functional.silu(self.norm("decoder.norm_out", x)))
        return ((x.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1)


def with_real_codebook(state: dict[str, Tensor], config: dict[str, Any], pixels_BHWC: Tensor) -> dict[str, Tensor]:
    """Draw the codebook from latents of these pixels: each entry has a latent that it fits exactly."""
    latents_ND = one_by_one(PlainVqgan(state, config).latents, pixels_BHWC).permute(0, 2, 3, 1).flatten(0, 2).float()
    rng = torch.Generator().manual_seed(1)
    picks = torch.randint(len(latents_ND), (config["n_embed"],), generator=rng)
    noise = torch.randn(config["n_embed"], config["embed_dim"], generator=rng)
    return {**state, "quantize.embedding.weight": latents_ND[picks] + 0.05 * latents_ND.std() * noise}


@pytest.fixture(scope="module")
def small_state() -> dict[str, Tensor]:
    others = torch.stack([photo(name, 128, 128) for name in PHOTOS[2:]])
    return with_real_codebook(vqgan_state(SMALL), SMALL, others)


@pytest.fixture(scope="module")
def small_folder(small_state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vqgan(tmp_path_factory.mktemp("vqgan"), config_tree(SMALL), small_state)


def check_against_plain(folder: Path, state: dict[str, Tensor], config: dict[str, Any], pixels_BHWC: Tensor) -> None:
    tokenizer = load_tokenizer("chameleon", weights=str(folder), device="cpu")
    plain = PlainVqgan(state, config)
    codes = tokenizer.encode(pixels_BHWC)
    expected = one_by_one(plain.codes, pixels_BHWC)
    pixels = one_by_one(plain.pixels, codes)
    assert codes.dtype == torch.int64
    assert len(set(codes.flatten().tolist())) > 20, "a comparison of constant codes would prove nothing"
    assert torch.equal(codes, expected)
    assert (tokenizer.decode(codes).float() - pixels).abs().max() < 0.51  # rounding to uint8


@pytest.mark.slow
def test_codes_of_chameleon_equal_those_of_a_plain_forward_pass(small_folder: Path, small_state: dict[str, Tensor]) -> None:
    pixels = torch.stack([photo(name, 192, 256) for name in PHOTOS])
    check_against_plain(small_folder, small_state, SMALL, pixels)


@pytest.mark.slow
def test_codes_of_a_full_size_chameleon_equal_those_of_a_plain_forward_pass(tmp_path: Path) -> None:
    state = with_real_codebook(vqgan_state(FULL), FULL, photo("coffee.png", 256, 256)[None])
    folder = write_vqgan(tmp_path / "vqgan", config_tree(FULL), state)
    check_against_plain(folder, state, FULL, photo("astronaut.png", 256, 256)[None])


def test_chameleon_says_what_it_is(small_folder: Path) -> None:
    tokenizer = load_tokenizer("chameleon", weights=str(small_folder), device="cpu")
    assert isinstance(tokenizer, ImageTokenizer)
    assert (tokenizer.name, tokenizer.codebook_size, tokenizer.stride) == ("chameleon", 512, 16)
    assert tokenizer.weights_hash.startswith("sha256:")
    assert len(tokenizer.weights_hash) == len("sha256:") + 64


def test_chameleon_gives_the_same_codes_in_any_batch(small_folder: Path) -> None:
    tokenizer = load_tokenizer("chameleon", weights=str(small_folder), device="cpu")
    pixels = torch.stack([photo(name, 64, 96) for name in PHOTOS])
    codes = tokenizer.encode(pixels)
    assert codes.shape == (5, 4, 6)
    assert torch.equal(codes.flip(0), tokenizer.encode(pixels.flip(0)))
    assert torch.equal(codes[2:3], tokenizer.encode(pixels[2:3]))


def test_bf16_changes_few_codes_of_chameleon(small_folder: Path) -> None:
    pixels = photo("coffee.png", 160, 160)[None]
    exact = load_tokenizer("chameleon", weights=str(small_folder), device="cpu").encode(pixels)
    rough = load_tokenizer("chameleon", weights=str(small_folder), device="cpu", precision="bf16").encode(pixels)
    assert (exact == rough).float().mean() > 0.8


def test_the_yaml_may_have_its_params_at_the_top_level(small_state: dict[str, Tensor], tmp_path: Path) -> None:
    for i, tree in enumerate((config_tree(SMALL)["model"], config_tree(SMALL)["model"]["params"])):
        folder = write_vqgan(tmp_path / str(i), tree, small_state)
        assert load_tokenizer("chameleon", weights=str(folder), device="cpu").codebook_size == 512


def test_other_numbers_of_levels_give_other_strides(tmp_path: Path) -> None:
    config = {**SMALL, "ch_mult": [1, 2, 4], "num_res_blocks": 1}
    folder = write_vqgan(tmp_path / "vqgan", config_tree(config), vqgan_state(config))
    tokenizer = load_tokenizer("chameleon", weights=str(folder), device="cpu")
    assert tokenizer.stride == 4
    assert tokenizer.encode(photo("coffee.png", 32, 64)[None]).shape == (1, 8, 16)


# --- Chameleon: what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"double_z": True}, "double_z is True"),
        ({"attn_resolutions": [32]}, r"lack decoder\.up\.4\.attn\.0\.k\.bias, .* and 47 more"),
        ({"ch_mult": [2, 2, 4, 4, 8]}, "the first of them 1"),
        ({"ch_mult": []}, "ch_mult is"),
        ({"ch_mult": 4}, "expected a list"),
        ({"ch": 48}, "multiple of 32"),
        ({"ch": "many"}, "expected a whole number"),
        ({"in_channels": 4}, "expected 3"),
        ({"ch": 64}, "encoder.conv_in.weight is .* asks for"),
        ({"num_res_blocks": 3}, r"lack decoder\.up\.0\.block\.3\.conv1\.bias, .* and 77 more"),
        ({"num_res_blocks": 1}, "unexpected .*block"),
        ({"n_embed": 1024}, "quantize.embedding.weight is .* asks for"),
    ],
)
def test_a_yaml_that_the_weights_do_not_fit_is_refused_in_one_line(
    changes: dict[str, Any], message: str, small_state: dict[str, Tensor], tmp_path: Path
) -> None:
    folder = write_vqgan(tmp_path / "vqgan", config_tree(SMALL, **changes), small_state)
    with pytest.raises(TokenizerError, match=message) as caught:
        load_tokenizer("chameleon", weights=str(folder), device="cpu")
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [unclosed", "not yaml"),
        ("just words", "no ddconfig"),
        ("model: {params: {n_embed: 4, embed_dim: 4}}", "no ddconfig"),
        ("model: {params: {ddconfig: {ch: 32}}}", "n_embed is missing"),
        ("a: !!python/object/apply:os.getcwd []", "not yaml"),
        ("", "no ddconfig"),
    ],
)
def test_a_bad_yaml_is_refused_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    folder = write_vqgan(tmp_path / "vqgan", {}, {})
    (folder / "vqgan.yaml").write_text(text)
    with pytest.raises(TokenizerError, match=message) as caught:
        load_tokenizer("chameleon", weights=str(folder), device="cpu")
    assert "\n" not in str(caught.value)


def test_missing_and_unexpected_tensors_are_named(small_state: dict[str, Tensor], tmp_path: Path) -> None:
    less = {key: value for key, value in small_state.items() if key != "post_quant_conv.bias"}
    folder = write_vqgan(tmp_path / "vqgan", config_tree(SMALL), less)
    with pytest.raises(TokenizerError, match=r"lack post_quant_conv\.bias: they do not fit"):
        load_tokenizer("chameleon", weights=str(folder), device="cpu")
    write_vqgan(folder, config_tree(SMALL), {**small_state, "extra.decay": torch.zeros(1)})
    with pytest.raises(TokenizerError, match=r"unexpected extra\.decay"):
        load_tokenizer("chameleon", weights=str(folder), device="cpu")
    write_vqgan(folder, config_tree(SMALL), {**small_state, "quant_conv.bias": "zero"})
    with pytest.raises(TokenizerError, match=r"quant_conv\.bias is str"):
        load_tokenizer("chameleon", weights=str(folder), device="cpu")


class WritesAFile:
    """Unpickled without care, this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(small_state: dict[str, Tensor], tmp_path: Path) -> None:
    target = tmp_path / "written by the checkpoint"
    folder = write_vqgan(tmp_path / "vqgan", config_tree(SMALL), {**small_state, "extra": WritesAFile(target)})
    with pytest.raises(TokenizerError, match="holds more than tensors") as caught:
        load_tokenizer("chameleon", weights=str(folder), device="cpu")
    assert not target.exists()
    assert "\n" not in str(caught.value)


def test_a_pickle_that_torch_did_not_write_is_refused_in_one_line_and_without_a_warning(tmp_path: Path) -> None:
    target = tmp_path / "written by the checkpoint"
    folder = write_vqgan(tmp_path / "vqgan", config_tree(SMALL), {})
    (folder / "vqgan.ckpt").write_bytes(pickle.dumps({"state_dict": WritesAFile(target)}, protocol=4))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises(TokenizerError, match=r"vqgan\.ckpt is damaged or holds"):
            load_tokenizer("chameleon", weights=str(folder), device="cpu")
    assert warned == []
    assert not target.exists()


def test_a_folder_is_no_tiny_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="is a folder: a tiny tokenizer is one"):
        load_tokenizer("tiny", weights=str(tmp_path), device="cpu")


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "text"])
def test_a_damaged_checkpoint_is_refused(damage: str, small_folder: Path, tmp_path: Path) -> None:
    whole = (small_folder / "vqgan.ckpt").read_bytes()
    noise = np.random.default_rng(0).bytes(5000)
    data = {"cut": whole[: len(whole) // 2], "empty": b"", "noise": noise, "text": b"version https://git-lfs\n"}[damage]
    folder = write_vqgan(tmp_path / "vqgan", config_tree(SMALL), {})
    (folder / "vqgan.ckpt").write_bytes(data)
    with pytest.raises(TokenizerError, match=r"vqgan\.ckpt is damaged"):
        load_tokenizer("chameleon", weights=str(folder), device="cpu")


def test_a_checkpoint_without_tensors_is_refused(tmp_path: Path) -> None:
    folder = write_vqgan(tmp_path / "vqgan", config_tree(SMALL), {})
    torch.save([torch.zeros(2)], folder / "vqgan.ckpt")
    with pytest.raises(TokenizerError, match="0 codebooks"):
        load_tokenizer("chameleon", weights=str(folder), device="cpu")


@pytest.mark.parametrize("name", ["vqgan.yaml", "vqgan.ckpt"])
def test_a_missing_file_is_named_with_what_the_folder_needs(name: str, tmp_path: Path) -> None:
    folder = write_vqgan(tmp_path / "vqgan", config_tree(SMALL), {})
    (folder / name).unlink()
    with pytest.raises(TokenizerError, match=rf"{name} is missing: the folder needs vqgan\.yaml and vqgan\.ckpt"):
        load_tokenizer("chameleon", weights=str(folder), device="cpu")


def test_without_diffusers_the_error_has_the_pip_line(small_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingPackage, match=r"pip install 'wds-tools\[convert\]'"):
        load_tokenizer("chameleon", weights=str(small_folder), device="cpu")


# --- tiny ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> ImageTokenizer:
    return load_tokenizer("tiny", device="cpu")


def test_tiny_says_what_it_is(tiny: ImageTokenizer) -> None:
    assert isinstance(tiny, ImageTokenizer)
    assert (tiny.name, tiny.codebook_size, tiny.stride) == ("tiny", 4096, 16)
    assert tiny.weights_hash == load_tokenizer("tiny", weights=str(BUNDLED), device="cpu").weights_hash


def test_the_bundled_weights_are_smaller_than_5_mb() -> None:
    assert BUNDLED.stat().st_size < 5_000_000


@pytest.mark.parametrize("name", PHOTOS)
def test_tiny_gives_photographs_back_above_the_stated_psnr(name: str, tiny: ImageTokenizer) -> None:
    pixels = photo(name)[None]
    codes = tiny.encode(pixels)
    assert codes.shape == (1, 32, 32)
    assert psnr_db(tiny.decode(codes), pixels) > TINY_PSNR_FLOOR_DB[name]


def test_tiny_uses_much_of_its_codebook(tiny: ImageTokenizer) -> None:
    codes = tiny.encode(torch.stack([photo(name) for name in PHOTOS]))
    assert len(set(codes.flatten().tolist())) > 1200  # of 5120 codes


def test_tiny_gives_the_same_codes_in_any_batch_and_order(tiny: ImageTokenizer) -> None:
    pixels = torch.stack([photo(name, 256, 320) for name in PHOTOS])
    codes = tiny.encode(pixels)
    order = [3, 0, 4, 1, 2]
    assert torch.equal(codes[order], tiny.encode(pixels[order]))
    for i in range(5):
        assert torch.equal(codes[i : i + 1], tiny.encode(pixels[i : i + 1]))
    assert torch.equal(tiny.decode(codes)[order], tiny.decode(codes[order]))


@pytest.mark.parametrize(("H", "W"), [(512, 1024), (1024, 512), (768, 768), (384, 1536), (16, 16), (16, 64)])
def test_tiny_takes_any_multiples_of_its_stride(H: int, W: int, tiny: ImageTokenizer) -> None:
    codes = tiny.encode(photo("coffee.png", H, W)[None])
    assert codes.shape == (1, H // 16, W // 16)
    pixels = tiny.decode(codes)
    assert (pixels.shape, pixels.dtype) == ((1, H, W, 3), torch.uint8)


@pytest.mark.parametrize(
    ("H", "W", "message"),
    [
        (500, 512, "H=500 is not a multiple of 16: crop to 496 or 512 first"),
        (512, 513, "W=513 is not a multiple of 16: crop to 512 or 528 first"),
        (9, 16, "H=9 is not a multiple of 16: crop to 16 first"),
    ],
)
def test_sizes_off_the_stride_are_refused_with_the_sizes_to_crop_to(H: int, W: int, message: str, tiny: ImageTokenizer) -> None:
    with pytest.raises(UsageError) as caught:
        tiny.encode(torch.zeros(1, H, W, 3, dtype=torch.uint8))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "pixels",
    [
        torch.zeros(1, 16, 16, 3),
        torch.zeros(16, 16, 3, dtype=torch.uint8),
        torch.zeros(1, 3, 16, 16, dtype=torch.uint8),
        torch.zeros(1, 16, 16, 4, dtype=torch.uint8),
    ],
)
def test_pixels_of_another_dtype_or_shape_are_refused(pixels: Tensor, tiny: ImageTokenizer) -> None:
    with pytest.raises(UsageError, match=r"expected torch.uint8 of shape \(B, H, W, 3\)"):
        tiny.encode(pixels)


@pytest.mark.parametrize("code", [-1, 4096, 10**9])
def test_a_code_outside_the_codebook_is_refused(code: int, tiny: ImageTokenizer) -> None:
    with pytest.raises(DataError, match=f"code {code} is outside the codebook of 4096 entries"):
        tiny.decode(torch.tensor([[[0, code]]]))


@pytest.mark.parametrize("codes", [torch.zeros(1, 2, 2), torch.zeros(2, 2, dtype=torch.int64)])
def test_codes_of_another_dtype_or_shape_are_refused(codes: Tensor, tiny: ImageTokenizer) -> None:
    with pytest.raises(UsageError, match=r"expected integers of shape \(B, h, w\)"):
        tiny.decode(codes)


def test_codes_may_be_of_any_integer_type(tiny: ImageTokenizer) -> None:
    codes = tiny.encode(photo("coffee.png", 64, 64)[None])
    pixels = tiny.decode(codes)
    for dtype in (torch.int16, torch.int32, torch.uint16):
        assert torch.equal(pixels, tiny.decode(codes.to(dtype)))


def test_a_batch_of_no_images_gives_no_codes(tiny: ImageTokenizer) -> None:
    codes = tiny.encode(torch.zeros(0, 32, 48, 3, dtype=torch.uint8))
    assert codes.shape == (0, 2, 3)
    assert tiny.decode(codes).shape == (0, 32, 48, 3)


def test_equal_weights_are_saved_as_equal_bytes(tmp_path: Path) -> None:
    model = TinyVQ(TinyConfig(codebook_size=8, enc8=4, enc16=4, dec16=4, dec8=4, dec4=4))
    save_tiny(model, tmp_path / "a.safetensors")
    save_tiny(model, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert load_tiny(tmp_path / "a.safetensors").codebook_size == 8


def test_tiny_weights_that_do_not_fit_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    configs = ["{}", "not json", '{"codebook_size": 0}', '{"depth": 3}', "[]", json.dumps({"codebook_size": 8})]
    writers: list[Any] = [lambda c=c: save_file({"a": torch.zeros(2)}, path, metadata={"tiny_vq": c}) for c in configs]
    writers += [lambda: save_file({"a": torch.zeros(2)}, path), lambda: path.write_bytes(b"\x80\x04K\x01."), path.unlink]
    for write in writers:
        write()
        with pytest.raises(TokenizerError, match=r"w\.safetensors does not hold a tiny tokenizer") as caught:
            load_tokenizer("tiny", weights=str(path), device="cpu")
        assert "\n" not in str(caught.value)


def test_weights_that_are_no_numbers_are_refused_and_named_and_so_are_pictures(tmp_path: Path) -> None:
    model = TinyVQ(TinyConfig(codebook_size=8, enc8=4, enc16=4, dec16=4, dec8=4, dec4=4))
    assert isinstance(model.decoder[-2], torch.nn.Conv2d)
    for weights, name in ((model.decoder[-2].bias, r"decoder\.12\.bias"), (model.codebook_KD, "codebook_KD")):
        was = weights.detach().clone()
        with torch.no_grad():
            weights[1] = torch.nan
        save_tiny(model, tmp_path / "w.safetensors")
        with torch.no_grad():
            weights.copy_(was)
        with pytest.raises(TokenizerError, match=f"tokenizer tiny: {name} has NaN or infinite weights: the file is damaged"):
            load_tokenizer("tiny", weights=str(tmp_path / "w.safetensors"), device="cpu")
    tokenizer = CodebookTokenizer(name="tiny", stride=16, weights_hash="", network=model, codebook_KD=model.codebook_KD)
    with torch.no_grad():
        model.decoder[-2].bias.fill_(torch.inf)
    with pytest.raises(TokenizerError, match="tiny in fp32 gave NaN or infinite pixels for picture 0 of 2: use --precision"):
        tokenizer.decode(torch.zeros(2, 1, 1, dtype=torch.int64))


# --- the registry --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("vqgan", {}, "unknown tokenizer 'vqgan': expected one of chameleon, emu3, emu35, glm-image, janus, llamagen, tiny"),
        ("tiny", {"device": "tpu"}, "unknown device 'tpu'"),
        ("tiny", {"precision": "fp8"}, "unknown precision 'fp8': expected one of fp32, tf32, bf16, fp16"),
        ("chameleon", {}, r"a folder with vqgan\.yaml and vqgan\.ckpt"),
    ],
)
def test_what_the_registry_does_not_know_is_refused(name: str, settings: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_tokenizer(name, **settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_where_there_is_none_is_refused(device: str) -> None:
    with pytest.raises(UsageError, match=f"device {device} was asked for, but torch .* finds no CUDA device"):
        load_tokenizer("tiny", device=device)


@pytest.mark.slow
def test_importing_the_tokenizers_does_not_import_diffusers() -> None:
    code = "import sys, wds_tools.vq; print(sorted({'diffusers', 'yaml', 'PIL'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- nearest -------------------------------------------------------------------------------------------------------

INTEGERS = st.integers(-50, 50).map(float)  # exact in float32, so that ties are true ties


@pytest.mark.slow
@tries(200)
@given(data=st.data(), N=st.integers(0, 40), K=st.integers(1, 30), D=st.integers(1, 6), chunk=st.integers(1, 50))
def test_nearest_is_a_brute_force_argmin_with_ties_to_the_lowest_index(
    data: st.DataObject, N: int, K: int, D: int, chunk: int
) -> None:
    latents = data.draw(hnp.arrays(np.float32, (N, D), elements=INTEGERS))
    codebook = data.draw(hnp.arrays(np.float32, (K, D), elements=INTEGERS))
    distances = ((latents[:, None, :].astype(np.float64) - codebook[None, :, :]) ** 2).sum(-1)
    codes = nearest(torch.from_numpy(latents), torch.from_numpy(codebook), chunk)
    assert codes.dtype == torch.int64
    assert codes.tolist() == distances.argmin(axis=1).tolist()


def test_nearest_does_not_depend_on_the_chunk() -> None:
    rng = torch.Generator().manual_seed(0)
    latents, codebook = torch.randn(3000, 16, generator=rng), torch.randn(512, 16, generator=rng)
    whole = nearest(latents, codebook, 3000)
    assert torch.equal(whole, torch.cdist(latents.double(), codebook.double()).argmin(1))
    for chunk in (1000, 37):
        assert torch.equal(whole, nearest(latents, codebook, chunk))


def test_nearest_compares_in_float32_under_autocast_too() -> None:
    codebook = torch.tensor([[1000.0], [1001.0], [1002.0]])  # one number in bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert nearest(torch.tensor([[1001.1], [1001.9]]), codebook, 8).tolist() == [1, 2]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_latent_that_is_no_number_is_nearest_to_no_code(bad: float) -> None:
    rng = torch.Generator().manual_seed(0)
    latents, codebook = torch.randn(700, 16, generator=rng), torch.randn(512, 16, generator=rng)
    expected = nearest(latents, codebook)
    latents[[3, 256, 699], [0, 5, 15]] = bad
    expected[[3, 256, 699]] = -1
    assert torch.equal(nearest(latents, codebook), expected)
    codebook[7, 2] = bad  # an entry that is as near as any, or none
    assert (nearest(latents, codebook)[[3, 256, 699]] == -1).all()


def test_nearest_refuses_shapes_that_do_not_go_together() -> None:
    with pytest.raises(UsageError, match=r"expected \(N, D\) and \(K, D\)"):
        nearest(torch.zeros(3, 4), torch.zeros(5, 6), 8)
    with pytest.raises(UsageError, match="at least 1"):
        nearest(torch.zeros(3, 4), torch.zeros(0, 4), 8)


# --- sums in one order ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "precision"),
    [("tiny", "fp32"), ("tiny", "bf16"), ("chameleon", "fp32"), pytest.param("chameleon", "bf16", marks=pytest.mark.slow)],
)
def test_codes_depend_on_nothing_but_the_image(name: str, precision: str, small_folder: Path) -> None:
    weights = str(small_folder) if name == "chameleon" else None
    tokenizer = load_tokenizer(name, weights=weights, device="cpu", precision=precision)
    H, W = (96, 80) if name == "chameleon" else (192, 160)
    pixels = torch.stack([photo(name, H, W) for name in PHOTOS])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        codes = tokenizer.encode(pixels)
        for count in (2, 3, 5):
            torch.set_num_threads(count)
            assert torch.equal(tokenizer.encode(pixels), codes)
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(tokenizer.encode(pixels[1:4]), codes[1:4])
    for i, one in enumerate(pixels):
        assert torch.equal(tokenizer.encode(one[None]), codes[i : i + 1])
        assert torch.equal(tokenizer.encode(torch.from_numpy(one.numpy()[None])), codes[i : i + 1])  # a stride of 0


def test_a_lane_has_one_thread_whatever_torch_has_elsewhere() -> None:
    threads = torch.get_num_threads()
    found: dict[int, int] = {}

    def look(place: int) -> None:
        torch.zeros(1 << 20).sum()
        found[place] = torch.get_num_threads()

    try:
        for count in (3, 1, 2):
            torch.set_num_threads(count)
            side_by_side(look, range(6))
            assert set(found.values()) == {1}
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_forked_process_encodes_too(tiny: ImageTokenizer) -> None:
    code = (
        "import os, torch\n"
        "from wds_tools.vq import load_tokenizer\n"
        "tokenizer, pixels = load_tokenizer('tiny', device='cpu'), torch.zeros(3, 32, 32, 3, dtype=torch.uint8)\n"
        "codes = tokenizer.encode(pixels)\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(not torch.equal(tokenizer.encode(pixels), codes))\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=200)
    assert done.stdout.strip() == "0"


@pytest.mark.parametrize("shape", [(2, 64, 96, 80), (1, 32, 7, 5), (3, 64, 24), (1, 64, 512, 512)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_norms_are_those_of_float64(shape: tuple[int, ...], channels_last: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=rng) * 3 + torch.randn(shape[1], generator=rng).view(1, -1, *[1] * (len(shape) - 2))
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x.transpose(1, 2).contiguous().transpose(1, 2)
    norm = torch.nn.GroupNorm(32, shape[1], eps=1e-6)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(shape[1], generator=rng))
        norm.bias.copy_(torch.randn(shape[1], generator=rng))
        exact = functional.group_norm(x.double(), 32, norm.weight.double(), norm.bias.double(), 1e-6)
        assert (GroupNorm.of(norm)(x) - exact).abs().max() < 3e-6


@pytest.mark.slow
def test_codes_of_a_large_image_are_those_of_a_plain_forward_pass(small_folder: Path, small_state: dict[str, Tensor]) -> None:
    check_against_plain(small_folder, small_state, SMALL, photo("astronaut.png", 512, 512)[None])
