"""A tokenizer's name, and what the user said of weights, device and precision -> a loaded `ImageTokenizer`.

Invariant: what is asked for is what runs. An unknown name, a device that isn't there or an unknown precision is a
UsageError; nothing falls back in silence. Cost: that of loading the one tokenizer asked for; no other is imported.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import cast, get_args

import torch

from wds_tools.errors import UsageError
from wds_tools.vq.base import ImageTokenizer
from wds_tools.vq.chameleon import CONFIG_NAME, WEIGHTS_NAME, load_chameleon
from wds_tools.vq.quantize import Precision
from wds_tools.vq.tiny import BUNDLED, load_tiny

Loader = Callable[[Path | None, torch.device, Precision], ImageTokenizer]


def load_tokenizer(name: str, *, weights: str | None = None, device: str = "auto", precision: str = "fp32") -> ImageTokenizer:
    """Load an image tokenizer by name.

    Args:
        name: "tiny" (bundled) or "chameleon".
        weights: path of the weights: a safetensors file for tiny (the bundled one if None), a folder for chameleon.
        device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N".
        precision: "fp32" (no TF32), or "bf16" for the network; the codebook search is float32 either way.

    Raises:
        UsageError: an unknown name or precision, a device that isn't there, or weights that were needed and not given.
        TokenizerError: the weights are missing, unsafe or do not fit their configuration.
        MissingPackage: the tokenizer needs a package that is not installed.
    """
    loader = LOADERS.get(name)
    if loader is None:
        raise UsageError(f"unknown tokenizer {name!r}: expected one of {', '.join(sorted(LOADERS))}")
    if precision not in get_args(Precision):
        raise UsageError(f"unknown precision {precision!r}: expected one of {', '.join(get_args(Precision))}")
    path = None if weights is None else Path(weights)
    return loader(path, find_device(device), cast(Precision, precision))


def find_device(device: str) -> torch.device:
    """Turn "auto", "cpu", "cuda" or "cuda:N" into a device that is there, or raise UsageError."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", device):
        raise UsageError(f"unknown device {device!r}: expected auto, cpu, cuda or cuda:N")
    if device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError(f"device {device} was asked for, but torch {torch.__version__} finds no CUDA device: use cpu")
    found = torch.device(device)
    count = torch.cuda.device_count()
    if found.index is not None and found.index >= count:
        raise UsageError(f"device {device} was asked for, but there are {count}: expected cuda:0 to cuda:{count - 1}")
    return found


def _tiny(weights: Path | None, device: torch.device, precision: Precision) -> ImageTokenizer:
    return load_tiny(BUNDLED if weights is None else weights, device=device, precision=precision)


def _chameleon(weights: Path | None, device: torch.device, precision: Precision) -> ImageTokenizer:
    if weights is None:
        raise UsageError(f"tokenizer chameleon needs weights: a folder with {CONFIG_NAME} and {WEIGHTS_NAME}")
    return load_chameleon(weights, device=device, precision=precision)


LOADERS: dict[str, Loader] = {"tiny": _tiny, "chameleon": _chameleon}
"""Name -> loader; the one place to add a tokenizer."""
