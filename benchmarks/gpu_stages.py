"""What `benchmarks.gpu` measures, a function each: it yields (what, figures) as it goes, the most telling first.

bare      Chameleon's network and search alone, on pixels in the device's memory: precisions, layouts, graphs, --compile
whole     `encode` on a dataset of JPEGs: the share of the bare network, what the device waited, cores in use
shapes    other sizes and batches, several ratios, two processes on one device, pinned copies on and off
codes     against those of the CPU and of fp32, and what pictures become of them
faults    out of memory made on purpose, NaN
others    emu3 and janus in their released configuration
compiles  --compile in the other precisions
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from benchmarks import gpu_ways
from benchmarks.encode_way import encode_all
from benchmarks.gpu_inputs import MAIN, OTHERS, Inputs
from benchmarks.gpu_ways import images_per_s, wait
from wds_tools.encode.device import Device, Outcome
from wds_tools.encode.image_encoder import ImageEncoder
from wds_tools.encode.options import TokenizerOptions
from wds_tools.errors import TokenizerError
from wds_tools.format.schema import Sample
from wds_tools.images import ImageLimits
from wds_tools.vq.quantize import CodebookTokenizer

Rows = Iterator[tuple[str, dict[str, Any]]]


class Stages:
    """The measurements of one device. `bare_per_s`: images a second of the bare network, by precision, once it is known."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs, self._scale = inputs, inputs.scale
        self._is_cuda = inputs.device.type == "cuda"
        self._precisions = ("bf16", "fp16", "tf32", "fp32") if self._is_cuda else ("bf16", "fp32")
        self.bare_per_s: dict[str, float] = {}

    def all(self) -> list[Callable[[], Rows]]:
        """In the order in which they are worth their time."""
        return [self.bare, self.whole, self.shapes, self.codes, self.faults, self.others, self.compiles]

    def bare(self) -> Rows:
        """See the module."""
        for precision in self._precisions:
            ways = [gpu_ways.as_it_is, gpu_ways.one_search, gpu_ways.channels_first]
            if self._is_cuda:
                ways += [gpu_ways.cuda_graph, gpu_ways.cudnn_benchmark]
            ways += [gpu_ways.half_network] if precision in gpu_ways.HALF else [gpu_ways.in_one_pass]
            if precision == "bf16":
                ways += [gpu_ways.compiled, gpu_ways.half_network_compiled]
            yield from self._ways(precision, ways)

    def compiles(self) -> Rows:
        """See the module."""
        for precision in self._precisions[1:]:
            yield from self._ways(precision, [gpu_ways.as_it_is, gpu_ways.compiled])

    def _ways(self, precision: Any, ways: Sequence[Any]) -> Rows:
        scale, device = self._scale, self._inputs.device
        tokenizer = self._inputs.tokenizer(MAIN, precision)
        pixels_BHWC = self._inputs.pixels(scale.batch).to(device)
        peak = gpu_ways.matmul_tflops(device, precision, scale.matmul, scale.seconds / 2)
        gflop = gpu_ways.gflop_an_image(tokenizer, scale.side)
        codes_Bhw = tokenizer.encode(pixels_BHWC)
        for way in ways:
            begun = time.perf_counter()
            with way(tokenizer, pixels_BHWC) as encode:
                found_Bhw = encode(pixels_BHWC)
                wait(device)
                to_begin = time.perf_counter() - begun
                rate = images_per_s(encode, pixels_BHWC, scale.seconds)
            if way is gpu_ways.as_it_is:
                self.bare_per_s[precision] = rate
            yield (
                f"{MAIN} {scale.side} px, batch {scale.batch}, {precision}: {way.__name__.replace('_', ' ')}",
                {
                    "images_per_s": rate,
                    "tflops": rate * gflop / 1e3,
                    "of_matmul": rate * gflop / 1e3 / peak,
                    "matmul_tflops": peak,
                    "gflop_an_image": gflop,
                    "equal_codes": _equal(found_Bhw, codes_Bhw),
                    "s_to_begin": to_begin,
                },
            )
        yield f"{precision}: slowest operators", dict(gpu_ways.slowest_operators(tokenizer, pixels_BHWC))

    def whole(self) -> Rows:
        """See the module."""
        for precision, resize in (("bf16", "pillow"), ("bf16", "torch"), ("fp32", "pillow")):
            yield from self._whole(precision, resize, f"cc{self._scale.side}")

    def _whole(self, precision: Any, resize: Any, mode: str) -> Rows:
        what = f"encode, {precision}, --resize {resize}, {mode}"
        if resize == "torch" and not hasattr(torch.ops.aten, "_upsample_lanczos2d_aa"):
            yield what, {"skipped": f"torch {torch.__version__} has no LANCZOS: 2.12 has"}
            return
        options = TokenizerOptions(
            weights=self._inputs.weights(MAIN),
            device=str(self._inputs.device),
            precision=precision,
            resize=resize,
            batch_size=self._scale.batch,
        )
        result = encode_all(self._inputs.dataset, MAIN, options, {"image_text": mode}, self._scale.side)
        rate = result["images"] / result["seconds"]
        figures = {"images": result["images"], "images_per_s": rate, "device_waited": result["waited"]}
        if mode == f"cc{self._scale.side}" and precision in self.bare_per_s:
            figures["of_bare"] = rate / self.bare_per_s[precision]
        yield what, {**figures, "cores_in_use": result["cpu_seconds"] / result["seconds"], "cores": os.cpu_count()}

    def shapes(self) -> Rows:
        """See the module."""
        scale, device = self._scale, self._inputs.device
        tokenizer = self._inputs.tokenizer(MAIN, "bf16")
        for batch in scale.batches:
            yield f"{MAIN} {scale.side} px, bf16, batch {batch}", self._rate(tokenizer, batch, scale.side)
        for side in scale.sides:
            batch = max(1, scale.batch * scale.side**2 // side**2)
            yield f"{MAIN} {side} px, bf16, batch {batch}", self._rate(tokenizer, batch, side)
        yield from self._whole("bf16", "pillow", f"multi{scale.side * 3 // 2}")
        images = [*self._inputs.pixels(4 * scale.batch).numpy()]
        for name, passes in (("pinned, on a stream of their own", self._through_device), ("plain", self._one_after_other)):
            passes(tokenizer, images)
            begun = time.perf_counter()
            for _ in range(repeats := 1 + int(scale.seconds * self.bare_per_s.get("bf16", 0) / len(images))):
                passes(tokenizer, images)
            yield f"copies {name}", {"images_per_s": repeats * len(images) / (time.perf_counter() - begun)}
        del tokenizer
        spawn = multiprocessing.get_context("spawn")
        barrier, rates = spawn.Barrier(2), spawn.SimpleQueue()
        processes = [spawn.Process(target=_beside, args=(self._inputs, barrier, rates), daemon=True) for _ in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError("one of two processes on one device failed")
        yield f"two processes on {device}, bf16", {"images_per_s": rates.get() + rates.get()}

    def _rate(self, tokenizer: CodebookTokenizer, batch: int, side: int) -> dict[str, float]:
        pixels_BHWC = self._inputs.pixels(batch, side).to(self._inputs.device)
        if self._is_cuda:
            torch.cuda.reset_peak_memory_stats()
        figures = {"images_per_s": images_per_s(tokenizer.encode, pixels_BHWC, self._scale.seconds)}
        gflop = gpu_ways.gflop_an_image(tokenizer, side)
        figures["tflops"] = figures["images_per_s"] * gflop / 1e3
        if self._is_cuda:
            figures["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return figures

    def _through_device(self, tokenizer: CodebookTokenizer, images: Sequence[Any]) -> None:
        encode_with(Device(tokenizer), images, self._scale.batch)

    def _one_after_other(self, tokenizer: CodebookTokenizer, images: Sequence[Any]) -> None:
        for first in range(0, len(images), self._scale.batch):
            pixels_BHWC = torch.from_numpy(np.stack(images[first : first + self._scale.batch]))
            tokenizer.encode(pixels_BHWC.to(self._inputs.device)).cpu()

    def codes(self) -> Rows:
        """See the module."""
        pixels_BHWC = self._inputs.pixels(self._scale.num_compared)
        for name in ("tiny", MAIN):
            on_cpu = self._inputs.tokenizer(name, "fp32", torch.device("cpu"))
            exact_Bhw = on_cpu.encode(pixels_BHWC)
            pictures = {"cpu": on_cpu.decode(exact_Bhw)} if name == "tiny" else {}
            fp32_Bhw = None
            for precision in reversed(self._precisions):
                tokenizer = self._inputs.tokenizer(name, precision)  # type: ignore[arg-type]
                found_Bhw = tokenizer.encode(pixels_BHWC).cpu()
                fp32_Bhw = found_Bhw if fp32_Bhw is None else fp32_Bhw
                figures = {"equal_to_cpu_fp32": _equal(found_Bhw, exact_Bhw), "equal_to_fp32": _equal(found_Bhw, fp32_Bhw)}
                figures["different_codes"] = len(exact_Bhw.unique())
                figures["further_away"] = further(on_cpu, pixels_BHWC, exact_Bhw, found_Bhw)
                if pictures:
                    here_BHWC = tokenizer.decode(found_Bhw).cpu()
                    figures["psnr_db"] = _psnr(here_BHWC, pixels_BHWC)
                    figures["psnr_db_cpu_fp32"] = _psnr(pictures["cpu"], pixels_BHWC)
                yield f"codes of {name}, {precision}", figures

    def faults(self) -> Rows:
        """See the module."""
        tokenizer, batch = self._inputs.tokenizer(MAIN, "bf16"), 4 * self._scale.batch
        images = [*self._inputs.pixels(2 * batch).numpy()]
        with little_memory(tokenizer, images[:batch]):
            found, reached = encode_with(Device(tokenizer), images, batch)
        expected, _ = encode_with(Device(tokenizer), images, reached)
        equal = float(np.mean([np.mean(one == other) for one, other in zip(found, expected, strict=True)]))
        yield f"out of memory at batch {batch}", {"went_on_with": reached, "equal_codes": equal}
        yield "NaN", {"error": nan_error(self._inputs)}

    def others(self) -> Rows:
        """See the module."""
        for name in OTHERS:
            for precision in ("bf16", "fp32"):
                tokenizer = self._inputs.tokenizer(name, precision)  # type: ignore[arg-type]
                what = f"{name} {self._scale.side} px, batch {self._scale.batch}, {precision}"
                yield what, self._rate(tokenizer, self._scale.batch, self._scale.side)


def _equal(one_Bhw: Tensor, other_Bhw: Tensor) -> float:
    return float((one_Bhw == other_Bhw).float().mean())


def _psnr(one_BHWC: Tensor, other_BHWC: Tensor) -> float:
    """Mean of the images'."""
    errors_B = (one_BHWC.float() - other_BHWC.float()).square().flatten(1).mean(1)
    return float((10 * torch.log10(255**2 / errors_B.clamp_min(1e-9))).mean())


def further(on_cpu: CodebookTokenizer, pixels_BHWC: Tensor, exact_Bhw: Tensor, found_Bhw: Tensor) -> float:
    """How much further from its latent the entry of a code that differs is than the nearest one, at most, of that distance."""
    worst = 0.0
    for i in range(len(pixels_BHWC)):
        places = exact_Bhw[i] != found_Bhw[i]
        if bool(places.any()):
            with torch.inference_mode():
                floats_BCHW = (pixels_BHWC[i : i + 1].permute(0, 3, 1, 2) / 255 * 2 - 1).contiguous()
                latents_ND = on_cpu.network.latents(floats_BCHW)[0].permute(1, 2, 0)[places]
            entries = (on_cpu.codebook_KD[codes_Bhw[i][places]] for codes_Bhw in (exact_Bhw, found_Bhw))
            near_N, far_N = ((latents_ND - entries_ND).norm(dim=1) for entries_ND in entries)
            worst = max(worst, float((far_N / near_N - 1).max()))
    return worst


def encode_with(device: Device, images: Sequence[Any], batch: int) -> tuple[list[Any], int]:
    """The codes of images of one size, and the size of batch that they came to: a smaller one where memory ran out."""
    device.takes_any_size = False  # in batches also on a CPU
    outcomes: list[Future[Outcome]] = [Future() for _ in images]
    for first in range(0, len(images), batch):
        device.encode(outcomes[first : first + batch], images[first : first + batch])
    return [outcome.result() for outcome in outcomes], min(batch, device._most_pixels // images[0][..., 0].size)


@contextmanager
def little_memory(tokenizer: CodebookTokenizer, images: Sequence[Any]) -> Iterator[None]:
    """Such a batch no longer fits. On a GPU its memory is limited to what lies between an image and all; a CPU plays it."""
    pixels_BHWC = torch.from_numpy(np.stack(images))
    if tokenizer.device.type == "cuda":
        peaks = []
        for part_BHWC in (pixels_BHWC[:1], pixels_BHWC):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            tokenizer.encode(part_BHWC)
            wait(tokenizer.device)
            peaks.append(torch.cuda.max_memory_reserved())
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(tokenizer.device).total_memory
        torch.cuda.set_per_process_memory_fraction(sum(peaks) / 2 / total)
        yield
        torch.cuda.set_per_process_memory_fraction(1.0)
        return
    encode = tokenizer.encode

    def limited(pixels_BHWC: Tensor) -> Tensor:
        if len(pixels_BHWC) > len(images) // 2:
            raise torch.OutOfMemoryError("as asked")
        return encode(pixels_BHWC)

    with patch.object(tokenizer, "encode", limited):
        yield


def nan_error(inputs: Inputs) -> str:
    """What a pass says of a network that gives NaN for one of its images. Raises AssertionError if it says nothing."""
    options = TokenizerOptions(weights=inputs.weights(MAIN), device=str(inputs.device), batch_size=4)
    modes = {"image_text": f"cc{inputs.scale.side}"}
    encoder = ImageEncoder(MAIN, options, workers=1, keep_images=False, limits=ImageLimits(), modes=modes)
    tokenizer: Any = encoder.device.tokenizer
    latents, calls = tokenizer._latents, iter(range(1 << 30))
    photo: dict[str, Any] = {"image": inputs.jpegs[0], "image_extension": "jpg"}
    samples = [(i, Sample(key=f"{i:08d}", data_type="image_text", text="", **photo)) for i in range(4)]
    with patch.object(tokenizer, "_latents", lambda x: latents(x) * (torch.nan if next(calls) == 2 else 1)):
        try:
            list(encoder.fill(samples))
        except TokenizerError as error:
            return str(error)
    raise AssertionError("NaN became codes")


def _beside(inputs: Inputs, barrier: Any, rates: Any) -> None:
    """One of two processes."""
    tokenizer = inputs.tokenizer(MAIN, "bf16")
    pixels_BHWC = inputs.pixels(inputs.scale.batch).to(inputs.device)
    tokenizer.encode(pixels_BHWC)
    barrier.wait(120)
    rates.put(images_per_s(tokenizer.encode, pixels_BHWC, inputs.scale.seconds))
