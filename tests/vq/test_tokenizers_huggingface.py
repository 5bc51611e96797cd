"""Tokenizers in the files of diffusers and transformers: a small model of each gives its own codes."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from commands import image_bytes, read_samples
from factory import make_dataset
from safetensors.torch import load_file, save_file
from weights import MODELS, Made, one_by_one, pixels, save, spread, vq_model

from loaders import LoaderConfig, Source, build_loader
from wds_tools.check.compare import CompareConfig, compare_codes
from wds_tools.check.verify import VerifyConfig, verify
from wds_tools.encode.encode import EncodeConfig, encode
from wds_tools.errors import MissingPackage, TokenizerError, UsageError
from wds_tools.format.schema import Sample
from wds_tools.vq import load_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Made]]:
    known: dict[str, tuple[Path, Made]] = {}

    def make(name: str) -> tuple[Path, Made]:
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            known[name] = folder, save(name, folder)
        return known[name]

    return make


@pytest.mark.parametrize("name", MODELS)
def test_codes_are_those_of_the_class_itself(name: str, made: Callable[[str], tuple[Path, Made]]) -> None:
    folder, (_, codes) = made(name)
    tokenizer = load_tokenizer(name, weights=str(folder), device="cpu")
    assert (tokenizer.name, tokenizer.codebook_size, tokenizer.stride) == (name, 512, 4)
    for size in ((32, 32), (32, 64)):
        expected = one_by_one(codes, (pixels(*size).float() / 255 * 2 - 1).permute(0, 3, 1, 2))
        found = tokenizer.encode(pixels(*size))
        assert found.shape == (2, size[0] // 4, size[1] // 4)
        assert torch.equal(found, expected)
        assert len(found.unique()) > 8, "a comparison of constant codes would prove nothing"


@pytest.mark.parametrize("name", MODELS)
def test_an_image_that_overflows_has_no_codes_and_leaves_the_others_theirs(
    name: str, made: Callable[[str], tuple[Path, Made]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer: Any = load_tokenizer(name, weights=str(made(name)[0]), device="cpu")
    expected, latents = tokenizer.encode(pixels()), tokenizer._latents
    monkeypatch.setattr(tokenizer, "_latents", lambda x: latents(x.mul(torch.inf) if torch.equal(x[0], second) else x))
    second = (pixels()[1].float() / 255 * 2 - 1).permute(2, 0, 1)
    expected[1] = -1
    assert torch.equal(tokenizer.encode(pixels()), expected)


@pytest.mark.parametrize("name", ["vqmodel", "emu3", "janus"])
def test_pictures_are_those_of_the_class_itself(name: str, made: Callable[[str], tuple[Path, Made]]) -> None:
    folder, (model, _) = made(name)
    tokenizer = load_tokenizer(name, weights=str(folder), device="cpu")
    codes = tokenizer.encode(pixels())
    with torch.no_grad():
        if name == "vqmodel":
            entries = model.quantize.get_codebook_entry(codes.flatten(), (*codes.shape, 8))
            expected = model.decode(entries, force_not_quantize=True).sample
        elif name == "emu3":
            expected = model.decode(codes)
        else:
            expected = model.decode(codes.flatten(1))
    expected = ((expected.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1)
    if name == "emu3":
        expected = expected.view(tokenizer.decode(codes).shape)
    assert (tokenizer.decode(codes).float() - expected).abs().max() < 0.51


@pytest.mark.parametrize(
    ("name", "instead"),
    [("chameleon", r"load vqgan\.yaml"), ("emu35", r"load config\.yaml"), ("glm-image", "its diffusion model")],
)
def test_a_class_without_a_decoder_says_where_pictures_come_from(
    name: str, instead: str, made: Callable[[str], tuple[Path, Made]]
) -> None:
    tokenizer = load_tokenizer(name, weights=str(made(name)[0]), device="cpu")
    with pytest.raises(UsageError, match=f"no image decoder: {instead}"):
        tokenizer.decode(tokenizer.encode(pixels()))


def test_codes_of_a_class_without_a_decoder_can_be_compared(made: Callable[[str], tuple[Path, Made]], tmp_path: Path) -> None:
    image = image_bytes(0, 64, 64)
    make_dataset(tmp_path / "in", [Sample(key="a", data_type="image_text", text="t", image=image, image_extension="jpg")])
    weights, sets = str(made("glm-image")[0]), [str(tmp_path / name) for name in "ab"]
    given: dict[str, Any] = {"tokenizer": "glm-image", "weights": weights, "mode": "cc64", "device": "cpu", "quiet": True}
    for output in sets:
        encode(EncodeConfig(input=str(tmp_path / "in"), output=output, **given))
    wanted = CompareConfig(a=sets[0], b=sets[1], weights=weights, device="cpu", quiet=True)
    with pytest.raises(UsageError, match=r"no image decoder: .*; --pictures 0 compares codes alone"):
        compare_codes(wanted)
    assert compare_codes(replace(wanted, pictures=0)).equal_codes == 16 * 16


def test_the_whole_folder_of_glm_image_has_its_model_and_its_preprocessor_inside(
    made: Callable[[str], tuple[Path, Made]], tmp_path: Path
) -> None:
    folder = made("glm-image")[0]
    expected = load_tokenizer("glm-image", weights=str(folder), device="cpu").encode(pixels())
    shutil.copytree(folder, tmp_path / "vision_language_encoder")
    (tmp_path / "processor").mkdir()
    (tmp_path / "vision_language_encoder/preprocessor_config.json").rename(tmp_path / "processor/preprocessor_config.json")
    for weights in (tmp_path, tmp_path / "vision_language_encoder"):
        assert torch.equal(load_tokenizer("glm-image", weights=str(weights), device="cpu").encode(pixels()), expected)
    shutil.rmtree(tmp_path / "processor")
    with pytest.raises(TokenizerError, match=r"no preprocessor_config\.json, here or in `processor`"):
        load_tokenizer("glm-image", weights=str(tmp_path), device="cpu")


def test_a_class_that_the_installed_transformers_lacks_is_named_with_the_pip_line(
    made: Callable[[str], tuple[Path, Made]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made("emu35")[0]
    monkeypatch.setitem(sys.modules, "transformers", ModuleType("transformers"))  # as one of before these classes
    with pytest.raises(
        MissingPackage, match=r"needs Apertus1p5VisionTokenizerModel of a newer transformers: pip install -U 'wds-to"
    ):
        load_tokenizer("emu35", weights=str(folder), device="cpu")


def in_a_language_model(folder: Path, out: Path, *, parts: int = 2) -> Path:
    """The same weights inside a sharded model whose other tensors are of no concern, in bfloat16 where they were."""
    out.mkdir()
    state = {f"model.vqmodel.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    state["model.embed_tokens.weight"] = torch.zeros(10, 4)
    names = sorted(state)
    files = {name: f"model-{i % parts + 1:05d}-of-{parts:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: state[name] for name in names if files[name] == file}, out / file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    config = json.loads((folder / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({"model_type": "any", "vision_config": config, "vq_config": config}))
    return out


@pytest.mark.parametrize("name", ["chameleon", "emu3", "janus", "emu35"])
def test_a_tokenizer_is_found_inside_a_language_model(
    name: str, made: Callable[[str], tuple[Path, Made]], tmp_path: Path
) -> None:
    folder, _ = made(name)
    whole = in_a_language_model(folder, tmp_path / "whole")
    alone = load_tokenizer(name, weights=str(folder), device="cpu")
    inside = load_tokenizer(name, weights=str(whole), device="cpu")
    assert torch.equal(inside.encode(pixels()), alone.encode(pixels()))
    assert inside.weights_hash != alone.weights_hash


def test_weights_in_several_files_load_from_the_links_of_a_cache_and_never_from_outside_the_folder(
    made: Callable[[str], tuple[Path, Made]], tmp_path: Path
) -> None:
    whole = in_a_language_model(made("janus")[0], tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for path in whole.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(f"../blobs/{path.name}")
    linked = load_tokenizer("janus", weights=str(tmp_path / "snapshot"), device="cpu")
    assert linked.weights_hash == load_tokenizer("janus", weights=str(whole), device="cpu").weights_hash
    (whole / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../blobs/config.json"}}))
    with pytest.raises(TokenizerError, match=r"names '\.\./blobs/config\.json', which is not there"):
        load_tokenizer("janus", weights=str(whole), device="cpu")


def test_emu3_takes_pixels_as_its_preprocessor_scales_them(made: Callable[[str], tuple[Path, Made]], tmp_path: Path) -> None:
    folder, (_, codes) = made("emu3")
    shutil.copytree(folder, tmp_path / "emu3")
    file = tmp_path / "emu3/preprocessor_config.json"
    plain = load_tokenizer("emu3", weights=str(folder), device="cpu")
    for mean, std in (([0.4] * 3, [0.3] * 3), ([0.4, 0.5, 0.6], [0.3, 0.25, 0.35]), ([0.4, 0.5, 0.6], [0.3])):
        file.write_text(json.dumps({"image_mean": mean, "image_std": std, "rescale_factor": 1 / 255}))
        tokenizer = load_tokenizer("emu3", weights=str(tmp_path / "emu3"), device="cpu")
        found = tokenizer.encode(pixels())
        with torch.no_grad():
            scaled = (pixels().double() / 255 - torch.tensor(mean)) / torch.tensor(std)
            expected = codes(scaled.float().permute(0, 3, 1, 2))
        assert (found == expected).float().mean() > 0.98  # the scale is applied in another order
        back = plain.decode(found).double() / 255 * 2 - 1  # clipped to where the network's own range ends
        scaled_back = ((back * torch.tensor(std) + torch.tensor(mean)) * 255).clamp(0, 255)
        differs = (tokenizer.decode(found) - scaled_back).abs() > 1
        assert differs[plain.decode(found).remainder(255) != 0].float().mean() < 0.01
    file.write_text(json.dumps({"image_mean": [0.4, 0.5], "image_std": [0.3]}))
    with pytest.raises(TokenizerError, match="expected a number, or one for each of 3 channels"):
        load_tokenizer("emu3", weights=str(tmp_path / "emu3"), device="cpu")


def test_files_of_old_diffusers_load(made: Callable[[str], tuple[Path, Made]], tmp_path: Path) -> None:
    folder, _ = made("vqmodel")
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in load_file(folder / "diffusion_pytorch_model.safetensors").items():
        for new, before in names.items():
            name = name.replace(f".attentions.0.{new}.", f".attentions.0.{before}.")
        old[name] = tensor
    (tmp_path / "old").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "old")
    torch.save(old, tmp_path / "old/diffusion_pytorch_model.bin")
    now = load_tokenizer("vqmodel", weights=str(folder), device="cpu").encode(pixels())
    assert torch.equal(load_tokenizer("vqmodel", weights=str(tmp_path / "old"), device="cpu").encode(pixels()), now)


class Trap:
    def __reduce__(self) -> Any:
        return (print, ("this must never run",))


def spoil(folder: Path, what: str) -> None:
    weights = folder / "diffusion_pytorch_model.safetensors"
    config = json.loads((folder / "config.json").read_text())
    state = load_file(weights)
    match what:
        case "no config":
            (folder / "config.json").unlink()
        case "no weights":
            weights.unlink()
        case "damaged":
            weights.write_bytes(weights.read_bytes()[:1000])
        case "lacks one":
            del state["quant_conv.weight"]
            save_file(state, weights)
        case "has one more":
            save_file({**state, "extra": torch.zeros(1)}, weights)
        case "another shape":
            (folder / "config.json").write_text(json.dumps({**config, "num_vq_embeddings": 64}))
        case "another class":
            (folder / "config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderKL"}))
        case "nonsense":
            (folder / "config.json").write_text(json.dumps({**config, "block_out_channels": "many"}))
        case "no object":
            (folder / "config.json").write_text("[]")
        case "a pickle":
            weights.unlink()
            torch.save({"quantize.embedding.weight": Trap()}, folder / "diffusion_pytorch_model.bin")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no config", r"config\.json is missing"),
        ("no weights", "no weights: expected"),
        ("damaged", "is damaged, and was not loaded"),
        ("lacks one", r"lack quant_conv\.weight: they do not fit"),
        ("has one more", "have the unexpected extra"),
        ("another shape", r"quantize\.embedding\.weight is torch.float32 \(512, 8\), but config\.json asks for"),
        ("another class", "of a 'AutoencoderKL', expected a diffusers VQModel"),
        ("nonsense", "makes no model"),
        ("no object", "it is a list, expected an object"),
        ("a pickle", "holds more than tensors, and was not loaded"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line_and_runs_nothing(
    what: str, message: str, made: Callable[[str], tuple[Path, Made]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made("vqmodel")[0], tmp_path / "w")
    spoil(tmp_path / "w", what)
    with pytest.raises(TokenizerError, match=message) as caught:
        load_tokenizer("vqmodel", weights=str(tmp_path / "w"), device="cpu")
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_codes_of_a_large_codebook_are_stored_in_32_bits_and_bf16_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model, _ = vq_model((1,) * 5, num_vq_embeddings=70_000)
    spread(model)
    model.save_pretrained(tmp_path / "w")
    images = [image_bytes(i, 64, 64) for i in range(2)]
    samples = [
        Sample(key=f"{i:04d}", data_type="image_text", text=f"t{i}", image=data, image_extension="jpg")
        for i, data in enumerate(images)
    ]
    make_dataset(tmp_path / "in", samples)
    out = tmp_path / "out"
    settings: dict[str, Any] = {"tokenizer": "vqmodel", "weights": str(tmp_path / "w"), "device": "cpu", "quiet": True}
    encode(EncodeConfig(input=str(tmp_path / "in"), output=str(out), **settings))
    assert "bf16" not in capsys.readouterr().err
    encode(EncodeConfig(input=str(tmp_path / "in"), output=str(tmp_path / "rough"), precision="bf16", **settings))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "bf16" in line]
    assert line.startswith("wds-tools: with the 70,000 codes of vqmodel, --precision bf16 changes many")
    assert verify(VerifyConfig(input=str(out), quiet=True)).problems == ()
    filled = read_samples(out)
    assert {sample.codes["vqcode_512"].dtype for sample in filled} == {np.dtype("<u4")}
    assert max(int(sample.codes["vqcode_512"].max()) for sample in filled) >= 1 << 16
    loader = build_loader(LoaderConfig(sources=(Source(str(out)),), batch_size=2, shuffle=False))
    (batch,) = list(loader)
    loader.close()
    assert torch.equal(batch["codes"], torch.from_numpy(np.stack([s.codes["vqcode_512"] for s in filled]).astype("i4")))
