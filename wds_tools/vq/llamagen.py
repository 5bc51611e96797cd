"""LlamaGen's tokenizers, VQ-8 and VQ-16, as their authors publish them: one `.pt`, without a configuration.

    shapes of the tensors -> `VqganConfig` -> an empty VQModel -> its names translated -> a `CodebookTokenizer`

The network (Sun et al. 2024, arXiv:2406.06525) is a VQGAN with attention at the lowest resolution; latents and entries are
compared, and entries decoded, scaled to length 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from wds_tools.errors import TokenizerError
from wds_tools.vq import huggingface
from wds_tools.vq.chameleon import VqganConfig, checkpoint_name, vq_model, vqgan_config
from wds_tools.vq.checkpoints import CODEBOOK, read_weights

_MIDDLE = {"block_1": "0", "attn_1": "1", "block_2": "2"}


def load_llamagen(path: Path) -> huggingface.Loaded:
    """Load a tokenizer from the file that has its tensors. Raises TokenizerError, MissingPackage: see load_tokenizer."""
    if not path.is_file():
        raise TokenizerError(f"{path} is no file: expected one such as vq_ds16_c2i.pt")
    state = read_weights([path])
    config = config_of(state, path)
    model, name_of = vq_model(config), partial(_name_of, levels=len(config.ch_mult))
    huggingface.fill_model(model, state, weights=f"{path}: the weights", config="LlamaGen's network", name_of=name_of)
    network = huggingface.Convolutional(model, compares_directions=True)
    return huggingface.Loaded(name="llamagen", network=network, stride=config.stride, files=[path], is_unit=True)


def config_of(state: Mapping[str, Tensor], path: Path) -> VqganConfig:
    """What the shapes of the tensors say. Raises TokenizerError."""
    blocks = [
        match
        for match in (re.fullmatch(r"encoder\.conv_blocks\.(\d+)\.res\.(\d+)\.conv2\.bias", name) for name in state)
        if match
    ]
    try:
        ch = len(state["encoder.conv_in.bias"])
        widths = [len(state[match[0]]) for match in blocks if match[2] == "0"]
        n_embed, embed_dim = state[CODEBOOK].shape
        values = {
            "n_embed": n_embed,
            "embed_dim": embed_dim,
            "z_channels": len(state["encoder.conv_out.bias"]),
            "ch": ch,
            "ch_mult": [width // ch for width in widths],
            "num_res_blocks": max((int(match[2]) + 1 for match in blocks), default=0),
            "attn_resolutions": [256 >> (len(widths) - 1)],
        }
        return vqgan_config(values, path)
    except (KeyError, TypeError, ValueError, TokenizerError) as error:
        raise TokenizerError(f"{path} has no tensors of LlamaGen's tokenizer ({error})") from error


def _name_of(name: str, levels: int) -> str:
    """Translate the name of a VQModel's tensor; blocks of the decoder are numbered from the lowest resolution here."""
    name = checkpoint_name(name, levels).replace(".block.", ".res.")
    name = re.sub(r"\.mid\.(\w+)", lambda match: f".mid.{_MIDDLE[match[1]]}", name)
    name = re.sub(r"\.up\.(\d+)\.", lambda match: f".conv_blocks.{levels - 1 - int(match[1])}.", name)
    return name.replace(".down.", ".conv_blocks.")
