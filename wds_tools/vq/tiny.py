"""The bundled tokenizer: a small convolutional VQ autoencoder of our own, stride 16, made to be fast on a CPU.

Flow: pixels -> PixelUnshuffle(8) -> residual convs at 1/8 -> stride 2 -> residual convs at 1/16 -> latents -> codes,
and back through residual convs at 1/16, 1/8 and 1/4 and a PixelShuffle(4). There is no normalisation and no attention,
so cost is linear in pixels and a code depends only on the pixels around it. About 1.9 GFLOP to encode 512 x 512 pixels,
7 to decode them. Weights are float16 in a safetensors file, upcast to float32 at load; its one metadata key holds
`TinyConfig` as JSON, so equal weights give equal bytes. Trained by examples/train_tiny_tokenizer.py.

VQ autoencoders with straight-through gradients: van den Oord et al. 2017, arXiv:1711.00937.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from wds_tools.errors import TokenizerError, in_one_line
from wds_tools.format.typed_json import read_json
from wds_tools.vq.quantize import CodebookTokenizer, Precision, hash_files

BUNDLED = Path(__file__).parent / "weights" / "tiny.safetensors"
STRIDE = 16
_METADATA_KEY = "tiny_vq"
_Size = Annotated[int, range(1, 65537)]


@dataclass(frozen=True, kw_only=True)
class TinyConfig:
    """Shape of the network; saved with the weights."""

    codebook_size: _Size = 4096
    """Number of codebook entries."""
    latent_dim: _Size = 16
    """Numbers per codebook entry."""
    enc8: _Size = 64
    """Encoder channels at 1/8 of the resolution."""
    enc16: _Size = 160
    """Encoder channels at 1/16."""
    dec16: _Size = 208
    """Decoder channels at 1/16."""
    dec8: _Size = 80
    """Decoder channels at 1/8."""
    dec4: _Size = 48
    """Decoder channels at 1/4."""


class _Residual(nn.Module):
    """x + conv1x1(silu(conv3x3(silu(x)))); starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(channels, channels, 3, padding=1)
        self.mix = nn.Conv2d(channels, channels, 1)
        for parameter in self.mix.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.mix(nn.functional.silu(self.spatial(nn.functional.silu(x))))
        return x + inner


class TinyVQ(nn.Module):
    """Encoder, decoder and codebook; `latents` and `image` are the two halves."""

    codebook_KD: Tensor  # noqa: N815 (a tensor's axes)

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        c = config
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(8),
            nn.Conv2d(3 * 64, c.enc8, 1),
            *(_Residual(c.enc8) for _ in range(2)),
            nn.Conv2d(c.enc8, c.enc16, 2, stride=2),
            *(_Residual(c.enc16) for _ in range(2)),
            nn.Conv2d(c.enc16, c.latent_dim, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(c.latent_dim, c.dec16, 3, padding=1),
            *(_Residual(c.dec16) for _ in range(3)),
            nn.Conv2d(c.dec16, 4 * c.dec8, 1),
            nn.PixelShuffle(2),
            *(_Residual(c.dec8) for _ in range(2)),
            nn.Conv2d(c.dec8, 4 * c.dec4, 1),
            nn.PixelShuffle(2),
            *(_Residual(c.dec4) for _ in range(2)),
            nn.Conv2d(c.dec4, 3 * 16, 3, padding=1),
            nn.PixelShuffle(4),
        )
        self.register_buffer("codebook_KD", torch.zeros(c.codebook_size, c.latent_dim))

    def latents(self, pixels_BCHW: Tensor) -> Tensor:
        """Turn pixels in [-1, 1] into latents_BDhw, h = H / 16 and w = W / 16."""
        latents_BDhw: Tensor = self.encoder(pixels_BCHW)
        return latents_BDhw

    def image(self, latents_BDhw: Tensor) -> Tensor:
        """Turn latents (codebook entries) into pixels_BCHW, nominally in [-1, 1]."""
        pixels_BCHW: Tensor = self.decoder(latents_BDhw)
        return pixels_BCHW


def save_tiny(model: TinyVQ, path: Path) -> None:
    """Write the weights as float16 with the configuration in the metadata; equal weights give equal bytes."""
    tensors = {name: tensor.half().contiguous() for name, tensor in sorted(model.state_dict().items())}
    save_file(tensors, path, metadata={_METADATA_KEY: json.dumps(asdict(model.config), sort_keys=True)})


def load_tiny(path: Path = BUNDLED, *, device: torch.device | str = "cpu", precision: Precision = "fp32") -> CodebookTokenizer:
    """Load a tiny tokenizer.

    Args:
        path: a file written by `save_tiny`; the bundled one by default.
        device: where the network and the codebook go.
        precision: see load_tokenizer.

    Raises:
        TokenizerError: the file is missing, is not a tiny tokenizer, or its tensors do not fit its configuration.
    """
    if Path(path).is_dir():
        raise TokenizerError(f"{path} is a folder: a tiny tokenizer is one .safetensors file; for a folder's see --tokenizer")
    try:
        with safe_open(path, framework="pt") as file:
            config = read_json(TinyConfig, (file.metadata() or {})[_METADATA_KEY], _METADATA_KEY)
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (not a dict)
        model = TinyVQ(config)
        model.load_state_dict(state)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise TokenizerError(f"{path} does not hold a tiny tokenizer ({in_one_line(error)})") from error
    model.requires_grad_(requires_grad=False).eval().to(device)
    return CodebookTokenizer(
        name="tiny",
        stride=STRIDE,
        weights_hash=hash_files(Path(path)),
        network=model,
        codebook_KD=model.codebook_KD,
        precision=precision,
    )
