"""Ways to run a tokenizer's network, and the clock for them. Those that the product does not offer are here to be measured only.

Each is a context: (tokenizer, pixels_BHWC of its device) -> what encodes such pixels. As the product has it, weights and
pixels are channels_last, and codes of fp32 are made image by image.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from wds_tools.vq import quantize
from wds_tools.vq.quantize import CodebookTokenizer

Encode = Callable[[Tensor], Tensor]
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def as_it_is(tokenizer: CodebookTokenizer, _: Tensor) -> Iterator[Encode]:
    """What `wds-tools encode` runs."""
    yield tokenizer.encode


@contextmanager
def channels_first(tokenizer: CodebookTokenizer, _: Tensor) -> Iterator[Encode]:
    """Weights and pixels in torch's default layout."""
    model: Any = tokenizer.network.model  # type: ignore[attr-defined]
    model.to(memory_format=torch.contiguous_format)
    with patch.object(tokenizer, "_latents", lambda pixels_BCHW: model.quant_conv(model.encoder(pixels_BCHW.contiguous()))):
        yield tokenizer.encode
    model.to(memory_format=torch.channels_last)


@contextmanager
def one_search(tokenizer: CodebookTokenizer, _: Tensor) -> Iterator[Encode]:
    """All latents of a pass against the codebook in one matmul."""
    with patch.object(quantize, "_CHUNK", {tokenizer.device.type: 1 << 30}):
        yield tokenizer.encode


@contextmanager
def cudnn_benchmark(tokenizer: CodebookTokenizer, _: Tensor) -> Iterator[Encode]:
    """cuDNN tries its algorithms for each shape and keeps the fastest."""
    with patch.object(torch.backends.cudnn, "benchmark", True):
        yield tokenizer.encode


@contextmanager
def in_one_pass(tokenizer: CodebookTokenizer, _: Tensor) -> Iterator[Encode]:
    """fp32 in batches: codes may then depend on what shares the batch."""
    with patch.object(tokenizer, "_images_at_once", lambda count: count):
        yield tokenizer.encode


@contextmanager
def half_network(tokenizer: CodebookTokenizer, _: Tensor, is_compiled: bool = False) -> Iterator[Encode]:
    """All weights and activations in bf16 or fp16. The product's autocast has norms and what follows them in float32."""
    dtype = HALF[tokenizer.precision]
    network: Any = copy.deepcopy(tokenizer.network)
    torch.nn.Module.to(network.model, dtype)  # diffusers' own warns
    with _backend(tokenizer):
        latents = torch.compile(network.latents, dynamic=False) if is_compiled else network.latents

    def in_half(pixels_BCHW: Tensor) -> Tensor:
        with torch.autocast(tokenizer.device.type, enabled=False):
            return latents(pixels_BCHW.to(dtype)).float()

    with patch.object(tokenizer, "_latents", in_half):
        yield tokenizer.encode


@contextmanager
def half_network_compiled(tokenizer: CodebookTokenizer, pixels_BHWC: Tensor) -> Iterator[Encode]:
    """The same through torch.compile, which joins norms with what surrounds them."""
    with half_network(tokenizer, pixels_BHWC, is_compiled=True) as encode:
        yield encode


@contextmanager
def cuda_graph(tokenizer: CodebookTokenizer, pixels_BHWC: Tensor) -> Iterator[Encode]:
    """The whole pass is recorded once and played for each batch."""
    given_BHWC = pixels_BHWC.clone()
    aside: Any = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        tokenizer.encode(given_BHWC)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes_Bhw = tokenizer.encode(given_BHWC)

    def play(pixels_BHWC: Tensor) -> Tensor:
        given_BHWC.copy_(pixels_BHWC)
        graph.replay()
        return codes_Bhw

    yield play


@contextmanager
def compiled(tokenizer: CodebookTokenizer, _: Tensor) -> Iterator[Encode]:
    """--compile."""
    with patch.multiple(tokenizer, _latents=tokenizer._latents, _is_compiled=False):
        with _backend(tokenizer):
            tokenizer.compile()
        yield tokenizer.encode


def _backend(tokenizer: CodebookTokenizer) -> Any:
    """On a CPU, which is for trying this, torch.compile traces and makes no code: that takes minutes."""
    if tokenizer.device.type != "cpu":
        return nullcontext()
    return patch.object(torch, "compile", partial(torch.compile, backend="eager"))


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def images_per_s(encode: Encode, pixels_BHWC: Tensor, seconds: float) -> float:
    """Of batches that lie in the device's memory, one after the other, for about so many seconds."""
    device = pixels_BHWC.device
    for _ in range(2):  # the first one loads and chooses kernels
        wait(device)
        begun = time.perf_counter()
        encode(pixels_BHWC)
        wait(device)
        once = time.perf_counter() - begun
    count = max(1, int(seconds / once))
    begun = time.perf_counter()
    for _ in range(count):
        encode(pixels_BHWC)
    wait(device)
    return count * len(pixels_BHWC) / (time.perf_counter() - begun)


def matmul_tflops(device: torch.device, precision: quantize.Precision, size: int, seconds: float) -> float:
    """What the device reaches in this precision, in practice: one large matrix product after the other."""
    factor = torch.randn(size, size, device=device, dtype=HALF.get(precision, torch.float32))
    with quantize.running_in(device, precision):
        rate = images_per_s(lambda some: some @ some, factor, seconds) / size
    return 2 * size**3 * rate / 1e12


def gflop_an_image(tokenizer: CodebookTokenizer, side: int) -> float:
    """Of the network and the search, as torch counts its operators; a multiplication and an addition are two."""
    pixels_BCHW = torch.zeros(1, 3, side, side, device=tokenizer.device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        latents_BDhw = tokenizer.network.latents(pixels_BCHW)
    search = 2 * (latents_BDhw.numel() // latents_BDhw.shape[1]) * tokenizer.codebook_KD.numel()
    return (counter.get_total_flops() + search) / 1e9


def slowest_operators(tokenizer: CodebookTokenizer, pixels_BHWC: Tensor, count: int = 6) -> dict[str, str]:
    """The operators that take most of the device's time in a pass, and their share of it."""
    from torch.profiler import ProfilerActivity, profile

    is_cuda = pixels_BHWC.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU]) as profiler:
        tokenizer._codes(pixels_BHWC[: tokenizer._images_at_once(len(pixels_BHWC))])
        wait(pixels_BHWC.device)
    figure = "self_device_time_total" if is_cuda else "self_cpu_time_total"
    times = {event.key: getattr(event, figure) for event in profiler.key_averages()}
    total = sum(times.values()) or 1
    return {name[:70]: f"{times[name] / total:.0%}" for name in sorted(times, key=times.__getitem__, reverse=True)[:count]}
