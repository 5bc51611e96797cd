"""Samples with images in, the same samples with codes out, in the same order: what the passes that encode have in common.

An `ImageEncoder` is a value that travels to the worker processes; each of them loads the tokenizer when its first task begins.
With several devices each process takes one of them, and keeps it.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from importlib.metadata import version
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

import torch
from numpy.typing import NDArray

from wds_tools.encode.batches import Prepare, encode_in_batches
from wds_tools.encode.device import Device
from wds_tools.encode.memory import keep_freed_memory
from wds_tools.encode.options import TokenizerOptions
from wds_tools.encode.resize import check_torch_resize, prepare_with_torch
from wds_tools.errors import FormatError, Reject, TokenizerError, UsageError
from wds_tools.format.codes import join_grids, named_column
from wds_tools.format.schema import MARKED_TYPES, PAIR_TYPES, Sample, pair_fields
from wds_tools.images import PREPROCESSING_VERSION, ImageLimits, Mode, parse_mode, prepare, probe
from wds_tools.run.local import stops_held
from wds_tools.run.ray_cluster import check_device
from wds_tools.terminal import say
from wds_tools.vq.base import ImageTokenizer, layout_of
from wds_tools.vq.quantize import ENCODER_VERSION, NAN_HELP
from wds_tools.vq.registry import find_device, load_tokenizer

Place = TypeVar("Place")
_LARGE_CODEBOOK = 1 << 16
_PREPARE = {"pillow": prepare, "torch": prepare_with_torch}
MODES = {"image_text": "cc512", "image_text_multi": "multi768", "visual_sft": "cc512", "interleaved": "cc512"}
"""Data type of samples with images -> mode of these, by default."""


class _Ticket(NamedTuple):
    """Where an image comes from."""

    number: int
    """Of its sample."""
    place: Any
    sample: Sample | Reject


class ImageEncoder:
    """Fills the codes of samples.

    Args:
        tokenizer: its name.
        options: how it runs.
        workers: processes that share this machine's cores.
        cpus: that a task has on another machine, where the work is done; None if it is done here.
        keep_images: keep the source images beside the codes.
        limits: what an image may be.
        modes: data type -> mode of its images, where it is another than that of MODES. A pair without codes becomes one of the
            data type of its mode.

    Raises:
        UsageError: an option has no effect here; a mode is none.
    """

    def __init__(
        self,
        tokenizer: str,
        options: TokenizerOptions,
        *,
        workers: int,
        cpus: int | None = None,
        keep_images: bool,
        limits: ImageLimits,
        modes: Mapping[str, str] = MODES,
    ) -> None:
        if cpus is not None:
            check_device(options.device)  # before a device of this machine is looked for
        if len(options.devices) > 1 and workers not in (1, len(options.devices)):
            raise UsageError(
                f"--workers {workers} with --device {options.device}: each device has one process, so leave --workers out"
            )
        if options.resize == "torch":
            check_torch_resize()
        self.name = tokenizer
        self.options = options
        self.workers = max(workers, len(options.devices))
        """Processes that encode."""
        self.runs_on = options.device
        self._cpus = cpus
        self._keep_images = keep_images
        self._limits = limits
        self._modes = {data_type: parse_mode(word) for data_type, word in {**MODES, **modes}.items()}
        self._devices: Any = None
        if len(options.devices) > 1:
            with stops_held():
                self._devices = multiprocessing.get_context("spawn").SimpleQueue()
            for name in options.devices:
                self._devices.put(str(find_device(name)))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "device"}  # a worker loads its own

    @cached_property
    def device(self) -> Device:
        """The tokenizer of this process, on its device."""
        name = self._devices.get() if self._devices is not None else self.options.devices[0]
        if find_device(name).type == "cpu":
            keep_freed_memory()  # before there are threads
            if self.workers > 1:
                torch.set_num_threads(self._threads)
        return Device(self._load(name, self.options.precision))

    @property
    def _threads(self) -> int:
        return self._cpus or max(1, (os.cpu_count() or 1) // self.workers)

    def _load(self, device: str, precision: str) -> ImageTokenizer:
        options = self.options
        return load_tokenizer(self.name, weights=options.weights, device=device, precision=precision, compile=options.compile)

    def column_of(self, data_type: str) -> str:
        """Where the codes of such a sample go."""
        return named_column(self._modes[data_type].column, self.options.code_set)

    def _mode(self, data_type: str, tokenizer: ImageTokenizer) -> Mode:
        """How the images of such a sample are brought to the tokenizer's size. Raises UsageError: they can't be."""
        mode = self._modes[data_type]
        return mode.at(tokenizer.name, tokenizer.stride, self.options.min_pixels if mode.family == "fit" else 0)

    def provenance(self, column_types: Collection[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """What decides on the codes, for the plan; and the provenance of each code column, for the manifest.

        Args:
            column_types: data types that will have codes.

        Raises:
            UsageError: the tokenizer can't take their sizes.
        """
        if self.workers == 1 and self._cpus is None:
            tokenizer = self.device.tokenizer
        else:  # the workers load their own, and this process leaves their devices alone
            if self._cpus is None:
                for name in self.options.devices:
                    find_device(name)
            tokenizer = self._load("cpu", "fp32" if self.options.precision == "tf32" else self.options.precision)
        layout = layout_of(tokenizer)
        if max(layout.sizes, default=0) > _LARGE_CODEBOOK and self.options.precision == "bf16":
            say(
                f"wds-tools: with the {max(layout.sizes):,} codes of {tokenizer.name}, --precision bf16 changes many (of "
                "131,072, about 10 %, say the authors of such a tokenizer): fp32 or tf32 changes none or few",
                error=True,
            )
        modes = [self._mode(data_type, tokenizer) for data_type in column_types]
        settings = {
            "tokenizer": tokenizer.name,
            "codebook_size": tokenizer.codebook_size,
            "stride": tokenizer.stride if layout.has_sides else None,
            **layout.declared,
            "weights_hash": tokenizer.weights_hash,
            "preprocessing_version": PREPROCESSING_VERSION,
            "encoder_version": ENCODER_VERSION,
            "precision": self.options.precision,
        }
        if self.options.compile:
            settings["compile"] = True
        if self.options.resize != "pillow":
            settings["resize"] = self.options.resize
        if self.options.precision != "fp32" or self.options.compile:  # then a code may depend on what shares its batch
            settings["batch_size"] = self.options.batch_size
        if self.options.min_pixels:
            if not any(mode.min_pixels for mode in modes):
                raise UsageError(
                    f"--min-pixels {self.options.min_pixels} is for a mode such as fit720, and has no effect on others"
                )
            settings["min_pixels"] = self.options.min_pixels
        libraries = {name: version(name) for name in ("torch", "pillow", "numpy")}
        columns = sorted({self.column_of(data_type) for data_type in column_types})
        how: dict[str, Any] = {"keep_images": True} if self._keep_images else {}
        for data_type in {*MARKED_TYPES}.intersection(column_types):  # which have one mode
            if (word := str(self._modes[data_type])) != MODES[data_type]:
                how["sft_mode"] = word
        return {**settings, **how}, {column: {**settings, "libraries": libraries} for column in columns}

    def fill(self, samples: Iterable[tuple[Place, Sample | Reject]]) -> Iterator[tuple[Place, Sample | Reject]]:
        """Fill the codes of samples, beside those that they have. What has no image passes through, and so do rejects.

        Args:
            samples: (where it comes from, the sample).

        Yields:
            The same in the same order, filled, or as a Reject that says why it can't be used.

        Raises:
            FormatError: a sample that has to have an image has none.
            TokenizerError: the network gave NaN or infinite numbers for an image, or what encode_in_batches raises.
        """
        device = self.device
        batches = encode_in_batches(self._jobs(samples), device, batch_size=self.options.batch_size, threads=self._threads)
        for _, images in groupby(batches, key=lambda image: image[0].number):
            tickets, outcomes = zip(*images, strict=True)
            place, sample = tickets[0].place, tickets[0].sample
            cause = next((outcome for outcome in outcomes if isinstance(outcome, Reject)), None)
            if cause is not None:
                yield place, cause
            elif isinstance(sample, Reject) or sample.data_type not in self._modes:
                yield place, sample
            else:
                yield place, self._filled(sample, [outcome for outcome in outcomes if outcome is not None])

    def _jobs(self, samples: Iterable[tuple[Place, Sample | Reject]]) -> Iterator[tuple[_Ticket, Prepare | None]]:
        """Each image, in order; what has none comes once."""
        for number, (place, sample) in enumerate(samples):
            ticket = _Ticket(number, place, sample)
            if isinstance(sample, Reject) or sample.data_type not in self._modes or not sample.images:
                if isinstance(sample, Sample) and sample.data_type in PAIR_TYPES:
                    raise FormatError(f"{sample.key} is {sample.data_type} but has no image")
                yield ticket, None
                continue
            mode = self._mode(sample.data_type, self.device.tokenizer)
            for image in sample.images:
                yield ticket, partial(_PREPARE[self.options.resize], image.data, mode, self._limits)

    def _filled(self, sample: Sample, grids: Sequence[NDArray[Any]]) -> Sample:
        tokenizer, layout, column = self.device.tokenizer, self.device.layout, self.column_of(sample.data_type)
        mode = self._mode(sample.data_type, tokenizer)
        sizes = [(info.width, info.height) for info in (probe(image.data, self._limits) for image in sample.images)]
        crops = [mode.crop_for(*size) for size in sizes]
        for number, grid in enumerate(grids):
            if num_bad := int((grid < 0 if grid.dtype.kind == "i" else ~layout.are_numbers(grid)).sum()):
                width, height = crops[number].size
                raise TokenizerError(
                    f"{sample.key}: tokenizer {tokenizer.name} in {self.options.precision} gave NaN or infinite numbers for "
                    f"{num_bad} of the {grid.size} codes of image {number} ({width} x {height} pixels): {NAN_HELP}"
                )
        codes, shapes = join_grids([grid.astype(layout.npy_dtype) for grid in grids], layout.npy_dtype, layout)
        filled = sample if self._keep_images else sample._replace(image=None, image_extension=None, more_images=())
        num_enlarged = sum(crop.enlarges(*size) for crop, size in zip(crops, sizes, strict=True))
        filled = filled._replace(codes={**sample.codes, column: codes}, num_enlarged=num_enlarged)
        if sample.data_type in MARKED_TYPES:
            return filled._replace(grids={**(sample.grids or {}), column: shapes})
        if sample.codes:  # what it is, and its size, go with those
            return filled
        if layout.has_sides:  # not by its head: what lies behind its pixels may turn it upright
            return filled._replace(**pair_fields(column, grids[0].shape, tokenizer.stride))
        pixels = (None, None) if mode.family == "cc" else crops[0].size
        return filled._replace(data_type=mode.data_type, width=pixels[0], height=pixels[1])
