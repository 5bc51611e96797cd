"""Pixels -> latents -> codes -> latents -> pixels: what every VQ tokenizer does around its network.

The network turns pixels in [-1, 1] into a grid of latents and back; here the latents become codes (the nearest codebook
entry) and the codes latents again (a lookup). Invariants: images go through the network one at a time, so that codes
never depend on the batch; `nearest` is always computed in float32, whatever precision the network runs in; ties go to
the lowest index. Cost of `nearest`: 2 N K D operations, and chunk x K x 4 bytes at any one time.

Legend: B images, H x W pixels, h x w codes, N latents of D numbers, K codebook entries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from wds_tools.errors import DataError, UsageError

Precision = Literal["fp32", "bf16"]

_NEAREST_CHUNK = 1024  # latents at a time: 32 MiB of distances with 8192 entries
_SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
_INTEGERS = (*_SIGNED, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


def nearest(latents_ND: Tensor, codebook_KD: Tensor, chunk: int = _NEAREST_CHUNK) -> Tensor:
    """Find the codebook entry nearest to each latent, by squared Euclidean distance in float32.

    Args:
        latents_ND: floating point, on the codebook's device.
        codebook_KD: floating point.
        chunk: latents compared at a time, >= 1; bounds the memory to chunk x K x 4 bytes.

    Returns:
        codes_N: int64 in [0, K); the lowest index among equally near entries.

    Raises:
        UsageError: the shapes do not go together, the codebook is empty, or chunk < 1.
    """
    if latents_ND.ndim != 2 or codebook_KD.ndim != 2 or latents_ND.shape[1] != codebook_KD.shape[1]:
        got = f"latents {tuple(latents_ND.shape)} and codebook {tuple(codebook_KD.shape)}"
        raise UsageError(f"nearest() got {got}: expected (N, D) and (K, D) with one D")
    if chunk < 1 or not len(codebook_KD):
        raise UsageError(f"nearest() got chunk={chunk} and {len(codebook_KD)} codebook entries: both must be at least 1")
    codes_N = torch.empty(len(latents_ND), dtype=torch.int64, device=latents_ND.device)
    with torch.autocast(latents_ND.device.type, enabled=False):
        codebook_DK = codebook_KD.float().T
        norms_K = codebook_DK.square().sum(dim=0)
        for start in range(0, len(latents_ND), chunk):
            part_ND = latents_ND[start : start + chunk].float()
            # |x - c|^2 without the |x|^2 that all entries share
            scores_NK = torch.addmm(norms_K, part_ND, codebook_DK, alpha=-2.0)
            codes_N[start : start + chunk] = scores_NK.argmin(dim=1)
    return codes_N


class Network(Protocol):
    """The part that differs between tokenizers."""

    def latents(self, pixels_BCHW: Tensor) -> Tensor:
        """Turn float32 pixels in [-1, 1] into latents_BDhw, as they are compared with the codebook."""
        ...

    def image(self, latents_BDhw: Tensor) -> Tensor:
        """Turn float32 codebook entries into pixels_BCHW, nominally in [-1, 1]."""
        ...


@dataclass(kw_only=True)
class CodebookTokenizer:
    """An `ImageTokenizer` made of a network and a codebook."""

    name: str
    """What `--tokenizer` calls it."""
    stride: int
    """Pixels per code along each side."""
    weights_hash: str
    """"sha256:<hex>" over the weights file(s)."""
    network: Network = field(repr=False)
    """In eval mode, on the codebook's device."""
    codebook_KD: Tensor = field(repr=False)  # noqa: N815 (a tensor's axes)
    """float32."""
    precision: Precision = "fp32"
    """Of the network; "bf16" is autocast. `nearest` is float32 either way."""

    codebook_size: int = field(init=False)
    """Number of codebook entries."""

    def __post_init__(self) -> None:
        self.codebook_size = len(self.codebook_KD)

    @torch.no_grad()
    def encode(self, pixels_BHWC: Tensor) -> Tensor:
        """Turn uint8 pixels_BHWC into int64 codes_Bhw; see `ImageTokenizer.encode`."""
        check_pixels(pixels_BHWC, self.stride)
        _, H, W, _ = pixels_BHWC.shape
        h, w = H // self.stride, W // self.stride
        codes_Bhw = torch.empty((len(pixels_BHWC), h, w), dtype=torch.int64, device=self.codebook_KD.device)
        with _precision(self.codebook_KD.device, self.precision):
            for i, pixels_HWC in enumerate(pixels_BHWC):
                pixels_1HWC = pixels_HWC[None].to(self.codebook_KD.device).float() / 255 * 2 - 1
                latents_1Dhw = self.network.latents(pixels_1HWC.permute(0, 3, 1, 2))
                latents_ND = latents_1Dhw[0].flatten(1).T
                codes_Bhw[i] = nearest(latents_ND, self.codebook_KD).view(h, w)
        return codes_Bhw

    @torch.no_grad()
    def decode(self, codes_Bhw: Tensor) -> Tensor:
        """Turn codes_Bhw into uint8 pixels_BHWC; see `ImageTokenizer.decode`."""
        check_codes(codes_Bhw, self.codebook_size)
        B, h, w = codes_Bhw.shape
        shape = (B, h * self.stride, w * self.stride, 3)
        pixels_BHWC = torch.empty(shape, dtype=torch.uint8, device=self.codebook_KD.device)
        with _precision(self.codebook_KD.device, self.precision):
            for i, codes_hw in enumerate(codes_Bhw):
                latents_hwD = self.codebook_KD[codes_hw.to(self.codebook_KD.device, torch.int64)]
                pixels_CHW = self.network.image(latents_hwD.permute(2, 0, 1)[None])[0].float()
                pixels_CHW = ((pixels_CHW.clamp(-1, 1) + 1) / 2 * 255).round()
                pixels_BHWC[i] = pixels_CHW.permute(1, 2, 0).to(torch.uint8)
        return pixels_BHWC


def check_pixels(pixels_BHWC: Tensor, stride: int) -> None:
    """Raise UsageError unless these are uint8 RGB images whose sides are multiples of `stride`."""
    if pixels_BHWC.dtype != torch.uint8 or pixels_BHWC.ndim != 4 or pixels_BHWC.shape[3] != 3:
        got = f"{pixels_BHWC.dtype} of shape {tuple(pixels_BHWC.shape)}"
        raise UsageError(f"pixels are {got}: expected torch.uint8 of shape (B, H, W, 3)")
    for side, size in zip("HW", pixels_BHWC.shape[1:3], strict=True):
        below = size // stride * stride
        if size == 0 or below != size:
            sizes = f"{below} or {below + stride}" if below else str(stride)
            raise UsageError(f"{side}={size} is not a multiple of {stride}: crop to {sizes} first")


def check_codes(codes_Bhw: Tensor, codebook_size: int) -> None:
    """Raise UsageError for a wrong dtype or shape, DataError for a code outside [0, codebook_size)."""
    if codes_Bhw.ndim != 3 or codes_Bhw.dtype not in _INTEGERS:
        got = f"{codes_Bhw.dtype} of shape {tuple(codes_Bhw.shape)}"
        raise UsageError(f"codes are {got}: expected integers of shape (B, h, w)")
    if not codes_Bhw.numel():
        return
    low, high = (int(code) for code in codes_Bhw.to(torch.int64).aminmax())
    if low < 0 or high >= codebook_size:
        bad = low if low < 0 else high
        raise DataError(
            f"code {bad} is outside the codebook of {codebook_size} entries: expected 0 to {codebook_size - 1}; "
            f"were these codes made by another tokenizer?"
        )


def hash_files(*paths: Path) -> str:
    """Hash the bytes of the files, in this order: "sha256:<hex>"."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"


@contextmanager
def _precision(device: torch.device, precision: Precision) -> Iterator[None]:
    """Run the network in true float32 (no TF32) or in bfloat16 autocast."""
    if precision == "bf16":
        with torch.autocast(device.type, torch.bfloat16):
            yield
        return
    convs: Any = getattr(torch.backends.cudnn, "conv", None)
    matmul = torch.backends.cuda.matmul
    if device.type != "cuda":
        switches: list[tuple[Any, str, Any]] = []
    elif convs is not None:  # torch >= 2.9
        switches = [(convs, "fp32_precision", "ieee"), (matmul, "fp32_precision", "ieee")]
    else:
        switches = [(torch.backends.cudnn, "allow_tf32", False), (matmul, "allow_tf32", False)]
    was = [getattr(owner, name) for owner, name, _ in switches]
    for owner, name, value in switches:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(switches, was, strict=True):
            setattr(owner, name, value)
