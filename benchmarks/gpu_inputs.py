"""What `benchmarks.gpu` measures on: photographs, as pixels and as a dataset, and networks with random weights.

Full size is what the figures are for. The reduced one runs the same code on any machine in a minute, and its figures say nothing.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import skimage.data
import torch
from PIL import Image
from torch import Tensor

from benchmarks.encode import write_chameleon
from wds_tools.dataset.output import Output, OutputSpec
from wds_tools.dataset.writer import ShardLimits, TaskWriter
from wds_tools.format.schema import Sample
from wds_tools.images import prepare
from wds_tools.storage import open_store
from wds_tools.vq import load_tokenizer
from wds_tools.vq.chameleon import WEIGHTS_NAME
from wds_tools.vq.quantize import CodebookTokenizer

MAIN = "chameleon"
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "ihc", "motorcycle_left", "retina", "rocket")
"""Of scikit-image's wheel, in colour."""
QUALITIES = (75, 88, 95)
OTHERS = {"emu3": "Emu3VQVAE", "janus": "JanusVQVAE"}
"""Tokenizers of transformers whose default configuration is the released one."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large all is."""

    network: tuple[int, int, int] = (128, 256, 8192)
    """Chameleon's channels, latents and codebook entries."""
    others: dict[str, Any] = field(default_factory=dict)
    """Name -> configuration of the others, where it is not their own."""
    side: int = 512
    sides: tuple[int, ...] = (256, 1024)
    batch: int = 16
    batches: tuple[int, ...] = (1, 4, 32, 64, 128)
    widths: tuple[int, ...] = (640, 1024, 1600)
    """Of the photographs that are encoded again."""
    num_photos: int = 2000
    num_compared: int = 8
    """Photographs whose codes are compared with the CPU's."""
    matmul: int = 8192
    seconds: float = 2.0
    """Of each measurement."""


_SMALL = {"embed_dim": 8, "latent_channels": 8, "base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1}
QUICK = Scale(
    network=(32, 32, 256),
    others={
        "emu3": {**_SMALL, "hidden_size": 64, "temporal_downsample_factor": 2, "attn_resolutions": [2]},
        "janus": {**_SMALL, "num_patches": 8},
    },
    side=64,
    sides=(128,),
    batch=1,
    batches=(2,),
    widths=(160,),
    num_photos=4,
    num_compared=2,
    matmul=128,
    seconds=0.01,
)


@dataclass
class Inputs:
    """Makes what is asked for, below a folder; travels to other processes."""

    folder: Path
    device: torch.device
    scale: Scale

    @cached_property
    def jpegs(self) -> list[bytes]:
        """The photographs at several sizes and qualities."""
        found = []
        for name in PHOTOGRAPHS:
            path = next(Path(skimage.data.data_dir).glob(f"{name}.*"))
            photo = Image.open(path).convert("RGB")
            for width in self.scale.widths:
                scaled = photo.resize((width, round(width * photo.height / photo.width)), Image.Resampling.LANCZOS)
                for quality in QUALITIES:
                    out = io.BytesIO()
                    scaled.save(out, "JPEG", quality=quality)
                    found.append(out.getvalue())
        return found

    def pixels(self, count: int, side: int | None = None) -> Tensor:
        """uint8 pixels_BHWC of photographs, on the CPU; other photographs first, then other sizes and qualities."""
        step = len(self.jpegs) // len(PHOTOGRAPHS)
        mixed = [data for first in range(step) for data in self.jpegs[first::step]]
        images = [prepare(data, f"cc{side or self.scale.side}") for data in mixed[:count]]
        return torch.from_numpy(np.stack(list(islice(cycle(images), count))))

    @cached_property
    def dataset(self) -> str:
        """All photographs, again and again, as pairs in one shard."""
        store = open_store(str(self.folder / "photos"))
        output = Output(store, OutputSpec(num_tasks=1, source={"command": "benchmark"}))
        output.begin()
        with TaskWriter(store, 0, ShardLimits()) as writer:
            for number, data in enumerate(islice(cycle(self.jpegs), self.scale.num_photos)):
                key, image = f"{number:08d}", {"image": data, "image_extension": "jpg"}
                writer.add(Sample(key=key, data_type="image_text", text="a photograph", **image))
            writer.finish(writer.num_samples)
        output.finish(output.results())
        return store.url

    def weights(self, name: str) -> str | None:
        """Random ones of this tokenizer; None for tiny, which has its own."""
        if name == "tiny":
            return None
        folder = self.folder / name
        if not folder.exists():
            torch.manual_seed(0)
            if name == MAIN:
                write_chameleon(folder, *self.scale.network)
                self._use_latents_as_entries(folder / WEIGHTS_NAME)
            else:
                self._write_other(name, folder)
        return str(folder)

    def _use_latents_as_entries(self, file: Path) -> None:
        """A codebook of what the network makes of photographs, blurred: else all latents would have the same few codes."""
        tokenizer = load_tokenizer(MAIN, weights=str(file.parent), device=str(self.device))
        assert isinstance(tokenizer, CodebookTokenizer)
        wanted = len(tokenizer.codebook_KD)
        images = self.pixels(-(-wanted * tokenizer.stride**2 // self.scale.side**2)).to(self.device)
        with torch.inference_mode():
            floats_BCHW = (images.permute(0, 3, 1, 2) / 255 * 2 - 1).contiguous()
            latents = [tokenizer.network.latents(image[None])[0].flatten(1).T.float() for image in floats_BCHW]
        latents_KD = torch.cat(latents)[:wanted].cpu()
        latents_KD += 0.3 * latents_KD.std(0) * torch.randn(latents_KD.shape)
        state = torch.load(file, weights_only=True)
        state["state_dict"]["quantize.embedding.weight"] = latents_KD.contiguous()
        torch.save(state, file)

    def _write_other(self, name: str, folder: Path) -> None:
        import transformers

        config = getattr(transformers, f"{OTHERS[name]}Config")(**self.scale.others.get(name, {}))
        getattr(transformers, OTHERS[name])(config).save_pretrained(folder)

    def tokenizer(
        self, name: str, precision: Literal["fp32", "tf32", "bf16", "fp16"], device: torch.device | None = None
    ) -> CodebookTokenizer:
        """Loaded, on the device that is measured unless another is named."""
        tokenizer = load_tokenizer(name, weights=self.weights(name), device=str(device or self.device), precision=precision)
        assert isinstance(tokenizer, CodebookTokenizer)
        return tokenizer
