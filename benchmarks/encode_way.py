"""One way of encoding photographs, timed in a process of its own: `python -m benchmarks.encode_way WAY SET TOKENIZER [WEIGHTS]`.

Prints JSON. What is timed begins when the model is loaded and has seen an image.

    plain              one image at a time in float32, as Liquid does it; nothing is written
    fp32, bf16         this project: a shard is read, encoded and written
    fp32/torch, ...    the same with --resize torch
    bare-fp32, -bf16   this project's tokenizer alone, on tensors that are in memory
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from wds_tools.dataset.reader import read_manifest, read_shard
from wds_tools.dataset.writer import ShardLimits, TaskWriter
from wds_tools.encode.encode import encode_shards
from wds_tools.encode.image_encoder import MODES, ImageEncoder
from wds_tools.encode.memory import keep_freed_memory
from wds_tools.encode.options import TokenizerOptions
from wds_tools.images import ImageLimits, prepare
from wds_tools.storage import open_store
from wds_tools.vq import load_tokenizer


class Plain:
    """Pillow, float pixels, the network in its own layout, all distances at once, a JSON list."""

    def __init__(self, name: str, weights: str | None) -> None:
        tokenizer: Any = load_tokenizer(name, weights=weights, device="cpu")
        network = tokenizer.network
        self._encode = network.latents
        if name == "chameleon":
            model = network.model.to(memory_format=torch.contiguous_format)
            for module in model.modules():
                if isinstance(module, torch.nn.GroupNorm):
                    module.__class__ = torch.nn.GroupNorm
            self._encode = lambda pixels_BCHW: model.quant_conv(model.encoder(pixels_BCHW))
        self._codebook_KD = tokenizer.codebook_KD

    @torch.no_grad()
    def __call__(self, data: bytes) -> str:
        """The codes of one image."""
        image = Image.open(io.BytesIO(data)).convert("RGB")
        factor = min(image.size) / 512
        image = image.resize((int(image.width / factor), int(image.height / factor)), Image.Resampling.LANCZOS)
        left, top = (image.width - 512) // 2, (image.height - 512) // 2
        image = image.crop((left, top, left + 512, top + 512))
        pixels_CHW = torch.from_numpy(np.array(image) / 255.0 * 2 - 1).permute(2, 0, 1).float()
        latents_ND = self._encode(pixels_CHW[None].contiguous()).permute(0, 2, 3, 1).flatten(0, 2)
        book_KD: Tensor = self._codebook_KD
        distances_NK = latents_ND.pow(2).sum(1, keepdim=True) + book_KD.pow(2).sum(1) - 2 * latents_ND @ book_KD.T
        return json.dumps(distances_NK.argmin(1).tolist())


class _Clock:
    """Of the wall, and of the processor, which neighbours on the machine disturb less."""

    def __init__(self) -> None:
        self._begun = (time.perf_counter(), time.process_time())

    def read(self, images: int) -> dict[str, float]:
        """Images, and seconds since this was made."""
        return {
            "images": images,
            "seconds": time.perf_counter() - self._begun[0],
            "cpu_seconds": time.process_time() - self._begun[1],
        }


def run(way: str, url: str, name: str, weights: str | None) -> dict[str, float]:
    """Time one way."""
    store = open_store(url)
    manifest = read_manifest(store)
    images = [sample.image for row in manifest.shards for sample in read_shard(store, row) if sample.image is not None]
    if way == "plain":
        plain = Plain(name, weights)
        plain(images[0])
        clock = _Clock()
        for data in images:
            plain(data)
        return clock.read(len(images))
    if way.startswith("bare-"):
        keep_freed_memory()
        tokenizer = load_tokenizer(name, weights=weights, device="cpu", precision=way.removeprefix("bare-"))
        pixels_BHWC = torch.from_numpy(np.stack([prepare(data, "cc512") for data in images]))
        tokenizer.encode(pixels_BHWC[:2])
        clock = _Clock()
        for part in pixels_BHWC.split(16):
            tokenizer.encode(part)
        return clock.read(len(images))
    precision, _, resize = way.partition("/")
    return encode_all(
        url,
        name,
        TokenizerOptions(weights=weights, device="cpu", precision=precision, resize=resize or "pillow"),  # type: ignore[arg-type]
    )


def encode_all(
    url: str, name: str, options: TokenizerOptions, modes: Mapping[str, str] = MODES, side: int = 512
) -> dict[str, float]:
    """Time this project's pass over a dataset, in this process: it is read, encoded and written.

    Args:
        side: of the pictures that it has seen before the clock starts.

    Returns:
        images, seconds, cpu_seconds; waited: the share of the time in which the device had nothing to do.
    """
    store = open_store(url)
    manifest = read_manifest(store)
    image_encoder = ImageEncoder(name, options, workers=1, keep_images=False, limits=ImageLimits(), modes=modes)
    image_encoder.device.tokenizer.encode(torch.zeros(2, side, side, 3, dtype=torch.uint8))
    with tempfile.TemporaryDirectory(dir=Path(url).parent) as folder, TaskWriter(open_store(folder), 0, ShardLimits()) as writer:
        clock = _Clock()
        inputs = encode_shards(url, image_encoder)([asdict(row) for row in manifest.shards], writer, lambda *_: None)
        writer.finish(inputs)
        result = clock.read(inputs)
    total_s, waited_s = image_encoder.device.times()
    return {**result, "waited": waited_s / total_s}


if __name__ == "__main__":
    print(json.dumps(run(*sys.argv[1:4], weights=sys.argv[4] if len(sys.argv) > 4 else None)))
