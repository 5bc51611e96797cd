"""Packages of others for tests, with entry points, as pip would leave them in a folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

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


@contextmanager
def installed(site: Path, module: str) -> Iterator[None]:
    """While this is open, the package is there for this process and for those that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        patch.setenv("PYTHONPATH", str(site))
        yield
        sys.modules.pop(module, None)
