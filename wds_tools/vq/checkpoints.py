"""Weights in files as people have them: safetensors, or what torch.save wrote, with whatever a trainer put around the tensors.

    files -> tensors by name, nested dicts flattened ("state_dict.module.encoder...") -> those beside the codebook, by their own
    names

So a bare state dict, `model`, `state_dict`, `module.` and the inside of a language model are one case. Of several whole sets the
one kept as an average (`ema`) is taken, as the scripts of those who train with one do; what only training needs is left out.
Invariant: `weights_only`, and of the objects that trainers add (`_TRAINERS`) a stand-in that does nothing is built, never they;
any other object is refused by name. Cost: the file in memory, of safetensors only the tensors asked for.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from wds_tools.errors import TokenizerError, in_one_line

CODEBOOK = "quantize.embedding.weight"
_TRAINERS = re.compile(
    r"(argparse|pathlib|numpy|typing|omegaconf|lightning|lightning_fabric|pytorch_lightning)\..*"
    r"|collections\.defaultdict|(builtins|__builtin__)\.(bool|int|float|str|bytes|list|tuple|dict|set|object)"
)
"""Settings and callbacks: objects that are in checkpoints beside the tensors."""
_TRAINING = re.compile(
    r"(loss|perceptual_loss|lpips|discriminator|model_ema)\.|quantize\.(codebook_used|(embedding\.)?(cluster_size|embed_avg))$"
)
"""Tensors that only training needs."""
_AVERAGE = re.compile(r"(.*[._])?ema[._]")


class _Nothing:
    """Stands for an object that is no tensor: takes anything and keeps nothing."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


def read_weights(files: Sequence[Path], codebook: str = CODEBOOK, parts: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
    """The tensors of a tokenizer under its own names; what else is in the files stays there.

    Args:
        files: all parts of the weights.
        codebook: its name in the tokenizer, by which the tokenizer is found.
        parts: what the names of its tensors begin with.

    Raises:
        TokenizerError: a file is damaged or holds objects that are refused; there is no codebook or more than one.
    """
    places: dict[str, Any] = {}
    for path in files:
        try:
            places.update(_safetensors(path) if path.suffix == ".safetensors" else _flat(load_pickle(path)))
        except TokenizerError:
            raise
        except Exception as error:
            raise TokenizerError(f"{path} is damaged, and was not loaded ({in_one_line(error)})") from error
    prefixes = {name.removesuffix(codebook) for name in places if f".{name}".endswith(f".{codebook}")}
    sets = {prefix: _set_of(prefix, prefixes, places, parts) for prefix in prefixes}
    best = max(((len(found), bool(_AVERAGE.match(prefix))) for prefix, found in sets.items()), default=None)
    whole = [found for prefix, found in sets.items() if (len(found), bool(_AVERAGE.match(prefix))) == best]
    if len(whole) != 1:
        where = files[0] if len(files) == 1 else files[0].parent
        raise TokenizerError(f"{where}: {len(whole)} codebooks ({codebook}) in the weights, expected one")
    state = {name: value() if callable(value) else value for name, value in whole[0].items()}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TokenizerError(f"{files[0].parent}: {name} is {type(value).__name__}: expected a tensor")
    return state


def _set_of(prefix: str, prefixes: set[str], places: Mapping[str, Any], parts: tuple[str, ...]) -> dict[str, Any]:
    """What is beside the codebook with this prefix, and beside no other."""
    others = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
    found = {name[len(prefix) :]: value for name, value in places.items() if name.startswith(prefix)}
    return {
        name: value
        for name, value in found.items()
        if name.startswith(parts) and not _TRAINING.match(name) and not f"{prefix}{name}".startswith(others)
    }


def _safetensors(path: Path) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """(name, what reads the tensor) of a file."""
    file: Any = safe_open(path, framework="pt")
    return ((name, partial(file.get_tensor, name)) for name in file.keys())  # noqa: SIM118 (not a dict)


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items() if isinstance(tree, Mapping) else ():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def load_pickle(path: Path) -> Any:
    """What the file holds, on the CPU.

    Raises:
        TokenizerError: it is damaged, or holds objects that are neither tensors nor of those that trainers add.
    """
    found: list[str] = []
    with suppress(Exception):  # files of before 2020 can't be asked
        found = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    stand_ins: list[Any] = [
        (dict if name.endswith(".AttributeDict") else _Nothing, name) for name in found if _TRAINERS.fullmatch(name)
    ]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):
            warnings.simplefilter("ignore")  # torch wonders in public about pickles that are none of its own
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise TokenizerError(
                f"{path} holds more than tensors, and was not loaded: it has a {refused[1]}. If you trust the file, save its "
                f"tensors by themselves: `state = torch.load({path.name!r}, 'cpu', weights_only=False)['state_dict']` (or "
                f"whichever key they are under) and `torch.save(state, {path.name!r})`"
            ) from error
        first = str(error).strip().partition("\n")[0].partition(". ")[0]  # what follows is how to load it all the same
        why = f"{type(error).__name__}: {first[:200]}" if first else type(error).__name__
        raise TokenizerError(f"{path} is damaged or holds more than tensors, and was not loaded ({why})") from error
