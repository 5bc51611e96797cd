"""Tokenizers in Hugging Face folders: `config.json` and safetensors, as save_pretrained writes them, whole models too.

    config.json -> an empty network of its class -> its tensors, found by the name of the codebook -> a `CodebookTokenizer`

diffusers' VQModel, and the tokenizers of Chameleon, Emu3 and Janus in transformers: alone, or inside the folder of the language
model, of whose weights only theirs are read. Invariants: nothing is downloaded, no code of the folder runs, weights are
safetensors or loaded with `weights_only`, and they fit the network in full. Codes are those of the classes' own `encode`.
Cost: the network's weights, in float32.

diffusers and transformers are imported when a model is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from wds_tools.errors import MissingPackage, TokenizerError, UsageError, in_one_line
from wds_tools.format.typed_json import read_json, shape
from wds_tools.vq.norm import use_right_norms
from wds_tools.vq.pickles import load_pickle
from wds_tools.vq.quantize import CodebookTokenizer, Precision, hash_files

CONFIG_NAME = "config.json"
_PREPROCESSOR_NAME = "preprocessor_config.json"
_CODEBOOK = "quantize.embedding.weight"
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What attention layers were called in diffusers' files before 2023."""


@dataclass
class Convolutional:
    """VQModel, ChameleonVQVAE and JanusVQVAE: an encoder, a 1 x 1 convolution, and the way back."""

    model: Any

    def latents(self, pixels_BCHW: Tensor) -> Tensor:
        """Encoder and quant_conv."""
        pixels_BCHW = pixels_BCHW.contiguous(memory_format=torch.channels_last)
        latents_BDhw: Tensor = self.model.quant_conv(self.model.encoder(pixels_BCHW))
        return latents_BDhw

    def image(self, latents_BDhw: Tensor) -> Tensor:
        """post_quant_conv and decoder."""
        decoder = getattr(self.model, "decoder", None)
        if decoder is None:
            raise UsageError("transformers' Chameleon has no image decoder: load vqgan.yaml and vqgan.ckpt to see pictures")
        inner_BChw = self.model.post_quant_conv(latents_BDhw.contiguous(memory_format=torch.channels_last))
        is_spatial = getattr(self.model.config, "norm_type", None) == "spatial"
        pixels_BCHW: Tensor = decoder(inner_BChw, latents_BDhw) if is_spatial else decoder(inner_BChw)
        return pixels_BCHW


class _Janus(Convolutional):
    """JanusVQVAE finds the entry by its distance, and decodes it scaled to length 1."""

    def image(self, latents_BDhw: Tensor) -> Tensor:
        """Entries scaled, then as the others."""
        return super().image(nn.functional.normalize(latents_BDhw, dim=1))


@dataclass
class _Emu3:
    """Emu3VQVAE, which is made for video: an image is a few equal frames that become one."""

    model: Any
    scale: float = 1.0
    shift: float = 0.0

    def latents(self, pixels_BCHW: Tensor) -> Tensor:
        """Encoder and quant_conv, in three dimensions."""
        if (self.scale, self.shift) != (1.0, 0.0):
            pixels_BCHW = pixels_BCHW * self.scale + self.shift
        frames = self.model.config.temporal_downsample_factor
        hidden_BTCHW = self.model.encoder(pixels_BCHW.contiguous()[:, None].repeat(1, frames, 1, 1, 1))
        latents_BDThw: Tensor = self.model.quant_conv(hidden_BTCHW.transpose(1, 2))
        return latents_BDThw[:, :, 0]

    def image(self, latents_BDhw: Tensor) -> Tensor:
        """post_quant_conv and decoder; the first frame."""
        latents_BDThw = latents_BDhw[:, :, None].contiguous()
        inner_BTDhw = self.model.post_quant_conv(latents_BDThw).transpose(1, 2)
        frames_BCHW: Tensor = self.model.decoder(inner_BTDhw, latents_BDThw.transpose(1, 2))
        B, _, h, w = latents_BDhw.shape
        stride = self.model.spatial_scale_factor
        pixels_BCHW = frames_BCHW.reshape(B, -1, self.model.config.out_channels, h * stride, w * stride)[:, 0]
        return (pixels_BCHW - self.shift) / self.scale


def load_vq_model(folder: Path, *, device: torch.device | str = "cpu", precision: Precision = "fp32") -> CodebookTokenizer:
    """Load a diffusers VQModel. Raises TokenizerError, MissingPackage: see load_tokenizer."""
    config = _read_json(folder / CONFIG_NAME)
    if config.get("_class_name") != "VQModel":
        raise TokenizerError(f"{folder}: {CONFIG_NAME} is of a {config.get('_class_name')!r}, expected a diffusers VQModel")
    model_class = vq_model_class()
    model = _build(folder, lambda: model_class.from_config(dict(config)))
    stride = 1 << (len(model.config.block_out_channels) - 1)
    return _load("vqmodel", folder, model, Convolutional(model), stride, device, precision)


def vq_model_class() -> Any:
    """diffusers' VQModel. Raises MissingPackage."""
    try:
        from diffusers import VQModel
    except ImportError as error:
        raise MissingPackage("a VQModel needs diffusers: pip install 'wds-tools[convert]'") from error
    return VQModel


def load_chameleon_vqvae(folder: Path, *, device: torch.device | str, precision: Precision) -> CodebookTokenizer:
    """Load transformers' ChameleonVQVAE, alone or of a Chameleon model. Raises as load_vq_model."""
    model, stride = _transformers_model(folder, "chameleon_vqgan", "ChameleonVQVAE")
    return _load("chameleon", folder, model, Convolutional(model), stride, device, precision)


def load_janus(folder: Path, *, device: torch.device | str = "cpu", precision: Precision = "fp32") -> CodebookTokenizer:
    """Load transformers' JanusVQVAE, alone or of a Janus model. Raises as load_vq_model."""
    model, stride = _transformers_model(folder, "janus_vqgan", "JanusVQVAE")
    return _load("janus", folder, model, _Janus(model), stride, device, precision)


def load_emu3(folder: Path, *, device: torch.device | str = "cpu", precision: Precision = "fp32") -> CodebookTokenizer:
    """Load transformers' Emu3VQVAE, alone or of an Emu3 model. Raises as load_vq_model."""
    model, stride = _transformers_model(folder, "emu3_vqgan", "Emu3VQVAE")
    return _load("emu3", folder, model, _Emu3(model, *_pixel_scale(folder)), stride, device, precision, channels_last=False)


def _transformers_model(folder: Path, model_type: str, class_name: str) -> tuple[Any, int]:
    """An empty model of a class of transformers, and its stride."""
    config = _read_json(folder / CONFIG_NAME)
    if config.get("model_type") != model_type:
        config = shape(dict[str, Any], config.get("vq_config") or {}, f"{folder}: {CONFIG_NAME}: vq_config", TokenizerError)
    if config.get("model_type", model_type) != model_type or not config:
        raise TokenizerError(f"{folder}: {CONFIG_NAME} has no {model_type}, neither as its model nor as vq_config")
    try:
        import transformers

        config_class, model_class = getattr(transformers, f"{class_name}Config"), getattr(transformers, class_name)
    except (ImportError, AttributeError) as error:
        raise MissingPackage(f"this tokenizer needs {class_name} of transformers: pip install 'wds-tools[train]'") from error
    model = _build(folder, lambda: model_class(config_class(**config)))
    return model, 1 << (len(model.config.channel_multiplier) - 1)


def _build(folder: Path, make: Any) -> Any:
    try:
        with torch.device("meta"):  # shapes only: the weights come from the file
            return make()
    except Exception as error:
        raise TokenizerError(f"{folder}: {CONFIG_NAME} makes no model ({in_one_line(error)})") from error


def _load(
    name: str,
    folder: Path,
    model: Any,
    network: Any,
    stride: int,
    device: torch.device | str,
    precision: Precision,
    *,
    channels_last: bool = True,
) -> CodebookTokenizer:
    """Fill a model from the files of a folder, and make a tokenizer of it."""
    files = _weight_files(folder)
    fill_model(model, _read_tensors(files), weights=f"{folder}: the weights", config=CONFIG_NAME)
    files = [folder / CONFIG_NAME, *files]
    return make_tokenizer(name, model, network, stride, files, device, precision, channels_last=channels_last)


def make_tokenizer(
    name: str,
    model: Any,
    network: Any,
    stride: int,
    files: Sequence[Path],
    device: torch.device | str,
    precision: Precision,
    *,
    channels_last: bool = True,
) -> CodebookTokenizer:
    """A tokenizer of a model that has its weights, hashed over these files. See CodebookTokenizer."""
    if channels_last:
        use_right_norms(model)
        model.to(memory_format=torch.channels_last)
    model.requires_grad_(False).eval().to(device)
    return CodebookTokenizer(
        name=name,
        stride=stride,
        weights_hash=hash_files(*files),
        network=network,
        codebook_KD=model.quantize.embedding.weight.detach(),
        precision=precision,
    )


def fill_model(
    model: nn.Module, state: Mapping[str, Tensor], *, weights: str, config: str, name_of: Callable[[str], str] = str
) -> None:
    """Give an empty model its tensors, as float32; all of them, and each of the right shape.

    Args:
        model: of meta tensors.
        state: the tensors.
        weights: what they are called in errors.
        config: the file that the model was made from.
        name_of: the model's name of a tensor -> its name in `state`.

    Raises:
        TokenizerError: they do not fit.
    """
    expected = {name: (name_of(name), tensor) for name, tensor in model.state_dict().items()}
    names = {name for name, _ in expected.values()}
    for problem, keys in (("lack", sorted(names - state.keys())), ("have the unexpected", sorted(state.keys() - names))):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise TokenizerError(f"{weights} {problem} {', '.join(keys[:3])}{more}: they do not fit {config}")
    filled = {}
    for model_name, (name, tensor) in expected.items():
        given = state[name]
        if given.squeeze().shape == tensor.squeeze().shape:
            given = given.reshape(tensor.shape)  # attention: 1 x 1 convolutions in old files, matrices here
        if given.shape != tensor.shape or given.is_floating_point() != tensor.is_floating_point():
            got, wanted = (f"{value.dtype} {tuple(value.shape)}" for value in (given, tensor))
            raise TokenizerError(f"{weights}: {name} is {got}, but {config} asks for {wanted}")
        filled[model_name] = given.float() if given.is_floating_point() else given
    model.load_state_dict(filled, assign=True)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise TokenizerError(f"nothing in {weights} gives {', '.join(left[:3])}: this version of the package is not supported")


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: all parts of them, in order."""
    for stem in ("model", "diffusion_pytorch_model"):
        if (index := folder / f"{stem}.safetensors.index.json").is_file():
            weight_map = shape(dict[str, str], _read_json(index).get("weight_map", {}), f"{index}: weight_map", TokenizerError)
            names = sorted(set(weight_map.values()))
            there = {path.name for path in folder.iterdir() if path.is_file()}
            if outside := [name for name in names if name not in there]:
                raise TokenizerError(f"{index} names {outside[0][:80]!r}, which is not there")
            return [folder / name for name in names]
        for name in (f"{stem}.safetensors", f"{stem}.bin"):
            if (folder / name).is_file():
                return [folder / name]
    raise TokenizerError(f"{folder}: no weights: expected model.safetensors or diffusion_pytorch_model.safetensors")


def _read_tensors(files: list[Path]) -> dict[str, Tensor]:
    """The tensors of the tokenizer under its own names; what else is in the files stays there."""
    places: dict[str, Any] = {}
    for path in files:
        try:
            places.update(_tensors_of(path))
        except TokenizerError as error:
            raise TokenizerError(f"{path.parent}: {error}") from error.__cause__
        except Exception as error:
            why = in_one_line(error)
            raise TokenizerError(f"{path} is damaged or holds more than tensors, and was not loaded ({why})") from error
    codebooks = [name for name in places if name.endswith(_CODEBOOK)]
    if len(codebooks) != 1:
        raise TokenizerError(f"{files[0].parent}: {len(codebooks)} codebooks ({_CODEBOOK}) in the weights, expected one")
    prefix = codebooks[0].removesuffix(_CODEBOOK)
    return {_new_name(name.removeprefix(prefix)): read() for name, read in places.items() if name.startswith(prefix)}


def _tensors_of(path: Path) -> Iterator[tuple[str, Any]]:
    """(name, a function that reads the tensor) of a file."""
    if path.suffix == ".bin":
        state = load_pickle(path)
        for name, tensor in state.items():
            if not isinstance(tensor, Tensor):
                raise TokenizerError(f"{name} is a {type(tensor).__name__}, expected a tensor")
            yield name, lambda tensor=tensor: tensor
        return
    file: Any = safe_open(path, framework="pt")
    for name in file.keys():  # noqa: SIM118 (not a dict)
        yield name, lambda name=name: file.get_tensor(name)


def _new_name(name: str) -> str:
    return re.sub(r"(?<=\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)", lambda match: _OLD_NAMES[match[1]], name)


def _pixel_scale(folder: Path) -> tuple[float, float]:
    """(scale, shift) from pixels in [-1, 1] to those that the folder's preprocessor gives to the network."""
    path = folder / _PREPROCESSOR_NAME
    if not path.is_file():
        return 1.0, 0.0
    settings = _read_json(path)
    kept = {name: settings[name] for name in ("image_mean", "image_std") if name in settings}
    means = shape(dict[str, list[float]], kept, f"{path}: not a preprocessor", TokenizerError)
    mean, std = means.get("image_mean", [0.5]), means.get("image_std", [0.5])
    rescale = shape(float, settings.get("rescale_factor", 1 / 255), f"{path}: rescale_factor", TokenizerError)
    if len(set(mean)) != 1 or len(set(std)) != 1 or not std[0]:
        raise TokenizerError(f"{path}: image_mean={mean!r}, image_std={std!r}: expected one number for all channels")
    scale, shift = 127.5 * rescale / std[0], (127.5 * rescale - mean[0]) / std[0]
    return (1.0, 0.0) if abs(scale - 1) + abs(shift) < 1e-6 else (scale, shift)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise TokenizerError(f"{path} is missing") from error
    except OSError as error:
        raise TokenizerError(f"{path} can't be read: {in_one_line(error)}") from error
    return read_json(dict[str, Any], data, f"{path} can't be read", TokenizerError)
