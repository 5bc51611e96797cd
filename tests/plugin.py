"""Packages of others for tests, with entry points, as pip would leave them in a folder."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from commands import ROOT

EXAMPLE = ROOT / "examples" / "plugin"
MODULE = "wds_tools_notes"

COLOURS = '''
"""Block -> its mean colour in 6 bits each of red, green and blue: 262,144 codes, stride 16."""

import torch
from torch.nn import functional as F


class Colours:
    name, codebook_size, stride, weights_hash, device = "colours", 1 << 18, 16, "sha256:0", torch.device("cpu")

    def encode(self, pixels_BHWC):
        r, g, b = (F.avg_pool2d(pixels_BHWC.permute(0, 3, 1, 2).float(), 16).long() >> 2).unbind(1)
        return r << 12 | g << 6 | b

    def decode(self, codes_Bhw):
        colours_Bhw3 = torch.stack([codes_Bhw.long() >> shift & 63 for shift in (12, 6, 0)], -1) << 2
        return colours_Bhw3.to(torch.uint8).repeat_interleave(16, 1).repeat_interleave(16, 2)


def load(weights, device, precision):
    return Colours()
'''

BLOCKS = '''
"""Blocks of pixels -> their mean colours, in three kinds of codes; and a template that makes ids of several codebooks."""

from dataclasses import dataclass

import numpy as np
import torch

from wds_tools.sequences.templates import Template


class Blocks:
    stride, weights_hash, code_dtype = 16, "sha256:" + "0" * 64, None

    def __init__(self, weights, device, precision):
        self.device = device
        self.into = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).to(device)

    def colours(self, pixels_BHWC):
        return pixels_BHWC.to(self.device).float().unflatten(2, (-1, 16)).unflatten(1, (-1, 16)).mean((2, 4)) / 127.5 - 1

    def picture(self, colours_Bhw3):
        pixels = ((colours_Bhw3.float().clamp(-1, 1) + 1) * 127.5).byte()
        return pixels.repeat_interleave(16, 1).repeat_interleave(16, 2)


class Eight(Blocks):
    """8 codebooks at each place, the last of them larger."""

    name, layout, codebook_size = "eight", "hwk", (16,) * 7 + (32,)

    def codes_shape(self, height, width):
        return height // 16, width // 16, 8

    def encode(self, pixels_BHWC):
        return ((self.colours(pixels_BHWC) @ self.into) * 3 + 8).long().clamp(0, 15)

    def decode(self, codes):
        return self.picture((codes - 7.5) / 3 @ torch.linalg.pinv(self.into))


class Line(Blocks):
    """32 codes for a whole picture, which is of 128 x 128 pixels when it is decoded."""

    name, layout, codebook_size = "line", "n", 512

    def codes_shape(self, height, width):
        return (32,)

    def encode(self, pixels_BHWC):
        colours = torch.nn.functional.adaptive_avg_pool2d(self.colours(pixels_BHWC).permute(0, 3, 1, 2), (4, 8))
        levels = ((colours.flatten(2) + 1) * 4).long().clamp(0, 7)
        return levels[:, 0] * 64 + levels[:, 1] * 8 + levels[:, 2]

    def decode(self, codes):
        levels = torch.stack([codes // 64, codes // 8 % 8, codes % 8], -1).view(-1, 4, 8, 3)
        return self.picture(levels.repeat_interleave(2, 1) / 3.5 - 1)


class Latents(Blocks):
    """No codebook: the colours themselves."""

    name, layout, codebook_size, code_dtype = "latents", "hwd", None, "bfloat16"

    def codes_shape(self, height, width):
        return height // 16, width // 16, 3

    def encode(self, pixels_BHWC):
        return self.colours(pixels_BHWC).bfloat16()

    def decode(self, codes):
        assert codes.dtype is torch.bfloat16
        return self.picture(codes)


class Small(Line):
    """Numbers of one byte, whose number is not known to anybody else."""

    name, layout, codebook_size, code_dtype = "small", "wn", None, "uint8"

    def codes_shape(self, height, width):
        return 4, 8

    def encode(self, pixels_BHWC):
        return super().encode(pixels_BHWC).view(-1, 4, 8) // 2


class Wrong(Eight):
    """One that is wrong in what it is asked to be wrong in."""

    name = "wrong"

    def encode(self, pixels_BHWC):
        codes = super().encode(pixels_BHWC)
        return {"k": codes[..., :7], "range": codes.index_fill(-1, torch.tensor(2), 16), "float": codes.float()}[fault]


class Infinite(Latents):
    name = "infinite"

    def encode(self, pixels_BHWC):
        return super().encode(pixels_BHWC).index_fill(1, torch.tensor(1), float("nan"))


@dataclass(frozen=True, kw_only=True)
class Flat(Template):
    """Ids of codebooks one behind the other."""

    def to_ids(self, codes):
        return codes.astype(np.int64) + 16 * np.arange(8)


fault = "k"
'''


def write_plugin(folder: Path, module: str, code: str, entry_points: str) -> Path:
    """Write a package of one module.

    Args:
        folder: where it goes; put it on the path to have it installed.
        module: its name.
        code: its source.
        entry_points: of the group of tokenizers, a line each; or of any groups, under their names in brackets.
    """
    (folder / f"{module}.py").write_text(code)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion: 1.0\n")
    group = "" if entry_points.startswith("[") else "[wds_tools.tokenizers]\n"
    (info / "entry_points.txt").write_text(f"{group}{entry_points}\n")
    return folder


def write_example(folder: Path) -> Path:
    """Write the package of examples/plugin, as `pip install ./examples/plugin` would leave it."""
    groups = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]["entry-points"]
    lines = (line for group, names in groups.items() for line in (f"[{group}]", *map(" = ".join, names.items())))
    return write_plugin(folder, MODULE, (EXAMPLE / f"{MODULE}.py").read_text(), "\n".join(lines))


@contextmanager
def installed(site: Path, module: str) -> Iterator[None]:
    """While this is open, the package is there for this process and for those that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        patch.setenv("PYTHONPATH", str(site))
        if getattr(sys.modules.get(module), "__file__", None) != str(site / f"{module}.py"):
            sys.modules.pop(module, None)  # of another site; this one's stays, since help looks into the sources of its classes
        yield
