"""Samples with images in, the same samples with codes out, in the same order: what the passes that encode have in common.

A `Filler` is a value that travels to the worker processes; each of them loads the tokenizer when its first task begins. With
several devices each process takes one of them, and keeps it.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from importlib.metadata import version
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from wds_tools.encode.batches import Prepare, encode_in_batches
from wds_tools.encode.device import Device
from wds_tools.encode.memory import keep_freed_memory
from wds_tools.encode.options import TokenizerOptions
from wds_tools.errors import FormatError, Reject, UsageError
from wds_tools.format.schema import Sample, code_column, code_dtype, join_grids
from wds_tools.images import PREPROCESSING_VERSION, ImageLimits, Mode, prepare
from wds_tools.vq.base import ImageTokenizer
from wds_tools.vq.quantize import ENCODER_VERSION
from wds_tools.vq.registry import find_device, load_tokenizer

Place = TypeVar("Place")


class Filler:
    """Fills the codes of samples.

    Args:
        tokenizer: its name.
        options: how it runs.
        workers: processes that share this machine's cores.
        keep_images: keep the source images beside the codes.
        limits: what an image may be.
        sft_mode: how images of conversations are cropped.
    """

    def __init__(
        self,
        tokenizer: str,
        options: TokenizerOptions,
        *,
        workers: int,
        keep_images: bool,
        limits: ImageLimits,
        sft_mode: Mode = "cc512",
    ) -> None:
        if len(options.devices) > 1 and workers not in (1, len(options.devices)):
            raise UsageError(
                f"--workers {workers} with --device {options.device}: each device has one process, so leave --workers out"
            )
        self.name = tokenizer
        self.options = options
        self.workers = max(workers, len(options.devices))
        """Processes that encode."""
        self._keep_images = keep_images
        self._limits = limits
        self._modes: dict[str, Mode] = {"image_text": "cc512", "image_text_multi": "multi768", "visual_sft": sft_mode}
        self._devices: Any = None
        if len(options.devices) > 1:
            self._devices = multiprocessing.get_context("spawn").SimpleQueue()
            for name in options.devices:
                self._devices.put(str(find_device(name)))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "device"}  # a worker loads its own

    @cached_property
    def device(self) -> Device:
        """The tokenizer of this process, on its device."""
        name = self._devices.get() if self._devices is not None else self.options.devices[0]
        tokenizer = self._load(name, self.options.precision)
        if tokenizer.device.type == "cpu":
            keep_freed_memory()
            if self.workers > 1:
                torch.set_num_threads(self._threads)
        return Device(tokenizer)

    @property
    def _threads(self) -> int:
        return max(1, (os.cpu_count() or 1) // self.workers)

    def _load(self, device: str, precision: str) -> ImageTokenizer:
        options = self.options
        return load_tokenizer(self.name, weights=options.weights, device=device, precision=precision, compile=options.compile)

    def mode_of(self, data_type: str) -> Mode | None:
        """How an image of such a sample is cropped; None if it has none."""
        return self._modes.get(data_type)

    def column_of(self, data_type: str) -> str:
        """Where the codes of such a sample go."""
        is_multi = self.mode_of(data_type) == "multi768"
        return code_column("image_text_multi" if is_multi else "image_text", self.options.codes)

    def provenance(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What decides on the codes, for the plan; and the same with what may be of interest, for the manifest."""
        if self.workers == 1:
            tokenizer = self.device.tokenizer
        else:  # the workers load their own, and this process leaves their devices alone
            for name in self.options.devices:
                find_device(name)
            tokenizer = self._load("cpu", "fp32" if self.options.precision == "tf32" else self.options.precision)
        settings = {
            "tokenizer": tokenizer.name,
            "codebook_size": tokenizer.codebook_size,
            "stride": tokenizer.stride,
            "weights_hash": tokenizer.weights_hash,
            "preprocessing_version": PREPROCESSING_VERSION,
            "encoder_version": ENCODER_VERSION,
            "precision": self.options.precision,
        }
        if self.options.compile:
            settings["compile"] = True
        return settings, {**settings, "libraries": {name: version(name) for name in ("torch", "pillow", "numpy")}}

    def fill(self, samples: Iterable[tuple[Place, Sample | Reject]]) -> Iterator[tuple[Place, Sample | Reject]]:
        """Fill the codes of samples, beside those that they have. What has no image passes through, and so do rejects.

        Args:
            samples: (where it comes from, the sample).

        Yields:
            The same in the same order, filled, or as a Reject that says why it can't be used.

        Raises:
            FormatError: a sample that has to have an image has none.
        """
        device = self.device
        batches = encode_in_batches(self._jobs(samples), device, batch_size=self.options.batch_size, threads=self._threads)
        for _, images in groupby(batches, key=lambda image: image[0][0]):
            items, outcomes = zip(*images, strict=True)
            _, place, sample = items[0]
            cause = next((outcome for outcome in outcomes if isinstance(outcome, Reject)), None)
            if cause is not None or isinstance(sample, Reject) or self.mode_of(sample.data_type) is None:
                yield place, cause or sample
            else:
                yield place, self._filled(sample, [codes_hw for codes_hw in outcomes if isinstance(codes_hw, np.ndarray)])

    def _jobs(
        self, samples: Iterable[tuple[Place, Sample | Reject]]
    ) -> Iterator[tuple[tuple[int, Place, Sample | Reject], Prepare | None]]:
        """Each image, in order; what has none comes once."""
        for number, (place, sample) in enumerate(samples):
            mode = None if isinstance(sample, Reject) else self.mode_of(sample.data_type)
            if isinstance(sample, Reject) or mode is None or not sample.images:
                if isinstance(sample, Sample) and mode is not None and sample.data_type != "visual_sft":
                    raise FormatError(f"{place}: {sample.key} is {sample.data_type} but has no image")
                yield (number, place, sample), None
                continue
            for image in sample.images:
                yield (number, place, sample), partial(prepare, image.data, mode, self._limits)

    def _filled(self, sample: Sample, found: Sequence[NDArray[np.int64]]) -> Sample:
        tokenizer = self.device.tokenizer
        dtype = code_dtype(tokenizer.codebook_size)
        grids = [codes_hw.astype(dtype) for codes_hw in found]
        column = self.column_of(sample.data_type)
        filled = sample if self._keep_images else sample._replace(image=None, image_extension=None, more_images=())
        if sample.data_type == "visual_sft":
            codes, shapes = join_grids(grids, dtype)
            return filled._replace(codes={**sample.codes, column: codes}, grids={**(sample.grids or {}), column: shapes})
        (codes_hw,) = grids
        height, width = (side * tokenizer.stride for side in codes_hw.shape)
        size = {"width": width, "height": height} if sample.data_type == "image_text_multi" else {}
        return filled._replace(codes={**sample.codes, column: codes_hw}, **size)
