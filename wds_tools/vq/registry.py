"""A tokenizer's name, and what the user said of weights, device and precision -> a loaded `ImageTokenizer`.

Tokenizers of others are entry points of the group `wds_tools.tokenizers` in an installed package:

    [project.entry-points."wds_tools.tokenizers"]
    mine = "my_package.tokenizer:load"

where `load(weights, device, precision)` is a `Loader`. Invariant: what is asked for is what runs. An unknown name, a device that
isn't there or a precision that the tokenizer does not know is a UsageError; nothing falls back in silence, and a name of ours
can't be taken. Cost: that of loading the one tokenizer asked for; no other is imported.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import cast, get_args

import torch

from wds_tools.errors import TokenizerError, UsageError, WdsToolsError, in_one_line, meant
from wds_tools.plugins import TOKENIZERS, load_plugin, plugins
from wds_tools.vq.base import ImageTokenizer
from wds_tools.vq.chameleon import load_chameleon, load_emu35
from wds_tools.vq.huggingface import Loaded, load_emu3, load_glm_image, load_janus, load_vq_model
from wds_tools.vq.llamagen import load_llamagen
from wds_tools.vq.quantize import CodebookTokenizer, Precision
from wds_tools.vq.tiny import BUNDLED, load_tiny

Loader = Callable[[Path | None, torch.device, Precision], ImageTokenizer]
"""Weights (what the user gave, if anything), device and precision -> a tokenizer. Raises as load_tokenizer."""


def load_tokenizer(
    name: str,
    *,
    weights: str | None = None,
    device: str = "auto",
    precision: str = "fp32",
    compile: bool = False,
) -> ImageTokenizer:
    """Load an image tokenizer by name.

    Args:
        name: one of `tokenizer_names()`.
        weights: path of the weights: a file for tiny (the bundled one if None) and llamagen, a folder for the others.
        device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N".
        precision: "fp32" (no TF32), "tf32" (GPUs only), "bf16" or "fp16" for the network; the codebook search is float32.
        compile: run the network through torch.compile.

    Returns:
        The tokenizer, on its device, ready to encode.

    Raises:
        UsageError: an unknown name or precision, a device that isn't there, or weights that were needed and not given.
        TokenizerError: the weights are missing, unsafe or do not fit their configuration.
        MissingPackage: the tokenizer needs a package that is not installed.
    """
    if name not in tokenizer_names():
        known = tokenizer_names()
        raise UsageError(f"unknown tokenizer {name!r}: {meant(name, known)}expected one of {', '.join(known)}")
    if weights is None and name in LOADERS:
        raise UsageError(f"tokenizer {name} needs weights: {LOADERS[name][1]}")
    plugin: Loader | None = None if name in ("tiny", *LOADERS) else load_plugin(TOKENIZERS, name, TokenizerError)
    if precision not in get_args(Precision):
        raise UsageError(f"unknown precision {precision!r}: expected one of {', '.join(get_args(Precision))}")
    found = find_device(device)
    if precision == "tf32" and found.type != "cuda":
        raise UsageError(f"precision tf32 is a mode of NVIDIA GPUs, and the device is {found}: use fp32 or bf16")
    try:
        path, exactly = Path(weights or BUNDLED), cast(Precision, precision)
        if plugin is not None:
            tokenizer = plugin(None if weights is None else path, found, exactly)
        elif name == "tiny":
            tokenizer = load_tiny(path, device=found, precision=exactly)
        else:
            tokenizer = LOADERS[name][0](path).tokenizer(found, exactly)
    except (WdsToolsError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise TokenizerError(f"tokenizer {name!r}: its loader failed ({in_one_line(error)})") from error
    if not isinstance(tokenizer, ImageTokenizer):
        raise TokenizerError(f"tokenizer {name!r}: its loader gave a {type(tokenizer).__name__}, which is no ImageTokenizer")
    if tokenizer.name != name:
        raise TokenizerError(
            f"tokenizer {name!r}: its loader gave one that calls itself {tokenizer.name!r}, and by that name, which datasets "
            "would have, nothing finds it: give the entry point the tokenizer's name"
        )
    if compile:
        if not isinstance(tokenizer, CodebookTokenizer):
            raise UsageError(f"tokenizer {name!r} can't be compiled here: leave --compile out")
        tokenizer.compile()
    return tokenizer


def tokenizer_names() -> list[str]:
    """What `load_tokenizer` knows: ours, and those of installed packages."""
    return sorted({"tiny", *LOADERS, *plugins(TOKENIZERS)})


def find_device(device: str) -> torch.device:
    """Turn "auto", "cpu", "cuda" or "cuda:N" into a device that is there, or raise UsageError."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", device):
        raise UsageError(f"unknown device {device!r}: expected auto, cpu, cuda or cuda:N (to encode also several: cuda:0,1,2,3)")
    if device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError(f"device {device} was asked for, but torch {torch.__version__} finds no CUDA device: use cpu")
    found = torch.device(device)
    count = torch.cuda.device_count()
    if found.index is not None and found.index >= count:
        raise UsageError(f"device {device} was asked for, but there are {count}: expected cuda:0 to cuda:{count - 1}")
    return found


LOADERS: dict[str, tuple[Callable[[Path], Loaded], str]] = {
    "chameleon": (load_chameleon, "a folder with vqgan.yaml and vqgan.ckpt, or of transformers"),
    "emu3": (load_emu3, "a folder with transformers' Emu3VQVAE"),
    "emu35": (load_emu35, "a folder with Emu3.5's config.yaml and model.ckpt, or transformers' Apertus 1.5"),
    "glm-image": (load_glm_image, "a folder of GLM-Image"),
    "janus": (load_janus, "a folder with transformers' JanusVQVAE"),
    "llamagen": (load_llamagen, "LlamaGen's vq_ds16_c2i.pt, or another of its tokenizers"),
    "vqmodel": (load_vq_model, "a folder with a diffusers VQModel"),
}
"""Name -> what loads it, and the weights that it needs: the one place to add a tokenizer of ours."""
