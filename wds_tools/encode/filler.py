"""Samples with images in, the same samples with codes out, in the same order: what the passes that encode have in common.

A `Filler` is a value that travels to the worker processes; each of them loads the tokenizer when its first task begins. With
several devices each process takes one of them, and keeps it.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property, partial
from importlib.metadata import version
from typing import Any, TypeVar

import torch

from wds_tools.encode.batches import Prepare, encode_in_batches
from wds_tools.encode.device import Device
from wds_tools.encode.memory import keep_freed_memory
from wds_tools.encode.options import TokenizerOptions
from wds_tools.errors import FormatError, Reject, UsageError
from wds_tools.format.schema import Codes, Sample, code_column, code_dtype
from wds_tools.images import PREPROCESSING_VERSION, ImageLimits, Mode, prepare
from wds_tools.vq.base import ImageTokenizer
from wds_tools.vq.quantize import ENCODER_VERSION
from wds_tools.vq.registry import find_device, load_tokenizer

Place = TypeVar("Place")
MODES: Mapping[str, Mode] = {"image_text": "cc512", "image_text_multi": "multi768", "visual_sft": "cc512"}


class Filler:
    """Fills the codes of samples.

    Args:
        tokenizer: its name.
        options: how it runs.
        workers: processes that share this machine's cores.
        keep_images: keep the source images beside the codes.
        limits: what an image may be.
    """

    def __init__(
        self, tokenizer: str, options: TokenizerOptions, *, workers: int, keep_images: bool, limits: ImageLimits
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

    def provenance(self, column_types: Iterable[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """What decides on the codes, for the plan; and the provenance of each code column, for the manifest.

        Args:
            column_types: data types that will have codes.
        """
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
        libraries = {name: version(name) for name in ("torch", "pillow", "numpy")}
        columns = sorted({code_column(data_type, self.options.codes) for data_type in column_types})
        return settings, {column: {**settings, "libraries": libraries} for column in columns}

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
        dtype = code_dtype(device.tokenizer.codebook_size)
        batches = encode_in_batches(self._jobs(samples), device, batch_size=self.options.batch_size, threads=self._threads)
        for (place, sample), outcome in batches:
            if isinstance(outcome, Reject):
                yield place, outcome
            elif outcome is None or isinstance(sample, Reject):
                yield place, sample
            else:
                yield place, self._filled(sample, outcome.astype(dtype))

    def _jobs(
        self, samples: Iterable[tuple[Place, Sample | Reject]]
    ) -> Iterator[tuple[tuple[Place, Sample | Reject], Prepare | None]]:
        for place, sample in samples:
            if isinstance(sample, Reject):
                yield (place, sample), None
            elif sample.image is not None:
                yield (place, sample), partial(prepare, sample.image, MODES[sample.data_type], self._limits)
            elif sample.data_type in MODES and sample.data_type != "visual_sft":
                raise FormatError(f"{sample.key} is {sample.data_type} but has no image")
            else:
                yield (place, sample), None

    def _filled(self, sample: Sample, codes_hw: Codes) -> Sample:
        height, width = (side * self.device.tokenizer.stride for side in codes_hw.shape)
        is_multi = sample.data_type == "image_text_multi"
        return sample._replace(
            codes={**sample.codes, code_column(sample.data_type, self.options.codes): codes_hw},
            width=width if is_multi else None,
            height=height if is_multi else None,
            image=sample.image if self._keep_images else None,
            image_extension=sample.image_extension if self._keep_images else None,
        )
