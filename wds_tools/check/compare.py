"""What another precision, tokenizer setting or machine does to codes: two sets of codes of the same images, side by side.

    samples of A and B, joined by key (both are in the order of their keys) -> equal codes; some, decoded -> PSNR

Cost: one pass over both datasets, and the tokenizer's decoder for the pictures that are looked at.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wds_tools.dataset.reader import read_manifest, read_shard
from wds_tools.errors import FormatError, UsageError
from wds_tools.format.codes import Codes, codes_named
from wds_tools.format.manifest import Manifest
from wds_tools.format.schema import Sample
from wds_tools.images import ImageLimits, mode_of_column, prepare
from wds_tools.run.progress import Advance, Progress, Shown
from wds_tools.storage import Store, open_store
from wds_tools.vq.base import ImageTokenizer, layout_of, to_tensor
from wds_tools.vq.registry import load_tokenizer

_SAME = ("tokenizer", "layout", "dtype", "codebook_size", "weights_hash", "preprocessing_version")
_LIMITS = ImageLimits(min_side=1, max_bytes=sys.maxsize)
"""Images that have codes are good."""
_REPORT_EVERY = 64


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Shown):
    """Compare the codes of two encoded datasets, or two sets of codes of one."""

    a: str
    """The first dataset."""
    b: str
    """The second; it may be the same, if the code sets differ."""
    code_set_a: str = ""
    """Code set of the first, where it has several, or column: vqcode_256."""
    code_set_b: str = ""
    """Code set of the second."""
    pictures: int = 100
    """Decode the pictures of this many samples, evenly spread, and compare them; 0: none."""
    weights: str | None = None
    """Folder of the tokenizer's weights, to decode with."""
    device: str = "auto"
    """Device to decode on: auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        if self.pictures < 0:
            raise UsageError(f"--pictures {self.pictures}: at least 0")
        if (self.a, self.code_set_a) == (self.b, self.code_set_b):
            raise UsageError("both are the same codes: name two datasets, or two code sets (--code-set-a, --code-set-b)")


@dataclass(kw_only=True)
class Comparison:
    """Counts and distances of two sets of codes of the same images."""

    samples: int = 0
    """Samples with codes in both."""
    only_a: int = 0
    only_b: int = 0
    equal_samples: int = 0
    """Samples all of whose codes are equal."""
    codes: int = 0
    equal_codes: int = 0
    pictures: int = 0
    """Pictures that were decoded."""
    psnr_between_db: float | None = None
    """PSNR of B's pictures against A's, from the squared error over all; infinite if equal, None if none was decoded."""
    psnr_a_db: float | None = None
    """PSNR of A's pictures against the photographs; None if these were not kept, or are of another size."""
    psnr_b_db: float | None = None


def compare_codes(config: CompareConfig) -> Comparison:
    """Compare the codes of two datasets, or two code sets of one.

    Raises:
        UsageError: the codes come from different tokenizers, or none are there, or the tokenizer makes no pictures of them.
        FormatError: keys do not ascend, or the grids of one image differ in size.
    """
    a, b = ((store := open_store(url), read_manifest(store)) for url in (config.a, config.b))
    columns = _check(config, a[1], b[1])
    tokenizer = None
    if config.pictures:
        first, *_ = columns.values()
        tokenizer = load_tokenizer(first["tokenizer"], weights=config.weights, device=config.device)
        if any(made["weights_hash"] != tokenizer.weights_hash for made in columns.values()):
            raise UsageError(f"--weights {config.weights} are not those that the codes were made with ({tokenizer.weights_hash})")
    every = max(1, min(a[1].samples, b[1].samples) // max(config.pictures, 1))
    result = Comparison()
    errors: dict[str, list[float]] = defaultdict(list)
    num_looked_at = 0
    with Progress("compare-codes", min(a[1].samples, b[1].samples), quiet=config.quiet) as progress:
        for sample_a, sample_b in _joined(_coded(*a, config.code_set_a, columns), _coded(*b, config.code_set_b, columns), result):
            _count(result, sample_a, sample_b)
            is_due = num_looked_at < config.pictures and num_looked_at * every < result.samples
            if tokenizer is not None and is_due and sample_a.grids:
                num_looked_at += 1
                try:
                    for name, error in _errors(tokenizer, columns[sample_a.column], sample_a, sample_b):
                        errors[name].append(error)
                except UsageError as cause:
                    raise UsageError(f"{cause}; --pictures 0 compares codes alone") from cause
            if result.samples % _REPORT_EVERY == 0:
                progress(Advance(units=_REPORT_EVERY, samples=_REPORT_EVERY))
    result.pictures = len(errors["between"])
    result.psnr_between_db, result.psnr_a_db, result.psnr_b_db = (_psnr_db(errors[name]) for name in ("between", "a", "b"))
    return result


def _check(config: CompareConfig, a: Manifest, b: Manifest) -> dict[str, Mapping[str, Any]]:
    """The columns that both have, under their plain names, and their provenance in A; they are of one tokenizer."""
    sides = ((config.a, a, config.code_set_a), (config.b, b, config.code_set_b))
    known = [codes_named(manifest.codes, choice) for _, manifest, choice in sides]
    columns = {column: made for column, made in known[0].items() if column in known[1]}
    if not columns:
        held = (f"{url} has {', '.join(manifest.codes) or 'none'}" for url, manifest, _ in sides)
        raise UsageError(
            f"no codes {config.code_set_a!r} of {config.a} and {config.code_set_b!r} of {config.b} are of images of one size: "
            f"{', '.join(held)}; choose with --code-set-a and --code-set-b"
        )
    for column, name in product(columns, _SAME):
        values = [made[column].get(name) for made in known]
        if values[0] != values[1]:
            raise UsageError(
                f"the codes of {config.a} and {config.b} can't be compared: {name} is {values[0]!r} and {values[1]!r}"
            )
    return columns


class _Coded(NamedTuple):
    """A sample that has codes."""

    sample: Sample
    column: str
    """Its plain name, whatever the code set."""
    grids: list[Codes]
    """The grid of each image: a conversation has any number."""

    @property
    def place(self) -> tuple[str, str]:
        """Where it stands in the order of its dataset."""
        return self.sample.key, self.column


def _coded(store: Store, manifest: Manifest, choice: str, columns: Collection[str]) -> Iterator[_Coded]:
    """The samples of a dataset that have codes of these columns, in the order of their keys and columns."""
    last = ""
    for shard in manifest.shards:
        for sample in read_shard(store, shard):
            if sample.key <= last:
                raise FormatError(f"{store.url}/{shard.name}: {sample.key} follows {last}: keys have to ascend to be compared")
            last = sample.key
            stored = codes_named({column: column for column in sample.codes}, choice)
            for column in sorted(stored.keys() & columns):
                yield _Coded(sample, column, sample.grids_of(stored[column]))


def _joined(a: Iterator[_Coded], b: Iterator[_Coded], result: Comparison) -> Iterator[tuple[_Coded, _Coded]]:
    """Pairs of samples with the same key and column."""
    sample_a, sample_b = next(a, None), next(b, None)
    while sample_a is not None and sample_b is not None:
        if sample_a.place < sample_b.place:
            result.only_a += 1
            sample_a = next(a, None)
        elif sample_a.place > sample_b.place:
            result.only_b += 1
            sample_b = next(b, None)
        else:
            result.samples += 1
            yield sample_a, sample_b
            sample_a, sample_b = next(a, None), next(b, None)
    result.only_a += (sample_a is not None) + sum(1 for _ in a)
    result.only_b += (sample_b is not None) + sum(1 for _ in b)


def _count(result: Comparison, a: _Coded, b: _Coded) -> None:
    shapes_a, shapes_b = ([grid_hw.shape for grid_hw in coded.grids] for coded in (a, b))
    if shapes_a != shapes_b:
        texts = [f"{', '.join(map(str, shapes)) or 'no image'}" for shapes in (shapes_a, shapes_b)]
        raise FormatError(f"{a.sample.key}: {a.column} has grids of {texts[0]} and of {texts[1]} codes: not of the same images")
    sizes = [grid_hw.size for grid_hw in a.grids]
    equal = sum(int((grid_a == grid_b).sum()) for grid_a, grid_b in zip(a.grids, b.grids, strict=True))
    result.codes += sum(sizes)
    result.equal_codes += equal
    result.equal_samples += equal == sum(sizes)


def _errors(tokenizer: ImageTokenizer, made: Mapping[str, Any], a: _Coded, b: _Coded) -> Iterator[tuple[str, float]]:
    """Decode the images of both: the mean squared error of their pictures, and of each against the photographs, by name."""
    photographs = a.sample.images or b.sample.images
    for number, grids in enumerate(zip(a.grids, b.grids, strict=True)):
        both_B = to_tensor(np.stack(grids), layout_of(tokenizer))
        pictures: dict[str, NDArray[Any]] = dict(zip("ab", tokenizer.decode(both_B).cpu().numpy(), strict=True))
        pairs = {"between": (pictures["a"], pictures["b"])}
        if photographs:
            mode = mode_of_column(a.column).at(tokenizer.name, tokenizer.stride, made.get("min_pixels", 0))
            photograph = prepare(photographs[number].data, mode, _LIMITS)
            if photograph.shape == pictures["a"].shape:  # codes without sides may decode to pictures of one size
                pairs |= {"a": (pictures["a"], photograph), "b": (pictures["b"], photograph)}
        for name, (first, second) in pairs.items():
            yield name, float(np.square(first.astype(np.float32) - second).mean())


def _psnr_db(errors: list[float]) -> float | None:
    if not errors:
        return None
    mean = sum(errors) / len(errors)
    return math.inf if mean == 0 else 10 * math.log10(255**2 / mean)
