"""Tokenizers in Hugging Face folders: `config.json` and safetensors, as save_pretrained writes them, whole models too.

    config.json -> an empty network of its class -> its tensors, found by the name of the codebook -> a `CodebookTokenizer`

diffusers' VQModel, and the tokenizers of Chameleon, Emu3, Janus, Apertus 1.5 (that of Emu3.5) and GLM-Image in transformers:
alone, or inside the folder of the language model, of whose weights only theirs are read. Invariants: nothing is downloaded, no
code of the folder runs, weights are safetensors or loaded with `weights_only`, and they fit the network in full. Codes are those
of the classes' own `encode`. Cost: the network's weights, in float32.

diffusers and transformers are imported when a model is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wds_tools.errors import MissingPackage, TokenizerError, UsageError, in_one_line
from wds_tools.format.typed_json import read_json, shape
from wds_tools.vq.checkpoints import CODEBOOK, read_weights
from wds_tools.vq.norm import use_right_norms
from wds_tools.vq.quantize import CodebookTokenizer, Nearest, Precision, hash_files

CONFIG_NAME = "config.json"
_PREPROCESSOR_NAME = "preprocessor_config.json"
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What attention layers were called in diffusers' files before 2023."""


@dataclass
class Convolutional:
    """VQModel, and most of transformers': an encoder, a 1 x 1 convolution, and the way back."""

    model: Any
    instead: str = ""
    """Where pictures come from, if the class has no decoder."""
    compares_directions: bool = False
    """Latents are scaled to length 1, before they are compared with a codebook that is as well."""
    decodes_directions: bool = False
    """Entries are scaled to length 1, before they are decoded: JanusVQVAE finds them by their distance."""

    def latents(self, pixels_BCHW: Tensor) -> Tensor:
        """Encoder and quant_conv."""
        pixels_BCHW = pixels_BCHW.contiguous(memory_format=torch.channels_last)
        latents_BDhw: Tensor = self.model.quant_conv(self.model.encoder(pixels_BCHW))
        return nn.functional.normalize(latents_BDhw.float(), dim=1) if self.compares_directions else latents_BDhw

    def image(self, latents_BDhw: Tensor) -> Tensor:
        """post_quant_conv and decoder."""
        latents_BDhw = nn.functional.normalize(latents_BDhw, dim=1) if self.decodes_directions else latents_BDhw
        decoder = getattr(self.model, "decoder", None)
        if decoder is None:
            raise UsageError(f"{type(self.model).__name__} of transformers has no image decoder: {self.instead}")
        inner_BChw = self.model.post_quant_conv(latents_BDhw.contiguous(memory_format=torch.channels_last))
        is_spatial = getattr(self.model.config, "norm_type", None) == "spatial"
        pixels_BCHW: Tensor = decoder(inner_BChw, latents_BDhw) if is_spatial else decoder(inner_BChw)
        return pixels_BCHW


@dataclass
class _GlmImage:
    """GLM-Image: a vision transformer, and a codebook on its features; pictures are made by a diffusion model."""

    model: Any

    def latents(self, pixels_BCHW: Tensor) -> Tensor:
        """Features of patches in raster order, then quant_conv, scaled to length 1."""
        visual, quantizer = self.model["visual"], self.model["vqmodel"]
        size = visual.patch_size
        B, C, H, W = pixels_BCHW.shape
        h, w = H // size, W // size
        patches_BhwCyx = pixels_BCHW.reshape(B, C, h, size, w, size).permute(0, 2, 4, 1, 3, 5)
        grid_B3 = torch.tensor([[1, h, w]] * B, device=pixels_BCHW.device)
        features_ND = visual(patches_BhwCyx.reshape(B * h * w, -1), grid_thw=grid_B3).last_hidden_state
        latents_BDhw = quantizer.quant_conv(features_ND.view(B, h, w, -1).permute(0, 3, 1, 2).contiguous())
        return nn.functional.normalize(latents_BDhw.float(), dim=1)

    def image(self, latents_BDhw: Tensor) -> Tensor:  # noqa: ARG002  Network's
        """There is none."""
        raise UsageError("GLM-Image's tokenizer has no image decoder: its diffusion model makes pictures of codes and a prompt")


@dataclass
class _Scaled:
    """A network whose pixels are not in [-1, 1]."""

    network: Any
    scale_C11: Tensor  # noqa: N815 (a tensor's axes)
    shift_C11: Tensor  # noqa: N815

    @property
    def model(self) -> Any:
        """Where its weights are."""
        return self.network.model

    def to(self, device: torch.device) -> _Scaled:
        """The same with its own numbers there."""
        return _Scaled(self.network, self.scale_C11.to(device), self.shift_C11.to(device))

    def latents(self, pixels_BCHW: Tensor) -> Tensor:
        """Those of its pixels."""
        latents_BDhw: Tensor = self.network.latents(pixels_BCHW * self.scale_C11 + self.shift_C11)
        return latents_BDhw

    def image(self, latents_BDhw: Tensor) -> Tensor:
        """Its pixels, scaled back."""
        pixels_BCHW: Tensor = (self.network.image(latents_BDhw) - self.shift_C11) / self.scale_C11
        return pixels_BCHW


@dataclass
class _Emu3:
    """Emu3VQVAE, which is made for video: an image is a few equal frames that become one."""

    model: Any

    def latents(self, pixels_BCHW: Tensor) -> Tensor:
        """Encoder and quant_conv, in three dimensions."""
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
        return frames_BCHW.reshape(B, -1, self.model.config.out_channels, h * stride, w * stride)[:, 0]


@dataclass(kw_only=True)
class Loaded:
    """A model that has its weights, on the CPU, and what makes a tokenizer of it; see CodebookTokenizer."""

    name: str
    network: Any
    """Around the model, which is its `model`."""
    stride: int
    files: Sequence[Path]
    """That the tokenizer is hashed over."""
    channels_last: bool = True
    """For networks of 2-D convolutions."""
    codebook: str = CODEBOOK
    """What the model calls it."""
    is_unit: bool = False
    """Its entries are scaled to length 1."""
    by: Nearest = "distance"

    def tokenizer(self, device: torch.device, precision: Precision) -> CodebookTokenizer:
        """A tokenizer there."""
        model = self.network.model
        if self.channels_last:
            use_right_norms(model)
            model.to(memory_format=torch.channels_last)
        model.requires_grad_(False).eval().to(device)
        codebook_KD = model.get_parameter(self.codebook).detach()
        return CodebookTokenizer(
            name=self.name,
            stride=self.stride,
            weights_hash=hash_files(*self.files),
            network=self.network.to(device) if isinstance(self.network, _Scaled) else self.network,
            codebook_KD=nn.functional.normalize(codebook_KD, dim=1) if self.is_unit else codebook_KD,
            precision=precision,
            by=self.by,
        )


def load_vq_model(folder: Path) -> Loaded:
    """Load a diffusers VQModel. Raises TokenizerError, MissingPackage: see load_tokenizer."""
    config = _read_json(folder / CONFIG_NAME)
    if config.get("_class_name") != "VQModel":
        raise TokenizerError(f"{folder}: {CONFIG_NAME} is of a {config.get('_class_name')!r}, expected a diffusers VQModel")
    model_class = vq_model_class()
    model = _build(folder, lambda: model_class.from_config(dict(config)))
    return _load("vqmodel", folder, Convolutional(model), 1 << (len(model.config.block_out_channels) - 1))


def vq_model_class() -> Any:
    """diffusers' VQModel. Raises MissingPackage."""
    try:
        from diffusers import VQModel
    except ImportError as error:
        raise MissingPackage("a VQModel needs diffusers: pip install 'wds-tools[convert]'") from error
    return VQModel


def load_chameleon_vqvae(folder: Path) -> Loaded:
    """Load transformers' ChameleonVQVAE, alone or of a Chameleon model. Raises as load_vq_model."""
    model = _transformers_model(folder, "chameleon_vqgan", "ChameleonVQVAE")
    return _load("chameleon", folder, Convolutional(model, "load vqgan.yaml and vqgan.ckpt to see pictures"), _stride(model))


def load_janus(folder: Path) -> Loaded:
    """Load transformers' JanusVQVAE, alone or of a Janus model. Raises as load_vq_model."""
    model = _transformers_model(folder, "janus_vqgan", "JanusVQVAE")
    return _load("janus", folder, Convolutional(model, decodes_directions=True), _stride(model))


def load_emu3(folder: Path) -> Loaded:
    """Load transformers' Emu3VQVAE, alone or of an Emu3 model. Raises as load_vq_model."""
    model = _transformers_model(folder, "emu3_vqgan", "Emu3VQVAE")
    return _load("emu3", folder, _scaled(_Emu3(model), folder / _PREPROCESSOR_NAME), _stride(model), channels_last=False)


def load_apertus(folder: Path) -> Loaded:
    """Load transformers' copy of Emu3.5's tokenizer, alone or of an Apertus 1.5 model. Raises as load_vq_model."""
    model = _transformers_model(folder, "apertus1p5_vision_tokenizer", "Apertus1p5VisionTokenizerModel", "vision_config")
    encoder = Convolutional(model, "load config.yaml and model.ckpt of Emu3.5's tokenizer to see pictures")
    return _load("emu35", folder, _scaled(encoder, folder / _PREPROCESSOR_NAME), _stride(model), by="product")


def load_glm_image(folder: Path) -> Loaded:
    """Load the tokenizer of GLM-Image: its whole folder, or that of the language model. Raises as load_vq_model."""
    inside = folder / "vision_language_encoder"
    preprocessors = [path / _PREPROCESSOR_NAME for path in (folder, folder / "processor", folder.parent / "processor")]
    preprocessor = next((path for path in preprocessors if path.is_file()), None)
    if preprocessor is None:
        raise TokenizerError(f"{folder}: no {_PREPROCESSOR_NAME}, here or in `processor`: it says how pixels are scaled")
    folder = inside if inside.is_dir() else folder
    visual = _transformers_model(folder, "glm_image_vision", "GlmImageVisionModel", "vision_config")
    model = nn.ModuleDict({"visual": visual, "vqmodel": _transformers_model(folder, "glm_image_vqmodel", "GlmImageVQVAE")})
    network, codebook = _scaled(_GlmImage(model), preprocessor), f"vqmodel.{CODEBOOK}"
    return _load("glm-image", folder, network, visual.patch_size, channels_last=False, codebook=codebook, is_unit=True)


def _transformers_model(folder: Path, model_type: str, class_name: str, key: str = "vq_config") -> Any:
    """An empty model of a class of transformers."""
    config = _read_json(folder / CONFIG_NAME)
    if config.get("model_type") != model_type:
        config = shape(dict[str, Any], config.get(key) or {}, f"{folder}: {CONFIG_NAME}: {key}", TokenizerError)
    if config.get("model_type", model_type) != model_type or not config:
        raise TokenizerError(f"{folder}: {CONFIG_NAME} has no {model_type}, neither as its model nor as {key}")
    try:
        import transformers

        config_class = getattr(transformers, f"{class_name.removesuffix('Model')}Config")
        model_class = getattr(transformers, class_name)
    except (ImportError, AttributeError) as error:
        raise MissingPackage(f"needs {class_name} of a newer transformers: pip install -U 'wds-tools[train]'") from error
    return _build(folder, lambda: model_class(config_class(**config)))


def _stride(model: Any) -> int:
    return 1 << (len(model.config.channel_multiplier) - 1)


def _build(folder: Path, make: Any) -> Any:
    try:
        with torch.device("meta"):  # shapes only: the weights come from the file
            return make()
    except Exception as error:
        raise TokenizerError(f"{folder}: {CONFIG_NAME} makes no model ({in_one_line(error)})") from error


def _load(name: str, folder: Path, network: Any, stride: int, *, codebook: str = CODEBOOK, **settings: Any) -> Loaded:
    """Fill the model of a network from the files of a folder."""
    files, model = _weight_files(folder), network.model
    parts = tuple(f"{part}." for part, _ in model.named_children()) if codebook != CODEBOOK else ("",)
    state = {_new_name(name): tensor for name, tensor in read_weights(files, codebook, parts).items()}
    fill_model(model, state, weights=f"{folder}: the weights", config=CONFIG_NAME)
    files = [folder / CONFIG_NAME, *files]
    return Loaded(name=name, network=network, stride=stride, files=files, codebook=codebook, **settings)


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
    for stem, suffix in product(("model", "diffusion_pytorch_model", "pytorch_model"), (".safetensors", ".bin")):
        if (index := folder / f"{stem}{suffix}.index.json").is_file():
            weight_map = shape(dict[str, str], _read_json(index).get("weight_map", {}), f"{index}: weight_map", TokenizerError)
            names = sorted(set(weight_map.values()))
            there = {path.name for path in folder.iterdir() if path.is_file()}
            if outside := [name for name in names if name not in there]:
                raise TokenizerError(f"{index} names {outside[0][:80]!r}, which is not there")
            return [folder / name for name in names]
        if (folder / f"{stem}{suffix}").is_file():
            return [folder / f"{stem}{suffix}"]
    raise TokenizerError(f"{folder}: no weights: expected model.safetensors or diffusion_pytorch_model.safetensors")


def _new_name(name: str) -> str:
    return re.sub(r"(?<=\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)", lambda match: _OLD_NAMES[match[1]], name)


def _scaled(network: Any, path: Path) -> Any:
    """The network, given pixels as this preprocessor scales them from those in [-1, 1]; itself if there is none."""
    if not path.is_file():
        return network
    settings = _read_json(path)
    kept = {name: settings[name] for name in ("image_mean", "image_std") if name in settings}
    means = shape(dict[str, list[float]], kept, f"{path}: not a preprocessor", TokenizerError)
    mean, std = means.get("image_mean", [0.5]), means.get("image_std", [0.5])
    rescale = shape(float, settings.get("rescale_factor", 1 / 255), f"{path}: rescale_factor", TokenizerError)
    if not {len(mean), len(std)} <= {1, 3} or 0 in std:
        raise TokenizerError(f"{path}: image_mean={mean!r}, image_std={std!r}: expected a number, or one for each of 3 channels")
    mean_C11, std_C11 = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (mean, std))
    scale_C11, shift_C11 = 127.5 * rescale / std_C11, (127.5 * rescale - mean_C11) / std_C11
    if bool(((scale_C11 - 1).abs() + shift_C11.abs() < 1e-6).all()):
        return network
    return _Scaled(network, scale_C11.float(), shift_C11.float())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise TokenizerError(f"{path} is missing") from error
    except OSError as error:
        raise TokenizerError(f"{path} can't be read: {in_one_line(error)}") from error
    return read_json(dict[str, Any], data, f"{path} can't be read", TokenizerError)
