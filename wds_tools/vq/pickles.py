"""Weights that torch.save wrote: tensors, and the containers that hold them; nothing else in the file is ever built."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from wds_tools.errors import TokenizerError


def load_pickle(path: Path) -> Any:
    """What the file holds, on the CPU.

    Raises:
        TokenizerError: it is damaged, or building it would take more than that.
    """
    try:
        with warnings.catch_warnings():  # torch wonders in public about pickles that are none of its own
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        why = first_line(error)  # what follows is how to load it all the same
        raise TokenizerError(f"{path.name} is damaged or holds more than tensors, and was not loaded ({why})") from error


def first_line(error: Exception) -> str:
    """The error's type, and the first sentence of its message."""
    first = str(error).strip().partition("\n")[0].partition(". ")[0]
    return f"{type(error).__name__}: {first[:200]}" if first else type(error).__name__
