"""Pixels -> latents -> codes -> latents -> pixels: what every VQ tokenizer does around its network.

The network turns pixels in [-1, 1] into a grid of latents and back; here the latents become codes (the nearest codebook
entry) and the codes latents again (a lookup). Invariant: in fp32 a code depends on its image alone. So images go through the
network one by one, on a CPU each on one thread (`lanes`), since kernels sum in another order for another batch or another number
of threads. The other precisions take a batch in one pass on a GPU, where one image alone would not fill it. `nearest` is always
computed in true float32; ties go to the lowest index. What is no number (NaN, infinite) never becomes a code: weights are
refused, latents get -1, which no table takes, and pictures are refused. Cost of `nearest`: 2 N K D operations, and chunk x K x 4
bytes; of looking whether latents are numbers, less than 1 % of that, and no wait for a GPU.

Legend: B images, H x W pixels, h x w codes, N latents of D numbers, K codebook entries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from wds_tools.errors import DataError, TokenizerError, UsageError
from wds_tools.vq.lanes import side_by_side

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Nearest = Literal["distance", "product"]

ENCODER_VERSION = "2"
"""Changes whenever equal pixels and weights give other codes in fp32. 1: sums depended on the number of threads."""
NO_CODE = -1
"""What `nearest` gives for a latent that is no number."""
NAN_HELP = "use --precision bf16 or fp32 (fp16 ends at 65,504); in fp32, look for other or damaged weights"
_CHUNK = {"cpu": 256}  # latents at a time: of 8192 entries 8 MiB of distances, which stay in a processor's cache
_GPU_CHUNK = 4096
_MOST_SHAPES = 256  # that are compiled: 25 sizes of images, of each a few of batches
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
_INTEGERS = (*_SIGNED, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


def nearest(latents_ND: Tensor, codebook_KD: Tensor, chunk: int | None = None, *, by: Nearest = "distance") -> Tensor:
    """Find the codebook entry nearest to each latent, in float32.

    Args:
        latents_ND: floating point, on the codebook's device.
        codebook_KD: floating point.
        chunk: latents compared at a time, >= 1; bounds the memory to chunk x K x 4 bytes.
        by: the smallest squared Euclidean distance, or the largest inner product.

    Returns:
        codes_N: int64 in [0, K); the lowest index among equally near entries; -1 where the latent is NaN or infinite.

    Raises:
        UsageError: the shapes do not go together, the codebook is empty, or chunk < 1.
    """
    if latents_ND.ndim != 2 or codebook_KD.ndim != 2 or latents_ND.shape[1] != codebook_KD.shape[1]:
        got = f"latents {tuple(latents_ND.shape)} and codebook {tuple(codebook_KD.shape)}"
        raise UsageError(f"nearest() got {got}: expected (N, D) and (K, D) with one D")
    device = latents_ND.device
    chunk = _CHUNK.get(device.type, _GPU_CHUNK) if chunk is None else chunk
    if chunk < 1 or not len(codebook_KD):
        raise UsageError(f"nearest() got chunk={chunk} and {len(codebook_KD)} codebook entries: both must be at least 1")
    codes_N = torch.empty(len(latents_ND), dtype=torch.int64, device=device)
    with torch.no_grad(), torch.autocast(device.type, enabled=False), running_in(device, "fp32"):
        codebook_DK = codebook_KD.float().T
        norms_K = codebook_DK.square().sum(dim=0) if by == "distance" else codebook_DK.new_zeros(len(codebook_KD))
        for start in range(0, len(latents_ND), chunk):
            part_ND = latents_ND[start : start + chunk].float()
            # |x - c|^2 without the |x|^2 that all entries share
            scores_NK = torch.addmm(norms_K, part_ND, codebook_DK, alpha=-2.0)
            if device.type == "cpu":  # numpy's argmin uses the vector units, torch's does not
                codes_N.numpy()[start : start + chunk] = scores_NK.numpy().argmin(axis=1)
            else:
                torch.argmin(scores_NK, dim=1, out=codes_N[start : start + chunk])
        # NaN or infinite as soon as one number of a latent is
        lengths_N = torch.linalg.vector_norm(latents_ND, dim=1, dtype=torch.float32)
        return codes_N.masked_fill_(~(lengths_N < torch.inf), NO_CODE)


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
    """An `ImageTokenizer` made of a network and a codebook. Raises TokenizerError if a weight is NaN or infinite."""

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
    """Of the network: bf16 and fp16 are autocast. `nearest` is float32 in all of them."""
    by: Nearest = "distance"
    """What is nearest; see `nearest`."""

    codebook_size: int = field(init=False)
    """Number of codebook entries."""

    def __post_init__(self) -> None:
        self.codebook_size = len(self.codebook_KD)
        model = getattr(self.network, "model", self.network)
        weights = model.state_dict() if isinstance(model, nn.Module) else {}
        for name, tensor in {**weights, "the codebook": self.codebook_KD}.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise TokenizerError(f"tokenizer {self.name}: {name} has NaN or infinite weights: the file is damaged")
        self._latents = self.network.latents
        self._is_compiled = False

    @property
    def device(self) -> torch.device:
        """Where the network is, and where pixels are best."""
        return self.codebook_KD.device

    def compile(self) -> None:
        """From now on, encode with a network that torch.compile made; its codes may differ in a few places."""
        torch._dynamo.config.recompile_limit = _MOST_SHAPES
        self._latents = torch.compile(self.network.latents, dynamic=False)
        self._is_compiled = True

    def encode(self, pixels_BHWC: Tensor) -> Tensor:
        """Turn uint8 pixels_BHWC into int64 codes_Bhw; see `ImageTokenizer.encode`."""
        check_pixels(pixels_BHWC, self.stride)
        B, H, W, _ = pixels_BHWC.shape
        codes_Bhw = torch.empty((B, H // self.stride, W // self.stride), dtype=torch.int64, device=self.device)

        def work(first: int) -> None:
            codes_Bhw[first : first + at_once] = self._codes(pixels_BHWC[first : first + at_once])

        at_once = self._images_at_once(B)
        self._for_each(work, range(0, B, at_once))
        return codes_Bhw

    def encode_each(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Turn uint8 pixels_HWC of any sizes into int64 codes_hw: on a CPU those that `encode` gives for each."""
        codes: dict[int, Tensor] = {}

        def work(i: int) -> None:
            check_pixels(images[i][None], self.stride)
            codes[i] = self._codes(images[i][None])[0]

        self._for_each(work, range(len(images)))
        return [codes[i] for i in range(len(images))]

    def decode(self, codes_Bhw: Tensor) -> Tensor:
        """Turn codes_Bhw into uint8 pixels_BHWC; see `ImageTokenizer.decode`."""
        check_codes(codes_Bhw, self.codebook_size)
        B, h, w = codes_Bhw.shape
        shape = (B, h * self.stride, w * self.stride, 3)
        pixels_BHWC = torch.empty(shape, dtype=torch.uint8, device=self.device)
        is_number_B = torch.empty(B, dtype=torch.bool, device=self.device)

        def work(i: int) -> None:
            pixels_BHWC[i], is_number_B[i] = self._pixels(codes_Bhw[i])

        self._for_each(work, range(B))
        if not bool(is_number_B.all()):
            number = int(is_number_B.int().argmin())
            raise TokenizerError(
                f"tokenizer {self.name} in {self.precision} gave NaN or infinite pixels for picture {number} of {B}: {NAN_HELP}"
            )
        return pixels_BHWC

    def _images_at_once(self, B: int) -> int:
        """How many images take part in one pass of the network."""
        return 1 if self.precision == "fp32" or self.device.type == "cpu" else max(B, 1)

    def _for_each(self, work: Callable[[int], None], places: range) -> None:
        if self.device.type == "cpu":
            side_by_side(work, places)
        else:
            for place in places:
                work(place)

    @torch.inference_mode()
    def _codes(self, pixels_BHWC: Tensor) -> Tensor:
        B, H, W, _ = pixels_BHWC.shape
        if self._is_compiled:  # few batch sizes, since each is compiled by itself
            pixels_BHWC = torch.cat([pixels_BHWC, pixels_BHWC[-1:].expand(_power_of_two(B) - B, -1, -1, -1)])
        # A tensor of our own, since a size-1 axis may have any stride, by which torch chooses between kernels.
        floats_BHWC = torch.empty(pixels_BHWC.shape, device=self.device).copy_(pixels_BHWC).div_(255).mul_(2).sub_(1)
        with running_in(self.device, self.precision):
            latents_BDhw = self._latents(floats_BHWC.permute(0, 3, 1, 2))[:B]
        latents_ND = latents_BDhw.permute(0, 2, 3, 1).flatten(0, 2)
        return nearest(latents_ND, self.codebook_KD, by=self.by).view(B, H // self.stride, W // self.stride)

    @torch.inference_mode()
    def _pixels(self, codes_hw: Tensor) -> tuple[Tensor, Tensor]:
        latents_hwD = self.codebook_KD[codes_hw.to(self.device, torch.int64)]
        with running_in(self.device, self.precision):
            pixels_CHW = self.network.image(latents_hwD.permute(2, 0, 1)[None])[0].float()
        is_number = pixels_CHW.isfinite().all()
        return ((pixels_CHW.clamp(-1, 1) + 1) / 2 * 255).round().permute(1, 2, 0).to(torch.uint8), is_number


def _power_of_two(count: int) -> int:
    """The next one that is not smaller."""
    return 1 << (count - 1).bit_length()


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
            hashlib.file_digest(file, lambda: digest)
    return f"sha256:{digest.hexdigest()}"


@contextmanager
def running_in(device: torch.device, precision: Precision) -> Iterator[None]:
    """Run a network in true float32 (no TF32), in TF32, or in bfloat16 or float16 autocast."""
    if precision in _AUTOCAST:
        with torch.autocast(device.type, _AUTOCAST[precision]):
            yield
        return
    switches: list[tuple[Any, str, Any]] = []
    if device.type == "cuda":
        convs: Any = getattr(torch.backends.cudnn, "conv", None)
        matmul = torch.backends.cuda.matmul
        if convs is not None:  # torch >= 2.9
            value = "tf32" if precision == "tf32" else "ieee"
            switches = [(convs, "fp32_precision", value), (matmul, "fp32_precision", value)]
        else:
            switches = [(torch.backends.cudnn, "allow_tf32", precision == "tf32"), (matmul, "allow_tf32", precision == "tf32")]
    was = [getattr(owner, name) for owner, name, _ in switches]
    for owner, name, value in switches:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(switches, was, strict=True):
            setattr(owner, name, value)
