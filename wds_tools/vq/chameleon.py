"""VQGANs in taming-transformers' files, run as a `diffusers.VQModel`: Chameleon's `vqgan.yaml` and `vqgan.ckpt`, and Emu3.5's.

Flow: yaml -> `VqganConfig` -> an empty VQModel -> its tensor names translated to those of the checkpoint -> weights
copied over -> a `CodebookTokenizer`. Names in the checkpoint are those of taming-transformers (Esser et al. 2021,
arXiv:2012.09841). Emu3.5's takes the entry with the largest inner product. Invariants: only tensors are ever unpickled
(`weights_only=True`); a checkpoint loads completely or not at all (what only training needs aside); whatever does not fit is one
TokenizerError. Cost: about 540 GFLOP to encode 512 x 512 pixels, 0.3 GB of weights, float32 (Chameleon).

diffusers and yaml are imported when a model is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from wds_tools.errors import MissingPackage, TokenizerError, UsageError, in_one_line
from wds_tools.format.typed_json import shape
from wds_tools.vq import huggingface
from wds_tools.vq.checkpoints import read_weights
from wds_tools.vq.quantize import Nearest

CONFIG_NAME = "vqgan.yaml"
WEIGHTS_NAME = "vqgan.ckpt"
_SUFFIXES = (".ckpt", ".safetensors", ".pt", ".pth", ".bin")
_NORM_GROUPS = 32
_Size = Annotated[int, range(1, 65537)]
"""As all limits below far beyond any real one; a typo is not worth an hour."""


@dataclass(frozen=True, kw_only=True)
class VqganConfig:
    """What the yaml says, as far as the network's shape goes; see `vqgan_config`."""

    n_embed: Annotated[int, range(1, (1 << 20) + 1)]
    """Codebook entries."""
    embed_dim: _Size
    """Numbers per entry."""
    z_channels: _Size
    """Channels between encoder and quant_conv."""
    ch: _Size
    """Channels at full resolution."""
    ch_mult: tuple[Annotated[int, range(1, 65)], ...]
    """Channels per level as multiples of `ch`; each level but the last halves the resolution."""
    num_res_blocks: Annotated[int, range(1, 17)]
    """Residual blocks per level of the encoder (the decoder has one more)."""
    in_channels: Literal[3] = 3
    out_ch: Literal[3] = 3
    double_z: Literal[False] = False
    """A VQ model has no mean and variance."""
    resolution: _Size = 256
    """Of the images that it was trained on: that of level i is `resolution >> i`."""
    attn_resolutions: tuple[int, ...] = ()
    """Levels of these resolutions have attention after each block."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.ch_mult) <= 8 or self.ch_mult[0] != 1:
            raise UsageError(f"ch_mult is {list(self.ch_mult)}: expected 1 to 8 numbers, the first of them 1, as VQModel has it")
        if self.ch % _NORM_GROUPS:
            raise UsageError(f"ch is {self.ch}: expected a multiple of {_NORM_GROUPS}, the number of norm groups")

    @property
    def stride(self) -> int:
        """Pixels per code along each side."""
        return 1 << (len(self.ch_mult) - 1)


def load_chameleon(folder: Path) -> huggingface.Loaded:
    """Load the tokenizer from a folder with `vqgan.yaml` and `vqgan.ckpt`, or from one that transformers wrote.

    Raises:
        TokenizerError: a file is missing, can't be read safely, or the weights do not fit the configuration.
        MissingPackage: diffusers or yaml is not installed.
    """
    if not (folder / CONFIG_NAME).exists() and (folder / huggingface.CONFIG_NAME).exists():
        return huggingface.load_chameleon_vqvae(folder)
    return _load_vqgan("chameleon", folder / CONFIG_NAME, folder / WEIGHTS_NAME)


def load_emu35(folder: Path) -> huggingface.Loaded:
    """Load Emu3.5's tokenizer: a folder with its `config.yaml` and `model.ckpt`, or of transformers. See load_chameleon."""
    if (folder / huggingface.CONFIG_NAME).exists():
        return huggingface.load_apertus(folder)
    return _load_vqgan("emu35", folder / "config.yaml", folder / "model.ckpt", by="product")


def _load_vqgan(name: str, config_path: Path, ckpt: Path, by: Nearest = "distance") -> huggingface.Loaded:
    weights_path = next((path for path in map(ckpt.with_suffix, _SUFFIXES) if path.is_file()), ckpt)
    for path in (config_path, weights_path):
        if not path.is_file():
            raise TokenizerError(f"{path} is missing: the folder needs {config_path.name} and {ckpt.name}")
    config = read_config(config_path)
    model, name_of = vq_model(config), partial(checkpoint_name, levels=len(config.ch_mult))
    what = f"{config_path.parent}: the weights in {weights_path.name}"
    huggingface.fill_model(model, read_weights([weights_path]), weights=what, config=config_path.name, name_of=name_of)
    network, files = huggingface.Convolutional(model), (config_path, weights_path)
    return huggingface.Loaded(name=name, network=network, stride=config.stride, files=files, by=by)


def read_config(path: Path) -> VqganConfig:
    """Read a vqgan.yaml: n_embed, embed_dim and ddconfig under `model.params` (Lightning), `params`, or at the top."""
    yaml = _yaml()
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TokenizerError(f"{path} is not yaml: {in_one_line(error)}") from error
    params = tree
    for key in ("model", "params"):
        params = params[key] if isinstance(params, dict) and key in params else params
    ddconfig = params.get("ddconfig") if isinstance(params, dict) else None
    if not isinstance(params, dict) or not isinstance(ddconfig, dict):
        raise TokenizerError(f"{path} has no ddconfig under model.params: expected taming-transformers' layout")
    return vqgan_config({**ddconfig, **params}, path)


def vqgan_config(values: Mapping[str, Any], path: Path) -> VqganConfig:
    """The configuration that a file says. Raises TokenizerError for what VQModel can't be."""
    return shape(VqganConfig, values, f"{path}: not a VQGAN that VQModel can be", TokenizerError)


def vq_model(config: VqganConfig) -> Any:
    """A VQModel without weights. Raises MissingPackage."""
    model_class = huggingface.vq_model_class()
    attention = ["Attn" * (config.resolution >> level in config.attn_resolutions) for level in range(len(config.ch_mult))]
    with torch.device("meta"):  # shapes only
        return model_class(
            down_block_types=[f"{attn}DownEncoderBlock2D" for attn in attention],
            up_block_types=[f"{attn}UpDecoderBlock2D" for attn in reversed(attention)],
            block_out_channels=tuple(config.ch * mult for mult in config.ch_mult),
            layers_per_block=config.num_res_blocks,
            latent_channels=config.z_channels,
            num_vq_embeddings=config.n_embed,
            vq_embed_dim=config.embed_dim,
            norm_num_groups=_NORM_GROUPS,
        )


_RENAMES = (
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.up_blocks\.(\d+)\.resnets\.", r".up.\1.block."),
    (r"\.up_blocks\.(\d+)\.upsamplers\.0\.", r".up.\1.upsample."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.(down|up)_blocks\.(\d+)\.attentions\.", r".\1.\2.attn."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
)


def checkpoint_name(name: str, levels: int) -> str:
    """Translate the name of a VQModel's tensor to the checkpoint's, where `up.0` is the highest resolution."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return re.sub(r"\.up\.(\d+)\.", lambda match: f".up.{levels - 1 - int(match[1])}.", name)


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise MissingPackage(f"reading {CONFIG_NAME} needs pyyaml: pip install 'wds-tools[convert]'") from error
    return yaml
